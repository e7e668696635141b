#!/usr/bin/env bash
# One question to a small language model whose KV cache is evicted while it answers, then a server to try by hand.
# Sets itself up (see setup.sh); needs no GPU. The first run fetches the model, SmolLM2 (93 MB); where it cannot be had,
# a toy that comes with the repository takes its place.
# Options: [--once] [--json FILE] [--port N] [--tokens N] [--toy]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec python "$ROOT/scripts/quickstart.py" "$@"
