"""The name of the data set in the configurations of earlier runs."""

from vae_lightning.data.torchvision_sets import MNISTDataModule as MNISTDataModule
