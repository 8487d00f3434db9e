"""A synthetic catalogue and a tiny model, made without a download."""
