package agent_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/fetcher/internal/agent"
	"github.com/prebake/prebake/fetcher/internal/resolve"
	"github.com/prebake/prebake/fetcher/internal/sample"
	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/testkit"
)

// liar is a registry that serves wrong bytes.
type liar struct {
	agent.Repository
	manifest func([]byte) []byte
	blob     func(digest string, data []byte) []byte
	attached func([][]byte) [][]byte
}

func (l liar) Manifest(ctx context.Context, digest string) ([]byte, error) {
	raw, err := l.Repository.Manifest(ctx, digest)
	if l.manifest != nil && err == nil {
		raw = l.manifest(raw)
	}
	return raw, err
}

func (l liar) Blob(ctx context.Context, digest string, size int64) (io.ReadCloser, error) {
	rc, err := l.Repository.Blob(ctx, digest, size)
	if l.blob == nil || err != nil {
		return rc, err
	}
	raw, err := io.ReadAll(rc)
	if err := errors.Join(err, rc.Close()); err != nil {
		return nil, err
	}
	return io.NopCloser(bytes.NewReader(l.blob(digest, raw))), nil
}

func (l liar) AttachedIf(ctx context.Context, digest, artifactType string, useful func([]byte) string,
	wanted ...map[string]string) ([][]byte, error) {
	all, err := l.Repository.AttachedIf(ctx, digest, artifactType, useful, wanted...)
	if l.attached != nil && err == nil {
		all = l.attached(all)
	}
	return all, err
}

// flip returns data with one changed bit. share says where: 0 is the first byte, 1 the last one.
func flip(data []byte, share float64) []byte {
	data = bytes.Clone(data)
	data[int(float64(len(data)-1)*share)] ^= 1
	return data
}

// spoil changes a word in every statement of this predicate type, so that its signature is no longer valid.
func spoil(predicate string) func([][]byte) [][]byte {
	return func(all [][]byte) [][]byte {
		var out [][]byte
		for _, b := range all {
			var m map[string]any
			if json.Unmarshal(b, &m) != nil {
				return nil
			}
			env := m["dsseEnvelope"].(map[string]any)
			var payload []byte
			if json.Unmarshal([]byte(`"`+env["payload"].(string)+`"`), &payload) != nil {
				return nil
			}
			if bytes.Contains(payload, []byte(predicate)) {
				payload = bytes.Replace(payload, []byte("lakitu"), []byte("lakitV"), 1)
				env["payload"] = payload // encoding/json writes []byte as base64
			}
			edited, err := json.Marshal(m)
			if err != nil {
				return nil
			}
			out = append(out, edited)
		}
		return out
	}
}

