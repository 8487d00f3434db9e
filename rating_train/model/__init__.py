"""The regressor: a SmolVLM backbone without its LM head, pooled, with a two-layer head."""
