"""Train systems of papers that print log likelihoods, estimate them in the same way, and write docs/published.md.

    python benchmarks/published.py                              # all rows, one after the other: hours on two cores
    python benchmarks/published.py davidson_2 davidson_5        # only these rows
    OMP_NUM_THREADS=1 python benchmarks/published.py davidson_40 &      # fastest: two at a time, one core each
    python benchmarks/published.py trainer.accelerator=gpu      # overrides apply to every run

Finished run directories under outputs/reproduce/ are neither trained nor evaluated again. Rows can therefore be made in
any order or in parallel, and the last call writes the complete table. Exits with 1 if a row is more than 2 % above the
paper.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from reproduce import ROOT, RUNS, machine, trained, write_between

START, END = "<!-- published: written by make published -->", "<!-- end of published -->"  # around the tables
WITHIN = 1.02  # the largest accepted ratio of −log p(x) to the paper's


@dataclass
class Row:
    """A system of a paper."""

    name: str  # of the run directory
    words: str  # overrides for train.py
    paper: float | None  # −log p(x) printed in the paper; None if it prints none
    samples: int  # importance samples per image


# Shortened to fit two cores: the paper trains for up to 2,000 epochs and uses k = 5,000.
SHORTER = "trainer.max_epochs=70 model.objective.warmup_epochs=20 model/schedule=cosine"
ROWS = [
    *(
        Row(f"davidson_{d}", f"experiment=davidson model.latent_dim={d}", printed, 500)
        for d, printed in ((2, 135.7), (5, 110.2), (10, 93.8), (20, 88.9), (40, 88.9))
    ),
    Row("iwae_5", "experiment=iwae_5", None, 500),
    Row("gated_normal_40", f"experiment=gated_vamp_40 model/prior=normal {SHORTER}", 84.45, 500),
    Row("gated_vamp_40", f"experiment=gated_vamp_40 {SHORTER}", 82.43, 500),
]


def evaluated(row: Row) -> dict[str, Any]:
    """The evaluation of a trained run. Runs evaluate.py if there is none with this number of samples."""
    file = RUNS / row.name / "evaluation.json"
    if not file.exists() or json.loads(file.read_text())["samples"] != row.samples:
        words = [f"run={RUNS / row.name}", f"samples={row.samples}"]
        subprocess.run([sys.executable, "evaluate.py", *words], cwd=ROOT, check=True)
    content: dict[str, Any] = json.loads(file.read_text())
    return content


def main() -> int:
    names = [word for word in sys.argv[1:] if "=" not in word] or [row.name for row in ROWS]
    unknown = set(names) - {row.name for row in ROWS}
    if unknown:
        sys.exit(f"{', '.join(sorted(unknown))}: no such row. Allowed: {', '.join(row.name for row in ROWS)}")
    overrides = [word for word in sys.argv[1:] if "=" in word]
    lines = [
        "| command | paper | −log p(x) | k | −ELBO | active units | 5-NN | epochs | minutes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    machines: set[str] = set()
    missed = 0
    for row in ROWS:
        if row.name in names:
            trained(row.name, [*row.words.split(), *overrides])
            evaluated(row)
        if not (RUNS / row.name / "evaluation.json").exists():
            continue
        run, found = trained(row.name, []), evaluated(row)
        nll = found["test/nll"]
        gap = "" if row.paper is None else f" ({100 * (nll / row.paper - 1):+.1f} %)"
        short = row.paper is not None and nll > row.paper * WITHIN
        missed += short
        machines.add(machine(run))
        lines.append(
            f"| `python train.py {row.words}` | {row.paper or '—'} | {'**' if short else ''}{nll:.2f} ± "
            f"{found['test/nll_stderr']:.2f}{gap}{'**' if short else ''} | {row.samples:,} "
            f"| {-found['test/elbo']:.2f} | {found['test/active_units']} of {run['latent_dim']} "
            f"| {100 * found['test/knn_accuracy']:.1f} % | {run['epochs']} | {run['seconds'] / 60:.0f} |"
        )
    write_between(ROOT / "docs" / "published.md", START, END, [*lines, "", f"Machine: {'; '.join(sorted(machines))}."])
    print("\n".join(lines))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
