#!/usr/bin/env bash
# Measures on a GPU, offline (see gpu_suite/):
#   bash scripts/gpu_suite.sh kernels|micro|server|trace|greedy|report|all [--dry-run]
# Takes the Python of LETHE_PYTHON, else of .venv, else python3; installs nothing.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${LETHE_PYTHON:-$ROOT/.venv/bin/python}
[[ -x $python ]] || python=$(command -v "${LETHE_PYTHON:-python3}")
cd "$ROOT"
export PYTHONPATH="$ROOT/scripts${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m gpu_suite "$@"
