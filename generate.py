"""Draw a picture of a trained run: `python generate.py --help`."""

from vae_lightning.launch.commands import generate

if __name__ == "__main__":
    generate()
