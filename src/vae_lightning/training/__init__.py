"""Training: `train(config)`, and everything that happens during a run."""
