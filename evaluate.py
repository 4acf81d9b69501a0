"""Evaluate a trained VAE: `python evaluate.py --help`."""

from vae_lightning.launch.commands import evaluate

if __name__ == "__main__":
    evaluate()
