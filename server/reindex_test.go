package main

import (
	"encoding/json"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/testkit"
	"github.com/prebake/prebake/pkg/trust"
)

// reindexed is a running server, and another registry whose artifacts may be missing in the server's catalogue.
type reindexed struct {
	dir, url, name string // the server's folder and address, and the repository
	client         *api.Client
	repo           *registry.Repository
	farm, stranger *testkit.Key
	pem            string // the path of the farm's public key
	driver         target.Driver
}

func newReindexed(t *testing.T) *reindexed {
	t.Helper()
	r := &reindexed{
		dir: filepath.Join(t.TempDir(), "state"), pem: filepath.Join(t.TempDir(), "farm.pub"),
		name: testkit.Registry(t, true) + "/prebake/driver",
		farm: testkit.NewKey(t), stranger: testkit.NewKey(t),
		driver: target.Driver{Version: "535.261.03", Flavour: target.Open},
	}
	r.url, _, _ = start(t, r.dir)
	r.client = api.NewClient(r.url, secretOf(t, r.dir), nil)
	var err error
	if r.repo, err = registry.Open(r.name, registry.Options{Plain: true}); err != nil {
		t.Fatal(err)
	}
	put(t, r.pem, r.farm.PEM(t))
	return r
}

// add records an artifact in the catalogue.
func (r *reindexed) add(t *testing.T, s testkit.Sample, d target.Driver, kernels ...target.Kernel) {
	t.Helper()
	if _, err := r.client.AddArtifact(t.Context(), api.NewArtifact{
		Digest: s.Digest, Repository: r.name, Fingerprint: s.Identity.Fingerprint,
		Driver: d, Release: s.Identity.Release, Kernels: kernels,
	}); err != nil {
		t.Fatal(err)
	}
}

// args returns the arguments of `server reindex` for this server and this registry.
func (r *reindexed) args() []string {
	token := filepath.Join(r.dir, "token")
	return []string{"reindex", "--server", r.url, "--repository", r.name, "--key", r.pem, "--token-file", token}
}

