package publish

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"slices"
	"strings"

	ocidigest "github.com/opencontainers/go-digest"

	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/target"
)

// maxDelta is the maximum size of a delta in bytes. A delta is in memory while it is made, and a larger one saves too
// little.
const maxDelta = 16 << 20

// maxBefore is the maximum number of earlier COS builds that Deltas examines for each wanted delta.
const maxBefore = 4

// Delta describes a delta that [Deltas] attached.
type Delta struct {
	// From is the COS build whose module layer a node needs to apply the delta.
	From target.Kernel `json:"from"`
	Size int64         `json:"size"`
}

// Deltas attaches up to count deltas to a published artifact. With a delta, a node makes the module layer from the
// layer of an earlier COS build. Both builds have the same board, milestone and driver. The newest builds come first,
// because an updated node usually has their layer.
//
// Deltas skips a delta that is attached already, or is larger than maxDelta or than half of the new layer. After an
// error, Deltas also returns the deltas that it attached before.
func Deltas(
	ctx context.Context,
	repo *registry.Repository,
	digest string,
	k target.Kernel,
	d target.Driver,
	count int,
) (made []Delta, err error) {
	made, err = deltas(ctx, repo, digest, k, d, count)
	if err != nil {
		err = fmt.Errorf("make deltas for %s: %w", digest, err)
	}
	return made, err
}

func deltas(
	ctx context.Context,
	repo *registry.Repository,
	digest string,
	k target.Kernel,
	d target.Driver,
	count int,
) (made []Delta, err error) {
	if count <= 0 {
		return nil, nil
	}
	tags, err := repo.Tags(ctx)
	if err != nil {
		return nil, err
	}
	before := buildsBefore(tags, k, d)
	if len(before) == 0 {
		return nil, nil
	}
	content, err := Content(ctx, repo, digest)
	if err != nil {
		return nil, err
	}
	to := content.Layer(bundle.LayerModules)
	there, err := repo.Payloads(ctx, digest, bundle.ArtifactTypeDelta, maxDelta)
	if err != nil {
		return nil, err
	}
	have := map[string]bool{} // by digest, because anybody may attach a delta for the same layer
	for _, p := range there {
		have[p.Digest.String()] = true
	}
	subject, err := repo.Resolve(ctx, digest)
	if err != nil {
		return nil, err
	}
	formers := map[string]bool{}
	for _, build := range before[:min(maxBefore*count, len(before))] {
		former, err := layerOf(ctx, repo, build, d)
		if err != nil {
			return made, err
		}
		if former.Digest == "" || former.DiffID == to.DiffID || formers[former.DiffID] {
			continue // several COS builds may have the same module layer
		}
		if formers[former.DiffID] = true; len(formers) > count {
			break
		}
		delta, err := makeDelta(ctx, repo, former, to)
		if errors.Is(err, errLarge) {
			continue
		}
		if err != nil {
			return made, err
		}
		if have[digestOf(delta)] {
			continue
		}
		from := map[string]string{bundle.AnnotationDeltaFrom: former.DiffID}
		if _, err := repo.Attach(ctx, subject, bundle.ArtifactTypeDelta, delta, from); err != nil {
			return made, err
		}
		made = append(made, Delta{From: build, Size: int64(len(delta))})
	}
	return made, nil
}

// buildsBefore returns the earlier COS builds of a kernel's board and milestone that have a tag of this driver, newest
// first.
func buildsBefore(tags []string, k target.Kernel, d target.Driver) []target.Kernel {
	suffix, milestone := strings.TrimPrefix(bundle.KernelTag(k, d), "cos-"+k.BuildID), firstNumber(k.BuildID)
	var before []target.Kernel
	for _, tag := range tags {
		id, ok := strings.CutSuffix(tag, suffix)
		if !ok || !strings.HasPrefix(id, "cos-") {
			continue
		}
		other, err := target.ParseKernel(strings.TrimPrefix(id, "cos-"), k.Board)
		if err == nil && firstNumber(other.BuildID) == milestone &&
			target.CompareVersions(other.BuildID, k.BuildID) < 0 {
			before = append(before, other)
		}
	}
	slices.SortFunc(before, func(x, y target.Kernel) int { return target.CompareVersions(y.BuildID, x.BuildID) })
	return before
}

