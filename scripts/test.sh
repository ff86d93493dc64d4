#!/usr/bin/env bash
# Installs what the tests need and runs them; ends with one line `N passed, N failed, N skipped`.
#
#   scripts/test.sh [TIER…]
#
#   pure    unit, property and simulation tests of every crate; any user
#   netns   whole processes in network namespaces: tunnel, host, hostile, ebpf, netns; root, this kernel
#   fuzz    each fuzz target for 20 s
#   vm      kernel WireGuard and the whole chain on it, on Debian's own kernel in QEMU (scripts/vm.sh); root; a quarter
#           of an hour, and so only when it is named
#
# A test that a machine cannot run is named with its reason, and a privileged tier without root is a failure.
# shellcheck source-path=SCRIPTDIR
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=lib/toolchain.sh
. scripts/lib/toolchain.sh
# shellcheck source=lib/services.sh
. scripts/lib/services.sh

all=(pure netns fuzz)
# By name only: with it a run takes more than an hour.
named=(vm)
# One selection of packages for all system tests: another has other features, and compiles every dependency again.
system_packages=(-p dvpn-daemon -p dvpn-pool -p dvpn-tests)
passed=0 failed=0 skipped=0
declare -a skips=()
log=$(mktemp)
trap 'rm -f "$log"' EXIT
# Without the kernel programs no tier says anything. For every call of cargo, or it would build all anew in between.
export DVPN_EBPF_REQUIRED=1

# number_before WORD LINE: the count before WORD in a summary, or 0.
number_before() { sed -nE "s/.*[^0-9]([0-9]+) $1([^a-z].*|$)/\1/p" <<<" $2" | grep . || echo 0; }

# nextest LABEL ARGUMENTS…: runs and adds what nextest's summary says.
nextest() {
  local label=$1 status=0 summary
  shift
  say "$label: cargo nextest run $*"
  cargo nextest run --locked --no-tests fail "$@" 2>&1 | tee "$log" || status=$?
  summary=$(sed 's/\x1b\[[0-9;]*m//g' "$log" | grep -E '^ *Summary \[' | tail -n 1 || true)
  if [[ -z $summary ]]; then
    warn "$label did not come as far as a summary (exit $status)"
    failed=$((failed + 1))
    return
  fi
  local bad=0 word
  for word in failed "timed out" "exec failed"; do bad=$((bad + $(number_before "$word" "$summary"))); done
  # A run that ends badly without a failed test counts as one.
  ((status == 0 || bad > 0)) || bad=1
  passed=$((passed + $(number_before passed "$summary")))
  failed=$((failed + bad))
  name_skips "$@"
}

# Names what `#[ignore = "reason"]` keeps out of a run.
name_skips() {
  local binary test name reason
  while read -r binary test; do
    [[ -n $test ]] || continue
    name=${test##*::}
    reason=$(git grep -hE -B 4 "fn ${name}\(" -- '*.rs' | sed -nE 's/.*#\[ignore = "(.*)"\].*/\1/p' | tail -n 1)
    skips+=("$binary $test: ${reason:-no reason given}")
    skipped=$((skipped + 1))
  done < <(cargo nextest list --locked --run-ignored only --message-format oneline "$@" 2>/dev/null)
}

tier_pure() {
  nextest pure --workspace --exclude dvpn-tests
}

tier_netns() {
  if ((EUID != 0)); then
    warn "tier netns makes network namespaces: run it as root (sudo scripts/test.sh netns)"
    failed=$((failed + 1))
    return
  fi
  packages "the system tests" iproute2 iputils-ping dbus systemd nftables tcpdump strace curl openssl procps kmod
  ensure_name_services
  local selection=("${system_packages[@]}" --bins) target
  for target in tunnel host hostile ebpf netns; do selection+=(--test "$target"); done
  say "netns: building programs and tests (profile lab)"
  if ! cargo build --locked --profile lab "${selection[@]}"; then
    warn "the programs do not build"
    failed=$((failed + 1))
    return
  fi
  nextest netns --cargo-profile lab "${selection[@]}"
}

# The test program and the programs under test are brought into the machine, which has no build tools. Its closing line
# is libtest's.
tier_vm() {
  if ((EUID != 0)); then
    warn "tier vm builds a machine's disk: run it as root (sudo scripts/test.sh vm)"
    failed=$((failed + 1))
    return
  fi
  local brought program status=0 summary bad
  say "vm: building programs and tests (profile lab)"
  if ! cargo test --locked --profile lab "${system_packages[@]}" --bins --test vm --no-run 2>&1 |
    tee "$log"; then
    warn "the programs do not build"
    failed=$((failed + 1))
    return
  fi
  program=$(sed -nE 's/.*Executable vm\/main\.rs \((.*)\)$/\1/p' "$log")
  brought=$(mktemp -d)
  cp "$program" "$brought/vm"
  cp "${CARGO_TARGET_DIR:-target}"/lab/{dvpn-daemon,dvpn-pool,dvpn-lab} "$brought"
  printf '#!/bin/sh\nexport DVPN_BIN_DIR=/brought RUST_BACKTRACE=0 DVPN_LAB_SLOWNESS=6\nexec ./vm --test-threads 1 --show-output --color never\n' >"$brought/run"
  chmod +x "$brought/run"
  say "vm: this Debian's own kernel"
  scripts/vm.sh release "$brought" 2>&1 | tee "$log" || status=$?
  rm -rf "$brought"
  summary=$(grep -E '^test result: ' "$log" | tail -n 1 || true)
  bad=$(number_before failed "$summary")
  # A run that ends badly without a failed test counts as one, and so does one that ran nothing.
  ((status == 0 && $(number_before passed "$summary") > 0 || bad > 0)) || bad=1
  passed=$((passed + $(number_before passed "$summary")))
  failed=$((failed + bad))
}

# scripts/fuzz.sh SECONDS runs every target for that long and closes with the same line as this script.
tier_fuzz() {
  if [[ ! -x scripts/fuzz.sh ]]; then
    skips+=("fuzz: scripts/fuzz.sh is not in this tree")
    skipped=$((skipped + 1))
    return
  fi
  local status=0 closing
  scripts/fuzz.sh 20 2>&1 | tee "$log" || status=$?
  closing=$(grep -E '^(fuzz: )?[0-9]+ passed, [0-9]+ failed(, [0-9]+ skipped)?$' "$log" | tail -n 1 || true)
  if [[ -z $closing ]]; then
    if ((status == 0)); then passed=$((passed + 1)); else failed=$((failed + 1)); fi
    return
  fi
  local bad
  bad=$(number_before failed "$closing")
  ((status == 0 || bad > 0)) || bad=1
  passed=$((passed + $(number_before passed "$closing")))
  failed=$((failed + bad))
  skipped=$((skipped + $(number_before skipped "$closing")))
}

main() {
  local tiers=("$@") tier started
  ((${#tiers[@]})) || tiers=("${all[@]}")
  for tier in "${tiers[@]}"; do
    [[ " ${all[*]} ${named[*]} " == *" $tier "* ]] || die "no tier $tier; there are: ${all[*]} ${named[*]}"
  done
  ensure_rust
  ensure_build_packages
  ensure_ebpf
  command -v cargo-nextest >/dev/null || ensure_tools
  for tier in "${tiers[@]}"; do
    started=$SECONDS
    "tier_$tier"
    say "tier $tier took $((SECONDS - started)) s"
  done
  ((${#skips[@]} == 0)) || printf 'skipped %s\n' "${skips[@]}"
  printf '%d passed, %d failed, %d skipped\n' "$passed" "$failed" "$skipped"
  ((failed == 0))
}

main "$@"
