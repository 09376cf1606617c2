package agent

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"testing"
	"time"

	"github.com/prebake/prebake/fetcher/internal/host"
	"github.com/prebake/prebake/fetcher/internal/install"
	"github.com/prebake/prebake/fetcher/internal/policy"
	"github.com/prebake/prebake/fetcher/internal/sample"
	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/testkit"
	"github.com/prebake/prebake/pkg/trust"
)

// mutate changes some random bytes, as a broken disk, an interrupted transfer or an attacker may do.
func mutate(rng *rand.Rand, data []byte, others ...[]byte) []byte {
	out := bytes.Clone(data)
	for range 1 + rng.IntN(3) {
		if len(out) == 0 {
			return []byte{byte(rng.Uint32())}
		}
		at := rng.IntN(len(out))
		n := min(1+rng.IntN(64), len(out)-at)
		switch rng.IntN(8) {
		case 0:
			out[at] ^= 1 << rng.IntN(8)
		case 1:
			out[at] = byte(rng.Uint32())
		case 2: // remove a part
			out = slices.Delete(out, at, at+n)
		case 3: // repeat a part
			out = slices.Insert(out, at, bytes.Clone(out[at:at+n])...)
		case 4: // truncate
			out = out[:at]
		case 5: // copy a part of another text
			to := rng.IntN(len(out) - n + 1)
			copy(out[to:to+n], bytes.Clone(out[at:at+n]))
		case 6: // copy from another text
			if len(others) > 0 {
				if other := others[rng.IntN(len(others))]; len(other) > 0 {
					from := rng.IntN(len(other))
					copy(out[at:], other[from:min(len(other), from+n)])
				}
			}
		case 7: // change a digit
			for i := at; i < len(out); i++ {
				if out[i] >= '0' && out[i] <= '9' {
					out[i] = '0' + byte(rng.IntN(10))
					break
				}
			}
		}
	}
	return out
}

// TestMutations makes ten thousand random changes to the input that a node gets from outside. The program must never
// crash. It must refuse a changed manifest, config or layer. A changed statement or policy may be valid, but such a
// statement must not change the verdict. Each refusal needs an error kind and a text.
func TestMutations(t *testing.T) {
	t.Parallel()
	rounds := 10_000
	if testing.Short() {
		rounds = 1000
	}
	key := testkit.NewKey(t)
	lay := filepath.Join(t.TempDir(), "layout")
	c := sample.NewCell(t, "17800.0.47", "535.261.03")
	c.Bulk = 4 << 10
	pub := sample.Publish(t, "oci:"+lay, key, c)
	repo, err := registry.Open("oci:"+lay, registry.Options{})
	if err != nil {
		t.Fatal(err)
	}
	v := key.Verifier(t)
	facts := &host.Facts{Kernel: c.Kernel}
	good, err := readEvidence(t.Context(), repo, v, pub.Digest, facts)
	if err != nil || len(good.Bundles) < 2 {
		t.Fatalf("%d bundles, %v", len(good.Bundles), err)
	}
	a := New(Config{}, Parts{Verifier: v, Now: time.Now})
	verify := func(p evidence) (*trust.Verdict, error) {
		_, verdict, err := a.verify(p, install.Published, pub.Digest, c.Driver, facts, time.Now())
		return verdict, err
	}
	believed, err := verify(good)
	if err != nil {
		t.Fatal(err)
	}
	var layers [][]byte
	for _, l := range pub.Layers {
		raw, err := os.ReadFile(filepath.Join(lay, "blobs", "sha256", l.Digest[len("sha256:"):]))
		if err != nil {
			t.Fatal(err)
		}
		layers = append(layers, raw)
	}
	policyText := []byte("version: 1\nroles: {farm: {keys: [{pem: \"" + escape(key.PEM(t)) +
		"\"}]}}\nsignatures:\n  - {statement: provenance, role: farm}\n  - {statement: kernelMatch, role: farm}\n")
	policyFile := filepath.Join(t.TempDir(), "policy.yaml")
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 1))
	counts := map[string]int{}
	refused := func(what string, err error) {
		t.Helper()
		if err == nil || err.Error() == "" || fault.Of(err) == fault.Internal {
			t.Errorf("%s: %v (%v); want a refusal of some kind, with words", what, err, fault.Of(err))
		}
		counts[what]++
	}
	for round := range rounds {
		if t.Failed() {
			t.Fatalf("in round %d", round)
		}
		p := good
		p.Bundles = slices.Clone(good.Bundles)
		switch rng.IntN(6) {
		case 0:
			if p.Manifest = mutate(rng, good.Manifest, good.Config); !bytes.Equal(p.Manifest, good.Manifest) {
				_, err := verify(p)
				refused("manifest", err)
			}
		case 1:
			if p.Config = mutate(rng, good.Config, good.Manifest); !bytes.Equal(p.Config, good.Config) {
				_, err := verify(p)
				refused("config", err)
			}
		case 2, 3:
			i := rng.IntN(len(p.Bundles))
			p.Bundles[i] = mutate(rng, good.Bundles[i], good.Bundles...)
			switch verdict, err := verify(p); {
			case err != nil:
				refused("statement", err)
			default:
				verdict.Ignored = nil // the changed statement may be one that no rule requires
				if want := *believed; !reflect.DeepEqual(&want, verdict) {
					t.Errorf("a changed statement was accepted as %+v; want %+v\n%s", verdict, want, p.Bundles[i])
				}
				counts["statement, the same"]++
			}
		case 4:
			i := rng.IntN(len(layers))
			raw := mutate(rng, layers[i], layers...)
			if bytes.Equal(raw, layers[i]) {
				continue
			}
			refused("layer", unpackTo(t, raw, pub.Layers[i]))
		case 5:
			text := mutate(rng, policyText)
			if err := os.WriteFile(policyFile, text, 0o600); err != nil {
				t.Fatal(err)
			}
			if _, err := policy.Read(policyFile); err != nil {
				refused("policy", err)
			}
		}
	}
	t.Log(counts)
	for _, what := range []string{"manifest", "config", "statement", "layer", "policy"} {
		if counts[what] < rounds/30 {
			t.Errorf("%d refusals of a %s: too few to show anything", counts[what], what)
		}
	}
}

func escape(pem []byte) string {
	return string(bytes.ReplaceAll(pem, []byte("\n"), []byte(`\n`)))
}

func unpackTo(t *testing.T, raw []byte, l bundle.Layer) (err error) {
	t.Helper()
	dir, err := os.MkdirTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	err = bundle.Unpack(context.Background(), bytes.NewReader(raw), l.Digest, l.DiffID, l.Size, root)
	if cerr := errors.Join(root.Close(), os.RemoveAll(dir)); cerr != nil {
		t.Fatal(cerr)
	}
	return err
}
