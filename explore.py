"""Serve a page on which to walk through the latent space of a trained run: drag, hover, draw a digit.

pip install -e '.[explore]'
python explore.py run=outputs/…                # then open http://127.0.0.1:8000
python explore.py run=outputs/… port=8080
"""

from vae_lightning.analysis.explorer import explore_run
from vae_lightning.launch.cli import command_line, one_line_errors

if __name__ == "__main__":
    with one_line_errors("explore"):
        explore_run(command_line("explore", __doc__))
