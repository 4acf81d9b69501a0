"""Compare many runs in one table: `python report.py --help`."""

from vae_lightning.launch.commands import report

if __name__ == "__main__":
    report()
