#!/usr/bin/env bash
# Ports the rows of a recipes.tsv in a copy of SpeechBrain's checkout, runs them, and compares
# with the traces of SpeechBrain's own loop, bit for bit:
#
#   PYTHON=/path/to/python SB_ROOT=/path/to/speechbrain ported_rows.sh RECIPES OUTDIR REFDIR
#
# RECIPES has recipes.tsv and run_all.sh; OUTDIR is made; REFDIR is what `run_all.sh speechbrain`
# has written.
set -euo pipefail
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
recipes=$(cd "$1" && pwd)
mkdir -p "$2"
out=$(cd "$2" && pwd)
reference=$(cd "$3" && pwd)
export PYTHONPATH=$repository

rm -rf "$out/checkout"
# Links: a port writes a file anew, and leaves the original as it is.
cp -al "$SB_ROOT" "$out/checkout"
cd "$out/checkout"
tail -n +2 "${TABLE:-$recipes/recipes.tsv}" | while IFS=$'\t' read -r _ script hparams _; do
    [ "$hparams" = - ] && hparams=$(dirname "$script")/hyperparams.yaml
    # 1: something is done by hand, and stays.
    "$PYTHON" -m brain_lightning port "$script" "$hparams" --write </dev/null || [ $? = 1 ]
done
SB_ROOT=$out/checkout STRICT=1 REDO=1 \
    bash "$recipes/run_all.sh" brain_lightning "$out/traces" "$reference"
