"""The command line, sweeps, the hyperparameter search, and the processes that they start."""