// firstNumber returns the first number of a BUILD_ID, which all COS builds of a milestone share.
func firstNumber(buildID string) string {
	first, _, _ := strings.Cut(buildID, ".")
	return first
}

// layerOf returns the module layer of a COS build's artifact with this driver. If the repository has no such artifact,
// or cannot serve it, the returned layer has no digest.
func layerOf(
	ctx context.Context,
	repo *registry.Repository,
	k target.Kernel,
	d target.Driver,
) (bundle.ContentLayer, error) {
	digest, ok, err := Existing(ctx, repo, bundle.KernelTag(k, d))
	if err != nil || !ok {
		return bundle.ContentLayer{}, err
	}
	content, err := Content(ctx, repo, digest)
	if fault.Is(err, fault.Unverified) || fault.Is(err, fault.NoArtifact) {
		return bundle.ContentLayer{}, nil
	}
	if err != nil || content.Identity.Driver != d {
		return bundle.ContentLayer{}, err
	}
	return content.Layer(bundle.LayerModules), nil
}

// makeDelta makes a delta in memory from two layers of the repository.
func makeDelta(ctx context.Context, repo *registry.Repository, from, to bundle.ContentLayer) ([]byte, error) {
	a, err := openLayer(ctx, repo, from)
	if err != nil {
		return nil, err
	}
	defer a.Close()
	b, err := openLayer(ctx, repo, to)
	if err != nil {
		return nil, err
	}
	defer b.Close()
	w := &limitedBuffer{limit: int(min(maxDelta, to.Size/2))}
	if err := bundle.WriteDelta(ctx, a, b, w); err != nil {
		return nil, err
	}
	return w.buf.Bytes(), errors.Join(a.check(), b.check())
}

// layerReader reads the uncompressed tar of a published layer and hashes it.
type layerReader struct {
	io.Reader
	h           hash.Hash
	want        string
	plain, blob io.Closer
}

func openLayer(ctx context.Context, repo *registry.Repository, l bundle.ContentLayer) (*layerReader, error) {
	blob, err := repo.Blob(ctx, l.Digest, l.Size)
	if err != nil {
		return nil, err
	}
	plain, err := bundle.OpenArchive(blob)
	if err != nil {
		return nil, errors.Join(err, blob.Close())
	}
	h := sha256.New()
	return &layerReader{io.TeeReader(plain, h), h, l.DiffID, plain, blob}, nil
}

// check reads the rest of the layer, and compares its uncompressed hash with the diff id in the artifact's config.
func (l *layerReader) check() error {
	if _, err := io.Copy(io.Discard, l); err != nil {
		return fmt.Errorf("read the modules layer: %w", err)
	}
	if got := ocidigest.NewDigest(ocidigest.SHA256, l.h).String(); got != l.want {
		return fault.New(
			fault.Unverified,
			fmt.Sprintf("read the modules layer: the layer has diff id %s, but the artifact's config says %s", got, l.want),
			"",
		)
	}
	return nil
}

func (l *layerReader) Close() error { return errors.Join(l.plain.Close(), l.blob.Close()) }

// limitedBuffer is a buffer that accepts at most limit bytes.
type limitedBuffer struct {
	buf   bytes.Buffer
	limit int
}

var errLarge = errors.New("the delta is too large to save enough bytes")

func (l *limitedBuffer) Write(p []byte) (int, error) {
	if l.buf.Len()+len(p) > l.limit {
		return 0, errLarge
	}
	return l.buf.Write(p)
}

func digestOf(b []byte) string {
	return ocidigest.FromBytes(b).String()
}
