# What the scripts say, and how they say that they are still at it. Sourced.
# shellcheck shell=bash

say() { printf '==> %s\n' "$*"; }
warn() { printf 'warning: %s\n' "$*" >&2; }
die() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

# quietly LABEL COMMAND…: runs COMMAND with its output in a log, says every other second how far it is, and shows the
# log only if it fails.
quietly() {
  local label=$1 log pid started=$SECONDS status=0 said=0
  shift
  log=$(mktemp)
  say "$label"
  "$@" >"$log" 2>&1 &
  pid=$!
  while kill -0 "$pid" 2>/dev/null; do
    sleep 0.2
    if ((SECONDS - started >= said + 2)); then
      said=$((SECONDS - started))
      printf '    %4d s  %s\n' "$said" "$(tail -n 1 "$log" | tr -d '\r' | cut -c 1-100)"
    fi
  done
  wait "$pid" || status=$?
  if ((status != 0)); then
    printf 'error: %s failed (exit %d); its last lines:\n' "$label" "$status" >&2
    tail -n 40 "$log" >&2
  fi
  rm -f "$log"
  return "$status"
}
