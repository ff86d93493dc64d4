#!/usr/bin/env bash
# Runs something as root on a Debian kernel of its own, in QEMU under software emulation (no KVM is needed).
#
#   scripts/vm.sh KERNEL FOLDER
#
# KERNEL is `release`, that of this machine's own Debian (6.1 on Debian 12), or `backports` (6.12 there): programs built
# here find the same libraries in the machine. FOLDER holds the program or script `run`, and all it needs; it is
# copied into the machine as /brought, read-only. Its output comes on stdout; its exit status is this script's, or 125
# when the machine did not come as far. DVPN_VM_SECONDS (480) limits the run.
#
# The machine's disk is built once by mmdebstrap from this machine's own Debian mirror and kept under
# ${XDG_CACHE_HOME:-~/.cache}/dvpn, by the hash of all it is made from; a run never changes it.
# shellcheck source-path=SCRIPTDIR
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=lib/toolchain.sh
. scripts/lib/toolchain.sh
: "${cache:?}"

readonly LIMIT=${DVPN_VM_SECONDS:-480}
readonly BUILD_LIMIT=900
readonly KERNEL=linux-image-cloud-amd64
readonly PACKAGES=kmod,iproute2,iputils-ping,procps,ethtool,nftables,wireguard-tools,openssl,ca-certificates,curl,dbus,systemd,initramfs-tools

usage() { sed -n '2,13s/^# \{0,1\}//p' "$0"; }

# mirror RELEASE: where apt gets it from here; nothing when it does not.
mirror() {
  local found
  # shellcheck disable=SC2016 # apt's own variable
  found=$(apt-get indextargets --format '$(SITE)' "Codename: $1" 'Origin: Debian' 2>/dev/null | head -n 1 || true)
  echo "$found"
}

# image RELEASE SUITE: the folder with disk, kernel and initrd; it appears whole or not at all.
image() {
  local release=$1 suite=$2 site version key folder work
  site=$(mirror "$release")
  [[ -n $site ]] || die "apt has no package lists of Debian $release: run apt-get update"
  version=$(apt-cache policy "$KERNEL" 2>/dev/null | awk '$1 == "Candidate:" { print $2 }')
  key=$({
    echo "$release $suite $KERNEL $PACKAGES ${version:-any}"
    cat scripts/vm/*
  } | sha256sum | cut -c 1-16)
  folder=$cache/vm-$suite-$key
  if [[ ! -e $folder/disk.ext4 ]]; then
    mkdir -p "$cache"
    work=$(mktemp -d "$cache/vm-building.XXXXXX")
    # The work stays nowhere, whatever happens.
    trap 'rm -rf "$work"' RETURN
    quietly "Building the virtual machine's disk ($suite)" \
      timeout "$BUILD_LIMIT" scripts/vm/build.sh "$work" "$site" "$release" "$suite" "$KERNEL" "$PACKAGES" >&2 ||
      die "the virtual machine's disk could not be built"
    # Another run may have been quicker.
    mv -T "$work/image" "$folder" 2>/dev/null || [[ -e $folder/disk.ext4 ]] || die "$folder could not be put in place"
  fi
  echo "$folder"
}

main() {
  local kernel=${1-} brought=${2-} release suite folder work status
  [[ -n $kernel && -x $brought/run ]] || {
    usage >&2
    exit 2
  }
  ((EUID == 0)) || die "building the machine's disk needs root: sudo scripts/vm.sh …"
  release=$(. /etc/os-release && [[ $ID == debian ]] && echo "$VERSION_CODENAME") || die "this is no Debian"
  case $kernel in
  release) suite=$release ;;
  backports) suite=$release-backports ;;
  *) die "no kernel $kernel; there are release and backports" ;;
  esac
  packages "the virtual machine" qemu-system-x86 mmdebstrap e2fsprogs >&2
  folder=$(image "$release" "$suite")
  work=$(mktemp -d)
  # shellcheck disable=SC2064 # the folder as it is now
  trap "rm -rf '$work'" EXIT
  local kilobytes
  kilobytes=$(($(du -sk "$brought" | cut -f 1) * 5 / 4 + 16384))
  mkfs.ext4 -q -F -O ^has_journal -d "$brought" "$work/brought.ext4" "${kilobytes}k"
  # -snapshot: what the guest writes is forgotten. Wider processor features make 6.12 crash under emulation.
  status=0
  timeout --kill-after 5 "$LIMIT" qemu-system-x86_64 -accel tcg,thread=multi -smp 1 \
    -cpu max,la57=off,pku=off,cx16=off -m 1536 -snapshot \
    -kernel "$folder/vmlinuz" -initrd "$folder/initrd" \
    -append "root=/dev/vda rw console=ttyS0 quiet panic=-1 mitigations=off init=/usr/local/sbin/vm-init" \
    -drive "file=$folder/disk.ext4,format=raw,if=virtio" -drive "file=$work/brought.ext4,format=raw,if=virtio" \
    -display none -serial "file:$work/console" -serial stdio -monitor none -no-reboot -nic none \
    </dev/null | sed -u 's/\r$//' | tee "$work/output" | sed -u '/^vm-exit-status [0-9]*$/d' || status=$?
  local told
  told=$(sed -n 's/^vm-exit-status \([0-9]*\)$/\1/p' "$work/output" | tail -n 1)
  if [[ -z $told ]]; then
    warn "the virtual machine did not come to an end within $LIMIT s (status $status); its console:"
    tail -n 30 "$work/console" >&2 || true
    exit 125
  fi
  exit "$told"
}

main "$@"
