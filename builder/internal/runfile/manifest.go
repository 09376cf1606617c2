package runfile

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"regexp"
	"strconv"
	"strings"
)

// Limits of a manifest: bytes, entries, and bytes of a path. Real manifests have about 1,000 lines, headerLines of them
// before the first entry.
const (
	maxManifest = 4 << 20
	maxEntries  = 50_000
	maxField    = 1024
	headerLines = 8
)

// Entry is one file or link of a release.
type Entry struct {
	// Path is the file's path in the archive. For a link, it is the link's name.
	Path string
	// Mode has the permission bits only, without setuid and setgid.
	Mode fs.FileMode
	// Type is NVIDIA's word for the kind of file, such as CUDA_LIB.
	Type string
	// Compat32 is true for files of 32-bit programs.
	Compat32 bool
	// Subdir is the file's folder, relative to the folder of its type, or "".
	Subdir string
	// Target is the target of a link, or "" for a file.
	Target string
	// NonGLVND is true for the variant of a library that is for systems without libglvnd.
	NonGLVND bool
	// Module is the driver component from the field MODULE:, or "" in older manifests.
	Module string
}

// Manifest is a parsed .manifest.
type Manifest struct {
	Product, Version string
	// Settings are lines 3 to 8, which only NVIDIA's installer needs.
	Settings []string
	Entries  []Entry
	// Unknown has the number of lines of each type that this package does not know.
	Unknown map[string]int
}

// lineFormat says which fields follow name, mode and type in a line of the manifest. The source is parse_manifest in
// install-from-cwd.c of https://github.com/NVIDIA/nvidia-installer.
type lineFormat struct {
	class  bool // NATIVE or COMPAT32
	subdir bool
	place  bool // an optional subdir, which ends in a slash
	target bool
	glvnd  bool // GLVND or NON_GLVND, after the other fields
}

var (
	lib         = lineFormat{class: true}
	libSub      = lineFormat{class: true, subdir: true}
	libGL       = lineFormat{class: true, glvnd: true}
	link        = lineFormat{class: true, target: true}
	linkSub     = lineFormat{class: true, subdir: true, target: true}
	linkGL      = lineFormat{class: true, target: true, glvnd: true}
	file        = lineFormat{}
	filePlace   = lineFormat{place: true}
	fileSub     = lineFormat{subdir: true}
	fileLink    = lineFormat{target: true}
	lineFormats = map[string]lineFormat{
		"OPENGL_LIB": lib, "GLVND_LIB": lib, "NVCUVID_LIB": lib, "ENCODEAPI_LIB": lib, "UTILITY_LIB": lib,
		"CUDA_LIB": libSub, "OPENCL_LIB": libSub, "OPENCL_WRAPPER_LIB": libSub, "VDPAU_LIB": libSub, "TLS_LIB": libSub,
		"GLX_CLIENT_LIB": libGL, "EGL_CLIENT_LIB": libGL,
		"OPENGL_SYMLINK": link, "GLVND_SYMLINK": link, "UTILITY_LIB_SYMLINK": link, "NVCUVID_LIB_SYMLINK": link,
		"ENCODEAPI_LIB_SYMLINK": link,
		"CUDA_SYMLINK":          linkSub, "OPENCL_LIB_SYMLINK": linkSub, "OPENCL_WRAPPER_SYMLINK": linkSub,
		"VDPAU_SYMLINK":      linkSub,
		"GLX_CLIENT_SYMLINK": linkGL, "EGL_CLIENT_SYMLINK": linkGL,
		"UTILITY_BINARY": file, "INSTALLER_BINARY": file, "CUDA_ICD": file, "VULKAN_ICD_JSON": filePlace,
		"GLVND_EGL_ICD_JSON": file, "FIRMWARE": file,
		"DOCUMENTATION": fileSub, "MANPAGE": fileSub, "NVIDIA_MODPROBE": fileSub, "EXPLICIT_PATH": fileSub,
		"APPLICATION_PROFILE": fileSub, "KERNEL_MODULE_SRC": fileSub,
		"UTILITY_BIN_SYMLINK": fileLink,
	}
)

// entryLine matches name, mode, type and the other fields. A name may contain blanks. It ends before the mode (digits)
// and the type (a word in capitals).
var entryLine = regexp.MustCompile(`^\s*(\S.*?)\s+([0-9]+)\s+([A-Z][A-Z0-9_]*)(\s.*)?$`)

