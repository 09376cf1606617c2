#!/usr/bin/env bash
# packages.sh prints the Debian packages of the builder's image, for both architectures, in the form
# of packages.lock. Each line has architecture, SHA-256, size in bytes, and path in the archive. The
# script takes the newest packages from this machine's apt sources. It does not change the packages
# and the package lists of this machine.
#
# usage: builder/release/packages.sh >builder/release/packages.lock   (make release-packages)
set -euo pipefail

# The packages that Dockerfile.builder installs, and Debian's essential packages.
packages=('?essential' bc bubblewrap ca-certificates dwarves ipxe-qemu libelf1 make qemu-system-x86 xz-utils zstd)

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
sources=$work/debian.list
# shellcheck disable=SC2016 # apt expands these, not the shell
apt-get indextargets --format 'deb $(REPO_URI) $(CODENAME) $(COMPONENT)' \
  'Created-By: Packages' 'Origin: Debian' 'Component: main' | sort -u >"$sources"
[[ -s $sources ]] || { echo "packages: apt has no index of Debian; run apt-get update" >&2; exit 1; }

echo '# Packages of the builder image; written by make release-packages.'
for arch in amd64 arm64; do
  root=$work/$arch
  mkdir -p "$root"/{lists/partial,cache/archives/partial}
  : >"$root/status"
  cat >"$root/apt.conf" <<EOF
APT::Architecture "$arch";
APT::Architectures:: "$arch";
APT::Install-Recommends "false";
APT::Sandbox::User "root";
Acquire::Languages "none";
Debug::NoLocking "true";
Dir::Etc::SourceList "$sources";
Dir::Etc::SourceParts "/dev/null";
Dir::State::Lists "$root/lists";
Dir::State::status "$root/status";
Dir::State::extended_states "$root/extended";
Dir::Cache "$root/cache";
EOF
  export APT_CONFIG=$root/apt.conf
  apt-get -q --error-on=any update >&2
  apt-get -qq --simulate install "${packages[@]}" |
    sed -n 's/^Inst \([^ :]*\)[^ ]* (\([^ ]*\) .*/\1=\2/p' >"$root/wanted"
  # shellcheck disable=SC2046 # one word for each package
  apt-cache show $(cat "$root/wanted") | awk '
    function put() { if (path != "") print arch, sum, size, path; path = "" }
    /^$/ { put() }
    /^Architecture: / { arch = $2 }
    /^SHA256: / { sum = $2 }
    /^Size: / { size = $2 }
    /^Filename: / { path = $2 }
    END { put() }'
done | sort -u -k1,1 -k4,4
