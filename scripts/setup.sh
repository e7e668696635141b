#!/usr/bin/env bash
# Puts a Python that has this project first on PATH; the other scripts source it.
#
# Without LETHE_VENV: creates .venv in the repository and installs the project there (2 to 6 minutes and 11 GB, nearly
# all of it SGLang and PyTorch); later runs skip that until a pyproject.toml changes.
# With LETHE_VENV=DIR: uses the environment in DIR as it is and installs nothing.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export ROOT

fail() {
  echo "error: $*" >&2
  exit 1
}

find_python() {
  local candidate
  for candidate in python3.11 python3.12 python3; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  fail "Python 3.11 or newer is needed and none is on PATH"
}

install_project() {
  local venv=$1 stamp=$1/.lethe-installed wanted python
  wanted="$ROOT $(cat "$ROOT/pyproject.toml" "$ROOT/lethe_cpu/pyproject.toml" | sha256sum)"
  [[ -f $stamp && $(<"$stamp") == "$wanted" ]] && return
  if [[ ! -x $venv/bin/python ]]; then
    python=$(find_python) || exit 1
    echo "== creating $venv with $python =="
    "$python" -m venv "$venv" || fail "$python -m venv failed; on Debian and Ubuntu, install python3-venv"
  fi
  echo "== installing lethe-sglang and SGLang into $venv (2 to 6 minutes) =="
  "$venv/bin/python" "$ROOT/scripts/install.py" || fail "the project could not be installed"
  echo "$wanted" >"$stamp"
}

if [[ -n ${LETHE_VENV:-} ]]; then
  venv=$LETHE_VENV
  "$venv/bin/python" -c 'from importlib.metadata import version as v; v("lethe-sglang"), v("lethe-cpu")' 2>/dev/null ||
    fail "LETHE_VENV=$venv does not have the project: $venv/bin/python -m pip install -e '.[dev]' -e ./lethe_cpu"
else
  venv=$ROOT/.venv
  install_project "$venv"
fi
export PATH="$venv/bin:$PATH"
# Modules are compiled when they are first imported, and kept, whatever the caller's environment says: to compile all
# that SGLang imports takes longer than to run it, and a server is three processes.
unset PYTHONDONTWRITEBYTECODE
