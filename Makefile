# Every job of this repository is one target here. CI runs only these targets.
.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c

GO ?= go
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo devel)

# The versions of tools are set here. The versions of the tools that tests use
# are in go.mod.
GOLANGCI := github.com/golangci/golangci-lint/v2/cmd/golangci-lint@v2.15.0
GOVULNCHECK := golang.org/x/vuln/cmd/govulncheck@v1.9.0
GOVULNDB ?= https://vuln.go.dev

FUZZTIME ?= 10s
ARGS ?=
# STATE is the folder that keeps mirror, caches and results between runs. The programs find it in the same way.
STATE = $${PREBAKE_STATE:-$${XDG_CACHE_HOME:-$$HOME/.cache}/prebake}
# PACKAGE_CACHE keeps the Debian packages that mirror downloads. Demo and tests use the folder too.
PACKAGE_CACHE = $(STATE)/packages
TOOLCHAIN = $(shell sed -n 's/^go /go/p' go.mod)
# The tests of deploy/e2e use the same version of cosign.
COSIGN = $(shell sed -n 's/^const cosign = "\(.*\)"$$/\1/p' deploy/e2e/parts_test.go)
# RAN fails if no test has the name that a target runs, or if a test is skipped.
RAN := deploy/ran.sh

# Build, test and lint use the same flags, so that Go compiles each package once.
# -trimpath keeps the path of this checkout out of the programs. grpcnotrace
# leaves out gRPC's debug pages, whose HTML templates each node would download
# with the fetcher. The linker's flag -s leaves out symbols and debug information, so
# that a test is linked in half the time; therefore the compiler makes no debug
# information. A panic still names files and lines. builder/release compiles with the
# same flags (goFlags). Only nvmlprobe needs cgo; it is off for all other programs.
export GOFLAGS := -trimpath -tags=grpcnotrace -gcflags=all=-dwarf=false -ldflags=-s $(GOFLAGS)
export CGO_ENABLED := 0
# go-nvml calls C functions that its own header marks as deprecated, so the
# warning about them is off. The other two flags are Go's default.
export CGO_CFLAGS := -O2 -g -Wno-deprecated-declarations
GOBUILD := $(GO) build -buildvcs=false -ldflags '-s -w -X main.version=$(VERSION)' -o bin/
CGO := ./fetcher/nvmlprobe

# PACKAGES are all packages without the cgo package. UNITS are PACKAGES without
# the end-to-end tests, because these need a mirror and virtual machines, or a
# browser.
PACKAGES = $$($(GO) list ./... | grep -v '/fetcher/nvmlprobe$$')
# SUITE begins with the longest tests. While they wait for an emulated machine, other tests can run.
SUITE = ./deploy/e2e ./deploy/browser $(UNITS)
UNITS = $$($(GO) list ./... | grep -v -e '/fetcher/nvmlprobe$$' -e '/deploy/e2e$$' -e '/deploy/browser$$')

.PHONY: help
help: ## show this list
	@awk 'BEGIN { FS = ":.*## " } /^[a-z0-9-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: setup
setup: ## install the Debian packages that are missing, for all tests (with sudo where needed)
	@deploy/setup.sh
	@! command -v npm >/dev/null || deploy/browser/modules.sh >/dev/null

.PHONY: setup-run
setup-run: ## install the Debian packages that are missing, only for building and for the demo
	@deploy/setup.sh build run

.PHONY: build
build: ## build all programs into bin/
	@deploy/setup.sh build
	$(GOBUILD) ./builder ./server ./fetcher ./pkg/vm/guestinit ./deploy/mirror
	CGO_ENABLED=1 $(GOBUILD) $(CGO)

.PHONY: demo
demo: setup-run build ## run the main job end to end: real kernel, real driver, virtual node
	$(GO) run ./deploy/demo $(ARGS)

