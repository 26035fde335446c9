# shellcheck shell=bash
# Sourced by the other scripts: makes .venv at the top level and installs the project into it.
# usage: install_project EXTRAS   (e.g. "" or "[test]"); PYTHON names the interpreter to use.
# Each step is followed by `|| return`: who sources this may not have said `set -e`.
install_project() {
  local extras=$1 python=${PYTHON:-python3} top stamp wanted
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "error: $python is not CPython 3.11 or newer; set PYTHON to one" >&2
    return 2
  fi
  top=$(realpath "$(dirname "${BASH_SOURCE[0]}")/..") || return
  stamp=$top/.venv/installed$extras
  wanted=$(cat "$top/setup.py" "$top/constraints.txt") || return
  wanted=$(cksum <<<"$wanted")
  if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ]; then
    echo "installing into $top/.venv (once; a few minutes)"
    # pip comes last into a new environment: without it, the making of it was cut off.
    [ -x "$top/.venv/bin/pip" ] || "$python" -m venv "$top/.venv" || return
    "$top/.venv/bin/python" -m pip install --quiet --constraint "$top/constraints.txt" \
      --editable "$top$extras" || return
    echo "$wanted" >"$stamp"
  fi
}
