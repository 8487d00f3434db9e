"""A synthetic catalogue and a tiny model, generated without any download."""
