#!/usr/bin/env bash
# Install into a virtual environment (VENV, by default .venv), train a relevance head with SAM, score photos, measure
# robustness. Everything goes to runs/quickstart.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --editable .
started=$SECONDS
out=runs/quickstart
rm -rf "$out"
"$venv/bin/python" scripts/train_relevance.py --data scenes --num 300 --epochs 15 \
    --output "$out/model" --progress
"$venv/bin/python" scripts/score_tokens.py assets/photos/images/*.jpg --model "$out/model" \
    --query "a cat" "a cup" "a person" "a rocket" --output "$out/photos"
"$venv/bin/python" scripts/evaluate_robustness.py --model "$out/model" --data scenes --num 30 --output "$out/robustness"
echo
echo "done in $((SECONDS - started)) s after installation: see $out"
