"""Run directories: their files, their state, and how a trained model is read back from one."""
