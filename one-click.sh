#!/usr/bin/env bash
# A whole DVPN on this machine: one pool, three providers, a web server that only they reach, and a client that pays,
# connects and fetches through SOCKS5. Everything lives in network namespaces of its own; the machine's own network is
# not touched.
#
#   ./one-click.sh          installs what is missing, builds, brings it up, shows that it works (again: quickly)
#   ./one-click.sh --device the same with all of the client's traffic in the tunnel, not only its proxy's
#   ./one-click.sh --down   removes the network; .env, certs/, the build and installed packages stay
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

readonly POOL=203.0.113.10
readonly LAB=${CARGO_TARGET_DIR:-target}/lab/dvpn-lab

usage() {
  sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
}

# random_hex BYTES
random_hex() { od -An -v -tx1 -N "$1" /dev/urandom | tr -d ' \n'; }

# add_key NAME VALUE WHY: appends to .env when the name is not in it; what is set stays as it is, where it is.
add_key() {
  grep -qE "^[[:space:]]*(export[[:space:]]+)?$1=" .env && return 0
  # A last line without its end would swallow the first of ours.
  if [[ -s .env && -n $(tail -c 1 .env) ]]; then
    echo >>.env
  fi
  printf '%s=%s\n' "$1" "$2" >>.env
  say ".env: added $1 ($3)"
}

prepare_env() {
  if [[ ! -e .env ]]; then
    (umask 077 && : >.env)
    give_back .env
    say "made .env (mode 0600)"
  fi
  add_key USER_ID "$(random_hex 16)" "who pays: a random number"
  add_key TOKEN_PASSPHRASE "$(random_hex 32)" "seals the payment token on disk"
}

# give_back PATH…: what root made for a user in the user's tree belongs to the user.
give_back() {
  [[ -z ${SUDO_UID-} ]] || chown -R "$SUDO_UID:${SUDO_GID:-$SUDO_UID}" "$@"
}

down() {
  if [[ ! -x $LAB ]]; then
    if compgen -G '/run/netns/dvpnlab-one-click-*' >/dev/null; then
      die "the network is up, but $LAB, which takes it down, is not built: run ./one-click.sh once more, then --down"
    fi
    say "nothing is up"
    return
  fi
  "$LAB" down
}

# Building goes to the terminal when there is one; else a line every other second says how far it is.
build() {
  local packages=(-p dvpn-daemon -p dvpn-pool -p dvpn-tests) what=Building
  [[ -x $LAB ]] || what="Building (this first time takes some minutes)"
  if [[ -t 2 ]]; then
    say "$what"
    cargo build --locked --profile lab "${packages[@]}" --bins
  else
    quietly "$what" cargo build --locked --profile lab "${packages[@]}" --bins
  fi
  give_back "${CARGO_TARGET_DIR:-target}"
}

main() {
  case ${1-} in
  "" | --device | --down) ;;
  -h | --help)
    usage
    exit 0
    ;;
  *)
    usage >&2
    exit 64
    ;;
  esac
  if [[ $(uname -s) != Linux ]]; then
    echo "error: DVPN runs on Linux; use a Debian 12 or 13 machine" >&2
    exit 69
  fi
  if ((EUID != 0)); then
    if ! command -v sudo >/dev/null; then
      echo "error: network namespaces need root and there is no sudo here: become root, then run this again" >&2
      exit 77
    fi
    echo "==> Network namespaces need root: asking sudo"
    # The user's own Rust is found where it is.
    local keep=("PATH=$PATH")
    [[ ! -d ${RUSTUP_HOME:-$HOME/.rustup} ]] || keep+=("RUSTUP_HOME=${RUSTUP_HOME:-$HOME/.rustup}")
    [[ ! -d ${CARGO_HOME:-$HOME/.cargo} ]] || keep+=("CARGO_HOME=${CARGO_HOME:-$HOME/.cargo}")
    [[ -z ${CARGO_TARGET_DIR-} ]] || keep+=("CARGO_TARGET_DIR=$CARGO_TARGET_DIR")
    exec sudo -- env "${keep[@]}" "$PWD/one-click.sh" "$@"
  fi
  # shellcheck source=scripts/lib/toolchain.sh
  . scripts/lib/toolchain.sh
  if [[ ${1-} == --down ]]; then
    down
    return
  fi
  # Two runs at once would fight for one network.
  exec {lock}<one-click.sh
  flock -n "$lock" || die "another ./one-click.sh is at work: wait for it"

  [[ -c /dev/net/tun ]] || modprobe tun 2>/dev/null ||
    die "/dev/net/tun is missing: load the module tun, or give this container --device /dev/net/tun"
  packages "network namespaces, the message bus, certificates and looking around" \
    iproute2 nftables dbus systemd openssl curl procps kmod
  ensure_rust
  ensure_build_packages
  ensure_ebpf
  build
  prepare_env
  scripts/gen_dev_certs.sh "IP:$POOL"
  give_back certs
  # What goes on running must not go on holding the lock.
  "$LAB" up "$@" {lock}<&-
}

main "$@"
