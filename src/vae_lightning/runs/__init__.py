"""Run directories: files, state, environment, resuming, and loading a trained model."""
