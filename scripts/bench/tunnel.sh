# shellcheck shell=bash
# Our userspace WireGuard beside wireguard-go (20231211 and newest set the bars, 20220316 is shown), both ends of a run
# the same program, over a veth between two namespaces. Sourced by scripts/bench.sh.
#
# Throughput is per core-second, because on one machine both ends share the cores: received TCP bits divided by
# user + system time of the two tunnel processes and the two iperf3 processes + the machine's interrupt and softirq
# time (which Linux charges to no process, and in which the veth and much of the stack run). Whole-machine busy time
# would count the neighbours. The same is counted for all.
#
# BENCH_ROUNDS (5), BENCH_SECONDS (3) a run, BENCH_ONLY (names of implementations) for a quicker look.

rounds=${BENCH_ROUNDS:-5}
seconds=${BENCH_SECONDS:-3}
work=$(mktemp -d)
cache=target/bench
ns=(dvpnbench$$a dvpnbench$$b)
link=(dvbn$$a dvbn$$b)
outer=(10.201.0.1 10.201.0.2)
inner=(10.202.0.1 10.202.0.2)
port=51900
pids=()
stdins=()
ticks=$(getconf CLK_TCK)

need iperf3 iperf3
need wg wireguard-tools
need ethtool ethtool
need ping iputils-ping
need jq jq

in_ns() { nsenter "--net=/run/netns/${ns[$1]}" "${@:2}"; }

tunnel_down() {
  local fd pid
  for fd in "${stdins[@]}"; do exec {fd}>&-; done
  for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done
  for pid in "${pids[@]}"; do wait "$pid" 2>/dev/null || true; done
  # A TUN goes a moment after its owner.
  for _ in $(seq 200); do
    in_ns 0 grep -q dvbt /proc/self/net/dev || in_ns 1 grep -q dvbt /proc/self/net/dev || break
    sleep 0.02
  done 2>/dev/null
  pids=() stdins=()
}
cleanup() {
  tunnel_down
  ip netns del "${ns[0]}" 2>/dev/null || true
  ip netns del "${ns[1]}" 2>/dev/null || true
  rm -rf "$work"
}
trap cleanup EXIT

# wireguard_go SUITE: prints the path of that suite's binary, unpacked, never installed.
wireguard_go() {
  local dir=$cache/$1 binary
  binary=$PWD/$dir/x/usr/bin/wireguard-go
  if [[ ! -x $binary ]]; then
    local mirror options
    mirror=$(awk '/^URIs:/ { print $2; exit } /^deb / { for (i = 2; i <= NF; i++) if ($i ~ /^https?:/) { print $i; exit } }' \
      /etc/apt/sources.list.d/debian.sources /etc/apt/sources.list 2>/dev/null)
    [[ -n $mirror ]] || { echo "no Debian mirror in /etc/apt" >&2; return 1; }
    mkdir -p "$dir"/{lists/partial,archives/partial}
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $1 main" >"$dir/sources.list"
    options=(-qq -o "Dir::Etc::sourcelist=$PWD/$dir/sources.list" -o Dir::Etc::sourceparts=/dev/null
      -o "Dir::State::lists=$PWD/$dir/lists" -o "Dir::Cache=$PWD/$dir" -o APT::Sandbox::User=root)
    apt-get "${options[@]}" update >&2
    (cd "$dir" && apt-get "${options[@]}" download "wireguard-go/$1" >&2)
    dpkg -x "$dir"/wireguard-go_*.deb "$dir/x"
  fi
  echo "$binary"
}

# The implementations: label, then the binary.
labels=(dvpn) binaries=("")
for suite in bookworm bookworm-backports sid; do
  binary=$(wireguard_go "$suite")
  labels+=("go-$suite")
  binaries+=("$binary")
done

# The selection of scripts/test.sh, so that what it built is used.
cargo build --quiet --locked --profile lab -p dvpn-daemon -p dvpn-pool -p dvpn-tests --bins \
  --test tunnel --test host --test hostile --test ebpf --test netns
ours=$PWD/target/lab/bench-tunnel-peer