# Tests also wait, for machines, timers and other programs. So one package more runs than there
# are processors.
.PHONY: test
test: setup build ## run all tests, the real compile and the virtual node among them
	CGO_ENABLED=1 $(GO) test $(CGO)
	deploy/postgres.sh $(GO) test -p $$(($$(nproc) + 1)) -timeout 80m $(SUITE)
	@! [[ -f "$(STATE)/passed/last-run.txt" ]] || cat "$(STATE)/passed/last-run.txt"

.PHONY: unit
unit: ## run the tests of single packages only, without the end-to-end ones
	$(GO) test -short $(UNITS)

.PHONY: race
race: ## run the tests of single packages with the race detector
	@deploy/setup.sh build
	CGO_ENABLED=1 $(GO) test -race -short -timeout 30m $(UNITS) $(CGO)

.PHONY: scenarios
scenarios: setup build ## play the scenarios of a node on a virtual one, with a real driver
	PREBAKE_SCENARIOS=1 $(RAN) $(GO) test -v -count=1 -timeout 80m -run '^TestNodeScenarios$$' ./deploy/e2e

# This machine must look like a COS node: mount an os-release with BUILD_ID over /etc/os-release.
.PHONY: gpu
gpu: setup build ## compare reports and CDI with this machine's GPU, and call cuInit; needs NVIDIA's driver
	PREBAKE_PROBE="$(CURDIR)/bin/nvmlprobe" PREBAKE_CUDA_PROBE="$(CURDIR)/bin/nvmlprobe" PREBAKE_CUDA=libcuda.so.1 \
	  $(RAN) $(GO) test -v -count=1 \
	  -run '^(TestGPUOfThisMachine|TestThisMachine|TestRealCUDA)$$' \
	  ./fetcher/internal/kube ./fetcher/internal/cdi ./fetcher/internal/gpucheck

.PHONY: soak
soak: ## kill the fetcher at random moments, SOAK (1000) times, and check what it leaves
	PREBAKE_SOAK=$(or $(SOAK),1000) $(RAN) $(GO) test -v -count=1 -timeout 120m -run '^TestSoak$$' ./fetcher

.PHONY: chaos
chaos: setup ## kill server, builders and PostgreSQL while CHAOS (300) jobs run, and count how they ended
	PREBAKE_CHAOS=$(or $(CHAOS),300) $(RAN) $(GO) test -v -count=1 -timeout 120m -run '^TestChaos$$' \
	  ./builder/internal/chaos

.PHONY: fuzz
fuzz: ## fuzz every parser of foreign bytes for FUZZTIME (10s) each
	@grep -rlE '^func Fuzz' --include='*_test.go' . | while read -r file; do \
	  for name in $$(sed -n 's/^func \(Fuzz[A-Za-z0-9_]*\)(.*/\1/p' "$$file"); do \
	    echo "fuzz: $$(dirname "$$file") $$name for $(FUZZTIME)"; \
	    $(GO) test -run '^$$' -fuzz "^$$name\$$" -fuzztime $(FUZZTIME) "$$(dirname "$$file")" </dev/null; \
	  done; \
	done

# The kernel is compiled once and kept in $(PACKAGE_CACHE).
.PHONY: clang
clang: setup build ## compile a kernel with clang as COS does, then compile and load a driver for it
	@deploy/setup.sh clang
	PREBAKE_CLANG_CACHE="$${PREBAKE_CLANG_CACHE:-$(PACKAGE_CACHE)}" \
	  $(RAN) $(GO) test -v -count=1 -timeout 120m -run '^TestClangKernel$$' ./deploy/internal/mirror

# With PREBAKE_CLANG_COMPILE=1, the target first compiles the kernel if no earlier run did.
.PHONY: clang-cell
clang-cell: setup build ## load-test a driver for the kernel that make clang compiled, if there is one
	@[[ -z "$${PREBAKE_CLANG_COMPILE:-}" ]] || deploy/setup.sh clang
	@PREBAKE_CLANG_CACHE="$${PREBAKE_CLANG_CACHE:-$(PACKAGE_CACHE)}" \
	  $(RAN) --may-skip $(GO) test -v -count=1 -timeout 45m -run '^TestClangCell$$' ./deploy/internal/mirror

