#!/usr/bin/env bash
# Mixed traffic at a CPU server for a long time, under strict memory checks: docs/testing.md says what is watched.
# Sets itself up (see setup.sh). Options: [--minutes N] [--stock-minutes N] [--model-path MODEL] [--seed N]
# [--growth MIB] [--out DIR]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec python -m lethe_bench.soak "$@"
