#!/usr/bin/env bash
# Compares with kvpress, in an environment of its own: kvpress needs another transformers than SGLang does.
#
# Without KVPRESS_VENV: creates out/kvpress-venv with the versions below (a few minutes and about 6 GB, nearly all of it
# PyTorch); later runs skip that. With KVPRESS_VENV=DIR: uses the environment in DIR as it is and installs nothing.
# Arguments go to compare.py.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
PINS=(kvpress==0.5.5 transformers==5.2.0 torch==2.14.1 pydantic==2.14.3 PyYAML==6.0.3)

fail() {
  echo "error: $*" >&2
  exit 1
}

if [[ -n ${KVPRESS_VENV:-} ]]; then
  venv=$KVPRESS_VENV
  "$venv/bin/python" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("kvpress") is None)' 2>/dev/null ||
    fail "KVPRESS_VENV=$venv does not have kvpress: $venv/bin/python -m pip install ${PINS[*]}"
else
  venv=$ROOT/out/kvpress-venv
  if [[ ! -f $venv/.pins || $(<"$venv/.pins") != "${PINS[*]}" ]]; then
    python=$(command -v python3.11 || command -v python3.12 || command -v python3) || fail "Python 3.11 or newer is needed"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "Python 3.11 or newer is needed"
    echo "== installing ${PINS[*]} into out/kvpress-venv (a few minutes) =="
    "$python" -m venv "$venv" || fail "$python -m venv failed; on Debian and Ubuntu, install python3-venv"
    "$venv/bin/python" -m pip install --disable-pip-version-check -q "${PINS[@]}" || fail "pip could not install kvpress"
    echo "${PINS[*]}" >"$venv/.pins"
  fi
fi
cd "$ROOT"
exec "$venv/bin/python" -m lethe_bench.kvpress.compare "$@"
