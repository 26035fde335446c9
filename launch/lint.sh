#!/usr/bin/env bash
# Installs the test extras; then linter, formatter, import layers and types. Changes nothing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/install.sh
install_project "[test]"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/lint-imports --no-logo --no-cache
.venv/bin/basedpyright