.PHONY: arm64
arm64: setup build ## cross-compile a driver for arm64 and load it in an emulated Arm machine
	@deploy/setup.sh arm64
	PREBAKE_ARM64_CACHE="$${PREBAKE_ARM64_CACHE:-$(PACKAGE_CACHE)}" \
	  $(RAN) $(GO) test -v -count=1 -timeout 60m -run '^TestARM64$$' ./deploy/internal/mirror

.PHONY: next
next: setup build ## build two driver branches for two kernel series, and compare the modules with those of plain make
	PREBAKE_NEXT_CACHE="$${PREBAKE_NEXT_CACHE:-$(PACKAGE_CACHE)}" \
	  $(RAN) $(GO) test -v -count=1 -timeout 170m -run '^TestNext$$' ./deploy/internal/mirror

# Debian has no driver of these branches. TREES is a clone of github.com/NVIDIA/open-gpu-kernel-modules.
CELLS ?= 6.12/580.126.16 6.12/580.126.18 6.12/580.142 6.1/595.45.04
.PHONY: trees
trees: setup build ## build NVIDIA's own sources of newer branches, from a clone TREES, and compare with plain make
	@[[ -n "$(TREES)" ]] || { echo "name a clone of open-gpu-kernel-modules: make trees TREES=FOLDER"; exit 2; }
	bin/mirror --only-kernels --kernel-series 6.1,6.12 --kernels 2 --out "$(STATE)/trees" --cache "$(STATE)/packages"
	PREBAKE_TREES="$(abspath $(TREES))" PREBAKE_TREES_MIRROR="$(STATE)/trees" PREBAKE_TREES_CELLS="$(CELLS)" \
	  $(RAN) $(GO) test -v -count=1 -timeout 150m -run '^TestTrees$$' ./deploy/internal/mirror

# The image builder-arm64 and the fetcher's image for arm64 nodes need these programs.
.PHONY: arm64-programs
arm64-programs: ## build the programs that run on arm64 machines into bin/
	@deploy/setup.sh build arm64
	GOARCH=arm64 $(GOBUILD)guestinit-arm64 ./pkg/vm/guestinit
	GOARCH=arm64 $(GOBUILD)fetcher-arm64 ./fetcher
	CGO_ENABLED=1 GOARCH=arm64 CC=aarch64-linux-gnu-gcc-12 $(GOBUILD)nvmlprobe-arm64 $(CGO)

# The screenshots are for people to look at. The tests of the pages are part of make test.
.PHONY: screenshots
screenshots: ## draw the server's pages into screenshots/: every state, desktop, phone and dark
	@deploy/setup.sh build browser
	PREBAKE_SCREENSHOTS="$(CURDIR)/screenshots" $(RAN) $(GO) test -v -count=1 -run '^TestDraw$$' ./deploy/browser

.PHONY: bench
bench: setup build ## measure the headline ratios and print them
	$(GO) run ./deploy/bench $(ARGS)

.PHONY: bench-server
bench-server: build ## measure the server with 60,000 cells and a year of builds
	$(GO) run ./server/bench $(ARGS)

.PHONY: lint
lint: ## gofmt, golangci-lint and govulncheck, pinned
	@deploy/setup.sh build
	@unformatted=$$(git ls-files -co --exclude-standard -- '*.go' | xargs gofmt -l); \
	  [[ -z "$$unformatted" ]] || { echo "lint: not formatted:"; echo "$$unformatted"; echo "lint: run gofmt -w on them"; exit 1; }
	@tool=$$(deploy/tool.sh $(GOLANGCI)) && \
	  "$$tool" run $$($(GO) list -f '{{.Dir}}' $(PACKAGES)) && CGO_ENABLED=1 "$$tool" run $(CGO)
	@tool=$$(deploy/tool.sh $(GOVULNCHECK)) && CGO_ENABLED=1 deploy/vulncheck.sh "$$tool" $(GOVULNDB)

