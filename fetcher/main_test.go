package main

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/prebake/prebake/fetcher/internal/sample"
	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/cosbucket"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/gpulist"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/snapshot"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/testkit"
	"github.com/prebake/prebake/pkg/testkit/script"
	"github.com/prebake/prebake/pkg/testkit/snapshots"
	"github.com/prebake/prebake/pkg/trust"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"fetcher": main, "cos-gpu-installer": main, "fake-builder": fakeBuilder,
		"fake-probe": fakeProbe})
}

// TestScript drives the program as an operator does. Each script has these variables:
//
//	$ROOT      a node's root folder: COS 17800.0.47, one GPU, no module loaded
//	$ROOT0     the same without a GPU
//	$REGISTRY  a repository with 535.261.03-open for that node
//	$SIBLING   a repository in which the tag of this COS build names the artifact of another one
//	$BOTH      a repository with both flavours of 535.261.03; its signed list says
//	           that the open modules drive an L4, but not the node's T4
//	$MADE      a folder; its folder local is an OCI layout with an artifact that a
//	           node compiled itself
//	$MADE_DIGEST  the digest of that artifact
//	$SERVER    a server that names the artifact; other drivers have other states
//	$CERTIFIED  a repository with the same artifact, signed by an identity that
//	           $TRUSTED certifies and $UNTRUSTED does not
//	$COLLECTOR  a receiver of traces; "collected RUN PHASE..." wants spans of these
//	           phases below the span of that run
//	$LIST, $YANKED  signed lists in which the artifact is published or yanked; root.json
//	           is the first root of both
//	$KEY, $OTHERKEY  the publisher's public key, and another party's
//	$DIGEST    the artifact's digest
func TestScript(t *testing.T) {
	t.Parallel()
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/script",
		RequireExplicitExec: true,
		Setup:               func(env *testscript.Env) error { return setup(t, env) },
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){
			"exits":     script.Exits,
			"collected": collected,
		},
	})
}

func setup(t *testing.T, env *testscript.Env) error {
	key, other := testkit.NewKey(t), testkit.NewKey(t)
	c := sample.NewCell(t, "17800.0.47", "535.261.03")
	published := testkit.Registry(t, true) + "/prebake/driver"
	p := sample.Publish(t, published, key, c)

	sibling := sample.NewCell(t, "17800.0.50", "535.261.03")
	sibling.Fingerprint = target.Fingerprint("sha256:" + strings.Repeat("0b", 32))
	sibling.PointAt = c.Kernel
	siblings := testkit.Registry(t, true) + "/prebake/driver"
	sample.Publish(t, siblings, key, sibling)

	both := testkit.Registry(t, true) + "/prebake/driver"
	for _, f := range []target.Flavour{target.Open, target.Proprietary} {
		flavoured := c
		flavoured.Driver.Flavour = f
		if err := list(t, both, key, sample.Publish(t, both, key, flavoured).Digest); err != nil {
			return err
		}
	}

	certified := testkit.Registry(t, true) + "/prebake/driver"
	farm := testkit.NewAuthority(t)
	if err := certify(t, certified, farm, c, sample.Publish(t, certified, other, c).Digest); err != nil {
		return err
	}

	own := testkit.NewKey(t)
	state := filepath.Join(env.WorkDir, "made")
	made := sample.NewCell(t, "17800.0.47", "550.54.15")
	pm := sample.Publish(t, "oci:"+filepath.Join(state, "local"), own, made)

	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		resolution(w, r, c,
			published, p.Digest)
	}))
	t.Cleanup(server.Close)
	for name, pem := range map[string][]byte{"key.pem": key.PEM(t), "other.pem": other.PEM(t), "own.pem": own.PEM(t),
		"trusted.json": farm.Root(t, nil, nil), "untrusted.json": testkit.NewAuthority(t).Root(t, nil, nil)} {
		if err := os.WriteFile(filepath.Join(env.WorkDir, name), pem, 0o644); err != nil {
			return err
		}
	}
	lists, now := snapshots.New(t, time.Now()), time.Now()
	lists.Publish(t, now, snapshot.Artifact{Digest: p.Digest, State: snapshot.Published})
	env.Setenv("LIST", lists.Copy(t))
	lists.Publish(t, now, snapshot.Artifact{Digest: p.Digest, State: snapshot.Yanked, Reason: "panics on unload"})
	env.Setenv("YANKED", lists.Dir)
	root, err := os.ReadFile(filepath.Join(lists.Dir, "1.root.json"))
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(env.WorkDir, "root.json"), root, 0o644); err != nil {
		return err
	}
	spans := &collector{}
	receiver := httptest.NewServer(spans)
	t.Cleanup(receiver.Close)
	env.Values[collectorKey{}] = spans
	env.Setenv("COLLECTOR", receiver.URL)
	env.Setenv("ROOT", sample.Root(t, c, 1))
	env.Setenv("ROOT0", sample.Root(t, c, 0))
	env.Setenv("REGISTRY", published)
	env.Setenv("SIBLING", siblings)
	env.Setenv("BOTH", both)
	env.Setenv("CERTIFIED", certified)
	env.Setenv("TRUSTED", filepath.Join(env.WorkDir, "trusted.json"))
	env.Setenv("UNTRUSTED", filepath.Join(env.WorkDir, "untrusted.json"))
	env.Setenv("SERVER", server.URL)
	env.Setenv("KEY", filepath.Join(env.WorkDir, "key.pem"))
	env.Setenv("OTHERKEY", filepath.Join(env.WorkDir, "other.pem"))
	env.Setenv("DIGEST", p.Digest)
	env.Setenv("MADE", state)
	env.Setenv("MADE_DIGEST", pm.Digest)
	return nil
}

