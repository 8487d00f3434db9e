"""Tests that need a GPU; see conftest.py."""
