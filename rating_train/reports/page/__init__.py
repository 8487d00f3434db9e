"""Pages: one style, one set of charts, one way to render, for runs, comparisons and datasets."""
