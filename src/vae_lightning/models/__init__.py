"""The science: VAE and Autoencoder, and the parts that they are built from."""
