#!/usr/bin/env bash
# The tests on the oldest and the newest of what this package runs on, and across.
#
#   bash tests/system/versions.sh              all rows of the table below
#   bash tests/system/versions.sh oldest ...   some of them
#
# Each row gets a virtual environment, .venv-ROW (several GB where torch comes with CUDA),
# and ends in a line of the version table; output goes to .venv-ROW/tests.log.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

#     row              python torch  torchaudio lightning speechbrain
ROWS="oldest           3.10   2.4.0  2.4.0      2.4.0     1.0.3
      lightning-2.4    3.11   2.13.0 2.11.0     2.4.0     1.1.2
      lightning-2.5    3.11   2.13.0 2.11.0     2.5.6     1.1.2
      speechbrain-1.0  3.12   2.8.0  2.8.0      2.6.6     1.0.3
      newest           3.13   2.15.0 2.11.0     2.6.6     1.1.2"

interpreter() { # VERSION: a Python of that version, on the path or of pyenv
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
    # Warnings are errors on the tested versions only: each release has others.
    "$venv/bin/python" -m pytest -q -p no:cacheprovider -W default >"$venv/tests.log" 2>&1 || true
    echo "| $1 | $2 | $3 | $5 | $6 | $(tail -1 "$venv/tests.log") |"
}

echo "| row | Python | torch | Lightning | SpeechBrain | tests |"
echo "|---|---|---|---|---|---|"
status=0
while read -r row versions; do
    if [[ $# -eq 0 || " $* " == *" $row "* ]]; then
        # shellcheck disable=SC2086  # the columns
        run_row "$row" $versions || status=1
        tail -1 ".venv-$row/tests.log" | grep -q " failed\| error" && status=1
    fi
done <<<"$ROWS"
exit $status
