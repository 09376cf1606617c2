// Package gpus reads the list of supported GPUs from an NVIDIA release, and makes a statement with this list about an
// artifact. A node can then choose a flavour by the PCI ids of its GPUs. The package never invents a list: if the
// release has none, there is no statement.
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

// Read returns the list of supported GPUs in the folder of an extracted release. An old release has no list; then Read
// returns nil.
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

// maxPredicate is the maximum size of the predicate in bytes. A Sigstore bundle has it in base64, with an envelope
// around it. The 1,008 products of 535.261.03 take 8 KB.
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
			"make the list of supported GPUs: the list has %d bytes; want at most %d bytes", len(raw),
			maxPredicate)
	}
	return sign.About("nvidia-"+d.String(), digest, gpulist.PredicateType, short)
}
