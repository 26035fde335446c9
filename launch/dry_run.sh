# shellcheck shell=bash
# Sourced by the other scripts: `run COMMAND ...` runs a command, or prints it where DRY_RUN is 1.
run() {
  if [ "${DRY_RUN:-0}" = 1 ]; then
    printf '%q ' "$@"
    printf '\n'
  else
    "$@"
  fi
}
