#!/usr/bin/env bash
# Has the orchestrator make a provider for this client.
#
# Reads {"user_id","token","public_key","timeout_seconds"} on standard input, prints the provider as JSON, says on
# standard error what went wrong. With them comes "proof", where the orchestrator gives challenges
# (provision/challenge): that the client holds the private half of public_key. The request is passed on as it is. FALLBACK_ORCHESTRATOR_URL says whom to ask, FALLBACK_CA_CERT (optional, PEM) whom to
# trust instead of the system's roots. The token passes through pipes alone: never an argument, never the environment.
set -euo pipefail

# What the daemon reads, and the status that curl adds.
readonly MAX_ANSWER_BYTES=$((65536 + 4))

fail() {
    printf 'setup_fallback_node: %s\n' "$1" >&2
    exit 1
}

url=${FALLBACK_ORCHESTRATOR_URL:-}
[[ $url == https://* ]] || fail 'FALLBACK_ORCHESTRATOR_URL must be set and begin with https://'

request=$(cat)
[[ $request =~ \"timeout_seconds\"[[:space:]]*:[[:space:]]*([0-9]{1,4})[^0-9] ]] ||
    fail 'the request on standard input has no timeout_seconds'
seconds=$((10#${BASH_REMATCH[1]}))
# A second is left to say what went wrong before the daemon's own limit.
((seconds > 1)) && seconds=$((seconds - 1))

options=(
    --disable --silent --show-error --globoff --write-out '\n%{http_code}'
    --proto '=https' --tlsv1.2 --max-redirs 0 --noproxy '*'
    --connect-timeout 10 --max-time "$seconds"
    --header 'Content-Type: application/json' --header 'Accept: application/json'
    --data-binary @-
)
# In device mode every other way is blocked: this socket of the daemon's leads to the orchestrator.
if [[ -n ${FALLBACK_SOCKET:-} ]]; then
    options+=(--unix-socket "$FALLBACK_SOCKET")
fi
if [[ -n ${FALLBACK_CA_CERT:-} ]]; then
    options+=(--cacert "$FALLBACK_CA_CERT" --capath /nonexistent)
fi

# printf is a builtin of bash: no program has the request among its arguments. An answer that is too long loses its last
# line, the status, and so is none.
answer=$(printf '%s' "$request" | curl "${options[@]}" --url "${url%/}/provision" | head -c "$MAX_ANSWER_BYTES") ||
    fail 'the orchestrator did not answer'
status=${answer##*$'\n'}
body=${answer%$'\n'*}
[[ $status =~ ^2[0-9][0-9]$ ]] || fail "the orchestrator made no provider (HTTP ${status:0:3}): ${body:0:300}"
printf '%s\n' "$body"
