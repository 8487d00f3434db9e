"""Training: the loop, the job and what it is made of, evaluation."""
