"""Parts of a build: one part, the pool of worker processes, the merge."""
