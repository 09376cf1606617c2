package compile

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/prebake/prebake/builder/internal/untrusted"
	"github.com/prebake/prebake/pkg/cas"
	"github.com/prebake/prebake/pkg/hostfile"
)

// The object cache keeps each object together with its inputs:
//   - the content of the driver's files that the compiler read, and the paths of all files of the driver with the same
//     base names, because a file that comes earlier in the search for an include would hide the one that was read,
//   - the results of conftest's tests about macros whose names occur in these files or in the kernel's headers,
//   - the driver's version, if the files contain the name of its macro.
//
// The key [objects.base] covers everything else that decides the bytes of an object. So the next driver of a branch, or
// a sibling kernel, reuses an object with the same inputs.
//
// The program `make` decides whether to use a restored object. It compares the command in the object's .cmd file and
// the object's time. If one of them does not fit, `make` compiles the file again.
//
// A view (see view.go) hides what differs between sibling kernels. The cache keeps only objects that contain nothing
// hidden: the recorder searches the files in the object's .cmd file for the hidden names. The cache never keeps objects
// of .mod.c files, because they contain the kernel's release and build salt.
const (
	objectKind = "object-2" // trees with the two files object and command
	inputsKind = "object-inputs-1"

	maxVariants = 8 // variants of one object; the newest are kept

	// Limits for one file, in bytes.
	maxCommand   = 1 << 20
	maxObject    = 1 << 30
	maxSource    = 8 << 20
	maxGenerated = 64 << 10
)

// objects stores the objects that a build compiles, and restores them in later builds.
type objects struct {
	*build
	view    *view
	answers map[string]string // files of the folder conftest/, by name
	base    *cas.Key          // what the cache keys of all objects of this build have in common
	tree    *nameScanner      // scans the original sources
	names   driverNames
	// restored has the paths of the objects that came from the cache.
	restored map[string]bool
}

// variant is one stored object with its inputs.
type variant struct {
	// Files are the driver's files that the compiler read, by slash path.
	Files []string `json:"files"`
	// Macros are the conftest macros whose names occur in the kernel's headers of this object.
	Macros []string `json:"macros,omitempty"`
	// Generated has the content of each file that the driver's makefiles generated, by the file's path.
	Generated map[string]string `json:"generated,omitempty"`
	// Inputs is the digest of all inputs, see objects.inputs. Version is the driver's version in the object's command.
	Inputs  string `json:"inputs"`
	Version string `json:"version"`
}

// newObjects prepares the object cache for a build. The results of conftest's tests, which are among the inputs of
// objects, must be known.
func (b *build) newObjects(v *view, a *answerer) (*objects, error) {
	o := &objects{build: b, view: v, answers: a.files, tree: newNameScanner(answerNames(a.files)),
		restored: map[string]bool{}}
	makefiles, err := b.makefiles()
	if err != nil {
		return nil, err
	}
	if o.names, err = b.driverNames(); err != nil {
		return nil, err
	}
	o.base = cas.NewKey(objectKind).Add("recipe", Recipe).Add("kernel view", v.Digest).Add("toolchain",
		b.r.ToolchainDigest).Add("host tools", b.r.HostDigest).
		Add("flavour", string(b.r.Driver.Flavour)).Add("makefiles", makefiles).Add("conftest flags",
		versionMacro.ReplaceAllString(a.keyer.Flags(), "")).Add("files beside the kernel's", o.names.kernel)
	for _, arg := range b.args {
		if !strings.HasPrefix(arg, "KERNEL_UNAME=") {
			o.base.Add("argument", arg)
		}
	}
	if b.debug {
		// Compilers write checksums of headers into debug information, so sibling kernels do not share these objects.
		o.base.Add("debug", b.r.Release+" "+b.r.HeaderDigest)
	}
	return o, nil
}

var (
	versionMacro = regexp.MustCompile(`(^| )-DNV_VERSION_STRING=\S+`)
	versionLine  = regexp.MustCompile(
		`^\s*ccflags-y \+= -DNV_VERSION_STRING=\\"[0-9.]+\\"$|^\s*EXTRA_CFLAGS \+= -DNV_VERSION_STRING=\\"[0-9.]+\\"$`)
	// listLine matches a line of the driver's makefiles that lists a conftest test or a header. The patterns allow only
	// plain words, which neither the shell nor `make` expands.
	listLine = regexp.MustCompile(`^NV_CONFTEST_[A-Z]+_COMPILE_TESTS \+= \w+$|^ +\w[\w./-]*\.h( \\)?$`)
)

