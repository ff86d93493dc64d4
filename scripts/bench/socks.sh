# shellcheck shell=bash
# The daemon's SOCKS5 proxy beside microsocks and dante. A veth pair has the name of the tunnel's interface, so that what
# is measured is the proxy and not WireGuard; the proxy binds its connections to it as it always does. Load, proxies and
# server share this machine's cores. Sourced by scripts/bench.sh.
#
# BENCH_ROUNDS (7), BENCH_BYTES (1000000000) a run.

rounds=${BENCH_ROUNDS:-7}
bytes=${BENCH_BYTES:-1000000000}
many=1000
work=$(mktemp -d)
cache=target/bench/socks
ns=(dvpnsocks$$a dvpnsocks$$b)
near=203.0.113.2
far=203.0.113.1
port=7000
declare -A proxy=([dvpn]=127.0.0.1:1081 [microsocks]=127.0.0.1:1082 [dante]=127.0.0.1:1083)
declare -A pid=()
bench=target/lab/bench-socks

need ip iproute2
need ethtool ethtool

in_ns() { nsenter "--net=/run/netns/${ns[$1]}" "${@:2}"; }

cleanup() {
  local each
  for each in "${pid[@]}"; do kill "$each" 2>/dev/null || true; done
  for each in "${pid[@]}"; do wait "$each" 2>/dev/null || true; done
  ip netns del "${ns[0]}" 2>/dev/null || true
  ip netns del "${ns[1]}" 2>/dev/null || true
  rm -rf "$work"
}
trap cleanup EXIT

# unpacked PACKAGE FILE: the path of that file of a Debian package, unpacked, never installed: no service is started.
unpacked() {
  local file=$PWD/$cache/$1/$2
  if [[ ! -x $file ]]; then
    mkdir -p "$cache"
    (cd "$cache" && apt-get download -qq "$1" >&2 && dpkg -x "$1"_*.deb "$1")
  fi
  echo "$file"
}

# run NAME CONNECTIONS BYTES [PID]: seconds, and the KiB of that process and its children while all connections stand.
run() {
  local way=()
  [[ $1 == direct ]] || way=(--proxy "${proxy[$1]}")
  in_ns 0 "$bench" load "$far:$port" "${way[@]}" --connections "$2" --bytes "$3" ${4:+--watch "$4"}
}

# The selection of scripts/test.sh, so that what it built is used.
cargo build --quiet --locked --profile lab -p dvpn-daemon -p dvpn-pool -p dvpn-tests --bins \
  --test tunnel --test host --test hostile --test ebpf --test netns
microsocks=$(unpacked microsocks usr/bin/microsocks)
dante=$(unpacked dante-server usr/sbin/danted)
missing=$(ldd "$dante" "$microsocks" | awk '/not found/ { print $1 }' | sort -u | xargs)
[[ -z $missing ]] || { echo "dante wants $missing: install the packages that have them" >&2; exit 69; }
ulimit -n 16384

ip netns add "${ns[0]}"
ip netns add "${ns[1]}"
in_ns 0 ip link add dvpn0 type veth peer name far netns "/run/netns/${ns[1]}"
in_ns 0 sh -c "ip link set lo up; ip link set dvpn0 up; ip addr add $near/24 dev dvpn0"
in_ns 1 sh -c "ip link set lo up; ip link set far up; ip addr add $far/24 dev far"
cat >"$work/danted.conf" <<CONF
logoutput: /dev/null
internal: 127.0.0.1 port = 1083
external: dvpn0
clientmethod: none
socksmethod: none
user.privileged: root
user.unprivileged: nobody
client pass { from: 0.0.0.0/0 to: 0.0.0.0/0 }
socks pass { from: 0.0.0.0/0 to: 0.0.0.0/0 }
CONF
in_ns 1 "$bench" server "$far:$port" &
pid[server]=$!
in_ns 0 "$bench" proxy "${proxy[dvpn]}" dvpn0 "$near" &
pid[dvpn]=$!
in_ns 0 "$microsocks" -q -i 127.0.0.1 -p 1082 &
pid[microsocks]=$!
in_ns 0 "$dante" -f "$work/danted.conf" -p "$work/danted.pid" &
pid[dante]=$!
for name in dvpn microsocks dante; do
  for _ in $(seq 100); do run "$name" 1 1 >/dev/null 2>&1 && break; sleep 0.05; done
  run "$name" 1 1 >/dev/null || { echo "$name does not answer" >&2; exit 1; }
done

for round in $(seq "$rounds"); do
  for name in direct dvpn microsocks dante; do
    for connections in 1 8; do
      run "$name" "$connections" $((bytes / connections)) | cut -d ' ' -f 1 >>"$work/$name.$connections"
    done
  done
  echo "round $round of $rounds"
done

# speed NAME CONNECTIONS: Gbit/s, the median.
speed() { median <"$work/$1.$2" | awk -v bytes="$bytes" '{ printf "%.2f", bytes * 8 / 1e9 / $1 }'; }
# ratio A B CONNECTIONS: the median of the rounds' B seconds over A seconds.
ratio() { paste "$work/$1.$3" "$work/$2.$3" | awk '{ print $2 / $1 }' | median | awk '{ printf "%.2f", $1 }'; }

declare -A kib=() opened=()
for name in dvpn microsocks dante; do
  read -r _ before < <(run direct 1 1 "${pid[$name]}")
  if read -r _ after < <(run "$name" "$many" 65536 "${pid[$name]}"); then
    opened[$name]=$many
    kib[$name]=$(awk -v a="$after" -v b="$before" -v n="$many" 'BEGIN { printf "%.1f", (a - b) / n }')
  else
    opened[$name]=0
    kib[$name]=-
  fi
done

printf '\n%-12s %12s %12s %10s %10s %22s\n' proxy '1 conn' '8 conns' '/direct' '/direct' "KiB each of $many"
for name in direct dvpn microsocks dante; do
  printf '%-12s %7s Gb/s %7s Gb/s %10s %10s %22s\n' "$name" "$(speed "$name" 1)" "$(speed "$name" 8)" \
    "$(ratio "$name" direct 1)" "$(ratio "$name" direct 8)" "${kib[$name]:--}"
done
machine
figure of-dante-1 "$(ratio dvpn dante 1)" least 1
figure of-dante-8 "$(ratio dvpn dante 8)" least 1
figure connections "${opened[dvpn]}" least "$many"
figure kib-each "${kib[dvpn]}" most 64
