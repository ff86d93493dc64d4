#!/usr/bin/env bash
# Measures one thing beside what others offer: scripts/bench.sh NAME, a file in scripts/bench/ each.
# Prints a table, the machine, then a line "bench NAME FIGURE VALUE BAR ok|short" per figure; exits 1 when one
# is short. Needs root; what it makes (namespaces, processes) it takes away.
# shellcheck disable=SC2317 # the functions are for the sourced files
set -euo pipefail
cd "$(dirname "$0")/.."

name=${1:-}
if [[ ! $name =~ ^[a-z0-9-]+$ || ! -f scripts/bench/$name.sh ]]; then
  echo "usage: scripts/bench.sh NAME, one of: $(find scripts/bench -name '*.sh' -printf '%f ' | sed 's/\.sh//g')" >&2
  exit 64
fi

short=0
figures=()
# figure NAME VALUE least|most BAR: VALUE has to be at least, or at most, BAR.
figure() {
  local verdict=ok
  if ! awk -v v="$2" -v b="$4" -v k="$3" 'BEGIN { exit !(k == "least" ? v >= b : v <= b) }'; then
    verdict=short
    short=1
  fi
  figures+=("bench $name $1 $2 $4 $verdict")
}

# median: of the numbers on stdin.
median() {
  sort -g | awk '{ v[NR] = $1 } END {
    if (NR == 0) exit 1
    if (NR % 2) print v[(NR + 1) / 2]; else print (v[NR / 2] + v[NR / 2 + 1]) / 2
  }'
}

# need COMMAND PACKAGE: installs PACKAGE when COMMAND is missing.
need() {
  command -v "$1" >/dev/null && return
  echo "installing $2: the benchmark uses $1"
  apt-get install -y -qq --no-install-recommends "$2" >/dev/null
}

machine() {
  echo
  echo "cpu      $(nproc) x $(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -1)"
  echo "kernel   $(uname -r)"
  echo "load     $(cut -d' ' -f1-3 /proc/loadavg) before, rustc $(rustc --version | cut -d' ' -f2), commit $(git rev-parse --short HEAD)"
}

[[ $EUID -eq 0 ]] || { echo "run as root: the benchmark makes network namespaces" >&2; exit 77; }
# shellcheck source=/dev/null
. "scripts/bench/$name.sh"

echo
printf '%s\n' "${figures[@]}"
exit "$short"
