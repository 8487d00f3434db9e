"""Shards, and from shards to batches: the format, the order of the samples, the prompt, the loaders."""
