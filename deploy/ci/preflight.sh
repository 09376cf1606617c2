#!/usr/bin/env bash
# This script asks a Prebake server whether node pools may move to COS builds. A pool may move
# if its nodes would find their driver there. The script ends with one of these statuses:
#
#   0      all pools may move
#   16     a pool may not move yet: the artifact that it needs is queued or being built
#   3      a pool may not move: the artifact that it needs is missing, and nobody builds it
#   other  the server did not answer the question; the status is that of the command line
#
# PREBAKE_WAIT is a time in seconds (default: 0). Until this time is over, the script asks
# again about the pools that may not move yet.
#
# usage: preflight.sh BUILD_ID[:BOARD[:DRIVER[:FLAVOUR]]]…   (or the list in PREBAKE_POOLS;
# lib.sh describes the other variables). A GKE version may be given in place of BUILD_ID.
set -euo pipefail
# shellcheck source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

pools=("$@")
((${#pools[@]} > 0)) || read -rd '' -a pools <<<"${PREBAKE_POOLS:-}" || true
((${#pools[@]} > 0)) || refuse "no node pool is named" "usage: preflight.sh BUILD_ID:BOARD:DRIVER:FLAVOUR…, such as 17800.66.78:lakitu:R535"
[[ ${PREBAKE_WAIT:=0} =~ ^[0-9]{1,6}$ ]] || refuse "PREBAKE_WAIT is ${PREBAKE_WAIT@Q}" "write a number of seconds"
for pool in "${pools[@]}"; do
  is_build_id "${pool%%:*}" || [[ ${pool%%:*} =~ ^v?[0-9]+\.[0-9]+\.[0-9]+-gke\.[0-9]+$ ]] ||
    refuse "${pool@Q} begins with no COS build" "write a pool such as 17800.66.78:lakitu:R535 or 1.33.5-gke.1080000:lakitu"
done

# note adds a line to the summary that GitHub shows on the page of a workflow's run.
note() { [[ -z ${GITHUB_STEP_SUMMARY:-} ]] || printf '%s\n' "$1" >>"$GITHUB_STEP_SUMMARY"; }

ask() {
  local id board driver flavour
  IFS=: read -r id board driver flavour <<<"$1"
  with_retries preflight --build-id="$id" --board="${board:-lakitu}" --driver="${driver:-default}" --flavour="${flavour:-auto}"
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
      "$no_artifact") # asks again: the server plans this cell a little after an announcement
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
  pools=("${waiting[@]}") # do not ask again about pools that may move
  sleep "${PREBAKE_PAUSE:-15}"
done
for line in "${notes[@]}"; do note "$line"; done
exit "$worst"
