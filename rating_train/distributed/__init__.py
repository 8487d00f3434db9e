"""The ranks of a job: their layout, their collectives, their random number generators."""
