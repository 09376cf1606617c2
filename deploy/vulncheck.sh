#!/usr/bin/env bash
# This script runs govulncheck over all packages. It fails if govulncheck finds a
# vulnerability. If Go's own database cannot be reached, it prints one line that says so,
# and succeeds. .ci/run repeats this line at its end. On a machine without a network, set
# GOVULNDB to a copy of the database (file:///…). The script fails if it cannot read that.
#
# usage: deploy/vulncheck.sh GOVULNCHECK DATABASE
set -euo pipefail
tool=$1 db=$2
public=https://vuln.go.dev # as in the Makefile

# Check one small package first: that takes only seconds, and shows whether the database
# can be reached.
if ! answer=$("$tool" -db "$db" ./pkg/fault 2>&1); then
  if [[ $answer == *"fetching vulnerabilities"* ]]; then
    echo "lint: known vulnerabilities were not checked: ${answer##*fetching vulnerabilities: }" >&2
    [[ $db == "$public" ]] && exit 0
    echo "lint: the database GOVULNDB=$db cannot be read" >&2
    exit 1
  fi
fi
exec "$tool" -db "$db" ./...
