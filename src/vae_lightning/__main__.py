"""`python -m vae_lightning …` is the command `vae`."""

from vae_lightning.launch.vae import vae

if __name__ == "__main__":
    vae()
