"""Scores of predictions: correlations and errors, CES, and the records that carry them."""
