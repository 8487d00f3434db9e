"""Source files to listings."""
