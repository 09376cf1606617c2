// Package gpus reads the list of supported GPUs from an NVIDIA release, and makes a statement that attaches the list to
// an artifact. With this statement a node can choose a flavour by the PCI ids of its GPUs. The package refuses to
// invent a list: an artifact of a release without a list gets no such statement.
package gpus

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"github.com/prebake/prebake/builder/internal/sign"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/gpulist"
	"github.com/prebake/prebake/pkg/target"
)

// Read returns the list of supported GPUs of a release. dir is the folder with the extracted release, and version is
// the driver's version. If the release is old and has no list, Read returns nil.
func Read(dir, version string) (*gpulist.List, error) {
	f, err := os.OpenInRoot(dir, gpulist.File)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read supported GPUs: %w", err)
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, gpulist.MaxFile+1))
	if err != nil {
		return nil, fmt.Errorf("read supported GPUs: %w", err)
	}
	return gpulist.ParseFile(version, text)
}

// maxPredicate is the largest size of the statement's predicate, in bytes. A Sigstore bundle must have room for the
// predicate in base64 and for the envelope around it. The 1,008 products of 535.261.03 take 8 KB.
const maxPredicate = 600 << 10

// Statement returns a statement that says which GPUs the artifact with this manifest digest supports.
func Statement(digest string, d target.Driver, l *gpulist.List) (sign.Statement, error) {
	short := l.Short()
	raw, err := json.Marshal(short)
	if err != nil {
		return sign.Statement{}, err
	}
	if len(raw) > maxPredicate {
		return sign.Statement{}, fault.Errorf(fault.Unsupported,
			"make the list of supported GPUs: it has %d bytes; at most %d fit into a statement", len(raw), maxPredicate)
	}
	return sign.About("nvidia-"+d.String(), digest, gpulist.PredicateType, short)
}