.PHONY: images
images: build ## build and start the container images with buildah, no registry needed
	@deploy/setup.sh run images
	@deploy/images.sh

.PHONY: images-arm64
images-arm64: build arm64-programs ## build the image that load-tests drivers for arm64 too, and the fetcher's image for both architectures
	@deploy/setup.sh run images
	@deploy/images.sh --arm64

# ARGS passes flags: -version v1.2.3 is the version of the release (default: git describe), -key
# FILE signs with an existing key, and -archive URL is an archive that still has the Debian
# packages that this machine's archive dropped. The release is made with exactly the Go version
# of go.mod, because Go's standard library compresses the images and another version may write
# other bytes.
.PHONY: release
release: ## make a release of this commit in release/: the same bytes wherever it is made
	@deploy/setup.sh build run arm64
	GOTOOLCHAIN=$(TOOLCHAIN) $(GO) run ./builder/release $(ARGS)

.PHONY: release-test
release-test: ## check release/, start its builder image and install a driver from it
	@deploy/setup.sh run release
	cosign=$$(deploy/tool.sh $(COSIGN)) && PATH="$$(dirname "$$cosign"):$$PATH" PREBAKE_RELEASE="$(CURDIR)/release" \
	  $(RAN) $(GO) test -v -count=1 ./builder/release

.PHONY: release-twice
release-twice: ## make the release in two clones at two paths and dates, and compare every byte
	@deploy/setup.sh build run arm64 release
	@builder/release/twice.sh

.PHONY: release-packages
release-packages: ## list the newest Debian packages for the builder image of releases
	builder/release/packages.sh >builder/release/packages.lock.new
	mv builder/release/packages.lock.new builder/release/packages.lock

# go generate installs protoc-gen-go, and protoc looks for it on PATH. Two more tables of faults need
# a virtual machine: TestMachineFaults and TestPowerCut name the command.
.PHONY: generate
generate: ## write the generated parts of the documentation again
	@deploy/setup.sh build run test
	GOBIN="$(CURDIR)/bin" PATH="$(CURDIR)/bin:$$PATH" $(GO) generate ./...
	$(RAN) $(GO) test ./fetcher/internal/policy ./pkg/plan -run '^TestSchema$$' -update
	$(RAN) $(GO) test ./deploy -run '^TestGenerated' -update
	$(RAN) $(GO) test ./builder ./server ./fetcher ./deploy/mirror -run '^TestReference$$' -write-page
	$(RAN) $(GO) test ./server/internal/httpapi -run '^TestDescription' -update
	$(RAN) $(GO) test ./builder ./server ./fetcher -run '^TestDocs$$' -update
	$(RAN) $(GO) test ./builder/internal/pipeline ./fetcher/internal/agent -run '^TestFaults$$' -update

.PHONY: clean
clean: ## remove what was built here; the user's cache folder stays
	rm -rf bin release .release-* screenshots
	rm -f builder/release/*.lock.new

# clean-cache removes only the folders in its list, because users may keep other files beside them.
# The next run makes the folders again. The folder build is also the default of builder's --cache.
# The build cache has read-only folders, so chmod first makes them writable.
.PHONY: clean-cache
clean-cache: ## remove the downloads and caches (some GB) of demo, tests and, by default, builder
	@state="$(STATE)"; \
	  for name in passed mirror bench-mirror bench-clang-mirror packages build demo browser images references release tools \
	    trees; do \
	    [[ -d "$$state/$$name" ]] || continue; \
	    du -sh "$$state/$$name"; chmod -R u+rwX "$$state/$$name"; rm -rf "$${state:?}/$$name"; \
	  done
