"""Checkpoints: the directory protocol (store), what is in one (state), the shards (deepspeed_io)."""
