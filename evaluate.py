"""Measure a trained VAE; print a table and write evaluation.json into its run directory.

    python evaluate.py run=outputs/vae/2026-11-21_10-00-00-000000
    python evaluate.py run=outputs/… samples=500 split=val

See conf/evaluate.yaml for the options and docs/numbers.md for what the numbers mean.
"""

from vae_lightning.analysis.evaluation import evaluate_run
from vae_lightning.launch.cli import command_line, one_line_errors

if __name__ == "__main__":
    with one_line_errors("evaluate"):
        evaluate_run(command_line("evaluate", __doc__))
