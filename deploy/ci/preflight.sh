#!/usr/bin/env bash
# Asks a Prebake server whether node pools may move to COS builds: whether each of their
# nodes would find its driver. Ends with 0 when all of them may, with 16 when what one lacks
# is queued or being built, with 3 when one is not covered and nobody builds what it lacks,
# and with another status when the answer is not known.
#
# With PREBAKE_WAIT, in seconds, it asks again and again for so long.
#
# usage: preflight.sh BUILD_ID[:BOARD[:DRIVER[:FLAVOUR]]]…   (or the list in PREBAKE_POOLS;
# lib.sh has the rest)
set -euo pipefail
# shellcheck source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

pools=("$@")
((${#pools[@]} > 0)) || read -rd '' -a pools <<<"${PREBAKE_POOLS:-}" || true
((${#pools[@]} > 0)) || refuse "no node pool is named" "usage: preflight.sh BUILD_ID:BOARD:DRIVER:FLAVOUR…, such as 17800.66.78:lakitu:R535"
[[ ${PREBAKE_WAIT:=0} =~ ^[0-9]{1,6}$ ]] || refuse "PREBAKE_WAIT is ${PREBAKE_WAIT@Q}" "write a number of seconds"
for pool in "${pools[@]}"; do
  is_build_id "${pool%%:*}" || refuse "${pool@Q} begins with no COS build" "write a pool such as 17800.66.78:lakitu:R535"
done

# note keeps a line where the run's page on GitHub shows it.
note() { [[ -z ${GITHUB_STEP_SUMMARY:-} ]] || printf '%s\n' "$1" >>"$GITHUB_STEP_SUMMARY"; }

ask() {
  local id board driver flavour
  IFS=: read -r id board driver flavour <<<"$1"
  patiently preflight --build-id="$id" --board="${board:-lakitu}" --driver="${driver:-default}" --flavour="${flavour:-auto}"
}

while true; do
  waiting=() notes=() worst=$pending
  for pool in "${pools[@]}"; do
    printf '== %s\n' "$pool"
    status=0
    ask "$pool" || status=$?
    case $status in
      0) note "- $pool: may move" ;;
      "$pending")
        waiting+=("$pool")
        notes+=("- $pool: may **not** move yet, it is being built")
        ;;
      "$no_artifact") # yet: what was announced is planned a little later
        waiting+=("$pool")
        notes+=("- $pool: may **not** move, nobody builds it")
        worst=$no_artifact
        ;;
      *)
        note "- $pool: not known, status $status"
        exit "$status"
        ;;
    esac
  done
  ((${#waiting[@]} > 0)) || exit 0
  ((SECONDS < PREBAKE_WAIT)) || break
  pools=("${waiting[@]}") # what may move once, may
  sleep "${PREBAKE_PAUSE:-15}"
done
for line in "${notes[@]}"; do note "$line"; done
exit "$worst"