// ParseManifest reads a .manifest. It counts and skips lines of unknown types, because every new branch adds types. If
// a known line lacks a field or leads out of the archive, the error is [fault.Unverified].
func ParseManifest(r io.Reader) (*Manifest, error) {
	lines := bufio.NewScanner(io.LimitReader(r, maxManifest+1))
	lines.Buffer(make([]byte, 0, 4096), 8*maxField)
	m := &Manifest{Unknown: map[string]int{}}
	read := 0
	for n := 1; lines.Scan(); n++ {
		text := lines.Text()
		if read += len(text) + 1; read > maxManifest || len(m.Entries) >= maxEntries {
			return nil, damaged("the manifest has more than %d bytes or more than %d entries", maxManifest, maxEntries)
		}
		switch {
		case n == 1:
			m.Product = text
		case n == 2:
			m.Version = strings.TrimSpace(text)
		case n <= headerLines:
			m.Settings = append(m.Settings, text)
		default:
			if err := m.line(text); err != nil {
				return nil, damaged("parse line %d of the manifest: %v", n, err)
			}
		}
	}
	if err := lines.Err(); err != nil {
		if errors.Is(err, bufio.ErrTooLong) {
			return nil, damaged("the manifest has a line of more than %d bytes", 8*maxField)
		}
		return nil, fmt.Errorf("read manifest: %w", err)
	}
	if len(m.Settings) != headerLines-2 {
		return nil, damaged("the manifest ends inside its header")
	}
	return m, nil
}

func (m *Manifest) line(text string) error {
	if strings.TrimSpace(text) == "" {
		return nil
	}
	f := entryLine.FindStringSubmatch(text)
	if f == nil {
		return fmt.Errorf("the line %.80q does not have a name, a mode and a type", text)
	}
	e := Entry{Path: f[1], Type: f[3]}
	s, ok := lineFormats[e.Type]
	if !ok {
		m.Unknown[e.Type]++
		return nil
	}
	mode, err := strconv.ParseUint(f[2], 8, 12)
	if err != nil {
		return fmt.Errorf("mode %.20q: want an octal number of at most 12 bits", f[2])
	}
	e.Mode = fs.FileMode(mode & 0o777)
	if e.Path, err = cleanPath(e.Path); err != nil {
		return err
	}
	if err := e.fill(s, strings.Fields(f[4])); err != nil {
		return fmt.Errorf("parse the entry %s %s: %w", e.Type, e.Path, err)
	}
	m.Entries = append(m.Entries, e)
	return nil
}

// fill reads the fields after the type: fields with a fixed position, then KEY:VALUE fields. INHERIT_PATH_DEPTH:n
// stands in the position of the subdir. The subdir is then the folder of the file's path without its first n parts.
func (e *Entry) fill(s lineFormat, fields []string) error {
	next := func(what string) (string, error) {
		if len(fields) == 0 {
			return "", fmt.Errorf("the field %s is missing", what)
		}
		f := fields[0]
		fields = fields[1:]
		return f, nil
	}
	if s.class {
		class, err := next("with NATIVE or COMPAT32")
		if err != nil {
			return err
		}
		if class != "NATIVE" && class != "COMPAT32" {
			return fmt.Errorf("field %.40q: want NATIVE or COMPAT32", class)
		}
		e.Compat32 = class == "COMPAT32"
	}
	// In newer branches, some files have a folder that had none before.
	if s.subdir || s.place && len(fields) > 0 && strings.HasSuffix(fields[0], "/") {
		sub, err := next("subdir")
		if err != nil {
			return err
		}
		if e.Subdir, err = e.subdir(sub); err != nil {
			return err
		}
	}
	if s.target {
		to, err := next("target")
		if err != nil {
			return err
		}
		if e.Target, err = cleanPath(to); err != nil {
			return err
		}
	}
	for _, f := range fields {
		key, value, ok := strings.Cut(f, ":")
		switch {
		case ok && key == "MODULE":
			e.Module = value
		case s.glvnd && f == "NON_GLVND":
			e.NonGLVND = true
		}
	}
	return nil
}

func (e *Entry) subdir(field string) (string, error) {
	depth, ok := strings.CutPrefix(field, "INHERIT_PATH_DEPTH:")
	if !ok {
		sub := strings.Trim(field, "/")
		if sub == "" || sub == "." {
			return "", nil
		}
		return cleanPath(sub)
	}
	n, err := strconv.ParseUint(depth, 10, 6)
	if err != nil {
		return "", fmt.Errorf("subdir %.40q: want INHERIT_PATH_DEPTH: and a number below 64", field)
	}
	parts := strings.Split(path.Dir(e.Path), "/")
	if int(n) >= len(parts) || parts[0] == "." {
		return "", nil
	}
	return path.Join(parts[n:]...), nil
}

// cleanPath returns the clean form of a relative path. It refuses a path that leads out of the archive.
func cleanPath(name string) (string, error) {
	if len(name) > maxField || strings.HasPrefix(name, "/") || strings.ContainsRune(name, 0) {
		return "", fmt.Errorf("path %.80q leads out of the archive", name)
	}
	for part := range strings.SplitSeq(name, "/") {
		if part == ".." {
			return "", fmt.Errorf("path %.80q leads out of the archive", name)
		}
	}
	return path.Clean(name), nil
}