// certify attaches the statements of a build that an identity signed one year ago.
func certify(t *testing.T, ref string, farm *testkit.Authority, c sample.Cell, digest string) error {
	then := time.Now().AddDate(-1, 0, 0)
	sign := func(kind string, predicate any) []byte {
		return farm.Sign(t, testkit.Payload(t, digest, kind, predicate),
			trust.Identity{Subject: "farm@example.com", Issuer: "https://login.example.com"}, then, then.Add(time.Minute))
	}
	return attach(t, ref, digest,
		sign(trust.PredicateProvenance,
			testkit.ProvenancePredicate(trust.Parameters{Kernel: c.Kernel, Fingerprint: c.Fingerprint, Driver: c.Driver})),
		sign(trust.PredicateKernelMatch, trust.KernelMatch{Kernel: c.Kernel, Fingerprint: c.Fingerprint}))
}

// list attaches a signed list of supported GPUs: open modules support the L4 (0x27b8), but not the T4 (0x1eb8).
func list(t *testing.T, ref string, key *testkit.Key, digest string) error {
	l := gpulist.List{Version: "535.261.03",
		Chips: []gpulist.Chip{{Device: "0x1eb8"}, {Device: "0x102d", Legacy: "470.xx"},
			{Device: "0x27b8", Features: []string{"kernelopen"}}}}
	return attach(t, ref, digest, key.Statement(t, digest, gpulist.PredicateType, l))
}

func attach(t *testing.T, ref, digest string, signed ...[]byte) error {
	repo, err := registry.Open(ref, registry.Options{Plain: true})
	if err != nil {
		return err
	}
	d, err := repo.Resolve(t.Context(), digest)
	if err != nil {
		return err
	}
	for _, s := range signed {
		if _, err := repo.Attach(t.Context(), d, trust.ArtifactTypeBundle, s, nil); err != nil {
			return err
		}
	}
	return nil
}

// cosList is a list of drivers as COS publishes it, with two GPU types that have their own drivers (message
// GPUDriverVersionInfoList of cos/tools, gpu_driver_versions.proto).
func cosList() cosbucket.DriverList {
	l, err := cosbucket.ParseDriverVersions([]byte(`
		gpu_driver_version_info {
			gpu_device { gpu_type: "NVIDIA_TESLA_V100" }
			supported_driver_versions { label: "DEFAULT" version: "535.261.03" }
			supported_driver_versions { label: "R535" version: "535.261.03" }
		}
		gpu_driver_version_info {
			gpu_device { gpu_type: "NVIDIA_B200" }
			supported_driver_versions { label: "DEFAULT" version: "550.54.15" }
		}
		gpu_driver_version_info {
			gpu_device { gpu_type: "OTHERS" }
			supported_driver_versions { label: "DEFAULT" version: "580.95.05" }
			supported_driver_versions { label: "LATEST" version: "580.95.05" }
		}`))
	if err != nil {
		panic(err)
	}
	return l
}