// makefiles returns a digest of all files of the driver that can change the compile commands: everything but sources,
// headers and NVIDIA's precompiled objects (.o_binary). It leaves out lines that only list conftest tests or set the
// driver's version, because these are inputs of each object.
func (b *build) makefiles() (string, error) {
	key := cas.NewKey("makefiles")
	err := walkHost(b.r.Source, func(file string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		name, err := filepath.Rel(b.r.Source, file)
		if err != nil {
			return err
		}
		if slices.Contains([]string{".c", ".h", ".o_binary"}, filepath.Ext(name)) ||
			slices.Contains([]string{"conftest.sh", "dkms.conf"}, name) {
			return nil // sources are inputs of single objects; `make` does not read the other two
		}
		if d.Type() == fs.ModeSymlink {
			to, err := os.Readlink(file)
			key.Add(name, "link to "+to)
			return err
		}
		text, err := readHost(file)
		if err != nil {
			return err
		}
		var kept strings.Builder
		for line := range strings.Lines(string(text)) {
			if bare := strings.TrimRight(line, "\r\n"); !versionLine.MatchString(bare) && !listLine.MatchString(bare) {
				kept.WriteString(line)
			}
		}
		key.Add(name, kept.String())
		return nil
	})
	return key.String(), err
}

var answerLine = regexp.MustCompile(`^\s*#\s*(?:define|undef)\s+(\w+)`)

// answerNames returns the macros that the results of conftest's tests define or undefine, and NV_VERSION_STRING.
func answerNames(files map[string]string) map[string]bool {
	names := map[string]bool{"NV_VERSION_STRING": true}
	for _, text := range files {
		for line := range strings.Lines(text) {
			if m := answerLine.FindStringSubmatch(line); m != nil {
				names[m[1]] = true
			}
		}
	}
	return names
}

// isAnswerHeader reports whether a file of the folder conftest/ is a header that sources include, such as
// conftest/types.h. The compiler does not read the other files, such as compile-tests/drm_available.h: they have the
// result of one test each, and `make` builds the headers from them.
func isAnswerHeader(name string) bool { return path.Ext(name) == ".h" && !strings.Contains(name, "/") }

// answersAbout returns the lines with test results that define or undefine one of the given macros. It also returns
// every line that defines or undefines no macro, because any file may depend on such a line.
func answersAbout(files map[string]string, named map[string]bool) string {
	var b strings.Builder
	for _, name := range slices.Sorted(maps.Keys(files)) {
		if !isAnswerHeader(name) {
			continue
		}
		fmt.Fprintf(&b, "%s\n", name)
		for line := range strings.Lines(files[name]) {
			if strings.HasPrefix(line, "// Kernel version: ") {
				continue // the release is in a comment only
			}
			if m := answerLine.FindStringSubmatch(line); m == nil || named[m[1]] {
				b.WriteString(line)
			}
		}
	}
	return b.String()
}

// inputs returns the digest of a variant's inputs in this build. It returns false if one of the variant's files is
// missing.
func (o *objects) inputs(v variant, read func(name string) *fileFacts) (string, bool) {
	key := cas.NewKey("inputs")
	named, pastes := map[string]bool{}, map[string]bool{}
	for _, name := range v.Macros {
		named[name] = true
	}
	for _, name := range v.Files {
		w := read(name)
		if w == nil {
			return "", false
		}
		key.Add(name, w.digest).Add("same name as "+name, o.names.like(name))
		maps.Copy(named, w.named)
		maps.Copy(pastes, w.pastes)
	}
	// If the preprocessor joins a part of a name with ##, the file may use every macro that begins or ends with the part.
	for part := range pastes {
		for name := range o.tree.names {
			if strings.HasPrefix(name, part) || strings.HasSuffix(name, part) {
				named[name] = true
			}
		}
	}
	for _, name := range slices.Sorted(maps.Keys(v.Generated)) {
		key.Add("generated "+name, v.Generated[name]).Add("same name as "+name, o.names.like(name))
	}
	for _, name := range slices.Sorted(maps.Keys(o.answers)) {
		if isAnswerHeader(name) {
			key.Add("same name as conftest/"+name, o.names.like(name))
		}
	}
	if named["NV_VERSION_STRING"] || o.debug {
		key.Add("version", o.r.Driver.Modules().Version)
	}
	return key.Add("answers", answersAbout(o.answers, named)).String(), true
}

func (o *objects) factKey(object string) string { return o.base.With("object", object).String() }

func (o *objects) variants(object string) []variant {
	var all []variant
	raw, ok := o.r.Cache.Fact(inputsKind, o.factKey(object))
	if !ok || json.Unmarshal(raw, &all) != nil {
		return nil
	}
	return all
}

var errNone = errors.New("the object cache does not have this object file")

