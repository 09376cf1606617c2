package tarball_test

import (
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/builder/internal/tarball"
	"github.com/prebake/prebake/pkg/trust"
)

var update = flag.Bool("update", false, "write the sample bucket that the server's test reads")

// sampleBucket is a folder with a bucket, which a test of the server reads. The server must not import this package.
const sampleBucket = "../../../server/testdata/bucket"

// TestSampleBucket checks that sampleBucket has the format that this package writes today.
func TestSampleBucket(t *testing.T) {
	t.Parallel()
	index := tarball.IndexName(kernel)
	if *update {
		s, pub := newSigner(t)
		dest := "file://" + filepath.Join(t.TempDir(), "bucket")
		if _, err := tarball.Publish(t.Context(), openBucket(t, dest), newRelease(t, s, open, "")); err != nil {
			t.Fatal(err)
		}
		if err := os.RemoveAll(sampleBucket); err != nil {
			t.Fatal(err)
		}
		for name, text := range content(t, dest) {
			if strings.HasPrefix(name, index) || name == tarball.TarballName(kernel, open) {
				write(t, filepath.Join(sampleBucket, name), text)
			}
		}
		key, err := os.ReadFile(pub)
		if err != nil {
			t.Fatal(err)
		}
		write(t, sampleBucket+".pub", string(key))
	}

	s, _ := newSigner(t)
	dest := "file://" + filepath.Join(t.TempDir(), "bucket")
	if _, err := tarball.Publish(t.Context(), openBucket(t, dest), newRelease(t, s, open, "")); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(sampleBucket, index))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(content(t, dest)[index], string(text)); diff != "" {
		t.Errorf("Publish() writes another index than the sample, run with -update (-published +sample):\n%s", diff)
	}
	key, err := os.ReadFile(sampleBucket + ".pub")
	if err != nil {
		t.Fatal(err)
	}
	keys, err := trust.ParsePublicKeys(key)
	if err != nil {
		t.Fatal(err)
	}
	v, err := trust.NewVerifier(trust.Policy{Keys: keys})
	if err != nil {
		t.Fatal(err)
	}
	digest := digestOf(text)
	signature, err := os.ReadFile(filepath.Join(sampleBucket, index+".sha256-"+digest[len("sha256:"):]+".sigstore.json"))
	if err != nil {
		t.Fatal(err)
	}
	facts := tarball.ObjectFacts{Object: index, BuildID: kernel.BuildID, Board: kernel.Board}
	if _, err := tarball.Verify(v, signature, digest, facts); err != nil {
		t.Errorf("Verify() of the sample's index = %v; want none", err)
	}
}
