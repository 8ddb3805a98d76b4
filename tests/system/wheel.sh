#!/usr/bin/env bash
# A wheel, installed with what it asks for and nothing else, works where the repository is not.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/pip" wheel -q --no-deps -w "$scratch" .
"$scratch/venv/bin/pip" install -q -c constraints.txt "$scratch"/brain_lightning-*.whl
cp tests/system/smoke.py tests/support/recipes/smoke.yaml "$scratch"

cd "$scratch"
export PATH="$scratch/venv/bin:$PATH"
brain-lightning --help >/dev/null
brain-lightning --version
python smoke.py smoke.yaml --number_of_epochs=3
brain-lightning run smoke.py smoke.yaml --trainer.max_steps=6 --device=cpu
