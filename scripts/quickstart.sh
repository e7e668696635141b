#!/usr/bin/env bash
# One question to a small reasoning model whose KV cache is evicted while it thinks, then a server to try by hand.
# Sets itself up (see setup.sh); needs no GPU. Options: [--once] [--json FILE] [--port N]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec python "$ROOT/scripts/quickstart.py" "$@"
