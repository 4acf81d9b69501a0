#!/usr/bin/env bash
# Train four systems for three epochs each and print what must stay the same: history.csv without its seconds, and the
# metrics. Used to compare two commits:
#
#     bash benchmarks/same_numbers.sh OLD_CHECKOUT > old.txt; bash benchmarks/same_numbers.sh . > new.txt; diff old.txt new.txt
set -euo pipefail
checkout=$(realpath "${1:-.}")
python=${PYTHON:-$PWD/.venv/bin/python}
out=$(mktemp -d)
export OMP_NUM_THREADS=1 PYTHONPATH=$checkout/src
run() {
    (cd "$out" && "$python" "$checkout/train.py" data.root="$checkout/data" trainer.accelerator=cpu trainer.max_epochs=3 \
        figures.every=0 "hydra.run.dir=$out/$1" "${@:2}" > /dev/null 2>&1)
    echo "== $1"
    "$python" - "$out/$1" <<'PY'
import csv, json, sys
for row in csv.DictReader(open(f"{sys.argv[1]}/history.csv")):
    print({key: value for key, value in row.items() if key != "seconds"})
print({key: value for key, value in json.load(open(f"{sys.argv[1]}/metrics.json")).items() if key.startswith("test/")})
PY
}
run relu_mlp_5 experiment=relu_mlp_5
run leaky_mlp_200 experiment=leaky_mlp_200
run conv model/backbone=conv model.latent_dim=10
run vamp_dreg model/prior=vamp model/objective=dreg data.pixels=dynamic model.latent_dim=10 model.prior.pseudo_inputs=50