// TestReindex compares a catalogue with another registry. There is an artifact for each kind of difference.
func TestReindex(t *testing.T) {
	t.Parallel()
	r := newReindexed(t)
	farm, stranger, repo, driver := r.farm, r.stranger, r.repo, r.driver
	sample := func(patch string, key *testkit.Key) testkit.Sample {
		return testkit.NewSample(t, key, testkit.SampleKernel(patch), driver, "")
	}
	add := func(s testkit.Sample, d target.Driver, kernels ...target.Kernel) {
		t.Helper()
		r.add(t, s, d, kernels...)
	}

	same := sample("1", farm)
	same.Publish(t, repo)
	add(same, driver, same.Kernel)

	// Most statements have labels. There are so many that one request does not return all of them.
	lacking := sample("2", farm)
	lacking.Publish(t, repo)
	want := []target.Kernel{lacking.Kernel}
	for n := range 70 {
		k := testkit.SampleKernel("2")
		k.BuildID = "17800.1." + strconv.Itoa(100+n)
		want = append(want, k)
		attach(t, repo, lacking, farm, k, nil)
	}
	// A stranger attests the artifact for another kernel. One of the farm's own statements has a label that names a third
	// kernel.
	attach(t, repo, lacking, stranger, testkit.SampleKernel("90"), nil)
	attach(t, repo, lacking, farm, lacking.Kernel, map[string]string{trust.LabelKernel: "17800.0.91/lakitu"})

	more := sample("3", farm)
	more.Publish(t, repo)
	second := testkit.SampleKernel("3")
	second.BuildID = "17800.2.3"
	attach(t, repo, more, farm, second, nil)
	add(more, driver, more.Kernel)

	wrong := sample("4", farm)
	wrong.Publish(t, repo)
	add(wrong, target.Driver{Version: "550.90.07", Flavour: target.Open}, wrong.Kernel)

	unattested := sample("5", farm)
	unattested.Publish(t, repo)
	add(unattested, driver, unattested.Kernel, testkit.SampleKernel("95"))

	gone := sample("6", farm)
	add(gone, driver, gone.Kernel)
	goneAndYanked := sample("7", farm)
	add(goneAndYanked, driver, goneAndYanked.Kernel)
	if _, err := r.client.Yank(t.Context(), goneAndYanked.Digest, api.YankRequest{Reason: "panics"}); err != nil {
		t.Fatal(err)
	}

	foreign := sample("8", stranger)
	foreign.Publish(t, repo)
	// Statements about another artifact must not count.
	replayed := sample("9", stranger)
	replayed.Bundles = same.Bundles
	replayed.Publish(t, repo)

	args := r.args()
	read := func(code int, more ...string) map[string]finding {
		t.Helper()
		got, out, errs := run(t, append(append(args, "--output", "json"), more...)...)
		if got != code {
			t.Fatalf("reindex %v = %d; want %d\n%s", more, got, code, errs)
		}
		var c comparison
		if err := json.Unmarshal([]byte(out), &c); err != nil {
			t.Fatal(err)
		}
		all := map[string]finding{}
		for _, f := range c.Findings {
			all[f.Digest] = f
		}
		return all
	}
	all := read(fault.Unverified.ExitCode())
	states := map[string]difference{}
	for digest, f := range all {
		states[digest] = f.Difference
	}
	wantStates := map[string]difference{lacking.Digest: missing, more.Digest: attested, wrong.Digest: differs,
		unattested.Digest: differs,
		gone.Digest:       absent, foreign.Digest: unverified, replayed.Digest: unverified}
	if diff := cmp.Diff(wantStates, states); diff != "" {
		t.Errorf("reindex finds (-want +got):\n%s", diff)
	}
	if got, wanted := kernelSet(all[lacking.Digest].Kernels), kernelSet(want); !maps.Equal(got, wanted) {
		t.Errorf("reindex finds %d kernels; want %d: those that the farm attests\n%s", len(got), len(wanted),
			cmp.Diff(wanted, got))
	}
	if diff := cmp.Diff([]target.Kernel{second}, all[more.Digest].Kernels); diff != "" {
		t.Errorf("reindex finds kernels (-want +got):\n%s", diff)
	}
	if known, err := r.client.Artifacts(t.Context()); err != nil || len(known) != 6 {
		t.Errorf("reindex without --apply left %d artifacts, %v; want 6", len(known), err)
	}

	code, out, _ := run(t, args...)
	if code != fault.Unverified.ExitCode() || !strings.Contains(out, "its driver is 535.261.03-open") {
		t.Errorf("reindex = %d\n%s\nwant 4, and what differs", code, out)
	}
	for line := range strings.Lines(out) {
		if len([]rune(strings.TrimRight(line, "\n"))) > columns {
			t.Errorf("a line of %d letters: %s", len(line), line)
		}
	}

	// Even with --apply, an artifact without a trusted signature must not be recorded.
	all = read(fault.Unverified.ExitCode(), "--apply")
	for digest := range wantStates {
		if applied := digest == lacking.Digest || digest == more.Digest; all[digest].Applied != applied {
			t.Errorf("%s (%s) is applied: %v; want %v", digest, wantStates[digest], all[digest].Applied, applied)
		}
	}
	known, err := r.client.Artifacts(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	stored := map[string]api.Artifact{}
	for _, a := range known {
		stored[a.Digest] = a
	}
	for _, digest := range []string{foreign.Digest, replayed.Digest} {
		if _, ok := stored[digest]; ok {
			t.Errorf("the catalogue has %s, which is unverified", digest)
		}
	}
	got := stored[lacking.Digest]
	if id := lacking.Identity; got.Repository != r.name || got.Fingerprint != id.Fingerprint || got.Driver != id.Driver ||
		got.Release != id.Release ||
		!maps.Equal(kernelSet(got.Kernels), kernelSet(want)) {
		t.Errorf("reindex --apply recorded %+v; want what is signed", got)
	}
	all = read(fault.Unverified.ExitCode())
	delete(wantStates, lacking.Digest)
	delete(wantStates, more.Digest)
	if len(all) != len(wantStates) {
		t.Errorf("reindex after --apply finds %d; want %d", len(all), len(wantStates))
	}

	for _, row := range []struct {
		args []string
		code int
		want string
	}{
		{[]string{"reindex", "--server", r.url}, fault.Usage.ExitCode(), "no public key"},
		{[]string{"reindex", "--server", r.url, "--key", r.dir + "/none"}, fault.Usage.ExitCode(), "--public-key FILE"},
		{[]string{"reindex", "--server", r.url, "--key", r.pem}, 0, ""}, // the server's own registry is empty
	} {
		if code, _, errs := run(t, row.args...); code != row.code || !strings.Contains(errs, row.want) {
			t.Errorf("%v = %d %s; want %d with %q", row.args, code, errs, row.code, row.want)
		}
	}
}

// TestReindexEmptyDatabase deletes the databases of a server. There is no backup, only the registry.
func TestReindexEmptyDatabase(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "state")
	url, stop, _ := start(t, dir)
	secret := secretOf(t, dir)
	c := api.NewClient(url, secret, nil)
	farm := testkit.NewKey(t)
	var all []testkit.Sample
	for _, patch := range []string{"47", "48"} {
		s := testkit.NewSample(t, farm, testkit.SampleKernel(patch),
			target.Driver{Version: "535.261.03", Flavour: target.Open}, "")
		publish(t, url, secret, s)
		record(t, c, s)
		all = append(all, s)
	}
	want, err := c.Artifacts(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if code := stop(); code != 0 {
		t.Fatalf("stop = %d; want 0", code)
	}
	for _, name := range []string{"catalogue.db", "queue.db"} {
		lost, err := filepath.Glob(filepath.Join(dir, name+"*"))
		if err != nil || len(lost) == 0 {
			t.Fatalf("files of %s: %v, %v; want some to lose", name, lost, err)
		}
		for _, file := range lost {
			if err := os.Remove(file); err != nil {
				t.Fatal(err)
			}
		}
	}

	url, _, _ = start(t, dir)
	c = api.NewClient(url, secret, nil)
	for _, s := range all {
		if r := resolved(t, c, s); r.State != api.Unknown {
			t.Fatalf("Resolve(%s) of an empty database = %s; want unknown", s.Kernel, r.State)
		}
	}
	pem := filepath.Join(t.TempDir(), "farm.pub")
	put(t, pem, farm.PEM(t))
	code, out, errs := run(t, "reindex", "--server", url, "--key", pem, "--token-file", filepath.Join(dir, "token"),
		"--apply")
	if code != 0 || strings.Count(out, "  recorded  ") != len(all) {
		t.Errorf("reindex --apply = %d\n%s%s\nwant 0, and %d recorded", code, out, errs, len(all))
	}
	for _, s := range all {
		if r := resolved(t, c, s); r.State != api.Published || r.Digest != s.Digest {
			t.Errorf("Resolve(%s) after reindex --apply = %s %s; want published %s", s.Kernel, r.State, r.Digest, s.Digest)
		}
	}
	got, err := c.Artifacts(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	order := func(all []api.Artifact) []api.Artifact {
		slices.SortFunc(all, func(x, y api.Artifact) int { return strings.Compare(x.Digest, y.Digest) })
		return all
	}
	if diff := cmp.Diff(order(want), order(got), cmpopts.IgnoreFields(api.Artifact{}, "PublishedAt")); diff != "" {
		t.Errorf("the catalogue after reindex --apply (-before +after):\n%s", diff)
	}
}

// TestReindexForgets checks that `server reindex --apply` removes a published artifact from the catalogue if the
// server's registry has lost its manifest. A yanked artifact must stay in the catalogue.
func TestReindexForgets(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "state")
	url, _, _ := start(t, dir)
	secret := secretOf(t, dir)
	c := api.NewClient(url, secret, nil)
	farm := testkit.NewKey(t)
	var all []testkit.Sample
	for _, patch := range []string{"47", "48", "49"} {
		s := testkit.NewSample(t, farm, testkit.SampleKernel(patch),
			target.Driver{Version: "535.261.03", Flavour: target.Open}, "")
		publish(t, url, secret, s)
		record(t, c, s)
		all = append(all, s)
	}
	kept, lost, yanked := all[0], all[1], all[2]
	if _, err := c.Yank(t.Context(), yanked.Digest, api.YankRequest{Reason: "panics"}); err != nil {
		t.Fatal(err)
	}
	for _, s := range []testkit.Sample{lost, yanked} { // a damaged disk may lose these files
		file := filepath.Join(dir, "registry/repos/prebake/driver/_manifests", strings.TrimPrefix(s.Digest, "sha256:"))
		if err := os.Remove(file); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.ForgetArtifact(t.Context(), kept.Digest); !fault.Is(err, fault.Mismatch) {
		t.Errorf("ForgetArtifact(in the registry) = %v; want mismatch", err)
	}
	if err := c.ForgetArtifact(t.Context(), yanked.Digest); !fault.Is(err, fault.Mismatch) {
		t.Errorf("ForgetArtifact(yanked) = %v; want mismatch", err)
	}
	pem := filepath.Join(t.TempDir(), "farm.pub")
	put(t, pem, farm.PEM(t))
	args := []string{"reindex", "--server", url, "--key", pem, "--token-file", filepath.Join(dir, "token")}
	if code, out, errs := run(t, args...); code != fault.Mismatch.ExitCode() || !strings.Contains(out, "  absent  ") {
		t.Errorf("reindex = %d\n%s%s\nwant an absent artifact", code, out, errs)
	}
	if code, out, errs := run(t, append(args, "--apply")...); code != 0 || strings.Count(out, "  forgotten  ") != 1 {
		t.Errorf("reindex --apply = %d\n%s%s\nwant 0, and one forgotten", code, out, errs)
	}
	for s, want := range map[*testkit.Sample]api.State{&kept: api.Published, &lost: api.Unknown, &yanked: api.Yanked} {
		if r := resolved(t, c, *s); r.State != want {
			t.Errorf("Resolve(%s) = %s; want %s", s.Kernel, r.State, want)
		}
	}
}

// TestReindexMoves checks that `server reindex --apply` changes the repository of a known artifact only if the new one
// is the server's --public-repository.
func TestReindexMoves(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "state")
	url, stop, _ := start(t, dir)
	secret := secretOf(t, dir)
	farm := testkit.NewKey(t)
	s := testkit.NewSample(t, farm, testkit.SampleKernel("47"),
		target.Driver{Version: "535.261.03", Flavour: target.Open}, "")
	publish(t, url, secret, s)
	record(t, api.NewClient(url, secret, nil), s)
	name := testkit.Registry(t, true) + "/mirror/driver"
	repo, err := registry.Open(name, registry.Options{Plain: true})
	if err != nil {
		t.Fatal(err)
	}
	s.Publish(t, repo)
	pem := filepath.Join(t.TempDir(), "farm.pub")
	put(t, pem, farm.PEM(t))
	apply := func(code int, text, repository string) {
		t.Helper()
		got, out, errs := run(t, "reindex", "--server", url, "--key", pem, "--token-file", filepath.Join(dir, "token"),
			"--repository", name, "--apply")
		if got != code || !strings.Contains(out, text) {
			t.Errorf("reindex --apply = %d\n%s%s\nwant %d with %q", got, out, errs, code, text)
		}
		if r := resolved(t, api.NewClient(url, secret, nil), s); r.Repository != repository {
			t.Errorf("Resolve() = repository %q; want %q", r.Repository, repository)
		}
	}
	apply(fault.Mismatch.ExitCode(), "the server keeps", "/prebake/driver")
	if code := stop(); code != 0 {
		t.Fatalf("stop = %d; want 0", code)
	}
	url, _, _ = start(t, dir, "--public-repository", name)
	apply(0, "  recorded  ", name)
	apply(0, "no differences", name)
}

// attach signs a kernel match for a sample, and attaches it. The attachment has the usual labels, replaced by the given
// ones.
func attach(t *testing.T, repo *registry.Repository, s testkit.Sample, key *testkit.Key, k target.Kernel,
	labels map[string]string) {
	t.Helper()
	raw := key.KernelMatch(t, s.Digest, trust.KernelMatch{Kernel: k, Fingerprint: s.Identity.Fingerprint})
	st, err := key.Verifier(t).Statement(raw)
	if err != nil {
		t.Fatal(err)
	}
	all := trust.Labels(st)
	maps.Copy(all, labels)
	subject, err := repo.Resolve(t.Context(), bundle.Tag(s.Identity))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := repo.Attach(t.Context(), subject, trust.ArtifactTypeBundle, raw, all); err != nil {
		t.Fatal(err)
	}
}

func kernelSet(kernels []target.Kernel) map[string]bool {
	all := map[string]bool{}
	for _, k := range kernels {
		all[k.String()] = true
	}
	return all
}
