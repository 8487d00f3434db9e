"""The modules that an exported folder holds, self-contained (see ``export/inline.py``), as its remote code."""
