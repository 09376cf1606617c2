#!/usr/bin/env bash
# Makes the release of this commit twice and compares every byte, but for the signatures: in two
# clones, at paths of different length, each with a compiler cache of its own, the second 40 days
# later by the clock of everything that uses the C library (compilers, git, tar, dpkg-deb). Go's
# programs ask the kernel for the time: what they write has none, which a test looks after.
#
# usage: builder/release/twice.sh [--warm]   --warm shares this machine's compiler cache, so that
# images, manifests and links are made twice, and objects once
set -euo pipefail
cd "$(dirname "$0")/../.."

warm=
[[ ${1:-} == --warm ]] && warm=1
work=$(mktemp -d)
trap 'chmod -R u+w "$work"; rm -rf "$work"' EXIT

# one CLONE [COMMAND…]: a release in a clone
one() {
  local clone=$1 start=$SECONDS
  shift
  git clone -q . "$clone"
  (
    cd "$clone"
    git checkout -q "$commit"
    [[ -n $warm ]] || export GOCACHE=$work/cache-$(basename "$clone")
    "$@" go run ./builder/release -out release
  )
  echo "twice: release in $clone took $((SECONDS - start)) s" >&2
}
commit=$(git rev-parse HEAD)
GOTOOLCHAIN=$(sed -n 's/^go /go/p' go.mod) # which runs the assembler, too
export GOTOOLCHAIN
one "$work/first"
one "$work/a/second/clone" faketime -f +40d

# Both are signed, with keys that were thrown away.
for dir in "$work/first/release" "$work/a/second/clone/release"; do
  (cd "$dir" && sha256sum --quiet --strict --check SHA256SUMS)
  go run ./builder/release -out "$dir" -verify "$dir/signatures/throw-away.pub"
done
diff --recursive --brief --exclude signatures "$work/first/release" "$work/a/second/clone/release"
echo "twice: $(find "$work/first/release" -type f -not -path '*/signatures/*' | wc -l) files are equal," \
  "$(du -sm "$work/first/release" | cut -f1) MB"
