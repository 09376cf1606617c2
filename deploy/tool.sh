#!/usr/bin/env bash
# This script prints the path of a Go tool in a pinned version. The first time, it
# builds the tool. It keeps the program in the user's cache folder, in a folder for
# this tool, tool version and Go version. A fresh clone of the repository then does
# not build the tool again.
#
# usage: deploy/tool.sh MODULE@VERSION   (as for "go install")
set -euo pipefail

package=${1:?usage: deploy/tool.sh MODULE@VERSION}
name=$(basename "${package%@*}")
version=${package##*@}
root=${PREBAKE_STATE:-${XDG_CACHE_HOME:-$HOME/.cache}/prebake}/tools
dir=$root/$name-$version-$(cd / && go env GOVERSION)

if [[ ! -x $dir/$name ]]; then
  echo "tool: building $name $version (once; kept in $dir)" >&2
  mkdir -p "$root"
  tmp=$(mktemp -d "$root/.new-XXXXXX")
  trap 'rm -rf "$tmp"' EXIT
  start=$SECONDS
  # Run outside of this module, so that the tool gets its own dependencies, and not those in
  # our go.mod.
  (cd / && GOBIN=$tmp CGO_ENABLED=0 GOFLAGS= go install -trimpath -ldflags='-s -w' "$package" >&2)
  # If two runs build at the same time, the folder of the first one to end stays.
  mv -T "$tmp" "$dir" 2>/dev/null || [[ -x $dir/$name ]]
  echo "tool: built $name in $((SECONDS - start)) s" >&2
fi
echo "$dir/$name"
