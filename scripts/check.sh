#!/usr/bin/env bash
# The gate: format, lints, dependencies, spelling, shell, the other architecture. Every step runs; any failure fails.
#
#   scripts/check.sh [STEP…]      steps: format tree shell spelling dependencies unused lints aarch64
#
# DVPN_ADVISORY_DB names an unpacked RustSec advisory database, for machines that cannot fetch it.
# shellcheck source-path=SCRIPTDIR
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=lib/toolchain.sh
. scripts/lib/toolchain.sh

all=(format tree shell spelling dependencies unused lints aarch64)
# What a step that cannot run here leaves: the reason.
skip_reason=
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

check_format() {
  cargo fmt --all --check
}

# Names that must not be in the tree: package hosts, somebody's home, unfinished code. The patterns do not match
# themselves.
check_tree() {
  local found=0 what pattern
  while IFS='|' read -r what pattern; do
    pattern=${pattern//%%/|}
    if git grep -nIE "$pattern" -- . ':!Cargo.lock' ':!*/Cargo.lock'; then
      warn "the tree names $what"
      found=1
    fi
  done <<'PATTERNS'
a package host|(index|static)[.]crates[.]io%%pypi[.]org%%pythonhosted[.]org%%(deb|security)[.]debian[.]org%%registry[.]npmjs
an absolute home path|/[r]oot/%%/home/[a-z]%%/[U]sers/
unfinished code|[t]odo!\(%%[u]nimplemented!\(%%\b[F]IXME\b
PATTERNS
  return "$found"
}

shell_files() {
  git ls-files -z --cached --others --exclude-standard | while IFS= read -r -d '' file; do
    [[ -f $file ]] || continue
    case $file in
      *.sh | *.bash) printf '%s\n' "$file" ;;
      *) head -c 64 "$file" | tr -d '\0' | head -n 1 | grep -qE '^#!.*[/ ](bash|sh)( |$)' && printf '%s\n' "$file" ;;
    esac || true
  done
}

check_shell() {
  local files
  packages "checking shell" shellcheck
  mapfile -t files < <(shell_files)
  say "shellcheck: ${files[*]}"
  shellcheck --external-sources "${files[@]}"
}

check_spelling() {
  typos --config .typos.toml
}

# Licences, sources, bans; advisories from a given database, the one beside the project, or fetched.
check_dependencies() {
  local config=$scratch/deny.toml database=${DVPN_ADVISORY_DB-} archive=../shared/data/rustsec-advisory-db.tar.xz offline=()
  cp .deny.toml "$config"
  if [[ -z $database && -e $archive ]]; then
    packages "unpacking the advisory database" xz-utils
    database=$scratch/database
    mkdir "$database"
    tar -xJf "$archive" -C "$database"
  fi
  if [[ -n $database ]]; then
    say "Advisories from $database"
    # cargo-deny wants a git repository under the name it derives from the database's address.
    local repository=$scratch/advisories/advisory-db-3157b0e258782691
    mkdir -p "$repository"
    cp -r "$database/." "$repository"
    rm -rf "$repository/.git"
    git -C "$repository" init -q
    git -C "$repository" add -A
    git -C "$repository" -c user.name=check -c user.email=check@localhost -c commit.gpgsign=false commit -qm database
    sed -i "s|^\[advisories\]|&\ndb-path = \"$scratch/advisories\"|" "$config"
    offline=(--offline)
  fi
  cargo deny --config "$config" "${offline[@]}" check --hide-inclusion-graph
}

check_unused() {
  cargo shear
}

# All targets of all crates; this also builds the eBPF object.
check_lints() {
  DVPN_EBPF_REQUIRED=1 cargo clippy --locked --workspace --all-targets -- -D warnings
}

# The libraries and programs for 64-bit ARM: std comes from rustup, or is checked from Debian's sources.
check_aarch64() {
  local target=aarch64-unknown-linux-gnu flags=() sysroot
  packages "checking for aarch64" gcc-aarch64-linux-gnu g++-aarch64-linux-gnu libc6-dev-arm64-cross
  if ! command -v aarch64-linux-gnu-gcc >/dev/null; then
    skip_reason="no aarch64-linux-gnu-gcc for the C parts of aws-lc-rs and SQLite"
    return 0
  fi
  sysroot=$(rustc --print sysroot)
  if [[ ! -d $sysroot/lib/rustlib/$target ]]; then
    if has_core_sources /usr/bin/rustc; then
      PATH=/usr/bin:$PATH
      export RUSTC_BOOTSTRAP=1
      flags=(-Z "build-std=std,panic_abort")
    elif ! command -v rustup >/dev/null || ! quietly "Adding std of $target" rustup target add "$target"; then
      skip_reason="no std of $target: neither rustup has it nor are Debian's sources of std (rust-web-src) installed"
      return 0
    fi
  fi
  DVPN_EBPF_OBJECT=$(find target -path '*/out/dvpn-ebpf' -size +0 -print -quit)
  [[ -n $DVPN_EBPF_OBJECT ]] || unset DVPN_EBPF_OBJECT
  [[ -z ${DVPN_EBPF_OBJECT-} ]] || export DVPN_EBPF_OBJECT=$PWD/$DVPN_EBPF_OBJECT
  # Only checked, never linked: the host's description of libsystemd will do, and the probe that its build script links
  # for the target is answered by doing nothing.
  printf '#!/bin/sh\ncase " $* " in *" systemd_capabilities "*) exit 0 ;; esac\nexec %s "$@"\n' "$(command -v rustc)" \
    >"$scratch/rustc"
  chmod +x "$scratch/rustc"
  RUSTC=$scratch/rustc PKG_CONFIG_ALLOW_CROSS=1 CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc \
    cargo check --locked "${flags[@]}" --target "$target" --target-dir target/aarch64 \
    -p dvpn-common -p dvpn-core -p dvpn-daemon -p dvpn-pool
}

main() {
  local steps=("$@") step results=() failed=0 started status
  ((${#steps[@]})) || steps=("${all[@]}")
  for step in "${steps[@]}"; do
    [[ " ${all[*]} " == *" $step "* ]] || die "no step $step; there are: ${all[*]}"
  done
  ensure_rust
  ensure_build_packages
  ensure_lints
  ensure_ebpf
  ensure_tools
  for step in "${steps[@]}"; do
    say "check $step"
    started=$SECONDS
    skip_reason=
    # Not under `if`, where bash would go on after a failing command of the step.
    set +e
    run_step "$step"
    status=$?
    set -e
    if ((status == 0)); then
      if [[ -s $scratch/skip ]]; then
        results+=("skip $step: $(<"$scratch/skip")")
      else
        results+=("ok   $step ($((SECONDS - started)) s)")
      fi
    else
      results+=("FAIL $step ($((SECONDS - started)) s)")
      failed=1
    fi
  done
  say "check:"
  printf '  %s\n' "${results[@]}"
  return "$failed"
}

run_step() (
  set -e
  : >"$scratch/skip"
  "check_$1"
  printf '%s' "$skip_reason" >"$scratch/skip"
)

main "$@"
