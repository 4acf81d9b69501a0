"""Images as one uint8 tensor on the device that trains: pixel protocols, splits, and torchvision's data sets."""
