"""Pack the three best runs of docs/published.json for a release: `make release-models`.

    python scripts/release_models.py            # writes dist/models/NAME.tar.gz and dist/models/SHA256SUMS

An archive has the best checkpoint, the configuration, the metrics and the evaluation of a run. After unpacking it,
`load_run("NAME")` loads the model, and `evaluate.py run=NAME` gives the number in the table again.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RUNS, TARGET = ROOT / "outputs" / "published", ROOT / "dist" / "models"
FILES = ("checkpoints/best.ckpt", "config.yaml", "metrics.json", "evaluation.json", "environment.json", "history.csv")
MANY = 3


def best_runs() -> list[str]:
    """Return the names of the runs with the lowest −log p(x) on MNIST, one of each row, the best first."""
    recorded = json.loads((ROOT / "docs" / "published.json").read_text())
    best = {
        f"{row}_{seed}": result["test/nll"]
        for row, runs in recorded.items()
        for seed, result in [min(runs.items(), key=lambda item: item[1]["test/nll"])]
        if result["data"] == "MNIST"
    }
    return sorted(best, key=lambda name: best[name])[:MANY]


def pack(name: str) -> Path:
    """Write the archive of a run and return its path."""
    archive = TARGET / f"{name}.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for file in FILES:
            tar.add(RUNS / name / file, f"{name}/{file}")
    return archive


def main() -> None:
    names = best_runs()
    for path in (RUNS / name / file for name in names for file in FILES):
        if not path.exists():
            row = path.relative_to(RUNS).parts[0].rpartition("_")[0]
            sys.exit(f"{path}: no such file; train it with python benchmarks/published.py {row}")
    TARGET.mkdir(parents=True, exist_ok=True)
    archives = [pack(name) for name in names]
    sums = [f"{hashlib.sha256(archive.read_bytes()).hexdigest()}  {archive.name}" for archive in archives]
    (TARGET / "SHA256SUMS").write_text("\n".join(sums) + "\n")
    for archive, line in zip(archives, sums, strict=True):
        print(f"{line}  {archive.stat().st_size / 2**20:.1f} MB")


if __name__ == "__main__":
    main()
