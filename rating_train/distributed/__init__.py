"""The ranks of a job: who they are, what they agree on, their random number generators."""
