package gcs_test

import (
	"errors"
	"fmt"
	"testing"

	"cloud.google.com/go/storage"
	"google.golang.org/api/googleapi"
	"google.golang.org/api/option"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/gcs"
)

func TestBucket(t *testing.T) {
	t.Parallel()
	client, err := storage.NewClient(t.Context(), option.WithoutAuthentication())
	if err != nil {
		t.Fatal(err)
	}
	for folder, want := range map[string][2]string{
		"":      {"a/b", "gs://cos/a/b"},
		"/x/y/": {"x/y/a/b", "gs://cos/x/y/a/b"},
		"x":     {"x/a/b", "gs://cos/x/a/b"},
	} {
		b := gcs.New(client, "cos", folder)
		if got := [2]string{b.Object("a/b").ObjectName(), b.URL("a/b")}; got != want || b.Path("a/b") != want[0] ||
			b.Trim(want[0]) != "a/b" {
			t.Errorf("folder %q: object and URL are %q, %q back; want %q", folder, got, b.Trim(want[0]), want)
		}
	}
	if err := gcs.New(client, "cos", "").Close(); err != nil {
		t.Error(err)
	}
}

func TestErrors(t *testing.T) {
	t.Parallel()
	for status, refused := range map[int]bool{
		400: true, 403: true, 404: true, 412: true, 408: false, 429: false, 500: false, 503: false,
	} {
		err := fmt.Errorf("ask: %w", &googleapi.Error{Code: status})
		if got := gcs.Status(err); got != status || gcs.Refused(got) != refused {
			t.Errorf("Status = %d, refused %t; want %d, %t", got, gcs.Refused(got), status, refused)
		}
	}
	cut := errors.New("cut off")
	if got := gcs.Status(cut); got != 0 || gcs.Refused(got) {
		t.Errorf("Status of no answer = %d, refused %t; want 0, false", got, gcs.Refused(got))
	}
	if err := gcs.TransientError(cut); !fault.Is(err, fault.Transient) || !errors.Is(err, cut) || fault.Hint(err) == "" {
		t.Errorf("TransientError = %v; want transient, with a hint", err)
	}
}
