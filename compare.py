"""Compare runs image by image: `python compare.py --help`."""

from vae_lightning.launch.commands import compare

if __name__ == "__main__":
    compare()