ip netns add "${ns[0]}"
ip netns add "${ns[1]}"
ip link add "${link[0]}" netns "${ns[0]}" type veth peer name "${link[1]}" netns "${ns[1]}"
for side in 0 1; do
  in_ns $side ip link set lo up
  in_ns $side ip address add "${outer[side]}/30" dev "${link[side]}"
  in_ns $side ip link set "${link[side]}" up
  (umask 077 && wg genkey >"$work/key$side")
  wg pubkey <"$work/key$side" >"$work/pub$side"
done

# tunnel_up INDEX: both ends with the implementation INDEX. nsenter by name, not by function: $! is to be the program.
tunnel_up() {
  local side tun fd pid binary=${binaries[$1]}
  for side in 0 1; do
    tun=dvbt$$$side
    local peer=$((1 - side))
    if [[ -z $binary ]]; then
      rm -f "$work/stdin$side"
      mkfifo "$work/stdin$side"
      # shellcheck disable=SC2086 # BENCH_PEER_ARGS is a list
      nsenter "--net=/run/netns/${ns[side]}" "$ours" "$tun" $port "$(<"$work/pub$peer")" "${outer[peer]}:$port" "${inner[peer]}/32" \
        ${BENCH_PEER_ARGS:-} <"$work/stdin$side" >"$work/out$side" 2>&1 &
      pid=$!
      exec {fd}>"$work/stdin$side"
      stdins+=("$fd")
      cat "$work/key$side" >&"$fd"
    else
      nsenter "--net=/run/netns/${ns[side]}" "$binary" -f "$tun" >"$work/out$side" 2>&1 &
      pid=$!
    fi
    pids+=("$pid")
    for _ in $(seq 200); do
      in_ns $side test -e "/proc/self/net/dev" && in_ns $side grep -q "$tun:" /proc/self/net/dev &&
        { [[ -z $binary ]] || [[ -S /var/run/wireguard/$tun.sock ]]; } && break
      kill -0 "$pid" 2>/dev/null || { cat "$work/out$side" >&2; return 1; }
      sleep 0.02
    done
    if [[ -n $binary ]]; then
      wg set "$tun" private-key "$work/key$side" listen-port $port peer "$(<"$work/pub$peer")" \
        endpoint "${outer[peer]}:$port" allowed-ips "${inner[peer]}/32"
      in_ns $side ip link set "$tun" mtu 1420
    fi
    in_ns $side ip address add "${inner[side]}/32" peer "${inner[peer]}" dev "$tun"
    in_ns $side ip link set "$tun" up
  done
  in_ns 0 ping -q -c 1 -W 5 "${inner[1]}" >/dev/null
}

process_ticks() {
  local total=0 pid fields
  for pid in "$@"; do
    fields=$(sed 's/.*) //' "/proc/$pid/stat")
    # shellcheck disable=SC2086 # split into fields: utime and stime are the 12th and 13th after the name
    set -- $fields
    total=$((total + ${12} + ${13}))
  done
  echo "$total"
}
interrupt_ticks() { awk '/^cpu / { print $7 + $8 }' /proc/stat; }

# transfer ARGUMENT...: iperf3 with them; prints "gbit core_seconds retransmits".
transfer() {
  local server client before after bits
  in_ns 1 iperf3 -s -1 -J >"$work/server" 2>&1 &
  server=$!
  for _ in $(seq 200); do in_ns 1 grep -q ':1451 ' /proc/self/net/tcp /proc/self/net/tcp6 && break; sleep 0.02; done
  before=$(($(process_ticks "${pids[@]}") + $(interrupt_ticks)))
  # TIMEFORMAT's user and system time of iperf3 itself, children included.
  local own
  own=$( { TIMEFORMAT='%U %S'; time in_ns 0 iperf3 -c "${inner[1]}" -J "$@" >"$work/client" 2>/dev/null; } 2>&1)
  client=$(jq -r '.end.cpu_utilization_percent.remote_total * .end.sum_received.seconds / 100' "$work/client")
  wait "$server" || true
  after=$(($(process_ticks "${pids[@]}") + $(interrupt_ticks)))
  bits=$(jq -r '.end.sum_received.bytes * 8 / 1e9' "$work/client")
  echo "$bits $after $before $own $client $(jq -r .end.sum_sent.retransmits "$work/client")" |
    awk -v hz="$ticks" '{ printf "%.3f %.3f %d\n", $1, ($2 - $3) / hz + $4 + $5 + $6, $7 }'
}

