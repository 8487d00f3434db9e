"""Stored visual tokens of a frozen vision tower: what they belong to, and their collation."""
