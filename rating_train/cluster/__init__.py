"""A run on a Slurm cluster: its jobs, and checks of the nodes that they get."""
