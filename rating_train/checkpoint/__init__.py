"""Checkpoints: the directory protocol (store), the training state (state), the engine's shards (deepspeed_io)."""
