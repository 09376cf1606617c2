#!/usr/bin/env bash
# Prints the path of a Go tool at a pinned version; builds it the first time.
# The build is kept under the user's cache folder, by tool, tool version and Go
# version, so that a fresh clone does not pay for it again.
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
  # Outside the module: a tool brings its own dependencies, not ours.
  (cd / && GOBIN=$tmp CGO_ENABLED=0 GOFLAGS= go install -trimpath -ldflags='-s -w' "$package" >&2)
  # Two builds at once: the first one to arrive stays.
  mv -T "$tmp" "$dir" 2>/dev/null || [[ -x $dir/$name ]]
  echo "tool: built $name in $((SECONDS - start)) s" >&2
fi
echo "$dir/$name"
