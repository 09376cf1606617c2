package maker

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"github.com/klauspost/compress/zstd"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/snapshot"
)

// Encode checks and sorts a list, and returns the file to publish.
func Encode(c snapshot.Catalogue) ([]byte, error) {
	c.Artifacts = slices.Clone(c.Artifacts)
	slices.SortFunc(c.Artifacts, func(a, b snapshot.Artifact) int { return strings.Compare(a.Digest, b.Digest) })
	if err := c.Check(); err != nil {
		return nil, fault.Wrap(fault.Usage, fmt.Errorf("write catalogue: %w", err), "")
	}
	text, err := json.Marshal(c)
	if err != nil {
		return nil, fmt.Errorf("write catalogue: %w", err)
	}
	enc, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedBetterCompression))
	if err != nil {
		return nil, fmt.Errorf("write catalogue: %w", err)
	}
	file := enc.EncodeAll(text, nil)
	if err := enc.Close(); err != nil {
		return nil, fmt.Errorf("write catalogue: %w", err)
	}
	if len(text) > snapshot.MaxText || len(file) > snapshot.MaxFile {
		return nil, fault.Errorf(
			fault.TooLarge,
			"write catalogue: the text has %d bytes, and %d compressed; clients read at most %d bytes, and %d compressed",
			len(text),
			len(file),
			snapshot.MaxText,
			snapshot.MaxFile,
		)
	}
	return file, nil
}
