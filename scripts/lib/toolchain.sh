#!/usr/bin/env bash
# Finds or installs what building, checking and testing need. Sourced by the other scripts, which call its functions;
# run by itself it makes this machine able to build everything, the eBPF object included.
#
# Nothing is written to the tree. Packages come from apt (root or sudo), tools go to ${XDG_CACHE_HOME:-~/.cache}/dvpn
# under names that carry their versions, so that an empty cache and a used one end in the same place.
# shellcheck source-path=SCRIPTDIR
# shellcheck source=log.sh
. "$(dirname "${BASH_SOURCE[0]}")/log.sh"

readonly MINIMUM_RUST=1.95
readonly LLVM=22
readonly BPF_LINKER_VERSION=0.13.0 # also in dvpn-daemon/build.rs
library=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cache=${XDG_CACHE_HOME:-${HOME:-/var/cache}/.cache}/dvpn

# as_root COMMAND…
as_root() {
  if ((EUID == 0)); then
    "$@"
  elif command -v sudo >/dev/null; then
    sudo "$@"
  else
    die "this needs root: $*"
  fi
}

# packages WHY NAME…: installs those Debian packages that are missing.
packages() {
  local why=$1 missing=() name
  shift
  command -v apt-get >/dev/null || {
    warn "no apt-get here; $why need what Debian calls: $*"
    return 0
  }
  for name in "$@"; do
    [[ $(dpkg-query -W -f '${db:Status-Status}' "$name" 2>/dev/null) == installed ]] || missing+=("$name")
  done
  ((${#missing[@]})) || return 0
  if [[ -z ${apt_updated-} ]]; then
    quietly "Updating the package lists" as_root apt-get update -q
    apt_updated=yes
  fi
  quietly "Installing for $why: ${missing[*]}" \
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "${missing[@]}"
}

# at_least MINIMUM VERSION: whether VERSION is MINIMUM or newer.
at_least() { printf '%s\n%s\n' "$1" "$2" | sort --version-sort --check=quiet; }

# rust_version COMMAND…: "1.95.0" of a rustc, or nothing.
rust_version() { "$@" --version 2>/dev/null | awk '$1 == "rustc" { sub(/-.*/, "", $2); print $2 }'; }

# fits COMMAND…: whether that rustc is new enough.
fits() {
  local version
  version=$(rust_version "$@")
  [[ -n $version ]] && at_least "$MINIMUM_RUST" "$version"
}

# Debian's newest Rust, in the security suite for the sake of the browsers: one toolchain for host and eBPF.
install_system_rust() {
  local candidate
  packages "$1" ca-certificates
  [[ -n ${apt_updated-} ]] || { quietly "Updating the package lists" as_root apt-get update -q && apt_updated=yes; }
  candidate=$(apt-cache policy rustc-web 2>/dev/null | awk '$1 == "Candidate:" { print $2 }')
  at_least "$MINIMUM_RUST" "${candidate:-0}" || return 1
  packages "$1" rustc-web cargo-web rust-web-src gcc libc6-dev
}

# A cargo and rustc ≥ 1.95 in PATH: the installed one if it is new enough, else Debian's.
ensure_rust() {
  [[ -d ${CARGO_HOME:-${HOME:-}/.cargo}/bin ]] && PATH=$PATH:${CARGO_HOME:-${HOME:-}/.cargo}/bin
  if ! fits rustc; then
    if ! fits /usr/bin/rustc; then
      install_system_rust "building (no Rust ≥ $MINIMUM_RUST is installed)" ||
        die "no Rust ≥ $MINIMUM_RUST here and none in the package lists: install one with rustup, then run this again"
    fi
    PATH=/usr/bin:$PATH
  fi
  export PATH
  say "Rust $(rust_version rustc), $(command -v cargo)"
}

# What the crates link or compile: a C toolchain (aws-lc-rs, SQLite) and libsystemd.
ensure_build_packages() { packages "building" gcc g++ libc6-dev make cmake pkg-config libsystemd-dev ca-certificates git; }

# clippy and rustfmt of the toolchain in use.
ensure_lints() {
  cargo clippy --version >/dev/null 2>&1 && cargo fmt --version >/dev/null 2>&1 && return 0
  if [[ $(command -v cargo) == /usr/bin/cargo ]]; then
    packages "linting and formatting" rust-web-clippy rustfmt-web
  else
    quietly "Adding clippy and rustfmt to the toolchain" rustup component add clippy rustfmt
  fi
}

has_core_sources() {
  local sysroot
  fits "$@" && sysroot=$("$@" --print sysroot) && [[ -e $sysroot/lib/rustlib/src/rust/library/core/Cargo.toml ]]
}

# A Rust that can build core, and bpf-linker, for dvpn-daemon/build.rs.
ensure_ebpf() {
  [[ -z ${DVPN_EBPF_OBJECT-} ]] || return 0
  if ! has_core_sources /usr/bin/rustc && ! has_core_sources rustup run nightly rustc; then
    install_system_rust "the eBPF object (sources of core)" ||
      quietly "Installing rustup's nightly for the eBPF object" \
        rustup toolchain install nightly --profile minimal --component rust-src
  fi
  local root=$cache/bpf-linker-$BPF_LINKER_VERSION
  linker_runs "$root" && return 0
  packages "bpf-linker" "llvm-$LLVM-dev" "libllvm$LLVM" g++ libzstd-dev zlib1g-dev
  # A cached linker may only have missed its LLVM.
  linker_runs "$root" && return 0
  quietly "Building bpf-linker $BPF_LINKER_VERSION, once, into $root (about a minute)" \
    env LLVM_PREFIX="/usr/lib/llvm-$LLVM" RUSTFLAGS="-L/usr/lib/llvm-$LLVM/lib" CARGO_TARGET_DIR="$cache/build" \
    cargo install bpf-linker --version "$BPF_LINKER_VERSION" --locked --root "$root" \
    --no-default-features --features "llvm-$LLVM"
  rm -rf "$cache/build"
}

linker_runs() { bpf-linker --version >/dev/null 2>&1 || "$1/bin/bpf-linker" --version >/dev/null 2>&1; }

# The pinned tools of tools.txt in PATH.
ensure_tools() {
  local root
  root=$cache/tools-$(sha256sum "$library/tools.txt" | cut -c 1-12)
  if [[ ! -e $root/complete ]]; then
    if [[ $(uname -m) == x86_64 ]]; then
      packages "the pinned tools" python3 python3-venv ca-certificates
      quietly "Making a folder for the pinned tools: $root" python3 -m venv --clear "$root"
      quietly "Installing $(tool_names)" "$root/bin/pip" install --disable-pip-version-check --quiet \
        --require-hashes --only-binary :all: --no-deps --requirement "$library/tools.txt"
    else
      local name version
      while IFS='=' read -r name _ version; do
        version=${version%% *}
        name=${name#astral-dev-toolchain-}
        [[ $name == typos ]] && name=typos-cli
        quietly "Building $name $version, once, into $root (some minutes)" \
          cargo install "$name" --version "$version" --locked --root "$root"
      done < <(grep -v '^#' "$library/tools.txt")
    fi
    touch "$root/complete"
  fi
  PATH=$root/bin:$PATH
  export PATH
}

tool_names() { awk -F'[= ]+' '!/^#/ { sub(/^astral-dev-toolchain-/, "", $1); printf "%s%s %s", separator, $1, $2; separator = ", " }' "$library/tools.txt"; }

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
  set -euo pipefail
  ensure_rust
  ensure_build_packages
  ensure_ebpf
  say "This machine can build DVPN: cargo build --release"
fi
