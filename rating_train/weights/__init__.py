"""Where weights come from, other than a hub: an exported folder, the checkpoint of another run."""
