#!/usr/bin/env bash
# build.sh WORK MIRROR RELEASE SUITE KERNEL PACKAGES: makes WORK/image with disk.ext4, vmlinuz and initrd. Called by vm.sh.
set -euo pipefail
work=$1 mirror=$2 release=$3 suite=$4 kernel=$5 packages=$6
here=$(cd "$(dirname "$0")" && pwd)

sources=("deb $mirror $release main")
include=$packages,$kernel
if [[ $suite != "$release" ]]; then
  sources+=("deb $mirror $suite main")
  include=$packages,$kernel/$suite
fi
mmdebstrap --mode=root --variant=minbase --include="$include" --dpkgopt='path-exclude=/usr/share/doc/*' \
  --dpkgopt='path-exclude=/usr/share/locale/*' "$release" "$work/tree" "${sources[@]}"
install -m 755 "$here/init" "$work/tree/usr/local/sbin/vm-init"
mkdir -p "$work/tree/brought" "$work/image"
cp "$work"/tree/boot/vmlinuz-* "$work/image/vmlinuz"
cp "$work"/tree/boot/initrd.img-* "$work/image/initrd"
rm -rf "$work"/tree/boot/* "$work"/tree/var/cache/apt/* "$work"/tree/var/lib/apt/lists/*
mkfs.ext4 -q -F -O ^has_journal -L root -d "$work/tree" "$work/image/disk.ext4" 1536M
