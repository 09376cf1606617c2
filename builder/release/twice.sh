#!/usr/bin/env bash
# twice.sh makes the release of this commit twice and compares every byte, except the signatures. It
# works in two clones whose paths differ in length, and each clone has its own compiler cache. For the
# second release, the clock of all programs that use the C library (compilers, git, tar, dpkg-deb)
# is 40 days ahead. Go programs ask the kernel for the time, so this clock does not reach them. The
# test TestAsksNoClock checks that the release program uses no clock.
#
# usage: builder/release/twice.sh [--warm]   With --warm, both clones share this machine's compiler
# cache: images, manifests and links are made twice, and objects once.
set -euo pipefail
cd "$(dirname "$0")/../.."

warm=
[[ ${1:-} == --warm ]] && warm=1
work=$(mktemp -d)
trap 'chmod -R u+w "$work"; rm -rf "$work"' EXIT

# release_in CLONE [COMMAND…] makes a release in a new clone. COMMAND runs the release program.
release_in() {
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
GOTOOLCHAIN=$(sed -n 's/^go /go/p' go.mod) # this Go also runs the release program
export GOTOOLCHAIN
release_in "$work/first"
release_in "$work/a/second/clone" faketime -f +40d

# Each release is signed with its own key, which was deleted after the signing.
for dir in "$work/first/release" "$work/a/second/clone/release"; do
  (cd "$dir" && sha256sum --quiet --strict --check SHA256SUMS)
  go run ./builder/release -out "$dir" -verify "$dir/signatures/throw-away.pub"
done
if ! diff --recursive --brief --exclude signatures "$work/first/release" "$work/a/second/clone/release"; then
  trap - EXIT
  echo "twice: the releases differ; they stay, with their compiler caches, in $work" >&2
  exit 1
fi
echo "twice: $(find "$work/first/release" -type f -not -path '*/signatures/*' | wc -l) files are equal," \
  "$(du -sm "$work/first/release" | cut -f1) MB"