// TestRefuses checks that the agent never installs wrong content, and that the installed driver stays active. The error
// must say what is wrong.
func TestRefuses(t *testing.T) {
	t.Parallel()
	key, stranger := testkit.NewKey(t), testkit.NewKey(t)
	older, newer := sample.NewCell(t, buildA, oldVersion), sample.NewCell(t, buildA, newVersion)
	newer.Bulk = 256 << 10 // random bytes, in which a flipped bit changes only the digest
	ref := testkit.Registry(t, true) + "/prebake/driver"
	po, pn := sample.Publish(t, ref, key, older), sample.Publish(t, ref, key, newer)
	modules, userspace := pn.Layers[0].Digest, pn.Layers[1].Digest

	foreign := newer
	foreign.Untagged = true
	strangers := testkit.Registry(t, true) + "/prebake/driver"
	ps := sample.Publish(t, strangers, stranger, foreign)

	// The sibling kernel prints the same `uname -r` but has another ABI fingerprint. Its artifact has the tag of this
	// node's COS build.
	sibling := sample.NewCell(t, buildB, newVersion)
	sibling.Fingerprint = target.Fingerprint("sha256:" + strings.Repeat("0b", 32))
	sibling.PointAt = newer.Kernel
	siblings := testkit.Registry(t, true) + "/prebake/driver"
	pb := sample.Publish(t, siblings, key, sibling)

	// The artifact is signed, but its modules are for another kernel.
	wrongInside := newer
	wrongInside.Vermagic, wrongInside.Untagged = "6.1.99+ SMP preempt mod_unload ", true
	insides := testkit.Registry(t, true) + "/prebake/driver"
	pw := sample.Publish(t, insides, key, wrongInside)
	spoiled := func(spoil func(map[string]string)) string {
		c := newer
		c.Modify, c.Untagged = spoil, true
		return sample.Publish(t, insides, key, c).Digest
	}
	nvidia := func(version, vermagic string) func(map[string]string) {
		return func(files map[string]string) {
			files["drivers/nvidia.ko"] = string(sample.Module("nvidia", version, vermagic))
		}
	}
	otherOptions := spoiled(nvidia(newVersion, "6.1.77+ SMP mod_unload "))
	otherVersion := spoiled(nvidia(oldVersion, "6.1.77+ SMP preempt mod_unload "))
	noNvidia := spoiled(func(files map[string]string) { delete(files, "drivers/nvidia.ko") })

	other := newer.Driver
	other.Version = "535.999.99"
	rows := []struct {
		name   string
		ref    string
		digest string
		driver target.Driver
		lie    liar
		kind   fault.Kind
		words  string
	}{
		{"flipped byte in the modules layer", ref, pn.Digest, newer.Driver,
			liar{blob: func(d string, b []byte) []byte { return pick(d == modules, flip(b, 0.5), b) }}, fault.Unverified,
			"modules layer " + modules},
		{"flipped byte in the user space layer", ref, pn.Digest, newer.Driver,
			liar{blob: func(d string, b []byte) []byte { return pick(d == userspace, flip(b, 0.9), b) }}, fault.Unverified,
			"userspace layer " + userspace},
		{"modules layer cut short", ref, pn.Digest, newer.Driver,
			liar{blob: func(d string, b []byte) []byte { return pick(d == modules, b[:len(b)/2], b) }}, fault.Unverified,
			"modules layer " + modules},
		{"modules layer with bytes behind its end", ref, pn.Digest, newer.Driver,
			liar{blob: func(d string, b []byte) []byte { return pick(d == modules, append(bytes.Clone(b), 0), b) }},
			fault.Unverified, "modules layer " + modules},
		{"another layer of the same artifact", ref, pn.Digest, newer.Driver,
			liar{blob: func(d string, b []byte) []byte { return pick(d == modules, read(t, pn.Layers[1]), b) }},
			fault.Unverified, "modules layer " + modules},
		{"flipped byte in the manifest", ref, pn.Digest, newer.Driver,
			liar{manifest: func(b []byte) []byte { return flip(b, 0.5) }}, fault.Unverified, "read manifest " + pn.Digest},
		{"manifest of another artifact", ref, pn.Digest, newer.Driver,
			liar{manifest: func([]byte) []byte { return po.Manifest }}, fault.Unverified, "read manifest " + pn.Digest},
		{"changed provenance", ref, pn.Digest, newer.Driver,
			liar{attached: spoil("slsa.dev/provenance")}, fault.Unverified, "the signature is not valid"},
		{"changed kernel match", ref, pn.Digest, newer.Driver,
			liar{attached: spoil("kernel-match")}, fault.Unverified, "the signature is not valid"},
		{"no signature", ref, pn.Digest, newer.Driver,
			liar{attached: func([][]byte) [][]byte { return nil }}, fault.Unverified, "provenance"},
		{"signed by another key", strangers, ps.Digest, newer.Driver, liar{}, fault.Unverified, "unknown key"},
		{"artifact of the sibling kernel", siblings, pb.Digest, newer.Driver, liar{}, fault.Mismatch,
			"kernel match for COS " + buildB + "/lakitu; this node runs COS " + buildA + "/lakitu"},
		{"modules for another kernel inside", insides, pw.Digest, newer.Driver, liar{}, fault.Mismatch,
			`the module has kernel release "6.1.99+"`},
		{"module with other options inside", insides, otherOptions, newer.Driver, liar{}, fault.Mismatch,
			`vermagic "6.1.77+ SMP mod_unload"`},
		{"module of another version inside", insides, otherVersion, newer.Driver, liar{}, fault.Mismatch,
			`version "` + oldVersion + `"`},
		{"no module of that name inside", insides, noNvidia, newer.Driver, liar{}, fault.Mismatch,
			"has no file drivers/nvidia.ko"},
		{"server names another driver's artifact", ref, pn.Digest, other, liar{}, fault.Mismatch, newVersion},
		{"digest that nobody has", ref, "sha256:" + strings.Repeat("ab", 32), newer.Driver, liar{}, fault.NoArtifact, ""},
		{"digest that is a path", ref, "sha256:../../../../etc/passwd", newer.Driver, liar{}, fault.Usage, ""},
	}
	for _, installed := range []bool{false, true} {
		for _, row := range rows {
			name := row.name
			if installed {
				name += ", over a good install"
			}
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				n := newNode(t, newer, 1, key)
				if installed {
					if _, err := n.run(t, ref, po.Digest, older.Driver); err != nil {
						t.Fatal(err)
					}
				}
				before := n.tree(t)
				n.parts.Open = func(ref string) (agent.Repository, error) {
					repo, err := registry.Open(ref, registry.Options{Plain: true})
					lie := row.lie
					lie.Repository = repo
					return lie, err
				}
				r, err := n.run(t, row.ref, row.digest, row.driver)
				if !fault.Is(err, row.kind) || !strings.Contains(err.Error(), row.words) {
					t.Errorf("Run = %v (%v); want kind %v and the words %q", err, fault.Of(err), row.kind, row.words)
				}
				if r.Changed || len(n.kernel.calls) > 0 {
					t.Errorf("Run changed the node: %v, system calls %v", r.Plan, n.kernel.calls)
				}
				if diff := cmp.Diff(before, n.tree(t)); diff != "" {
					t.Errorf("install folder changed (-before +after):\n%s", diff)
				}
				if left := n.leftovers(t); len(left) > 0 {
					t.Errorf("left behind: %v", left)
				}
				layers, err := os.ReadDir(filepath.Join(n.root, installDir, ".prebake/layers"))
				if err != nil {
					t.Fatal(err)
				}
				for _, l := range layers {
					// The other layers are valid, so the agent may keep them under their final names.
					if digest := "sha256:" + l.Name(); strings.Contains(row.words, digest) || digest == pw.Layers[0].Digest {
						t.Errorf("refused layer %s got its final name", digest)
					}
				}
			})
		}
	}
}

