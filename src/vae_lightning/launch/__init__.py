"""The command line, sweeps, the hyperparameter search, and their errors."""

TRACEBACK = "VAE_LIGHTNING_TRACEBACK"  # environment variable: HYDRA_FULL_ERROR as the user has set it
