# Approvals a second into one provider, and from a client's question to the pool's answer, which comes after the
# provider's acknowledgement. Sourced by scripts/bench.sh.
#
# BENCH_STEADY (1000) clients at 100 a second, then BENCH_CROWD (2500) as fast as they are served.
# shellcheck shell=bash

for pair in ip:iproute2 dbus-daemon:dbus openssl:openssl nft:nftables; do
  need "${pair%%:*}" "${pair#*:}"
done
# The selection of scripts/test.sh, so that what it built is used.
cargo build --quiet --locked --profile lab -p dvpn-daemon -p dvpn-pool -p dvpn-tests --bins \
  --test tunnel --test host --test hostile --test ebpf --test netns
measured=$(target/lab/bench-approvals)
grep -v '^figure [a-z]*-*[a-z0-9-]* [0-9.]*$' <<<"$measured"
machine
value() { awk -v name="$1" '$1 == "figure" && $2 == name { print $3 }' <<<"$measured"; }
figure approvals-per-second "$(value approvals-per-second)" least 1000
figure lost "$(value lost)" most 0
figure steady-p50-ms "$(value steady-p50-ms)" most 25
figure steady-p99-ms "$(value steady-p99-ms)" most 50