func pick(yes bool, a, b []byte) []byte {
	if yes {
		return a
	}
	return b
}

func read(t *testing.T, l bundle.Layer) []byte {
	t.Helper()
	raw, err := os.ReadFile(l.Path)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

// TestTamperedOnDisk changes an installed module on the disk. The agent must not load the changed module.
func TestTamperedOnDisk(t *testing.T) {
	t.Parallel()
	key := testkit.NewKey(t)
	ref := layout(t)
	c := sample.NewCell(t, buildA, newVersion)
	p := sample.Publish(t, ref, key, c)
	n := newNode(t, c, 1, key)
	n.cfg.NoLoad = true
	if _, err := n.run(t, ref, p.Digest, c.Driver); err != nil {
		t.Fatal(err)
	}
	path, err := filepath.EvalSymlinks(filepath.Join(n.root, installDir, "drivers/nvidia.ko"))
	if err != nil {
		t.Fatal(err)
	}
	n.cfg.NoLoad = false
	// The server does not answer, so the run uses the installed driver.
	n.parts.Finder = finder{err: fault.New(fault.Transient, "nobody answers", "")}
	if err := os.WriteFile(path, sample.Module("nvidia", newVersion, "6.1.77+ SMP preempt mod_unload evil"),
		0o644); err != nil {
		t.Fatal(err)
	}
	_, err = n.runAs(t)
	if !fault.Is(err, fault.Unverified) || len(n.kernel.calls) > 0 {
		t.Errorf("Run with a changed module = %v, system calls %v; want unverified and none", err, n.kernel.calls)
	}
}

// TestOffline checks a run while the server does not answer. The run must succeed only if the installed driver is for
// the node's COS build, and has the wanted version and flavour.
func TestOffline(t *testing.T) {
	t.Parallel()
	key := testkit.NewKey(t)
	ref := layout(t)
	c := sample.NewCell(t, buildA, newVersion)
	p := sample.Publish(t, ref, key, c)
	rows := []struct {
		name      string
		wish      target.Wish
		flavour   string
		buildID   string
		installed bool
		kind      fault.Kind // Internal means no error
	}{
		{"installed", target.Default, resolve.Auto, buildA, true, fault.Internal},
		{"installed, exact wish", newVersion, "open", buildA, true, fault.Internal},
		{"installed, its branch", "R535", resolve.Auto, buildA, true, fault.Internal},
		{"nothing installed", target.Default, resolve.Auto, buildA, false, fault.Transient},
		{"another version wanted", "550.1.1", resolve.Auto, buildA, true, fault.Transient},
		{"another flavour wanted", target.Default, "proprietary", buildA, true, fault.Transient},
		{"the node was updated", target.Default, resolve.Auto, buildB, true, fault.Transient},
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			n := newNode(t, c, 1, key)
			if row.installed {
				if _, err := n.run(t, ref, p.Digest, c.Driver); err != nil {
					t.Fatal(err)
				}
			}
			osRelease := filepath.Join(n.root, "etc/os-release")
			raw, err := os.ReadFile(osRelease)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(osRelease, bytes.Replace(raw, []byte(buildA), []byte(row.buildID), 1), 0o644); err != nil {
				t.Fatal(err)
			}
			n.cfg.Wish, n.cfg.Flavour = row.wish, row.flavour
			n.parts.Finder = finder{err: fault.New(fault.Transient, "nobody answers", "")}
			_, err = n.runAs(t)
			if row.kind == fault.Internal && err != nil || row.kind != fault.Internal && !fault.Is(err, row.kind) {
				t.Errorf("Run = %v; want kind %v", err, row.kind)
			}
		})
	}
}

