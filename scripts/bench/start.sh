# From the start of the daemon to READY=1, and from Start to the first byte through the proxy, in the network of
# one-click.sh. Sourced by scripts/bench.sh.
# shellcheck shell=bash

for pair in ip:iproute2 dbus-daemon:dbus busctl:systemd openssl:openssl nft:nftables; do
  need "${pair%%:*}" "${pair#*:}"
done
# The selection of scripts/test.sh, so that what it built is used.
cargo build --quiet --locked --profile lab -p dvpn-daemon -p dvpn-pool -p dvpn-tests --bins \
  --test tunnel --test host --test hostile --test ebpf --test netns
measured=$(target/lab/bench-start)
grep -v '^figure [a-z]*-[a-z-]* [0-9.]*$' <<<"$measured"
machine
value() { awk -v name="$1" '$1 == "figure" && $2 == name { print $3 }' <<<"$measured"; }
figure first-byte-ms "$(value first-byte-ms)" most 700
figure ready-ms "$(value ready-ms)" most 200
figure idle-kib "$(value idle-kib)" most 25600
figure sessions-kib "$(value sessions-kib)" most 40960
