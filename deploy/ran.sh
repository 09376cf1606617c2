#!/usr/bin/env bash
# This script runs a command that runs Go tests, such as go test. It fails if the command
# fails. It also fails if there was no test to run or if a test was skipped: go test counts
# both as passed. With --may-skip, a test may be skipped. The command must print which tests
# it runs (go test -v), or else the script cannot see that one was skipped.
#
# usage: deploy/ran.sh [--may-skip] COMMAND…
set -euo pipefail

refused=(-e 'no tests to run' -e '--- SKIP')
if [[ ${1-} == --may-skip ]]; then
  refused=(-e 'no tests to run')
  shift
fi
log=$(mktemp)
trap 'rm -f "$log"' EXIT
"$@" | tee "$log"
if line=$(grep -m 1 "${refused[@]}" "$log"); then
  echo "deploy/ran.sh: a test did not run: $line" >&2
  exit 1
fi
