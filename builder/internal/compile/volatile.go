package compile

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/sandbox"
)

// volatileHeaders are the headers that differ between two compilations of the same kernel. No fingerprint covers them
// (see package cossrc). The compiler sees their string macros with a fixed value. For a kernel before 6.1, NVIDIA's
// driver would otherwise put the number and the time of the kernel's build into a module.
var volatileHeaders = []string{"include/generated/compile.h", "include/generated/utsversion.h"}

var stringDefinition = regexp.MustCompile(`(?m)^#define[ \t]+([A-Za-z_][A-Za-z0-9_]*)[ \t]+"[^"\n]*"[ \t]*$`)

// hideStrings returns a header that defines only the string macros of the given header, with a fixed value.
func hideStrings(text []byte) []byte {
	var shown strings.Builder
	for _, m := range stringDefinition.FindAllSubmatch(text, -1) {
		fmt.Fprintf(&shown, "#define %s %s\n", m[1], maskedString)
	}
	return []byte(shown.String())
}

// hideVolatileHeaders writes replacements of the volatile headers to a folder. The returned sandbox binds put them over
// the header tree.
func hideVolatileHeaders(headers, dir string) ([]sandbox.Bind, error) {
	var binds []sandbox.Bind
	for _, name := range volatileHeaders {
		info, err := os.Lstat(filepath.Join(headers, name))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		} else if err != nil {
			return nil, err
		} else if !info.Mode().IsRegular() {
			return nil, fault.New(fault.Unsupported, "read header tree: "+name+" is not a regular file",
				"check that kernel-headers.tgz is the header archive of a COS build")
		}
		text, err := readHost(filepath.Join(headers, name))
		if err != nil {
			return nil, err
		}
		file := filepath.Join(dir, path.Base(name))
		if err := write(file, string(hideStrings(text)), 0o644); err != nil {
			return nil, err
		}
		binds = append(binds, sandbox.Bind{Host: file, Inside: insideKernel + "/" + name})
	}
	return binds, nil
}
