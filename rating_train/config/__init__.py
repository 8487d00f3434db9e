"""Configuration: what can be set (schema), where it comes from (load), what it implies (resolve)."""
