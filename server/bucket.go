package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/prebake/prebake/pkg/cosbucket"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/trust"
)

// Builders can publish tarballs in a bucket: docs/decisions/0014-tarball-twins.md. A signed index for each COS build
// and board contains the digest of each tarball's artifact. The command reindex looks for these artifacts in the
// registry.

// bucketObject is the predicate type of a statement about an object of a bucket.
const bucketObject = "https://prebake.dev/bucket-object/v1"

// maxIndex is the maximum size of an index, in bytes. maxEntries is its maximum number of drivers. Builders have the
// same limits.
const (
	indexFile  = "index.json"
	maxIndex   = 4 << 20
	maxEntries = 2000
)

// tarballIndex has the fields of an index that the server reads.
type tarballIndex struct {
	Format  int       `json:"format"`
	BuildID string    `json:"buildId"`
	Board   string    `json:"board"`
	Drivers []tarball `json:"drivers"`
}

// tarball is one driver for one COS build.
type tarball struct {
	target.Driver
	Object string `json:"object"`
	// Artifact is the digest of the artifact with the same modules; "" if the builder left it out.
	Artifact string `json:"artifact"`

	kernel target.Kernel
}

// bucket is an untrusted bucket of tarballs. Only content with a trusted signature is used.
type bucket struct {
	b        *cosbucket.Bucket
	verifier *trust.Verifier
}

// tarballs reads all indexes. It returns the tarballs that are both in an index and in the bucket. It also returns a
// finding for each untrusted index and for each tarball that is missing in the bucket.
func (b *bucket) tarballs(ctx context.Context) (all []tarball, bad []finding, err error) {
	ids, err := b.b.BuildIDs(ctx)
	if err != nil {
		return nil, nil, err
	}
	var mu sync.Mutex
	group, running := errgroup.WithContext(ctx)
	group.SetLimit(readAtOnce)
	for _, id := range ids {
		group.Go(func() error {
			some, wrong, err := b.readIndexes(running, id)
			mu.Lock()
			defer mu.Unlock()
			all, bad = append(all, some...), append(bad, wrong...)
			return err
		})
	}
	if err := group.Wait(); err != nil {
		return nil, nil, err
	}
	slices.SortFunc(all, func(x, y tarball) int { return strings.Compare(x.Object, y.Object) })
	slices.SortFunc(bad, func(x, y finding) int { return strings.Compare(x.Note, y.Note) })
	return all, bad, nil
}

// readIndexes reads the indexes of one COS build, and returns the same results as [bucket.tarballs].
func (b *bucket) readIndexes(ctx context.Context, id string) (all []tarball, bad []finding, err error) {
	names, err := b.b.List(ctx, id+"/")
	if err != nil {
		return nil, nil, err
	}
	for _, name := range names {
		parts := strings.Split(name, "/")
		if len(parts) != 3 || parts[2] != indexFile {
			continue
		}
		k, err := target.ParseKernel(id, parts[1])
		if err != nil {
			continue
		}
		index, err := b.readIndex(ctx, name, k)
		if believable := fault.Is(err, fault.Unverified) || fault.Is(err, fault.Mismatch); err != nil && believable {
			bad = append(bad, finding{Difference: unverified, Note: name + ": " + err.Error()})
			continue
		}
		if err != nil {
			return nil, nil, err
		}
		for _, t := range index.Drivers {
			t.kernel = k
			there, err := b.hasObject(ctx, names, t.Object)
			switch {
			case err != nil:
				return nil, nil, err
			case there:
				all = append(all, t)
			default:
				bad = append(bad, finding{Digest: t.Artifact, Difference: absent, Driver: t.Driver,
					Note: t.Object + " is in the bucket's index, but not in the bucket"})
			}
		}
	}
	return all, bad, nil
}

// hasObject reports whether the bucket has an object. It first searches the given sorted list. The list may be older
// than the index, so hasObject then asks the bucket.
func (b *bucket) hasObject(ctx context.Context, listed []string, name string) (bool, error) {
	if _, ok := slices.BinarySearch(listed, name); ok {
		return true, nil
	}
	body, _, err := b.b.Get(ctx, name)
	if fault.Is(err, fault.InputMissing) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	return true, body.Close()
}

