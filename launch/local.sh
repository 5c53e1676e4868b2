#!/usr/bin/env bash
# From a fresh clone to a trained model and a prediction, on this machine: bash launch/local.sh
# Trains configs/brats.py:demo on the built-in phantom into runs/demo (further arguments go to train, such as
# --config.seed=1 or --workdir=runs/other) and predicts the case that training exported. Started again it goes on
# where it stopped. Needs Python 3.11 or newer ($PYTHON names one) and, the first time, the network.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/venv.sh

workdir=runs/demo
for argument in "$@"; do
  case $argument in
    --workdir=*) workdir=${argument#--workdir=} ;;
    --workdir) echo "error: write --workdir=FOLDER" >&2; exit 2 ;;
  esac
done

prepare_venv ''
.venv/bin/python -m entrust_jax.train --config=configs/brats.py:demo --workdir="$workdir" "$@"

example=$(find "$workdir/example" -mindepth 1 -maxdepth 1 -type d 2>/dev/null | sort | head -n 1)
if [ -z "$example" ]; then
  echo "error: $workdir/example holds no case; remove $workdir and run this again" >&2
  exit 2
fi
.venv/bin/python -m entrust_jax.predict --workdir="$workdir" --case="$example" --output="$workdir/prediction"

echo
echo "picture:  $(pwd)/$workdir/prediction/overview.png"
echo "maps:     $(pwd)/$workdir/prediction/*.nii.gz"
echo "report:   $(pwd)/$workdir/prediction/report.json"
