#!/usr/bin/env bash
# This script announces COS builds to a Prebake server. The server then plans the cells that
# its wish lists want for these COS builds, and queues them at once. Announcing a COS build
# twice does no harm.
#
# usage: announce.sh BUILD_ID…   (or the list in PREBAKE_BUILD_IDS; lib.sh describes the
# other variables)
set -euo pipefail
# shellcheck source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

ids=("$@")
((${#ids[@]} > 0)) || read -rd '' -a ids <<<"${PREBAKE_BUILD_IDS:-}" || true
((${#ids[@]} > 0)) || refuse "no COS build is named" "usage: announce.sh BUILD_ID…, such as 17800.66.78"
for id in "${ids[@]}"; do
  is_build_id "$id" || refuse "${id@Q} is no COS build" "write the number of a release, such as 17800.66.78"
done

# If the announcement of a COS build fails, the script still announces the others. It ends
# with the status of the first failure.
first=0
for id in "${ids[@]}"; do
  status=0
  with_retries announce "$id" || status=$?
  ((first)) || first=$status
done
exit "$first"