// readIndex reads an index and verifies its signature. The name of the signature's file contains the index's digest.
// Builders write the signature before the index.
func (b *bucket) readIndex(ctx context.Context, name string, k target.Kernel) (x tarballIndex, err error) {
	text, err := b.b.ReadSmall(ctx, name, maxIndex)
	if err != nil {
		return x, asUnverified(err)
	}
	sum := sha256.Sum256(text)
	digest := hex.EncodeToString(sum[:])
	signature, err := b.b.ReadSmall(ctx, name+".sha256-"+digest+".sigstore.json", trust.MaxBundleSize)
	if fault.Is(err, fault.InputMissing) {
		return x, fault.New(fault.Unverified, "the index has no signature", "")
	}
	if err != nil {
		return x, asUnverified(err)
	}
	st, err := b.verifier.Statement(signature)
	if err != nil {
		return x, err
	}
	var facts struct {
		Object  string `json:"object"`
		BuildID string `json:"buildId"`
		Board   string `json:"board"`
	}
	if err := json.Unmarshal(st.Predicate, &facts); err != nil {
		return x, fault.Wrap(fault.Unverified, fmt.Errorf("read the signed statement: %w", err), "")
	}
	if st.PredicateType != bucketObject || !st.About("sha256:"+digest) {
		return x, fault.New(fault.Unverified, "the signed statement is not about this index", "")
	}
	// Compare the place, too: otherwise a signed index could be copied to another COS build.
	if facts.Object != name || facts.BuildID != k.BuildID || facts.Board != k.Board {
		return x, fault.New(fault.Mismatch,
			fmt.Sprintf("the signature is for the index %.200q of kernel %.40q/%.40q, not for this index",
				facts.Object, facts.BuildID, facts.Board), "")
	}
	if err := json.Unmarshal(text, &x); err != nil {
		return x, fault.Wrap(fault.Unverified, err, "")
	}
	if err := x.check(k); err != nil {
		return x, fault.Wrap(fault.Unverified, err, "")
	}
	return x, nil
}

// asUnverified changes the kind of an error to Unverified if the file is too long or has a wrong checksum.
func asUnverified(err error) error {
	if fault.Is(err, fault.Unsupported) || fault.Is(err, fault.Checksum) {
		return fault.Wrap(fault.Unverified, err, "")
	}
	return err
}

func (x tarballIndex) check(k target.Kernel) error {
	if x.Format != 1 {
		return fmt.Errorf("the index has format %d; this program reads only format 1", x.Format)
	}
	if x.BuildID != k.BuildID || x.Board != k.Board {
		return fmt.Errorf("the index is for kernel %.40q/%.40q, not %s", x.BuildID, x.Board, k)
	}
	if len(x.Drivers) > maxEntries {
		return fmt.Errorf("the index has %d drivers; want at most %d drivers", len(x.Drivers), maxEntries)
	}
	for _, t := range x.Drivers {
		if _, err := target.ParseDriver(t.Version, string(t.Flavour)); err != nil {
			return err
		}
		// A digest has the format of a fingerprint, so the same parser checks both.
		if _, err := target.ParseFingerprint(t.Artifact); t.Artifact != "" && err != nil {
			return fmt.Errorf("artifact %.80q: want sha256: and 64 hex digits", t.Artifact)
		}
		if !strings.HasPrefix(t.Object, k.BuildID+"/"+k.Board+"/") || !fs.ValidPath(t.Object) {
			return fmt.Errorf("object %.200q is not in the folder %s/%s", t.Object, k.BuildID, k.Board)
		}
	}
	return nil
}

// addBucket adds findings about artifacts that only the bucket has.
func (c *comparison) addBucket(ctx context.Context, url string, b *bucket) error {
	all, bad, err := b.tarballs(ctx)
	if err != nil {
		return fmt.Errorf("read bucket %s: %w", url, err)
	}
	c.Bucket, c.InBucket = url, len(all)
	c.Findings = append(c.Findings, bad...)
	// Each artifact gets one finding, with the kernels of all its tarballs.
	at := map[string]int{}
	for _, t := range all {
		if c.serves(t) {
			continue
		}
		key := t.Artifact + " " + t.Driver.String()
		i, ok := at[key]
		if !ok {
			i = len(c.Findings)
			at[key] = i
			c.Findings = append(c.Findings, finding{Digest: t.Artifact, Difference: lost, Driver: t.Driver})
		}
		f := &c.Findings[i]
		f.Kernels = append(f.Kernels, t.kernel)
		f.Note = "for " + kernelNames(f.Kernels)
	}
	return nil
}

// serves reports whether the registry has a tarball's artifact, verified for the tarball's kernel.
func (c *comparison) serves(t tarball) bool {
	return slices.ContainsFunc(c.held, func(a artifact) bool {
		if a.err != nil || a.identity.Driver != t.Driver || t.Artifact != "" && a.digest != t.Artifact {
			return false
		}
		return len(without([]target.Kernel{t.kernel}, a.kernels)) == 0
	})
}
