#!/bin/sh
# `pip install .` and `pip install -e .` with pip 23.2, on each Python that runs here: the command starts, imports no
# torch, and finds the first-party plugins through their entry points.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

check() { # venv
    "$1/bin/hfms" --version
    "$1/bin/hfms" plugins list --json | "$1/bin/python" -c '
import json, sys
rows = {row["name"]: row for row in json.load(sys.stdin)}
missing = {"storage", "hardware", "engines", "middleware"} - rows.keys()
broken = {name: row["error"] for name, row in rows.items() if row["error"]}
sys.exit(f"missing {missing}, broken {broken}" if missing or broken else 0)'
}

for version in 3.11 3.12 3.13; do
    # pyenv keeps a shim for versions that are installed but not selected: name one that runs.
    python=$(command -v "python$version" || true)
    if ! "${python:-false}" -c '' 2>/dev/null; then
        python=$(ls -d "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$version".*/bin/python 2>/dev/null | head -n 1)
    fi
    if [ -z "$python" ]; then
        echo "python$version: SKIPPED, not on this machine"
        continue
    fi
    for how in "." "--editable ."; do
        venv="$work/$version"
        rm -rf "$venv"
        "$python" -m venv "$venv"
        "$venv/bin/python" -m pip install --quiet 'pip==23.2.1'
        # shellcheck disable=SC2086
        "$venv/bin/python" -m pip install --quiet $how
        echo "python$version, pip install $how: $(check "$venv")"
    done
done
