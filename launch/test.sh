#!/usr/bin/env bash
# Installs the test extras and runs the suite, less what is marked slow (add `-m slow` for that).
# Arguments pass through to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/install.sh
install_project "[test]"
exec .venv/bin/python -m pytest "$@"
