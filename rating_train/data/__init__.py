"""Listings: from catalogue files to shards, and from shards to batches."""
