# shellcheck shell=bash
# Sourced by the other scripts: makes .venv at the top level and installs the project into it.
# usage: install_project EXTRAS   (e.g. "" or "[test]"); PYTHON names the interpreter to use.
install_project() {
  local extras=$1 python=${PYTHON:-python3} stamp wanted
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "error: $python is not CPython 3.11 or newer; set PYTHON to one" >&2
    return 2
  fi
  stamp=.venv/installed$extras
  wanted=$(cat setup.py constraints.txt | cksum)
  if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ]; then
    echo "installing into .venv (once; a few minutes)"
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    .venv/bin/python -m pip install --quiet --constraint constraints.txt --editable ".$extras"
    echo "$wanted" >"$stamp"
  fi
}
