#!/usr/bin/env bash
# Measures on a GPU, offline (see gpu_suite.py): bash scripts/gpu_suite.sh kernels|micro|server|report|all [--dry-run]
# Takes the Python of LETHE_PYTHON, else of .venv, else python3; installs nothing.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${LETHE_PYTHON:-$ROOT/.venv/bin/python}
[[ -x $python ]] || python=$(command -v "${LETHE_PYTHON:-python3}")
cd "$ROOT"
exec "$python" "$ROOT/scripts/gpu_suite.py" "$@"
