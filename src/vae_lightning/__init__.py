"""vae-lightning: a PyTorch Lightning research template for variational autoencoders."""