// builder stands in for a compiler on the node. It returns an artifact that the test has published.
type builder struct {
	answer resolve.Answer
	asked  *resolve.Question
}

func (b builder) Build(_ context.Context, q resolve.Question) (resolve.Answer, func() error, error) {
	*b.asked = q
	return b.answer, noRelease, nil
}

func TestMiss(t *testing.T) {
	t.Parallel()
	farm, own := testkit.NewKey(t), testkit.NewKey(t)
	ref := layout(t)
	c := sample.NewCell(t, buildA, newVersion)
	p := sample.Publish(t, ref, own, c)
	local := resolve.Answer{State: api.Published, Source: "local", Driver: c.Driver, Repository: ref, Digest: p.Digest}
	rows := []struct {
		name  string
		state api.State
		build bool
		kind  fault.Kind // Internal means no error
	}{
		{"unknown, compiled here", api.Unknown, true, fault.Internal},
		{"failed, compiled here", api.Failed, true, fault.Internal},
		{"unsupported, compiled here", api.Unsupported, true, fault.Internal},
		{"yanked is never compiled around", api.Yanked, true, fault.NoArtifact},
		{"unknown, no builder", api.Unknown, false, fault.NoArtifact},
		{"building, no builder", api.Building, false, fault.NoArtifact},
		{"unsupported, no builder", api.Unsupported, false, fault.Unsupported},
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			n := newNode(t, c, 1, farm)
			n.parts.Finder = finder{answer: resolve.Answer{State: row.state, Source: "server"}}
			var asked resolve.Question
			if row.build {
				n.parts.Local = builder{answer: local, asked: &asked}
				n.parts.NodeVerifier = func() (agent.Verifier, error) { return own.Verifier(t), nil }
			}
			r, err := n.runAs(t)
			if row.kind != fault.Internal {
				if !fault.Is(err, row.kind) || fault.Hint(err) == "" && row.state != api.Unsupported {
					t.Errorf("Run = %v (hint %q); want %v with a hint", err, fault.Hint(err), row.kind)
				}
				return
			}
			if err != nil || r.Answer.Source != "local" || asked.Kernel.BuildID != buildA {
				t.Errorf("Run = %+v, %v, asked %+v; want the node's own artifact", r, err, asked)
			}
		})
	}
	// The node trusts its own key only for artifacts that it compiled itself. This artifact comes from the server.
	n := newNode(t, c, 1, farm)
	if _, err := n.run(t, ref, p.Digest, c.Driver); !fault.Is(err, fault.Unverified) {
		t.Errorf("Run of a node-signed artifact from elsewhere = %v; want unverified", err)
	}
}

