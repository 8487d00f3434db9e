"""What people read about a run or a dataset: pages, figures, tables."""
