#!/usr/bin/env bash
# The tests of what touches Transformers, on other versions: tests/versions.sh oldest newest (more in versions.py)
exec python "$(dirname "$0")/versions.py" "$@"
