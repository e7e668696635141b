#!/usr/bin/env bash
# Lint, types and tests. Sets itself up (see setup.sh). Arguments go to pytest: bash scripts/test.sh -k budgets
set -uo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$ROOT" || exit 1
export OMP_NUM_THREADS=1 # two workers of two threads each would spin against each other on two cores

failed=()
section() {
  local title=$1
  shift
  printf '\n== %s ==\n' "$title"
  "$@" || failed+=("$title")
}

section "lint" python -m ruff check .
section "format" python -m ruff format --check .
section "types" python -m mypy
run_suite() {
  # A file's servers stay with one worker, and files are begun in the order in which they are collected.
  read -ra folders <<<"$1"
  python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "${folders[@]}" "${@:2}"
  local status=$?
  [[ $status == 5 && $# -gt 1 ]] || return $status  # 5: the user's own selection left nothing in this suite
}

# Cheap suites first, then whatever else tests/ holds. Two that import the same share a run, for imports take long.
suites=("tests/unit tests/bench" "tests/kernels")
for suite in tests/test_*.py tests/*/; do
  suite=${suite%/}
  [[ " ${suites[*]} " == *" $suite "* || -z $(find "$suite" -name 'test_*.py' -print -quit 2>/dev/null) ]] && continue
  suites+=("$suite")
done
for suite in "${suites[@]}"; do
  section "$suite" run_suite "$suite" "$@"
done

if ((${#failed[@]})); then
  printf '\n== FAILED: %s ==\n' "$(IFS=,; echo "${failed[*]}")"
  exit 1
fi
printf '\n== all passed ==\n'
