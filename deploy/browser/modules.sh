#!/usr/bin/env bash
# This script prints the folder with the npm packages in package-lock.json. The first
# time, it installs the packages. playwright-core drives Chromium; axe-core judges
# accessibility. The folder is in the user's cache folder, and its name is the hash of
# package-lock.json. The packages come from the registry that npm is configured with.
#
# usage: deploy/browser/modules.sh
set -euo pipefail
cd "$(dirname "$0")"

root=${PREBAKE_STATE:-${XDG_CACHE_HOME:-$HOME/.cache}/prebake}/browser
hash=$(sha256sum package-lock.json)
dir=$root/${hash:0:16}

if [[ ! -d $dir/node_modules ]]; then
  for program in node npm; do
    command -v "$program" >/dev/null ||
      { echo "modules: there is no $program; run: deploy/setup.sh browser" >&2; exit 1; }
  done
  echo "modules: installing the packages in package-lock.json (once; kept in $dir)" >&2
  mkdir -p "$root"
  tmp=$(mktemp -d "$root/.new-XXXXXX")
  trap 'rm -rf "$tmp"' EXIT
  cp package.json package-lock.json .npmrc "$tmp"
  # Neither package needs an install script, because the browser comes from Debian.
  (cd "$tmp" && npm ci --ignore-scripts --no-audit --no-fund --loglevel=error >&2)
  # If two runs install at the same time, the folder of the first one to end stays.
  mv -T "$tmp" "$dir" 2>/dev/null || [[ -d $dir/node_modules ]]
fi
echo "$dir/node_modules"
