package publish_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"io"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/prebake/prebake/builder/internal/publish"
	"github.com/prebake/prebake/builder/internal/sign"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/testkit"
	"github.com/prebake/prebake/pkg/trust"
)

func pack(t testing.TB, log io.Reader) (packed []byte, digest string) {
	t.Helper()
	packed, digest, err := publish.PackLog(log)
	if err != nil {
		t.Fatal(err)
	}
	if sum := sha256.Sum256(packed); digest != "sha256:"+hex.EncodeToString(sum[:]) ||
		len(packed) > registry.MaxAttachment {
		t.Errorf("PackLog = %d bytes with digest %s; want at most %d and their digest", len(packed), digest,
			registry.MaxAttachment)
	}
	return packed, digest
}

func TestPackLog(t *testing.T) {
	t.Parallel()
	noise := func(n int) string { // noise hardly compresses
		raw := make([]byte, n/2)
		_, _ = rand.NewChaCha8([32]byte{1}).Read(raw)
		return hex.EncodeToString(raw)
	}
	for name, row := range map[string]struct {
		log   string
		whole bool
	}{
		"empty": {"", true},
		"short": {"a\nb\n", true},
		"usual": {strings.Repeat("  CC [M]  nvidia/nv.o\n", 60_000), true},
		"long":  {"first\n" + strings.Repeat("x y z\n", 5<<20) + "last\n", false},
		"noise": {"first\n" + noise(9<<20) + "last\n", false},
	} {
		packed, _ := pack(t, strings.NewReader(row.log))
		text, err := publish.UnpackLog(packed)
		switch {
		case err != nil:
			t.Errorf("%s: UnpackLog = %v", name, err)
		case row.whole && string(text) != row.log:
			t.Errorf("%s: UnpackLog(PackLog) = %d bytes; want the same %d", name, len(text), len(row.log))
		case !row.whole && (!bytes.HasPrefix(text, []byte("first\n")) || !bytes.HasSuffix(text, []byte("last\n")) ||
			!bytes.Contains(text, []byte("left out here"))):
			t.Errorf("%s: UnpackLog(PackLog) = %d bytes; want both ends and a word on what is missing", name, len(text))
		}
	}
}

func FuzzUnpackLog(f *testing.F) {
	packed, _ := pack(f, strings.NewReader("a log\n"))
	f.Add(packed)
	f.Add([]byte("no log"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		if text, err := publish.UnpackLog(raw); err == nil && len(text) > 17<<20 {
			t.Errorf("UnpackLog = %d bytes", len(text))
		}
	})
}

// TestLogThatProvenanceNames publishes an artifact in two runs with different logs. In one row the first run is
// complete; in the other it ends after it attached its log. The registry must have the log that the attached provenance
// names.
func TestLogThatProvenanceNames(t *testing.T) {
	t.Parallel()
	s := testkit.NewSample(t, testkit.NewKey(t), testkit.SampleKernel("47"), driver, "")
	for name, cutOff := range map[string]bool{"published twice": false, "cut off behind the log": true} {
		ctx, repo := t.Context(), open(t, testkit.Registry(t, true)+"/prebake/driver", nil)
		signer := newSigner(t)
		v, err := signer.Verifier()
		if err != nil {
			t.Fatal(err)
		}
		run := func(log string) (publish.Artifact, string) {
			packed, digest := pack(t, strings.NewReader(log))
			provenance, err := sign.Provenance(s.Digest,
				sign.BuildFacts{Kernel: s.Kernel, Fingerprint: s.Identity.Fingerprint, Driver: driver,
					BuilderID: "https://example.com/builder", LogDigest: digest})
			if err != nil {
				t.Fatal(err)
			}
			raw, err := sign.Bundle(ctx, signer, provenance)
			if err != nil {
				t.Fatal(err)
			}
			return publish.Artifact{Image: s.Image, Identity: s.Identity, Kernel: s.Kernel, Verifier: v, Bundles: [][]byte{raw},
				Log: packed}, digest
		}
		one, want := run("log of the first run\n")
		two, second := run("log of the second run\n")
		if cutOff {
			want = second
			d, err := repo.Push(ctx, s.Image)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := repo.Attach(ctx, d, publish.ArtifactTypeLog, one.Log, nil); err != nil {
				t.Fatal(err)
			}
		} else if _, _, err := publish.Publish(ctx, repo, one); err != nil {
			t.Fatal(err)
		}
		if _, _, err := publish.Publish(ctx, repo, two); err != nil {
			t.Fatal(err)
		}
		attached, err := repo.Attached(ctx, s.Digest, trust.ArtifactTypeBundle)
		if err != nil {
			t.Fatal(err)
		}
		statements := v.Statements(attached, s.Digest, trust.PredicateProvenance)
		if len(statements) != 1 || !strings.Contains(string(statements[0].Predicate), strings.TrimPrefix(want, "sha256:")) {
			t.Fatalf("%s: %d provenances, %+v; want one that names %s", name, len(statements), statements, want)
		}
		logs, err := repo.Attached(ctx, s.Digest, publish.ArtifactTypeLog)
		if err != nil {
			t.Fatal(err)
		}
		found := 0
		for _, packed := range logs {
			if sum := sha256.Sum256(packed); "sha256:"+hex.EncodeToString(sum[:]) == want {
				found++
			}
		}
		if found != 1 || !cutOff && len(logs) != 1 {
			t.Errorf("%s: %d logs, %d of them the one that provenance names; want it once", name, len(logs), found)
		}
	}
}
