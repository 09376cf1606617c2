package registry_test

import (
	"fmt"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/v1/random"

	"github.com/prebake/prebake/pkg/registry"
)

// TestAttachedNewestFirst checks that Attached reads the newest attachments first, so that its limit leaves out only
// old ones. The time of an attachment must not decide whether it matches.
func TestAttachedNewestFirst(t *testing.T) {
	t.Parallel()
	repo := open(t, "oci:"+t.TempDir())
	img, err := random.Image(64, 1)
	if err != nil {
		t.Fatal(err)
	}
	subject, err := repo.Push(t.Context(), img)
	if err != nil {
		t.Fatal(err)
	}
	const created = "org.opencontainers.image.created"
	const count = registry.MaxAttachments + 16
	begin := time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC)
	day := func(n int) map[string]string {
		return map[string]string{"kind": "provenance", created: begin.AddDate(0, 0, n).Format(time.RFC3339)}
	}
	for n := range count {
		if _, err := repo.Attach(t.Context(), subject, labelledType, fmt.Append(nil, n), day(n)); err != nil {
			t.Fatal(err)
		}
	}
	for name, annotations := range map[string]map[string]string{
		"without a time": {"kind": "provenance"}, "with a wrong time": {"kind": "provenance", created: "yesterday"},
	} {
		if _, err := repo.Attach(t.Context(), subject, labelledType, []byte(name), annotations); err != nil {
			t.Fatal(err)
		}
	}
	for _, wanted := range []map[string]string{{"kind": "provenance"}, day(0)} {
		all, err := repo.Attached(t.Context(), subject.Digest.String(), labelledType, wanted)
		if err != nil || len(all) != registry.MaxAttachments {
			t.Fatalf("Attached(%v) = %d payloads, %v; want %d", wanted, len(all), err, registry.MaxAttachments)
		}
		for i, payload := range all {
			if want := fmt.Sprint(count - 1 - i); string(payload) != want {
				t.Errorf("Attached(%v) has payload %d = %q; want %q", wanted, i, payload, want)
				break
			}
		}
	}
}
