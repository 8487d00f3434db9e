"""One module per verb of the command line: its options, and the call that does the work."""
