#!/usr/bin/env bash
# Installs the test extras and runs the suite, less what is marked slow (add `-m slow` for that).
# One process for each core (WORKERS), a file of tests to each. Arguments pass through to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/install.sh
install_project "[test]"
workers=${WORKERS:-$(getconf _NPROCESSORS_ONLN)}
exec .venv/bin/python -m pytest --numprocesses="$workers" --dist=loadfile --no-loadscope-reorder "$@"