func TestDryRun(t *testing.T) {
	t.Parallel()
	key := testkit.NewKey(t)
	ref := layout(t)
	c := sample.NewCell(t, buildA, newVersion)
	p := sample.Publish(t, ref, key, c)
	n := newNode(t, c, 1, key)
	n.cfg.DryRun = true
	r, err := n.run(t, ref, p.Digest, c.Driver)
	if err != nil || len(r.Plan) != 5 || !r.DryRun {
		t.Fatalf("Run = %+v, %v; want a plan of five steps", r, err)
	}
	if _, err := os.Stat(filepath.Join(n.root, installDir)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a dry run made the install folder: %v", err)
	}
}

func TestPolicyAndStatus(t *testing.T) {
	t.Parallel()
	key := testkit.NewKey(t)
	ref := layout(t)
	c := sample.NewCell(t, buildA, newVersion)
	p := sample.Publish(t, ref, key, c)
	n := newNode(t, c, 1, key)
	status := func(want fault.Kind, words string) {
		t.Helper()
		s, err := agent.New(n.cfg, n.parts).Status(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		err = s.Verdict.Err()
		if (want == fault.Internal) != (err == nil) || err != nil &&
			(!fault.Is(err, want) || !strings.Contains(err.Error(), words)) {
			t.Errorf("Status = %+v, %v; want %v with %q", s.Verdict, err, want, words)
		}
	}
	status(fault.NoArtifact, "has installed no driver")
	sample.Write(t, n.root, "sys/module/module/parameters/sig_enforce", "Y\n")
	_, err := n.run(t, ref, p.Digest, c.Driver)
	if !fault.Is(err, fault.Rejected) || !strings.Contains(err.Error(), "module.sig_enforce=1") || len(n.tree(t)) > 0 {
		t.Errorf("Run on a node that enforces signatures = %v, tree %v; want rejected and nothing", err, n.tree(t))
	}
	sample.Write(t, n.root, "sys/module/module/parameters/sig_enforce", "N\n")
	n.cfg.NoLoad = true
	if r, err := n.run(t, ref, p.Digest, c.Driver); err != nil || r.Verdict.State != "staged" {
		t.Errorf("Run without loading = %+v, %v; want staged", r, err)
	}
	status(fault.Internal, "")
	n.cfg.NoLoad = false
	if _, err := n.run(t, ref, p.Digest, c.Driver); err != nil {
		t.Fatal(err)
	}
	status(fault.Internal, "")
	for text, want := range map[string][]string{"nvidia" + newVersion: nil, "another compiler's": {"nvidia"}} {
		sample.Write(t, n.root, "sys/module/nvidia/notes/.note.gnu.build-id", sample.BuildNote(text))
		s, err := agent.New(n.cfg, n.parts).Status(t.Context())
		if err != nil || !cmp.Equal(s.Verdict.Foreign, want) || s.Verdict.Err() != nil {
			t.Errorf("Status with a module of build %q = %+v, %v; want %v named as foreign", text, s.Verdict, err, want)
		}
	}
	sample.Write(t, n.root, "proc/sys/kernel/random/boot_id", "another\n")
	status(fault.Internal, "") // the driver is loaded; NVML was last asked before this boot
	sample.Write(t, n.root, "sys/module/nvidia/version", oldVersion+"\n")
	status(fault.Mismatch, "module nvidia has version "+oldVersion)
	sample.Write(t, n.root, "sys/module/nvidia/version", newVersion+"\n")
	sample.Write(t, n.root, "etc/os-release", "ID=cos\nBUILD_ID="+buildB+"\n")
	status(fault.Mismatch, "installed for COS "+buildA)
}

func TestOneAtATime(t *testing.T) {
	t.Parallel()
	key := testkit.NewKey(t)
	c := sample.NewCell(t, buildA, newVersion)
	n := newNode(t, c, 1, key)
	f, err := os.Create(filepath.Join(n.root, "tmp/cos_gpu_installer_lock"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	}()
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	if _, err := n.run(t, layout(t), "sha256:"+strings.Repeat("ab", 32), c.Driver); !fault.Is(err, fault.Busy) {
		t.Errorf("Run beside Google's installer = %v; want busy", err)
	}
}
