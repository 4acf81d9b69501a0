"""Explore the latent space of a trained run in a browser: `python explore.py --help`."""

from vae_lightning.launch.commands import explore

if __name__ == "__main__":
    explore()
