"""DataLoader workers: how they are asked, how they hand over what they read, and the shared memory that takes."""
