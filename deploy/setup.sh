#!/usr/bin/env bash
# This script installs the Debian packages that building, testing and the demo need. It
# installs only packages that are missing.
#
# usage: deploy/setup.sh [GROUP…]   groups: build, run, test, browser, images,
# clang, arm64, release; default: all but the last three
set -euo pipefail

declare -A groups=(
  # The NVML probe is cgo; everything else is plain Go.
  [build]="gcc libc6-dev ca-certificates"
  # For builder: a sandbox (bubblewrap), and programs that kbuild runs in the sandbox
  # (make, bc, libelf1 for objtool, dwarves for --btf). For releases: gcc-12 with binutils,
  # which compiles nvmlprobe. For mirror: makeself packs the driver, patch undoes Debian's
  # edits, zstd and xz compress archives, patchelf makes the compiler of the mirror's
  # toolchain find its own libraries. For the load test and the demo's node: qemu;
  # ipxe-qemu has the boot ROM without which qemu does not make the network card; mke2fs
  # (e2fsprogs) makes the file system of the node's disk. For make bench: curl.
  [run]="bubblewrap make bc libelf1 dwarves gcc-12 binutils makeself patch patchelf xz-utils zstd qemu-system-x86 ipxe-qemu e2fsprogs curl"
  # postgresql: the second database that server and queue support; see deploy/postgres.sh.
  # docker-registry: a registry of another project. skopeo and containerd: clients of
  # registries. etcd-server: the store of a real kube-apiserver. fdisk, dosfstools and
  # mtools make an EFI partition. zsh and fish test the completion of commands. mandoc
  # checks the manual pages. protoc and the binutils for arm64 make files to which tests
  # compare the results of our code.
  [test]="postgresql docker-registry skopeo containerd etcd-server fdisk dosfstools mtools zsh fish mandoc \
    protobuf-compiler binutils-aarch64-linux-gnu"
  # Chromium opens the server's pages, and draws text with fonts-dejavu-core. A program in
  # deploy/browser drives it. nodejs runs that program, and npm installs its packages.
  [browser]="chromium fonts-dejavu-core nodejs npm"
  # buildah builds Dockerfiles and needs no daemon. debootstrap makes the base image.
  # bubblewrap enters an image to try the sandbox in it.
  [images]="buildah debootstrap bubblewrap"
  # Only `mirror --clang` needs these packages: it compiles a whole kernel. clang itself
  # comes from packages that mirror downloads.
  [clang]="make bc flex bison libelf-dev libssl-dev"
  # To load a driver for arm64: an emulated Arm machine, and a C compiler for nvmlprobe,
  # which asks NVML in that machine. The cross compiler for the driver comes from packages
  # that mirror downloads.
  [arm64]="qemu-system-arm gcc-12-aarch64-linux-gnu libc6-dev-arm64-cross"
  # faketime gives the second of two releases another date. skopeo, a program of another
  # project, reads the images of a release.
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
  echo "setup: this is not a Debian machine; install the programs of these Debian packages by hand: ${wanted[*]}" >&2
  exit 0
fi

installed=" $(dpkg-query -W -f='${Package}=${db:Status-Status} ' "${wanted[@]}" 2>/dev/null || true)"
missing=()
for package in "${wanted[@]}"; do
  # If Docker's own package of containerd is installed, Debian's package would replace it.
  [[ $package == containerd ]] && command -v containerd ctr >/dev/null && continue
  # A Node.js that does not come from Debian brings its own npm. Debian's packages conflict
  # with it.
  [[ $package == nodejs || $package == npm ]] && command -v node >/dev/null && command -v npm >/dev/null && continue
  [[ $installed == *" $package=installed "* ]] || missing+=("$package")
done
if ((${#missing[@]} == 0)); then
  echo "setup: all ${#wanted[@]} packages are there" >&2
  exit 0
fi

sudo=()
if ((EUID != 0)); then
  command -v sudo >/dev/null || { echo "setup: these packages are missing: ${missing[*]}; there is no sudo, so run as root: apt-get install ${missing[*]}" >&2; exit 1; }
  sudo=(sudo)
fi
apt() { "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -q -o Dpkg::Use-Pty=0 -o DPkg::Lock::Timeout=600 -o Acquire::Retries=3 "$@" </dev/null; }

echo "setup: installing ${missing[*]}${sudo:+ (with sudo)}" >&2
start=$SECONDS
# An error of apt-get update does not stop the script, because the source that cannot be
# reached may have none of the packages. An error of apt-get install stops the script.
apt update >/dev/null || echo "setup: apt-get update failed; going on with the package lists of an earlier update" >&2
if [[ " ${missing[*]} " == *" postgresql "* ]]; then
  # The tests need only PostgreSQL's programs. This setting keeps Debian's package from
  # starting a server that would run on this machine from now on.
  "${sudo[@]}" mkdir -p /etc/postgresql-common/createcluster.d
  echo 'create_main_cluster = false' | "${sudo[@]}" tee /etc/postgresql-common/createcluster.d/prebake.conf >/dev/null
fi
if [[ " ${missing[*]} " == *" docker-registry "* ]]; then
  # The tests need only the program. This link masks the service, so that it never starts.
  "${sudo[@]}" mkdir -p /etc/systemd/system
  "${sudo[@]}" ln -sfn /dev/null /etc/systemd/system/docker-registry.service
fi
if [[ " ${missing[*]} " == *" containerd "* ]]; then
  "${sudo[@]}" mkdir -p /etc/systemd/system
  # The tests need only the programs. This link masks the service, so that it never starts.
  "${sudo[@]}" ln -sfn /dev/null /etc/systemd/system/containerd.service
fi
# Recommended packages are left out, because those of qemu alone are a whole desktop.
apt install -y --no-install-recommends "${missing[@]}" >&2
echo "setup: installed ${#missing[@]} packages in $((SECONDS - start)) s" >&2
