"""What settings cost: sweeps, budgets, and the text lengths that the data need."""
