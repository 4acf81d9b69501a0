"""vae-lightning: a PyTorch Lightning research template for variational autoencoders."""

from vae_lightning.runs import load_run

__all__ = ["load_run"]
