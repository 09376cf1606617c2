#!/usr/bin/env bash
# Installs the Debian packages that building, testing and the demo need, and
# only those that are missing. Quick when nothing is.
#
# usage: deploy/setup.sh [GROUP…]   groups: build, run, test, browser, images,
# clang, arm64, release; default: all but the last three
set -euo pipefail

declare -A groups=(
  # The NVML probe is cgo; everything else is plain Go.
  [build]="gcc libc6-dev ca-certificates"
  # builder: a sandbox (bubblewrap), what kbuild runs in it (make, bc, libelf1
  # for objtool, dwarves for --btf), and gcc-12 with binutils, which the COS-shaped
  # mirror wraps as the toolchain of Debian's kernels. mirror: makeself packs the driver, zstd
  # and xz read packages, patchelf makes the wrapped compiler find its own
  # libraries. Load test and demo node: qemu, and its network card's boot ROM,
  # without which qemu refuses to make the card; mke2fs makes its disk.
  [run]="bubblewrap make bc libelf1 dwarves gcc-12 binutils makeself patch patchelf xz-utils zstd qemu-system-x86 ipxe-qemu e2fsprogs"
  # The other database of the server and its queue; see deploy/postgres.sh. A
  # registry that nobody here wrote, clients of registries, what a real kube-apiserver
  # keeps its objects in, what makes an EFI partition, shells that complete what is typed,
  # and what reads manual pages.
  [test]="postgresql docker-registry skopeo containerd etcd-server fdisk dosfstools mtools zsh fish mandoc"
  # A browser that opens the server's pages, what it draws text and signs with, and
  # what drives it (deploy/browser).
  [browser]="chromium fonts-dejavu-core nodejs npm"
  # A Dockerfile builder that needs no daemon, a base image made on the spot, and
  # what enters an image to try its sandbox.
  [images]="buildah debootstrap bubblewrap"
  # What compiling a whole kernel needs, for `mirror --clang` only; clang
  # itself comes out of the mirror's packages.
  [clang]="make bc flex bison libelf-dev libssl-dev"
  # Loading a driver for arm64: an emulated Arm machine, and a C compiler for the
  # program that asks NVML in it. The driver's own cross compiler comes out of
  # the mirror's packages.
  [arm64]="qemu-system-arm gcc-12-aarch64-linux-gnu libc6-dev-arm64-cross"
  # Another day for the second of two releases, and what reads images that others wrote.
  [release]="faketime skopeo"
)

wanted=()
for group in "${@:-build run test browser images}"; do
  for name in $group; do
    [[ -n ${groups[$name]:-} ]] || { echo "setup: no group $name; want build, run, test, browser, images, clang, arm64 or release" >&2; exit 2; }
    read -ra packages <<<"${groups[$name]}"
    wanted+=("${packages[@]}")
  done
done

if ! command -v dpkg-query >/dev/null || ! command -v apt-get >/dev/null; then
  echo "setup: this is not a Debian machine; it must bring, under its own names: ${wanted[*]}" >&2
  exit 0
fi

installed=" $(dpkg-query -W -f='${Package}=${db:Status-Status} ' "${wanted[@]}" 2>/dev/null || true)"
missing=()
for package in "${wanted[@]}"; do
  # Docker's own package of containerd is another one, which Debian's would replace.
  [[ $package == containerd ]] && command -v containerd ctr >/dev/null && continue
  # A newer Node.js than Debian's brings its own npm, with which Debian's conflicts.
  [[ $package == nodejs || $package == npm ]] && command -v node >/dev/null && command -v npm >/dev/null && continue
  [[ $installed == *" $package=installed "* ]] || missing+=("$package")
done
if ((${#missing[@]} == 0)); then
  echo "setup: all ${#wanted[@]} packages are there" >&2
  exit 0
fi

sudo=()
if ((EUID != 0)); then
  command -v sudo >/dev/null || { echo "setup: missing ${missing[*]}; run as root: apt-get install ${missing[*]}" >&2; exit 1; }
  sudo=(sudo)
fi
apt() { "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -q -o Dpkg::Use-Pty=0 -o DPkg::Lock::Timeout=600 -o Acquire::Retries=3 "$@" </dev/null; }

echo "setup: installing ${missing[*]}${sudo:+ (with sudo)}" >&2
start=$SECONDS
# One unreachable source among many must not stop us: installing decides.
apt update >/dev/null || echo "setup: apt-get update had trouble; going on with the lists at hand" >&2
if [[ " ${missing[*]} " == *" postgresql "* ]]; then
  # Only the programs are wanted: no server that runs on this machine from now on.
  "${sudo[@]}" mkdir -p /etc/postgresql-common/createcluster.d
  echo 'create_main_cluster = false' | "${sudo[@]}" tee /etc/postgresql-common/createcluster.d/prebake.conf >/dev/null
fi
if [[ " ${missing[*]} " == *" docker-registry "* ]]; then
  # As above: the program, and no service of that name.
  "${sudo[@]}" mkdir -p /etc/systemd/system
  "${sudo[@]}" ln -sfn /dev/null /etc/systemd/system/docker-registry.service
fi
if [[ " ${missing[*]} " == *" containerd "* ]]; then
  "${sudo[@]}" mkdir -p /etc/systemd/system
  # As above.
  "${sudo[@]}" ln -sfn /dev/null /etc/systemd/system/containerd.service
fi
# Recommended packages stay out: qemu's alone would be a desktop.
apt install -y --no-install-recommends "${missing[@]}" >&2
echo "setup: installed ${#missing[@]} packages in $((SECONDS - start)) s" >&2