// resolution answers as a server does. The wanted driver version decides which state the answer has.
func resolution(w http.ResponseWriter, r *http.Request, c sample.Cell, repository, digest string) {
	q := r.URL.Query()
	answer := api.Resolution{Kernel: c.Kernel, Driver: c.Driver, State: api.Published, Repository: repository,
		Digest: digest}
	if r.URL.Path != "/v1/resolve" || q.Get("buildId") != c.Kernel.BuildID || q.Get("board") != c.Kernel.Board {
		answer = api.Resolution{Kernel: c.Kernel, State: api.Unknown, Reason: "no such kernel"}
	}
	if wish, gpu := target.Wish(q.Get("driver")).GPU(); gpu != "" {
		if version, err := cosList().Choose(target.Wish(q.Get("driver"))); err != nil {
			answer = api.Resolution{State: api.Unknown, Reason: "the list has no driver for " + string(wish),
				Hint: fault.Hint(err)}
		} else if version != c.Driver.Version {
			answer = api.Resolution{State: api.Unknown, Driver: target.Driver{Version: version}, Reason: "not requested yet"}
		}
	}
	build := &api.Build{ID: 7, Class: "api-break", Error: "nv-pci.c:1: error: too few arguments"}
	switch q.Get("driver") {
	case "500.1.1":
		w.WriteHeader(http.StatusServiceUnavailable)
		return
	case "500.1.2":
		answer = api.Resolution{State: api.Failed, Build: build}
	case "500.1.3":
		answer = api.Resolution{State: api.Building, Build: build}
	case "500.1.4":
		answer = api.Resolution{State: api.Unsupported, Reason: "this release has no such flavour"}
	case "500.1.5":
		answer = api.Resolution{State: api.Yanked, Reason: "breaks suspend"}
	case "550.54.15":
		answer = api.Resolution{State: api.Unknown, Reason: "not requested yet"}
	case "500.1.6":
		answer.Digest = "sha256:" + strings.Repeat("ab", 32) // this answer also has another driver than the wanted one
	}
	w.Header().Set("Content-Type", "application/json")
	if err := json.NewEncoder(w).Encode(answer); err != nil {
		panic(err)
	}
}

// fakeBuilder stands in for the builder. It accepts the builder's command line, and returns an artifact that the test
// has made. The environment variable FAIL makes it fail with that exit status.
func fakeBuilder() {
	args := map[string]string{}
	for i := 2; i+1 < len(os.Args); i += 2 {
		args[os.Args[i]] = os.Args[i+1]
	}
	check := func(err error) {
		if err != nil {
			fmt.Fprintln(os.Stderr, "error:", err)
			os.Exit(1)
		}
	}
	made := os.Getenv("MADE")
	switch os.Args[1] {
	case "keygen":
		check(os.WriteFile(os.Args[2], []byte("private"), 0o600))
		pem, err := os.ReadFile(filepath.Join(filepath.Dir(made), "own.pem"))
		check(err)
		check(os.WriteFile(os.Args[2]+".pub", pem, 0o644))
	case "build":
		if status, err := strconv.Atoi(os.Getenv("FAIL")); err == nil {
			fmt.Fprint(os.Stderr, "compiling\nerror: compile: nv-pci.c:1: error: too few arguments\nhint:  take another "+
				"driver\n")
			os.Exit(status)
		}
		check(os.CopyFS(strings.TrimPrefix(args["--to"], "oci:"), os.DirFS(filepath.Join(made, "local"))))
		version, err := cosList().Choose(target.Wish(args["--driver"]))
		check(err)
		fmt.Printf("{\"digest\": %q, \"driver\": {\"version\": %q, \"flavour\": \"open\"}}\n", os.Getenv("MADE_DIGEST"),
			version)
	}
}

// fakeProbe stands in for nvmlprobe on a machine without the driver.
func fakeProbe() {
	fmt.Println(`{"driverVersion":"","cudaVersion":"","devices":[],"error":"cannot open libnvidia-ml.so.1"}`)
	os.Exit(1)
}
