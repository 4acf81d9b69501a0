"""Pack the three best runs of docs/published.json for a release.

    python benchmarks/release_models.py            # writes dist/models/NAME.tar.gz and dist/models/SHA256SUMS

An archive has the best checkpoint, the configuration, the metrics and the evaluation of a run. After unpacking it,
`load_run("NAME")` loads the model, and `vae evaluate NAME` gives the number in the table again.
"""

from __future__ import annotations

import hashlib
import sys
import tarfile
from pathlib import Path

from published import ROOT, ROWS, RUNS, Result, read_results

from vae_lightning.config import UserError
from vae_lightning.files import staging_directory

TARGET = ROOT / "dist" / "models"
FILES = ("checkpoints/best.ckpt", "config.yaml", "metrics.json", "evaluation.json", "history.csv")
MANY = 3


def best_runs() -> list[Path]:
    """Return the run with the lowest −log p(x) of each of the best rows on MNIST, the best first. Raises FileError."""
    recorded = read_results()
    best: dict[Path, float] = {}
    for row in ROWS:
        runs = Result.of(row, recorded).runs
        if row.data == "MNIST" and runs:
            seed, run = min(runs.items(), key=lambda item: item[1]["test/nll"])
            best[row.directory(int(seed))] = run["test/nll"]
    return sorted(best, key=lambda directory: best[directory])[:MANY]


def pack(run: Path, directory: Path) -> Path:
    """Write the archive of a run into a directory and return its path."""
    archive = directory / f"{run.name}.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for file in FILES:
            tar.add(run / file, f"{run.name}/{file}", filter=anonymous)
    return archive


def anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Leave out the user and the group."""
    return member.replace(uid=0, gid=0, uname="", gname="", deep=False)


def main() -> None:
    runs = best_runs()
    for path in (run / file for run in runs for file in FILES):
        if not path.exists():
            row = path.relative_to(RUNS).parts[0].rpartition("_")[0]
            raise UserError(f"{path}: no such file; train it with python benchmarks/published.py {row}")
    with staging_directory(TARGET) as scratch:
        archives = [pack(run, scratch) for run in runs]
        sums = {archive.name: hashlib.sha256(archive.read_bytes()).hexdigest() for archive in archives}
        (scratch / "SHA256SUMS").write_text("".join(f"{digest}  {name}\n" for name, digest in sums.items()))
    for archive in TARGET.glob("*.tar.gz"):
        if archive.name in sums:
            print(f"{sums[archive.name]}  {archive.name}  {archive.stat().st_size / 2**20:.1f} MB")
        else:
            archive.unlink()  # of an earlier release


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
