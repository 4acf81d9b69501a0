"""Images as one uint8 tensor on the training device: pixel protocols, splits, and torchvision's data sets."""
