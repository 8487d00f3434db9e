"""How fast a configuration runs here: loader, forward pass, step and training, each against a limit of the same run."""
