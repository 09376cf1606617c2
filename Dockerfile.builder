# Three images: "builder" (the default), "server", and "builder-arm64", which
# load-tests drivers for arm64 too.
#
#   make build
#   docker build -f Dockerfile.builder -t prebake-builder .
#   docker build -f Dockerfile.builder -t prebake-server --target server .
#   make arm64-programs
#   docker build -f Dockerfile.builder -t prebake-builder-arm64 --target builder-arm64 .
#
# BASE is any Debian 12 root with apt; pin it by digest (BASE=…@sha256:…) for the
# same tools in each build of the image. "make images" makes one on the spot and
# needs neither a registry nor a Docker daemon.
ARG BASE=docker.io/library/debian:bookworm-slim

FROM ${BASE} AS certificates
RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates

# The server is one static program. It keeps everything under --data.
FROM scratch AS server
COPY --from=certificates /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
COPY bin/server /usr/local/bin/server
USER 65532:65532
EXPOSE 8440
ENTRYPOINT ["/usr/local/bin/server"]

# The builder brings what its sandbox needs beside the kernel's own toolchain:
# bubblewrap, make and the shell tools of kbuild, bc, libelf1 for objtool, dwarves
# for --btf; and qemu with its network card's boot ROM for the load test.
FROM ${BASE} AS builder
RUN apt-get update \
 && apt-get install -y --no-install-recommends \
      bc bubblewrap ca-certificates dwarves ipxe-qemu libelf1 make qemu-system-x86 xz-utils zstd \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/dpkg.log /var/log/apt
# guestinit and nvmlprobe lie beside builder, where it looks for them; fetcher
# is there so that one image can do a whole installation.
COPY bin/builder bin/fetcher bin/guestinit bin/nvmlprobe /usr/local/bin/
USER 65532:65532
ENTRYPOINT ["/usr/local/bin/builder"]

# An emulated Arm machine, and what runs in it: cross-compiled, so that no
# compiler is in the image. The emulator of 32-bit machines is as large as the
# one that load tests start, and comes in the same package.
FROM builder AS builder-arm64
USER 0:0
RUN apt-get update \
 && apt-get install -y --no-install-recommends qemu-system-arm \
 && rm -rf /usr/bin/qemu-system-arm /var/lib/apt/lists/* /var/cache/apt/* /var/log/dpkg.log /var/log/apt
COPY bin/guestinit-arm64 bin/nvmlprobe-arm64 /usr/local/bin/
USER 65532:65532

# What is built where no target is named.
FROM builder
