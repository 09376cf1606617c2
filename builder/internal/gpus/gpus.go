// Package gpus takes the list of supported GPUs out of an NVIDIA release and
// states it about an artifact, so that a node can choose a flavour by its PCI
// ids. It refuses to make a list up: a release without one gets no statement.
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

// Read returns the list of the release that was extracted to dir; nil where
// the release has none, as old ones have.
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

// maxPredicate leaves room in a bundle for base64 and the envelope; the 1,008
// products of 535.261.03 take 8 KB.
const maxPredicate = 600 << 10

// Statement states which GPUs the artifact with this manifest digest supports.
func Statement(digest string, d target.Driver, l *gpulist.List) (sign.Statement, error) {
	short := l.Short()
	raw, err := json.Marshal(short)
	if err != nil {
		return sign.Statement{}, err
	}
	if len(raw) > maxPredicate {
		return sign.Statement{}, fault.Errorf(fault.Unsupported,
			"make list of supported GPUs: %d bytes; at most %d fit into a statement", len(raw), maxPredicate)
	}
	return sign.About("nvidia-"+d.String(), digest, gpulist.PredicateType, short)
}
