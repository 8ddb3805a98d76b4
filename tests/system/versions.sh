#!/usr/bin/env bash
# Runs the whole test suite on the oldest and the newest supported versions, and on some between.
#
#   bash tests/system/versions.sh              all rows of the table below
#   bash tests/system/versions.sh oldest ...   some of them
#
# Each row gets a virtual environment, .venv-ROW (several GB if torch comes with CUDA), and prints
# a row of the table in CONTRIBUTING.md. The output of the tests goes to .venv-ROW/tests.log. The
# exit status is 1 if a test fails. .github/workflows/versions.yml runs this script every week.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

#     row              python torch  torchaudio lightning speechbrain
ROWS="oldest           3.10   2.4.0  2.4.0      2.4.0     1.0.3
      lightning-2.4    3.11   2.13.0 2.11.0     2.4.0     1.1.2
      lightning-2.5    3.11   2.13.0 2.11.0     2.5.6     1.1.2
      speechbrain-1.0  3.12   2.8.0  2.8.0      2.6.6     1.0.3
      newest           3.13   2.15.0 2.11.0     2.6.6     1.1.2
      python-3.14      3.14   2.13.0 2.11.0     2.6.6     1.1.2"

interpreter() { # VERSION: a Python of that version, on the path or installed by pyenv
    for python in "python$1" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$1".*/bin/python; do
        if "$python" -c "" 2>/dev/null; then
            echo "$python"
            return
        fi
    done
    echo "no Python $1" >&2
    return 1
}

run_row() { # ROW PYTHON TORCH TORCHAUDIO LIGHTNING SPEECHBRAIN
    local venv=.venv-$1
    "$(interpreter "$2")" -m venv "$venv"
    printf '%s\n' "torch==$3" "torchaudio==$4" "lightning==$5" "speechbrain==$6" >"$venv/constraints.txt"
    "$venv/bin/pip" install -q -U pip
    "$venv/bin/pip" install -q -c "$venv/constraints.txt" -e ".[test,port]"
    # Warnings are errors only on the versions of constraints.txt: each release has others.
    local status=0
    "$venv/bin/python" -m pytest -q -p no:cacheprovider -W default >"$venv/tests.log" 2>&1 || status=1
    # SpeechBrain may print lines after the summary of pytest.
    echo "| $1 | $2 | $3 | $5 | $6 | $(grep -E '(passed|failed|error).* in [0-9.]+s' "$venv/tests.log" | tail -1) |"
    return $status
}

echo "| row | Python | torch | Lightning | SpeechBrain | tests |"
echo "|---|---|---|---|---|---|"
status=0
while read -r row versions; do
    if [[ $# -eq 0 || " $* " == *" $row "* ]]; then
        # shellcheck disable=SC2086  # the columns
        run_row "$row" $versions || status=1
    fi
done <<<"$ROWS"
exit $status
