package sign_test

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"github.com/prebake/prebake/builder/internal/sign"
	"github.com/prebake/prebake/pkg/testkit"
	"github.com/prebake/prebake/pkg/trust"
)

func TestRelease(t *testing.T) {
	t.Parallel()
	digest := func(c string) string { return "sha256:" + strings.Repeat(c, 64) }
	facts := sign.ReleaseFacts{
		Version: "v1.2.3", Commit: strings.Repeat("c", 40), Toolchain: "go1.26", BuilderID: "https://example.com/release",
		Files:  []sign.Material{{Name: "SHA256SUMS", Digest: digest("1")}, {Name: "linux-amd64/server", Digest: digest("2")}},
		Inputs: []sign.Material{{Name: "bash.deb", URI: "pkg:deb/debian/bash@5", Digest: digest("3")}},
	}
	st, err := sign.Release(facts)
	if err != nil {
		t.Fatal(err)
	}
	if again, err := sign.Release(facts); err != nil || !bytes.Equal(again.JSON(), st.JSON()) {
		t.Errorf("Release = %s, %v; before it was %s", again.JSON(), err, st.JSON())
	}
	for _, want := range []string{facts.Commit, "v1.2.3", "go1.26", "pkg:deb/debian/bash@5", strings.Repeat("3", 64)} {
		if !strings.Contains(string(st.JSON()), want) {
			t.Errorf("Release = %s; want %s in it", st.JSON(), want)
		}
	}
	signer, verifier := keyFile(t)
	raw, err := sign.Bundle(t.Context(), signer, st)
	if err != nil {
		t.Fatal(err)
	}
	read, err := verifier.Statement(raw)
	if err != nil {
		t.Fatal(err)
	}
	if read.PredicateType != trust.PredicateProvenance || !read.About(digest("1")) || !read.About(digest("2")) {
		t.Errorf("Statement = %+v; want provenance of both files", read)
	}
	if _, err := testkit.NewKey(t).Verifier(t).Statement(raw); !errors.Is(err, trust.ErrUnknownKey) {
		t.Errorf("Statement by another key = %v; want %v", err, trust.ErrUnknownKey)
	}
	for name, change := range map[string]func(*sign.ReleaseFacts){
		"no files":   func(f *sign.ReleaseFacts) { f.Files = nil },
		"bad digest": func(f *sign.ReleaseFacts) { f.Files = []sign.Material{{Name: "x", Digest: "latest"}} },
		"bad input":  func(f *sign.ReleaseFacts) { f.Inputs = []sign.Material{{Name: "x", Digest: "md5:x"}} },
		"no builder": func(f *sign.ReleaseFacts) { f.BuilderID = "" },
	} {
		f := facts
		change(&f)
		if st, err := sign.Release(f); err == nil {
			t.Errorf("%s: Release = %s; want an error", name, st.JSON())
		}
	}
}
