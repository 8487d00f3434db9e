"""From catalogue files and images to a dataset directory."""
