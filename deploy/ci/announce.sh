#!/usr/bin/env bash
# Tells a Prebake server of COS builds, so that it plans and queues at once what its wish
# lists want of them. Telling twice does no harm.
#
# usage: announce.sh BUILD_ID…   (or the list in PREBAKE_BUILD_IDS; lib.sh has the rest)
set -euo pipefail
# shellcheck source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

ids=("$@")
((${#ids[@]} > 0)) || read -rd '' -a ids <<<"${PREBAKE_BUILD_IDS:-}" || true
((${#ids[@]} > 0)) || refuse "no COS build is named" "usage: announce.sh BUILD_ID…, such as 17800.66.78"
for id in "${ids[@]}"; do
  is_build_id "$id" || refuse "${id@Q} is no COS build" "write the number of a release, such as 17800.66.78"
done

# Trouble with one of them keeps the server from none of the others.
first=0
for id in "${ids[@]}"; do
  status=0
  patiently announce "$id" || status=$?
  ((first)) || first=$status
done
exit "$first"
