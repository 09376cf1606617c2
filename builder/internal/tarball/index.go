package tarball

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
)

// indexFormat is the only format that this program writes and reads.
const indexFormat = 1

// Limits of an index: its size in bytes, and the numbers of drivers and labels. One entry has about 2 KB.
const (
	maxIndex   = 4 << 20
	maxEntries = 2000
	maxLabels  = 4000
)

// Index lists the drivers that are published for one COS build. Builders add drivers, and never change or remove them.
// The index contains no time, so equal lists give equal files.
type Index struct {
	Format  int    `json:"format"`
	BuildID string `json:"buildId"`
	Board   string `json:"board"`
	// Drivers are sorted by version and flavour.
	Drivers []Entry `json:"drivers"`
	// Labels are the labels that builders set. All other labels in gpu_driver_versions are from somebody else.
	Labels []Label `json:"labels,omitempty"`
}

// Entry is one driver of an index. Object names are relative to the bucket's prefix.
type Entry struct {
	target.Driver
	// Object is the name of the tarball. Its checksums and its signature are separate objects.
	Object    string `json:"object"`
	Size      int64  `json:"size"`
	SHA256    string `json:"sha256"`
	MD5       string `json:"md5"`
	Signature string `json:"signature"`
	// Artifact is the manifest digest of the OCI artifact with the same files. Fingerprint is the ABI fingerprint of the
	// modules' kernel.
	Artifact    string             `json:"artifact,omitempty"`
	Fingerprint target.Fingerprint `json:"fingerprint,omitempty"`
	// Runfile is NVIDIA's runfile, which contains the user space.
	Runfile *RunfileEntry `json:"runfile,omitempty"`
	Files   []File        `json:"files"`
}

// RunfileEntry is the entry of NVIDIA's runfile in an index.
type RunfileEntry struct {
	Name   string `json:"name"`
	SHA256 string `json:"sha256"`
	// URI is the runfile's source. Object is the name of its copy in this bucket, if there is one.
	URI    string `json:"uri,omitempty"`
	Object string `json:"object,omitempty"`
}

// ParseIndex reads an index whose signature the caller has verified. It accepts only what this program writes. For
// other content, such as an unknown field or another order, the error is [fault.Unverified].
func ParseIndex(text []byte) (Index, error) {
	x, err := parseIndex(text)
	if err != nil {
		return Index{}, fault.Errorf(fault.Unverified, "read index: %w", err)
	}
	return x, nil
}

func parseIndex(text []byte) (Index, error) {
	var x Index
	if len(text) > maxIndex {
		return x, fmt.Errorf("the index has %d bytes; want at most %d bytes", len(text), maxIndex)
	}
	dec := json.NewDecoder(bytes.NewReader(text))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&x); err != nil {
		return x, err
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return x, errors.New("the index has data after the end of its JSON document")
	}
	if x.Format != indexFormat {
		return x, fmt.Errorf("the index has format %d; this program reads only format %d", x.Format, indexFormat)
	}
	k, err := target.ParseKernel(x.BuildID, x.Board)
	if err != nil {
		return x, err
	}
	if len(x.Drivers) > maxEntries {
		return x, fmt.Errorf("the index has %d drivers; want at most %d drivers", len(x.Drivers), maxEntries)
	}
	for i, e := range x.Drivers {
		if err := e.check(k); err != nil {
			return x, fmt.Errorf("check entry %d of the index's drivers: %w", i, err)
		}
		if i > 0 && x.Drivers[i-1].compare(e) >= 0 {
			return x, fmt.Errorf("entry %d of the index's drivers is out of order or a duplicate", i)
		}
	}
	if len(x.Labels) > maxLabels {
		return x, fmt.Errorf("the index has %d labels; want at most %d labels", len(x.Labels), maxLabels)
	}
	for i, l := range x.Labels {
		if err := l.check(x); err != nil {
			return x, fmt.Errorf("check entry %d of the index's labels: %w", i, err)
		}
		if i > 0 && x.Labels[i-1].compare(l) >= 0 {
			return x, fmt.Errorf("entry %d of the index's labels is out of order or a duplicate", i)
		}
	}
	return x, nil
}

func (e Entry) check(k target.Kernel) error {
	if _, err := target.ParseDriver(e.Version, string(e.Flavour)); err != nil {
		return err
	}
	name := TarballName(k, e.Driver)
	if e.Object != name || e.Signature != signatureName(name) {
		return fmt.Errorf("the entry names object %.200q with signature %.200q; want object %q with signature %q", e.Object,
			e.Signature, name, signatureName(name))
	}
	digests := []string{e.SHA256}
	if e.Artifact != "" {
		digests = append(digests, e.Artifact)
	}
	if e.Fingerprint != "" {
		digests = append(digests, string(e.Fingerprint))
	}
	if e.Runfile != nil {
		digests = append(digests, e.Runfile.SHA256)
	}
	for _, f := range e.Files {
		digests = append(digests, f.SHA256)
	}
	for _, d := range digests {
		if _, err := target.ParseFingerprint(d); err != nil { // a fingerprint has the same format
			return fmt.Errorf("digest %.80q: want sha256: and 64 hex digits", d)
		}
	}
	if e.Size <= 0 || len(e.Files) == 0 || len(e.Files) > maxFiles {
		return fmt.Errorf("the tarball has %d bytes and %d files; want a positive size, and 1 to %d files", e.Size,
			len(e.Files), maxFiles)
	}
	return nil
}

func (e Entry) compare(o Entry) int {
	return cmp.Or(target.CompareVersions(e.Version, o.Version), strings.Compare(e.Version, o.Version),
		strings.Compare(string(e.Flavour), string(o.Flavour)))
}

// withEntry returns the index with the entry added. If the index has this driver with another tarball or artifact,
// withEntry returns an error.
func (x Index) withEntry(e Entry) (Index, error) {
	x.Drivers = slices.Clone(x.Drivers)
	i, found := slices.BinarySearchFunc(x.Drivers, e, Entry.compare)
	if !found {
		x.Drivers = slices.Insert(x.Drivers, i, e)
		return x, nil
	}
	have := x.Drivers[i]
	if have.SHA256 != e.SHA256 || have.Artifact != e.Artifact || have.Fingerprint != e.Fingerprint {
		return x, fault.New(fault.PublishRefused,
			fmt.Sprintf("the index already has driver %s: tarball %s from artifact %s; the new tarball is %s from artifact %s",
				e.Driver, have.SHA256, have.Artifact, e.SHA256, e.Artifact),
			"a published tarball is never replaced, and equal inputs give equal digests; to see what differs, run "+
				"\"builder reproduce\" on the artifact of the published tarball")
	}
	// A copy of the runfile may be added later than the driver.
	if e.Runfile != nil && (have.Runfile == nil || have.Runfile.SHA256 == e.Runfile.SHA256 && have.Runfile.Object == "" &&
		e.Runfile.Object != "") {
		x.Drivers[i].Runfile = e.Runfile
	}
	return x, nil
}

func (x Index) marshal() ([]byte, error) {
	text, err := json.MarshalIndent(x, "", "  ")
	return append(text, '\n'), err
}
