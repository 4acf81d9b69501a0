"""The command line, sweeps, the hyperparameter search, and their subprocesses."""
