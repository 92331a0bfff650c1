#!/usr/bin/env bash
# Install into a virtual environment (VENV, by default .venv) and run the checks and the fast tests.
# Arguments go to pytest: scripts/test.sh -m slow
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --editable '.[dev]'
"$venv/bin/ruff" format --check .
"$venv/bin/ruff" check .
"$venv/bin/mypy"
"$venv/bin/python" -m pytest "$@"
