"""From catalogue files and images to shards, out of core, in parallel, resumable."""
