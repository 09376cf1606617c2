package compile

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/prebake/prebake/pkg/cas"
	"github.com/prebake/prebake/pkg/sandbox"
)

// A view is a kernel's header tree without the parts that differ between sibling kernels. These parts are the release
// and version strings, the salt of the build ids, and the checksums in Module.symvers. A file with a hidden part is
// masked: the view has a replacement for it.
//
// Results of conftest's tests and compiled objects are stored under a view's digest, so sibling kernels share them. No
// stored result may contain a hidden part:
//   - The sandboxes of conftest's tests show only the replacements.
//   - `make`'s sandbox shows the real files, but the recorder (see inputs.go) stores no object that may contain a
//     hidden part.
type view struct {
	viewFact
	masked map[string][]byte // the replacement of each masked file, by slash path in the tree
}

// viewFact is the part of a view that takes long to compute. The cache stores it by the header tree's digest.
type viewFact struct {
	// Digest covers every file of the header tree; of a masked file it covers the replacement. In the cache it covers only
	// the files that are not masked.
	Digest string `json:"digest"`
	// Macros is true if a kernel header contains the name of a macro that the driver or its conftest defines.
	Macros bool `json:"macros"`
}

var (
	quoted      = regexp.MustCompile(`"[^"\n]*"`)
	symversCRC  = regexp.MustCompile(`(?m)^0x[0-9a-fA-F]+\t`)
	driverMacro = regexp.MustCompile(`\bNV_\w+_PRESENT\b|\bNV_VERSION_STRING\b`)
)

const maskedString = `"masked"`

func dropSalt(text []byte) []byte {
	var kept []byte
	for line := range bytes.Lines(text) {
		if !bytes.Contains(line, []byte("CONFIG_BUILD_SALT")) {
			kept = append(kept, line...)
		}
	}
	return kept
}

func dropStrings(text []byte) []byte { return quoted.ReplaceAll(text, []byte(maskedString)) }

// masks returns a function for each masked file. The function returns the replacement of the file's content.
func masks() map[string]func([]byte) []byte {
	return map[string]func([]byte) []byte{
		".config":                        dropSalt,
		"include/config/auto.conf":       dropSalt,
		"include/generated/autoconf.h":   dropSalt,
		"include/generated/rustc_cfg":    dropSalt,
		"include/generated/compile.h":    hideStrings,
		"include/generated/package.h":    dropStrings,
		"include/generated/utsrelease.h": dropStrings,
		"include/generated/utsversion.h": hideStrings,
		"include/config/kernel.release":  func([]byte) []byte { return []byte("masked\n") },
		"Module.symvers": func(text []byte) []byte {
			return symversCRC.ReplaceAll(text,
				[]byte("0x00000000\t"))
		},
	}
}

// newView reads the header tree and computes its view.
func newView(ctx context.Context, cache *cas.Cache, headers, headerDigest string) (*view, error) {
	v := &view{masked: map[string][]byte{}}
	h := sha256.New()
	all := masks()
	for _, name := range slices.Sorted(maps.Keys(all)) {
		path := filepath.Join(headers, name)
		if info, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
			continue
		} else if err != nil {
			return nil, err
		} else if !info.Mode().IsRegular() {
			return nil, fmt.Errorf("%w: %s is not a regular file", errUseMake, name)
		}
		text, err := readHost(path)
		if err != nil {
			return nil, err
		}
		v.masked[name] = all[name](text)
		fmt.Fprintf(h, "%s %d\n%s\n", name, len(v.masked[name]), v.masked[name])
	}
	var shown viewFact
	raw, ok := cache.Fact("header-view-1", headerDigest)
	if !ok || json.Unmarshal(raw, &shown) != nil {
		var err error
		skip := func(p string) bool { _, masked := v.masked[p]; return masked }
		if shown.Digest, err = cas.DigestTree(ctx, headers, skip); err != nil {
			return nil, err
		}
		if shown.Macros, err = mentionsDriver(headers); err != nil {
			return nil, err
		}
		if raw, err = json.Marshal(shown); err != nil {
			return nil, err
		}
		if err := cache.PutFact("header-view-1", headerDigest, raw); err != nil {
			return nil, err
		}
	}
	fmt.Fprintln(h, shown.Digest)
	v.Digest, v.Macros = hex.EncodeToString(h.Sum(nil)), shown.Macros
	return v, nil
}

// mentionsDriver reports whether a kernel header contains the name of one of the driver's own macros. The meaning of
// this header depends on the driver.
func mentionsDriver(headers string) (found bool, err error) {
	err = walkHost(headers, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() || !strings.HasSuffix(path, ".h") {
			return err
		}
		text, err := readHost(path)
		if err != nil {
			return err
		}
		if driverMacro.Match(text) {
			found = true
			return fs.SkipAll
		}
		return nil
	})
	return found, err
}

// binds writes the replacements of the masked files to a folder. The returned sandbox binds put them over the header
// tree.
func (v *view) binds(dir string) ([]sandbox.Bind, error) {
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, err
	}
	var binds []sandbox.Bind
	for _, name := range slices.Sorted(maps.Keys(v.masked)) {
		file := filepath.Join(dir, strings.ReplaceAll(name, "/", "@"))
		if err := os.WriteFile(file, v.masked[name], 0o644); err != nil {
			return nil, err
		}
		binds = append(binds, sandbox.Bind{Host: file, Inside: insideKernel + "/" + name})
	}
	return binds, nil
}
