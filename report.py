"""One table, and pictures, of many runs: where their configurations differ, mean ± standard deviation over seeds.

    python report.py outputs/sweeps/2026-11-21_10-00-00-000000
    python report.py outputs --metrics test/loss test/kl --style markdown
    python report.py outputs/vae outputs/sweeps --to outputs/report --style latex

report.md, report.csv, report.tex and the pictures go to --to; what is printed last is that directory.
"""

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from vae_lightning.analysis.reports import report
from vae_lightning.launch.cli import one_line_errors


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"{message}; python report.py --help shows how it is used", file=sys.stderr)
        raise SystemExit(2)


if __name__ == "__main__":
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run directories, or directories of them")
    parser.add_argument("--metrics", nargs="+", default=[], help="columns, such as test/loss; by default all there are")
    parser.add_argument("--style", default="terminal", choices=["terminal", "markdown", "csv", "latex"])
    parser.add_argument("--to", type=Path, default=Path("outputs/report"))
    parser.add_argument("--trust", nargs="+", default=[], help="modules of your own that configurations may name")
    arguments = parser.parse_args()
    with one_line_errors("train"):
        a = arguments
        print(report(a.runs, a.metrics, a.style, a.to, a.trust))
