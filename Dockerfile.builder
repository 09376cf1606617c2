# Three images: "builder" (the default), "server", and "builder-arm64", which
# load-tests drivers for arm64 too.
#
#   make build
#   docker build -f Dockerfile.builder -t prebake-builder .
#   docker build -f Dockerfile.builder -t prebake-server --target server .
#   make arm64-programs
#   docker build -f Dockerfile.builder -t prebake-builder-arm64 --target builder-arm64 .
#
# BASE is an image of Debian 12 with apt. To get the same tools in each build of
# the image, pin BASE by digest (BASE=…@sha256:…). "make images" makes its own
# base image, and needs neither a registry nor a Docker daemon.
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

# The image has the programs that a compile in the sandbox needs beside the
# kernel's own toolchain: bubblewrap, make and the shell tools of kbuild, bc,
# libelf1 for objtool, and dwarves for --btf. For the load test it has qemu, and
# ipxe-qemu with the boot ROM of qemu's network card.
FROM ${BASE} AS builder
RUN apt-get update \
 && apt-get install -y --no-install-recommends \
      bc bubblewrap ca-certificates dwarves ipxe-qemu libelf1 make qemu-system-x86 xz-utils zstd \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/dpkg.log /var/log/apt
# The program builder looks for guestinit and nvmlprobe in its own folder. The image has
# the program fetcher too, so that one image can build a driver and install it.
COPY bin/builder bin/fetcher bin/guestinit bin/nvmlprobe /usr/local/bin/
USER 65532:65532
ENTRYPOINT ["/usr/local/bin/builder"]

# This stage adds qemu for Arm machines, and the programs that run in such a machine.
# "make arm64-programs" cross-compiled these programs, so that the image needs no
# compiler. The Debian package also has qemu-system-arm, which emulates 32-bit
# machines. Load tests do not start this program, and it is large, so it is removed.
FROM builder AS builder-arm64
USER 0:0
RUN apt-get update \
 && apt-get install -y --no-install-recommends qemu-system-arm \
 && rm -rf /usr/bin/qemu-system-arm /var/lib/apt/lists/* /var/cache/apt/* /var/log/dpkg.log /var/log/apt
COPY bin/guestinit-arm64 bin/nvmlprobe-arm64 /usr/local/bin/
USER 65532:65532

# If docker build gets no --target, it makes the last stage.
FROM builder