// restore copies stored objects into the staged sources and returns their number.
func (o *objects) restore(ctx context.Context) (int, error) {
	read := func(name string) *fileFacts {
		return o.tree.read(name, func() ([]byte, error) { return readHost(filepath.Join(o.src, filepath.FromSlash(name))) })
	}
	err := walkHost(o.src, func(file string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() || filepath.Ext(file) != ".c" && filepath.Ext(file) != ".S" {
			return err
		}
		rel, err := filepath.Rel(o.src, file)
		if err != nil {
			return err
		}
		object := filepath.ToSlash(strings.TrimSuffix(rel, filepath.Ext(rel)) + ".o")
		for _, v := range o.variants(object) {
			if inputs, ok := o.inputs(v, read); !ok || inputs != v.Inputs {
				continue
			}
			ok, err := o.restoreOne(ctx, object, v)
			if err != nil {
				return err
			}
			if ok {
				o.restored[object] = true
				break
			}
		}
		return nil
	})
	return len(o.restored), err
}

func (o *objects) restoreOne(ctx context.Context, object string, v variant) (bool, error) {
	dir, _, err := o.r.Cache.Tree(ctx, objectKind, o.base.With("object", object).Add("inputs", v.Inputs).String(),
		func(context.Context, string) error { return errNone })
	if errors.Is(err, errNone) {
		return false, nil
	} else if err != nil {
		return false, err
	}
	for name, text := range v.Generated {
		file := filepath.Join(o.src, filepath.FromSlash(name))
		if was, err := readHost(file); err == nil && string(was) != text {
			return false, nil
		} else if err == nil {
			continue
		}
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			return false, err
		}
	}
	command, err := readHost(filepath.Join(dir, "command"))
	if err != nil {
		return false, err
	}
	// kbuild's command defines the driver's version for every file. The stored command gets the version of this build, so
	// that `make` finds no difference. This is safe: if the object depends on the version, the version is among its
	// inputs.
	command = bytes.ReplaceAll(command, []byte(`-DNV_VERSION_STRING=\"`+v.Version+`\"`),
		[]byte(`-DNV_VERSION_STRING=\"`+o.r.Driver.Modules().Version+`\"`))
	file := filepath.Join(o.src, filepath.FromSlash(object))
	// The copy's time is now, so the object is not older than its sources.
	if err := hostfile.Copy(file, filepath.Join(dir, "object")); err != nil {
		return false, err
	}
	return true, os.WriteFile(filepath.Join(filepath.Dir(file), "."+filepath.Base(file)+".cmd"), command, 0o644)
}

// store stores the objects of a finished build in the cache.
func (o *objects) store(ctx context.Context, left *untrusted.Dir) error {
	hidden, err := o.hiddenMacros()
	if err != nil {
		return err
	}
	k := &recorder{objects: o, output: left, hidden: hidden, driver: newNameScanner(maps.Clone(o.tree.names)),
		headers: newNameScanner(maps.Clone(o.tree.names))}
	for _, names := range hidden {
		for _, name := range names {
			k.headers.names[name], k.driver.names[name] = true, true
		}
	}
	files, err := left.Files()
	if err != nil {
		return err
	}
	for _, name := range files {
		object, ok := strings.CutSuffix(path.Base(name), ".o.cmd")
		if !ok || !strings.HasPrefix(object, ".") || strings.HasSuffix(object, ".mod") {
			continue
		}
		object = path.Join(path.Dir(name), object[1:]+".o")
		if o.restored[object] {
			continue // the cache has this object already
		}
		if err := k.recordOne(ctx, name, object); err != nil {
			return fmt.Errorf("record which files %s was compiled from: %w", object, err)
		}
	}
	return nil
}

// recordOne stores an object if all its inputs are known.
func (k *recorder) recordOne(ctx context.Context, cmdFile, object string) error {
	text, err := k.output.Read(cmdFile, maxCommand)
	if err != nil {
		return nil //nolint:nilerr // kbuild did not make this file, because it makes only regular files: store nothing
	}
	c, ok := parseCommand(string(text)) // only a compiled object has a .cmd file that parses
	if !ok {
		return nil
	}
	v, ok := k.inputsOf(c)
	if !ok {
		return nil
	}
	if v.Inputs, ok = k.inputs(v, k.readDriverFile); !ok {
		return nil
	}
	key := k.base.With("object", object).Add("inputs", v.Inputs).String()
	_, _, err = k.r.Cache.Tree(ctx, objectKind, key, func(_ context.Context, dir string) error {
		if _, err := k.output.Copy(filepath.Join(dir, "object"), object, maxObject); err != nil {
			return err
		}
		return os.WriteFile(filepath.Join(dir, "command"), text, 0o644)
	})
	if errors.Is(err, untrusted.ErrKind) || errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	all := k.variants(object)
	if slices.ContainsFunc(all, func(have variant) bool { return have.Inputs == v.Inputs }) {
		return nil // `make` did not accept the stored object, or the object was damaged
	}
	all = append([]variant{v}, all...)
	raw, err := json.Marshal(all[:min(len(all), maxVariants)])
	if err != nil {
		return err
	}
	return k.r.Cache.PutFact(inputsKind, k.factKey(object), raw)
}
