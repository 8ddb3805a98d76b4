#!/usr/bin/env bash
# The built wheel and the built sdist work in a bare environment, without the repository.
#
#   bash tests/system/wheel.sh                        with python3
#   bash tests/system/wheel.sh python3.10 python3.13  with each of these
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
cp tests/system/smoke.py tests/support/recipes/smoke.yaml constraints.txt "$scratch"

# Installs a package with its dependencies only, and runs a recipe.
read -r -d '' TRY <<'END' || true
pip install -q -c constraints.txt "$1"
brain-lightning --version
python -m brain_lightning --version
python smoke.py smoke.yaml --number_of_epochs=3
brain-lightning run smoke.py smoke.yaml --trainer.max_steps=6 --device=cpu
pip uninstall -q -y brain_lightning
rm -r save
END

for python in "${@:-python3}"; do
    "$python" -m venv "$scratch/venv"
    "$scratch/venv/bin/pip" install -q build
    "$scratch/venv/bin/python" -m build --outdir "$scratch/dist" . >/dev/null
    "$python" -m venv --clear "$scratch/venv"
    for package in "$scratch"/dist/brain_lightning-*; do
        # Nothing of the environment of the caller, except where pip finds packages.
        (
            cd "$scratch"
            # shellcheck disable=SC2086  # the names and values of pip's variables
            env -i HOME="$scratch" PATH="$scratch/venv/bin:/usr/bin:/bin" $(env | grep '^PIP_' || true) \
                bash -euo pipefail -c "$TRY" - "$package"
        )
        echo "$("$python" --version): $(basename "$package") works"
    done
done
