#!/usr/bin/env bash
# This script builds the three images with buildah, starts the programs in them, and
# prints the images' sizes and digests. It needs neither a registry nor a daemon. The base
# image is a Debian root that debootstrap makes from this machine's own apt sources. The
# script keeps that root under the user's cache folder.
#
# usage: deploy/images.sh [--arm64] [FOLDER]   write images as OCI archives into FOLDER (bin/images)
#   --arm64        build builder-arm64, and fetcher for both architectures, and not the three images
#   BASE_IMAGE=…   use this base image, and do not make one
set -euo pipefail
cd "$(dirname "$0")/.."

cache=${PREBAKE_STATE:-${XDG_CACHE_HOME:-$HOME/.cache}/prebake}
suite=bookworm
images=(builder server fetcher)
programs=(builder server fetcher nvmlprobe guestinit)
fetcher_bytes=30000000

say() { echo "images: $*" >&2; }
args=("$@")
if [[ ${1:-} == --arm64 ]]; then
  shift
  images=(builder-arm64 fetcher)
  programs+=(guestinit-arm64 nvmlprobe-arm64 fetcher-arm64)
fi
out=${1:-bin/images}
for program in "${programs[@]}"; do
  [[ -x bin/$program ]] || { say "bin/$program is missing; run: make build (for --arm64 also: make arm64-programs)"; exit 1; }
done

mkdir -p "$cache/images" "$out"
if ((EUID != 0)); then
  # Only root can make a root file system with files of several owners and with devices.
  say "going on with sudo"
  exec sudo PREBAKE_STATE="$cache" PREBAKE_OWNER="$(id -u):$(id -g)" BASE_IMAGE="${BASE_IMAGE:-}" deploy/images.sh "${args[@]}"
fi

work=$(mktemp -d "$cache/images/.work-XXXXXX")
# leave removes the temporary files. If a user started the script, leave makes that user the
# owner of the files that root has made in the user's folders: otherwise the user's next make or
# builder could not open them.
leave() {
  rm -rf "$work" || true
  [[ -n ${PREBAKE_OWNER:-} ]] || return 0
  local name files=("$cache")
  [[ $out != bin/images ]] || files+=("$out")
  for name in "${images[@]}"; do
    [[ ! -f $out/$name.tar ]] || files+=("$out/$name.tar")
  done
  chown -hR --from=0 "$PREBAKE_OWNER" "${files[@]}" || say "could not make you the owner of the files that root made in ${files[*]}"
}
trap leave EXIT

# debian_sources prints this machine's Debian sources as lines of a sources.list.
debian_sources() {
  # shellcheck disable=SC2016 # apt expands these, not the shell
  apt-get indextargets --format 'deb $(REPO_URI) $(CODENAME) $(COMPONENT)' \
    'Created-By: Packages' 'Origin: Debian' 'Component: main' | sort -u | grep -E " $suite(-security|-updates)? "
}

