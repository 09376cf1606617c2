#!/usr/bin/env bash
# This script prints the folder with a real kube-apiserver and its kubectl, for tests. The
# first time, it builds both from the Go module k8s.io/kubernetes. That module requires its
# parts, such as k8s.io/api, in the version v0.0.0, so "go install" refuses it. The script
# therefore replaces each part by the part's own module of the same release.
#
# It keeps both programs under the user's cache folder. Building them takes some minutes.
set -euo pipefail

version=${KUBERNETES_VERSION:-1.36.3}
root=${PREBAKE_STATE:-${XDG_CACHE_HOME:-$HOME/.cache}/prebake}/tools
dir=$root/kubernetes-$version-$(cd / && go env GOVERSION)

if [[ ! -x $dir/kubectl ]]; then
  echo "kubernetes: building $version (once; kept in $dir)" >&2
  mkdir -p "$root"
  tmp=$(mktemp -d "$root/.new-XXXXXX")
  trap 'rm -rf "$tmp"' EXIT
  start=$SECONDS
  cd "$tmp"
  export CGO_ENABLED=0 GOFLAGS=-mod=mod GOWORK=off
  go mod init example.com/kubernetes 2>/dev/null
  list=$(go mod download -json "k8s.io/kubernetes@v$version" | sed -n 's/^.*"GoMod": "\(.*\)".*$/\1/p')
  while read -r part; do
    go mod edit -replace "$part=$part@v0.${version#1.}"
  done < <(sed -n 's/^\s*\(k8s\.io\/[^ ]*\) v0\.0\.0$/\1/p' "$list" | sort -u)
  go mod edit -require "k8s.io/kubernetes@v$version" -go "$(sed -n 's/^go //p' "$list")"
  mkdir new
  for program in kube-apiserver kubectl; do
    go build -trimpath -ldflags='-s -w' -o "new/$program" "k8s.io/kubernetes/cmd/$program" >&2
  done
  # If two runs build at the same time, the folder of the first one to end stays.
  mv -T new "$dir" 2>/dev/null || [[ -x $dir/kubectl ]]
  echo "kubernetes: built in $((SECONDS - start)) s" >&2
fi
echo "$dir"
