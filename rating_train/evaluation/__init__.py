"""A trained model on a split: metrics with intervals, baselines beside them, and a gate for pipelines."""