# base_tar sets base_file to the path of a tar of the Debian root. If the cache has no such
# tar, base_tar makes it. The name of the tar has the version of Debian's package base-files,
# which changes with each Debian point release.
base_tar() {
  [[ -n $(debian_sources || true) ]] || apt-get -q update >/dev/null
  local version tar mirror start=$SECONDS
  version=$(apt-cache show --no-all-versions base-files | sed -n 's/^Version: //p')
  tar=$cache/images/$suite-${version//[^a-zA-Z0-9.]/_}-$(dpkg --print-architecture).tar
  if [[ -f $tar ]]; then
    say "base $(basename "$tar") from the cache"
  else
    mirror=$(debian_sources | awk -v suite="$suite" '$3 == suite { print $2; exit }')
    say "making the base with debootstrap"
    debootstrap --variant=minbase "$suite" "$work/base" "$mirror" >"$work/debootstrap.log" 2>&1 </dev/null ||
      { tail -n 20 "$work/debootstrap.log" >&2; say "debootstrap failed"; exit 1; }
    debian_sources >"$work/base/etc/apt/sources.list"
    rm -rf "$work"/base/var/cache/apt/* "$work"/base/var/lib/apt/lists/* "$work"/base/var/log/*
    tar -C "$work/base" --numeric-owner --one-file-system -cf "$work/base.tar" .
    rm -rf "$work/base"
    mv "$work/base.tar" "$tar"
    say "base made in $((SECONDS - start)) s"
  fi
  base_file=$tar
}

# buildah_ runs buildah with the storage driver vfs. vfs, and the isolation chroot below, also
# work inside a container: they need no more kernel features than a container has.
buildah_() { buildah --root "$work/storage" --runroot "$work/run" --storage-driver vfs "$@" </dev/null; }

base=${BASE_IMAGE:-}
if [[ -z $base ]]; then
  base_tar
  base=localhost/prebake/base:$suite
  mkdir -p "$work/context"
  ln "$base_file" "$work/context/root.tar" 2>/dev/null || cp "$base_file" "$work/context/root.tar"
  printf 'FROM scratch\nADD root.tar /\nCMD ["/bin/bash"]\n' >"$work/context/Dockerfile"
  buildah_ bud -q --isolation chroot -t "$base" "$work/context" >/dev/null
  rm -rf "$work/context"
fi

# build NAME DOCKERFILE [OPTION…] builds an image, and writes it to an OCI archive in $out and
# its digest to a file in $work.
build() {
  local name=$1 file=$2 start=$SECONDS
  shift 2
  say "building $name"
  buildah_ bud -q --isolation chroot --pull=false --layers --timestamp 0 \
    --build-arg BASE="$base" -f "$file" "$@" -t "localhost/prebake/$name" . >"$work/$name.log" 2>&1 ||
    { tail -n 40 "$work/$name.log" >&2; say "building $name failed"; exit 1; }
  rm -f "$out/$name.tar"
  buildah_ push -q --digestfile "$work/$name.digest" "localhost/prebake/$name" "oci-archive:$out/$name.tar:prebake/$name:latest"
  say "built $name in $((SECONDS - start)) s"
}
sizes() {
  printf '%-13s %10s %10s\n' image unpacked archive
  for name in "${images[@]}"; do
    printf '%-13s %10s %10s\n' "$name" \
      "$(buildah_ images --format '{{.Size}}' "localhost/prebake/$name" | tr -d ' ')" "$(du -h "$out/$name.tar" | cut -f1)"
  done
  # With --arm64, the lines replace two of the three that make images prints. The manifests name no
  # image builder-arm64: it takes the place of builder.
  if [[ ${images[0]} == builder-arm64 ]]; then
    printf '\nFor the overlay, once these are in a registry of yours, in place of the lines with the same names:\nimages:\n'
  else
    printf '\nFor the overlay, once these are in a registry of yours:\nimages:\n'
  fi
  for name in "${images[@]}"; do
    printf '  - {name: ghcr.io/prebake/%s, newName: REGISTRY/%s, digest: "%s"}\n' "${name%-arm64}" "$name" "$(cat "$work/$name.digest")"
  done
}

# enter IMAGE makes a container of an image. starts COMMAND… checks that a program starts in it.
enter() {
  image=$1
  container=$(buildah_ from --pull=false "localhost/prebake/$image")
}
starts() {
  buildah_ run --isolation chroot "$container" -- "$@" >"$work/smoke.log" 2>&1 ||
    { tail -n 20 "$work/smoke.log" >&2; say "$image: $* does not run inside the image"; exit 1; }
  say "$image: $1: $(head -n 1 "$work/smoke.log" | tr -d '\r')"
}
# fits BYTES checks the size of the unpacked image. Each node fetches the fetcher's image before
# it has a driver.
fits() {
  local size
  size=$(du -sb "$(buildah_ mount "$container")" | cut -f1)
  ((size < $1)) || { say "$image: the image has $size bytes unpacked; want less than $1"; exit 1; }
}
# doctor_finds CHECK runs builder doctor with the image as the machine's root file system.
# builder doctor must report CHECK as ok.
doctor_finds() {
  local root report
  root=$(buildah_ mount "$container")
  report=$(bwrap --bind "$root" / --dev-bind /proc /proc --dev-bind /dev /dev --tmpfs /tmp \
    --clearenv --setenv PATH /usr/local/bin:/usr/bin:/bin --setenv HOME /nonexistent \
    setpriv --reuid 65532 --regid 65532 --clear-groups builder doctor --cache /tmp/cache 2>&1) || true
  grep -q "^ok    $1 " <<<"$report" || { echo "$report" >&2; say "$image: doctor does not find $1"; exit 1; }
  say "$image: doctor finds $1"
}
# both_fetchers makes one index with the fetcher's image for each architecture. It writes the
# index to fetcher.tar, in place of the image for one architecture.
both_fetchers() {
  local arch platforms
  build fetcher Dockerfile.fetcher
  # The base image is for this machine's architecture. This does no harm, because the image takes
  # only the certificates from the base image.
  build fetcher-arm64 Dockerfile.fetcher --build-arg SUFFIX=-arm64
  enter fetcher-arm64
  fits "$fetcher_bytes"
  buildah_ config --arch arm64 "$container"
  buildah_ commit -q --rm --timestamp 0 "$container" localhost/prebake/fetcher-arm64 >/dev/null
  buildah_ manifest create fetchers >/dev/null
  for arch in fetcher fetcher-arm64; do
    buildah_ manifest add fetchers "containers-storage:localhost/prebake/$arch" >/dev/null
  done
  rm -f "$out/fetcher.tar" "$out/fetcher-arm64.tar"
  buildah_ manifest push -q --all --digestfile "$work/fetcher.digest" fetchers "oci-archive:$out/fetcher.tar:prebake/fetcher:latest"
  platforms=$(buildah_ manifest inspect fetchers | sed -n 's/.*"architecture": "\(.*\)".*/\1/p' | sort | tr '\n' ' ')
  [[ $platforms == "amd64 arm64 " ]] || { say "fetcher: the index is for ${platforms:-nothing}"; exit 1; }
  say "fetcher: one index for $platforms"
}
if [[ ${images[0]} == builder-arm64 ]]; then
  build builder-arm64 Dockerfile.builder --target builder-arm64
  enter builder-arm64
  starts qemu-system-aarch64 --version
  doctor_finds "qemu amd64"
  doctor_finds "qemu arm64"
  buildah_ rm "$container" >/dev/null
  both_fetchers
  sizes
  exit
fi
build builder Dockerfile.builder --target builder
build server Dockerfile.builder --target server
build fetcher Dockerfile.fetcher
enter builder
starts builder version
starts fetcher version
starts bwrap --version
# The machine that this command emulates has a network card. qemu needs a boot ROM for the
# card. The Debian package with that ROM is easily forgotten.
starts sh -c 'echo quit | timeout 60 qemu-system-x86_64 -accel tcg -machine q35 -display none -S \
  -netdev user,id=n -device virtio-net-pci,netdev=n -monitor stdio'
# check_sandbox runs, in the image and as the user of the pod, the sandbox and programs that
# kbuild runs in the sandbox. buildah would run them in a chroot, and the kernel lets no process
# in a chroot make namespaces. Therefore bwrap makes the image the root of a mount namespace, as
# it is in a pod.
check_sandbox() {
  local root answer
  root=$(buildah_ mount "$container")
  # shellcheck disable=SC2016 # make's and awk's, not this shell's
  answer=$(bwrap --bind "$root" / --dev-bind /proc /proc --dev-bind /dev /dev --tmpfs /tmp --clearenv --setenv PATH /usr/bin:/bin \
    setpriv --reuid 65532 --regid 65532 --clear-groups \
    bwrap --unshare-all --unshare-user --disable-userns --uid 1000 --gid 1000 --cap-drop ALL --new-session --die-with-parent \
    --ro-bind /usr /usr --symlink usr/bin /bin --symlink usr/lib /lib --symlink usr/lib64 /lib64 \
    --ro-bind /etc/alternatives /etc/alternatives --proc /proc --dev /dev --tmpfs /tmp --remount-ro / \
    prlimit --core=0 make -s -f - <<<'all:; @echo 6*7 | bc | awk "{ print \$$1 }"' 2>&1) || true
  [[ $answer == 42 ]] || { say "$image: the sandbox does not run inside the image: $answer"; exit 1; }
  say "$image: sandbox with make, bc and awk runs as uid 65532"
}
check_sandbox
# same_digest builds one cell in the image, as the image's user and from empty caches. It builds
# the same cell with bin/builder on this machine, where bin/builder may use caches. Both
# artifacts must have the same digest.
same_digest() {
  local root mirror=$cache/mirror start=$SECONDS here there cell
  bin/mirror --out "$mirror" --cache "$cache/packages" >"$work/mirror.log" 2>&1 ||
    { tail -n 20 "$work/mirror.log" >&2; say "bin/mirror failed, so there is nothing to build from"; exit 1; }
  bin/builder keygen "$work/key" >/dev/null
  cell=(--build-id "$(sed -n 's/.*"buildId": "\(.*\)".*/\1/p' "$mirror/mirror.json" | sed -n 2p)"
    --driver "$(sed -n 's/.*"version": "\(.*\)".*/\1/p' "$mirror/mirror.json" | sed -n 1p)"
    --flavour proprietary --load-test off --output json)
  digest() { sed -n 's/^  "digest": "\(sha256:[0-9a-f]*\)",$/\1/p'; }
  here=$(bin/builder build "${cell[@]}" --kernel-mirror "file://$mirror/cos" --driver-mirror "file://$mirror/drivers" \
    --cache "$cache/build" --key "$work/key" --to "oci:$work/here" 2>"$work/here.log" | digest) || true
  root=$(buildah_ mount "$container")
  install -d -o 65532 -g 65532 "$work/there"
  install -o 65532 -g 65532 -m 0600 "$work/key" "$work/there/key"
  there=$(bwrap --bind "$root" / --dev-bind /proc /proc --dev-bind /dev /dev --tmpfs /tmp --ro-bind "$mirror" /mnt --bind "$work/there" /srv \
    --clearenv --setenv PATH /usr/local/bin:/usr/bin:/bin --setenv HOME /nonexistent \
    setpriv --reuid 65532 --regid 65532 --clear-groups \
    builder build "${cell[@]}" --kernel-mirror file:///mnt/cos --driver-mirror file:///mnt/drivers \
    --cache /srv/cache --key /srv/key --to oci:/srv/out 2>"$work/there.log" | digest) || true
  if [[ -z $here || $here != "$there" ]]; then
    tail -n 5 "$work/here.log" "$work/there.log" >&2
    say "$image: COS build ${cell[1]}, driver ${cell[3]}: the artifact is ${here:-missing} here, and ${there:-missing} in the image"
    exit 1
  fi
  say "$image: COS build ${cell[1]}, driver ${cell[3]}: the artifact is $there here, and in the image from empty caches as uid 65532; $((SECONDS - start)) s"
  node_compiles "$mirror" "$here"
  rm -rf "$work/here" "$work/there"
}
# node_compiles checks that a node for which nothing is published pulls this image, compiles the
# driver with it, and gets the same artifact. The node uses the cache that the build in the
# image filled: the keys of the object cache depend on the programs in the image.
node_compiles() {
  local mirror=$1 want=$2 node=$work/node start=$SECONDS made kernel
  kernel=$(sed -n 's/.*"release": "\(.*\)".*/\1/p' "$mirror/mirror.json" | sed -n 2p)
  mkdir -p "$node"/{etc,proc/sys/kernel} "$work/layout"
  chown -R 0:0 "$work/there/cache"
  printf 'ID=cos\nBUILD_ID=%s\nVERSION=109\nKERNEL_COMMIT_ID=%s\n' "${cell[1]}" "$(cat "$mirror/cos/${cell[1]}/lakitu/kernel_commit")" >"$node/etc/os-release"
  printf 'CHROMEOS_RELEASE_BOARD=lakitu\n' >"$node/etc/lsb-release"
  printf '%s\n' "$kernel" >"$node/proc/sys/kernel/osrelease"
  printf 'root=/dev/dm-0 cros_efi\n' >"$node/proc/cmdline"
  touch "$node/proc/modules" "$node/proc/devices"
  tar -xf "$out/builder.tar" -C "$work/layout"
  made=$(bin/fetcher install --host-root "$node" --builder "oci:$work/layout@$(cat "$work/builder.digest")" \
    --driver "${cell[3]}" --flavour proprietary --kernel-mirror "file://$mirror/cos" --driver-mirror "file://$mirror/drivers" \
    --cache "$work/there/cache" --key "$work/key.pub" --no-load --output json 2>"$work/made.log" |
    sed -n 's/^ *"digest": "\(sha256:[0-9a-f]*\)".*/\1/p' | head -n 1) || true
  if [[ $made != "$want" || ! -f $node/home/kubernetes/bin/nvidia/drivers/nvidia.ko ]]; then
    tail -n 20 "$work/made.log" >&2
    say "$image: a node that compiles with this image has the artifact ${made:-nothing}; want $want"
    exit 1
  fi
  [[ ! -e $node/var/lib/prebake/builder-image ]] || { say "$image: the node did not remove the image after compiling"; exit 1; }
  say "$image: a node compiled driver ${cell[3]} with this image, and has the artifact $made; $((SECONDS - start)) s"
  rm -rf "$node" "$work/layout"
}
same_digest
buildah_ rm "$container" >/dev/null
enter server
starts /usr/local/bin/server version
buildah_ rm "$container" >/dev/null
enter fetcher
starts /usr/local/bin/fetcher version
fits "$fetcher_bytes"
buildah_ rm "$container" >/dev/null

sizes