rss_kib() { for pid in "${pids[@]}"; do awk '/^VmRSS/ { print $2 }' "/proc/$pid/status"; done | sort -g | tail -1; }

segmentation() {
  for side in 0 1; do in_ns $side ethtool -K "${link[side]}" tx-udp-segmentation "$1" >/dev/null; done
}

for round in $(seq "$rounds"); do
  for index in "${!labels[@]}"; do
    label=${labels[index]}
    [[ -z ${BENCH_ONLY:-} || " $BENCH_ONLY " == *" $label "* ]] || continue
    for mode in on off; do
      segmentation $mode
      tunnel_up "$index"
      if [[ $mode == on ]]; then
        in_ns 0 ping -i 0.005 -c 300 "${inner[1]}" | sed -n 's/.*time=\([0-9.]*\).*/\1/p' | median >>"$work/ping.$label"
      fi
      transfer -t "$seconds" >"$work/run"
      read -r gbit cores lost <"$work/run"
      awk -v g="$gbit" -v c="$cores" 'BEGIN { print g / c }' >>"$work/$mode.$label"
      awk -v g="$gbit" -v s="$seconds" 'BEGIN { print g / s }' >>"$work/rate$mode.$label"
      if [[ $mode == on && $round -le 3 ]]; then
        # The rest of the first gigabyte and a little.
        transfer -n 1G >/dev/null
        rss_kib >>"$work/rss.$label"
      fi
      echo "round $round $label segmentation $mode: $gbit Gbit in $cores core-s, $lost retransmits" >&2
      tunnel_down
    done
  done
done

printf '%-24s %14s %14s %12s %12s %10s %10s\n' implementation "Gbit/core-s on" "Gbit/core-s off" "Gbit/s on" "Gbit/s off" "ping ms" "RSS MiB"
declare -A best
# keep KEY VALUE most|least: the best of the others.
keep() {
  local old=${best[$1]:-}
  if [[ -z $old ]] || awk -v n="$2" -v o="$old" -v k="$3" 'BEGIN { exit !(k == "most" ? n > o : n < o) }'; then best[$1]=$2; fi
}
for index in "${!labels[@]}"; do
  label=${labels[index]}
  [[ -f $work/on.$label ]] || continue
  on=$(median <"$work/on.$label") off=$(median <"$work/off.$label")
  ping=$(median <"$work/ping.$label") rss=$(median <"$work/rss.$label")
  printf '%-24s %14.3f %14.3f %12.2f %12.2f %10.3f %10.1f\n' "$label" "$on" "$off" \
    "$(median <"$work/rateon.$label")" "$(median <"$work/rateoff.$label")" "$ping" "$(awk -v k="$rss" 'BEGIN { print k / 1024 }')"
  if [[ $label == dvpn ]]; then
    our_on=$on our_off=$off our_ping=$ping our_rss=$rss
  elif [[ $label != go-bookworm ]]; then # the old one, without offloads, is a third column and no bar
    keep on "$on" most; keep off "$off" most; keep ping "$ping" least; keep rss "$rss" least
  fi
done
machine
echo "others   $(for deb in "$cache"/*/wireguard-go_*.deb; do printf '%s=%s ' "go-$(basename "$(dirname "$deb")")" "$(dpkg-deb -f "$deb" Version)"; done)"
echo "runs     $rounds rounds of $seconds s, interleaved, medians; both ends on this machine"

ratio() { awk -v a="$1" -v b="$2" 'BEGIN { printf "%.2f", a / b }'; }
if [[ -n ${our_on:-} && -n ${best[on]:-} ]]; then
  figure throughput-per-core-second-vs-best "$(ratio "$our_on" "${best[on]}")" least 1.00
  figure throughput-per-core-second-unsegmented-vs-best "$(ratio "$our_off" "${best[off]}")" least 1.60
  figure ping-p50-vs-best "$(ratio "$our_ping" "${best[ping]}")" most 0.90
  figure rss-after-1gb-vs-least "$(ratio "$our_rss" "${best[rss]}")" most 0.25
fi
