#!/usr/bin/env bash
# Format, lint, types and the direction of imports. `tests/style.sh --fix` mends what can be mended.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ "${1:-}" = --fix ]; then
    ruff check --fix --quiet
    ruff format --quiet
fi
ruff format --check
ruff check
mypy
lint-imports
