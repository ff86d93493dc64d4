#!/usr/bin/env bash
# The name services that the tests run, unpacked and never installed: installed, they would take this machine's own name
# resolution over, and two of them exclude each other. Sourced by scripts/test.sh.
# shellcheck source-path=SCRIPTDIR

# Where they are unpacked, each in a folder of its own; the tests know the place by this variable.
export DVPN_NAME_SERVICES=${DVPN_NAME_SERVICES-${XDG_CACHE_HOME:-${HOME:-/var/cache}/.cache}/dvpn/name-services-1}

# ensure_name_services: downloads and unpacks what is missing.
ensure_name_services() {
  [[ ! -e $DVPN_NAME_SERVICES/complete ]] || return 0
  command -v apt-get >/dev/null || die "the tests of name resolution need Debian's systemd-resolved, network-manager, \
resolvconf and openresolv, unpacked below $DVPN_NAME_SERVICES"
  if [[ -z ${apt_updated-} ]]; then
    quietly "Updating the package lists" as_root apt-get update -q
    apt_updated=yes
  fi
  quietly "Unpacking systemd-resolved, NetworkManager, resolvconf and openresolv into $DVPN_NAME_SERVICES" \
    unpack_name_services
}

unpack_name_services() {
  local root archives folder package
  mkdir -p "$(dirname "$DVPN_NAME_SERVICES")"
  root=$(mktemp -d "$DVPN_NAME_SERVICES.XXXXXX")
  chmod 755 "$root"
  archives=$(mktemp -d)
  mkdir -p "$archives/system/partial" "$archives/resolvconf" "$archives/openresolv"
  # With whatever of their libraries this machine lacks.
  as_root apt-get install -y -q --no-install-recommends --reinstall --download-only \
    -o "Dir::Cache::archives=$archives/system" systemd-resolved network-manager
  for package in resolvconf openresolv; do
    (cd "$archives/$package" && apt-get download -q "$package")
  done
  for folder in system resolvconf openresolv; do
    mkdir -p "$root/$folder/usr/bin" "$root/$folder/usr/sbin" "$root/$folder/usr/lib"
    # As on the machine that they are laid over.
    ln -s usr/bin usr/sbin usr/lib "$root/$folder"
    for package in "$archives/$folder"/*.deb; do dpkg-deb --fsys-tarfile "$package" |
      tar -xf - -C "$root/$folder" --keep-directory-symlink --no-same-owner; done
  done
  as_root rm -rf "$archives"
  touch "$root/complete"
  # Whole or not at all; one that is there is incomplete.
  rm -rf "$DVPN_NAME_SERVICES"
  mv -T "$root" "$DVPN_NAME_SERVICES"
}
