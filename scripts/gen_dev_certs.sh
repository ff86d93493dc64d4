#!/usr/bin/env bash
# Makes a certificate authority and a server certificate for development, once:
#   certs/dev-ca.crt  certs/dev-ca.key  certs/server.crt  certs/server.key
# The server certificate holds for localhost, 127.0.0.1, ::1 and every name given as an argument:
#   scripts/gen_dev_certs.sh IP:203.0.113.10 DNS:pool.example
# A second run changes nothing, except that names not yet in the certificate give a new server certificate from the
# same authority. CERTS_DIRECTORY puts the files elsewhere.
set -euo pipefail

directory=${CERTS_DIRECTORY:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/certs}
days=825

command -v openssl >/dev/null || {
    echo "gen_dev_certs: openssl is missing: apt-get install openssl" >&2
    exit 1
}

names=(DNS:localhost IP:127.0.0.1 IP:::1)
for name in "$@"; do
    case $name in
    IP:?* | DNS:?*) names+=("$name") ;;
    *)
        echo "gen_dev_certs: '$name' must be IP:ADDRESS or DNS:NAME" >&2
        exit 2
        ;;
    esac
    case $name in
    *[[:space:],\;\[\]=\$\\]*)
        echo "gen_dev_certs: '$name' holds a character that no name has" >&2
        exit 2
        ;;
    esac
done

[[ -d $directory ]] || install -d -m 0755 "$directory" # the authority's certificate is for everybody
umask 077
# Two runs at once would make a certificate that its key does not fit.
exec 9>"$directory/.lock"
flock 9
work=$(mktemp -d "$directory/.new.XXXXXX")
trap 'rm -rf "$work"' EXIT

openssl_run() {
    openssl "$@" 2>"$work/log" || {
        cat "$work/log" >&2
        exit 1
    }
}

new_key() {
    openssl_run genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out "$1"
}

serial() {
    # 159 bits, so that the number is positive in 20 bytes.
    printf '0x5%s' "$(openssl rand -hex 19)"
}

# Whether the file exists, reads, and lasts for another day.
lasts() {
    [[ -s $1 ]] && openssl x509 -in "$1" -noout -checkend 86400 >/dev/null 2>&1
}

if ! lasts "$directory/dev-ca.crt" || [[ ! -s $directory/dev-ca.key ]]; then
    cat >"$work/ca.cnf" <<'CONFIG'
[req]
distinguished_name = subject
x509_extensions = authority
prompt = no
[subject]
CN = DVPN development CA
[authority]
basicConstraints = critical, CA:TRUE, pathlen:0
keyUsage = critical, keyCertSign, cRLSign
subjectKeyIdentifier = hash
CONFIG
    new_key "$work/dev-ca.key"
    openssl_run req -x509 -new -sha256 -days "$days" -config "$work/ca.cnf" -set_serial "$(serial)" \
        -key "$work/dev-ca.key" -out "$work/dev-ca.crt"
    rm -f "$directory/server.crt" "$directory/server.key"
    mv -f "$work/dev-ca.key" "$directory/dev-ca.key"
    mv -f "$work/dev-ca.crt" "$directory/dev-ca.crt"
    chmod 0644 "$directory/dev-ca.crt"
    echo "gen_dev_certs: made $directory/dev-ca.crt"
fi

# Whether the server certificate holds for a name; openssl compares addresses by value.
holds_for() {
    case $1 in
    IP:*) openssl x509 -in "$directory/server.crt" -noout -checkip "${1#IP:}" ;;
    DNS:*) openssl x509 -in "$directory/server.crt" -noout -checkhost "${1#DNS:}" ;;
    esac 2>/dev/null | grep -q 'does match'
}

stale=
if ! lasts "$directory/server.crt" || [[ ! -s $directory/server.key ]] ||
    ! openssl verify -CAfile "$directory/dev-ca.crt" "$directory/server.crt" >/dev/null 2>&1; then
    stale=yes
else
    for name in "${names[@]}"; do
        holds_for "$name" || stale=yes
    done
    # Names of earlier runs stay.
    while read -r name; do
        [[ -n $name ]] && names+=("$name")
    done < <(openssl x509 -in "$directory/server.crt" -noout -ext subjectAltName 2>/dev/null |
        tail -n +2 | tr ',' '\n' | sed 's/^ *//; s/ *$//; s/^IP Address:/IP:/' |
        grep -vxE 'DNS:localhost|IP:127\.0\.0\.1|IP:0:0:0:0:0:0:0:1' || true)
fi

if [[ -n $stale ]]; then
    list=$(printf '%s\n' "${names[@]}" | awk '!seen[$0]++' | paste -sd, -)
    cat >"$work/server.cnf" <<CONFIG
[req]
distinguished_name = subject
prompt = no
[subject]
CN = DVPN development server
[server]
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = serverAuth
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
subjectAltName = $list
CONFIG
    new_key "$work/server.key"
    openssl_run req -new -sha256 -config "$work/server.cnf" -key "$work/server.key" -out "$work/server.csr"
    openssl_run x509 -req -sha256 -days "$days" -in "$work/server.csr" -extfile "$work/server.cnf" -extensions server \
        -CA "$directory/dev-ca.crt" -CAkey "$directory/dev-ca.key" -set_serial "$(serial)" -out "$work/server.crt"
    mv -f "$work/server.key" "$directory/server.key"
    mv -f "$work/server.crt" "$directory/server.crt"
    chmod 0644 "$directory/server.crt"
    echo "gen_dev_certs: made $directory/server.crt for $list"
else
    echo "gen_dev_certs: $directory is complete"
fi
