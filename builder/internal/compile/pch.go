package compile

import (
	_ "embed"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/prebake/prebake/builder/internal/pch"
	"github.com/prebake/prebake/pkg/sandbox"
)

// insidePCH is the folder of precompiled headers inside the sandbox.
const insidePCH = "/prebake/preambles"

//go:embed preamble.sh
var pchScript string

// precompile finds the headers that many sources of a module include first, so that the compiler reads them only once.
// It returns `make`'s sandbox with a wrapper script in place of the compiler.
//
// For gcc and for builds with debug information, precompile returns the sandbox unchanged. There precompiled headers
// would change the objects: the order of gcc's instructions, or the list of files in the debug information.
func (b *build) precompile(box sandbox.Config) (sandbox.Config, error) {
	if !b.t.clang || b.debug {
		return box, nil
	}
	found, err := pch.Find(hostFS(b.src), insideSource)
	if err != nil { // `make` may succeed with sources that Find cannot read
		fmt.Fprintf(b.watch, "prebake: no precompiled headers: %v\n", err)
		return box, nil
	}
	if len(found) == 0 {
		return box, nil
	}
	dir, sources := filepath.Join(b.r.WorkDir, "preambles"), 0
	for i, p := range found {
		name := strconv.Itoa(i)
		if err := write(filepath.Join(dir, name+".h"), p.Text, 0o644); err != nil {
			return box, err
		}
		sources += len(p.Sources)
		for _, s := range p.Sources {
			about := name + "\n" + s.First + "\n" + strings.Join(s.Through, " ") + "\n"
			if err := write(filepath.Join(dir, "of", s.Path), about, 0o644); err != nil {
				return box, err
			}
		}
	}
	script := strings.NewReplacer("@COMPILER@", insideGuard+"/"+filepath.Base(b.t.compiler), "@SOURCES@", insideSource,
		"@KERNEL@", insideKernel, "@PREAMBLES@", insidePCH).Replace(pchScript)
	if err := write(filepath.Join(dir, "bin", filepath.Base(b.t.compiler)), script, 0o755); err != nil {
		return box, err
	}
	fmt.Fprintf(b.watch, "prebake: %s to compile with %s\n", count(sources, "source"),
		count(len(found), "precompiled header"))
	box.Binds = append(slices.Clone(box.Binds), sandbox.Bind{Host: dir, Inside: insidePCH, Writable: true})
	box.Env = maps.Clone(box.Env)
	box.Env["PATH"] = insidePCH + "/bin:" + box.Env["PATH"]
	return box, nil
}
