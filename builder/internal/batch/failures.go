package batch

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"sync"

	"github.com/prebake/prebake/builder/internal/compile"
	"github.com/prebake/prebake/pkg/cosbucket"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/plan"
	"github.com/prebake/prebake/pkg/target"
)

// facts is the part of the cache that FailureStore needs. A fact is a small value under a kind and a key.
type facts interface {
	PutFact(kind, key string, value []byte) error
	Fact(kind, key string) ([]byte, bool)
}

// smallReader is the part of a bucket that FailureStore needs. The limit is in bytes.
type smallReader interface {
	ReadSmall(ctx context.Context, name string, limit int64) ([]byte, error)
}

const (
	failureKind = "failure-v1"
	maxSumFile  = 4 << 10 // limit for one checksum file, in bytes
)

// FailureStore stores permanent failures in the cache, so that a later run does not compile a cell that would fail
// again. The key covers toolchain_env and the checksums that the buckets publish for headers, toolchain and runfile, so
// Find does not fetch these three files. Without these checksums, every run tries the cell again. A run with another
// builder version, [compile.Recipe], setting or input also tries the cell again.
type FailureStore struct {
	Facts            facts
	Kernels, Drivers smallReader
	// Version is the version of this program.
	Version string
	// BTF is true if the modules get BTF. Then the key also covers vmlinux, which has the kernel's types.
	BTF bool
	// Settings is a text with all settings that can decide whether a build fails. The key covers it.
	Settings string
	// Signatures returns the names of the objects in the kernel bucket that may have signatures for a driver's modules.
	// The objects may change later, so the key covers their checksums. Nil means no objects.
	Signatures func(k target.Kernel, version string) []string
	// If Forget is true, Find returns only failures that this store's Remember stored. So each cell is tried once more,
	// in the first pass that reaches it.
	Forget bool

	mu  sync.Mutex
	own map[string]bool // keys of the failures that Remember stored
}

// key returns the key of a cell's failure. It is "" if toolchain_env or a needed checksum cannot be read from a bucket.
func (m *FailureStore) key(ctx context.Context, c plan.Cell) string {
	h := sha256.New()
	fmt.Fprintf(h, "%s\n%s\n%q\n%s\n%s\n", m.Version, compile.Recipe, m.Settings, c.Driver, c.Kernel.Arch)
	type object struct {
		from smallReader
		name string
	}
	parts := []object{
		{m.Kernels, cosbucket.MD5Name(cosbucket.HeadersName(c.Kernel))},
		{m.Kernels, cosbucket.MD5Name(cosbucket.ToolchainName(c.Kernel))},
		{m.Kernels, cosbucket.ToolchainEnvName(c.Kernel)},
		{m.Drivers, cosbucket.RunfileSumName(c.Driver.Version, c.Kernel.Arch)},
	}
	if m.BTF {
		parts = append(parts, object{m.Kernels, cosbucket.MD5Name(cosbucket.VMLinuxName(c.Kernel))})
	}
	for _, part := range parts {
		text, err := part.from.ReadSmall(ctx, part.name, maxSumFile)
		if err != nil || len(bytes.TrimSpace(text)) == 0 {
			return ""
		}
		fmt.Fprintf(h, "%d:%s\n", len(text), text)
	}
	if m.Signatures == nil {
		return hex.EncodeToString(h.Sum(nil))
	}
	for _, name := range m.Signatures(c.Kernel, c.Driver.Version) {
		text, err := m.Kernels.ReadSmall(ctx, cosbucket.MD5Name(name), maxSumFile)
		if err != nil && !fault.Is(err, fault.InputMissing) {
			return ""
		}
		fmt.Fprintf(h, "%d:%s\n", len(text), text)
	}
	return hex.EncodeToString(h.Sum(nil))
}

// Find returns the stored failure of a cell with the same inputs. It returns false if no failure is stored.
func (m *FailureStore) Find(ctx context.Context, c plan.Cell) (Failure, bool) {
	key := m.key(ctx, c)
	m.mu.Lock()
	forgotten := m.Forget && !m.own[key]
	m.mu.Unlock()
	if key == "" || forgotten {
		return Failure{}, false
	}
	raw, ok := m.Facts.Fact(failureKind, key)
	var f Failure
	if !ok || json.Unmarshal(raw, &f) != nil || f.Class == fault.Internal {
		return Failure{}, false
	}
	return f, true
}

// Remember stores a failure. If the cell has no key, Remember stores nothing and returns nil.
func (m *FailureStore) Remember(ctx context.Context, c plan.Cell, f Failure) error {
	key := m.key(ctx, c)
	if key == "" {
		return nil
	}
	raw, err := json.Marshal(f)
	if err != nil {
		return err
	}
	m.mu.Lock()
	if m.own == nil {
		m.own = map[string]bool{}
	}
	m.own[key] = true
	m.mu.Unlock()
	return m.Facts.PutFact(failureKind, key, raw)
}
