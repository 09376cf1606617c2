package pch

import (
	"errors"
	"io/fs"
	"path"
	"regexp"
	"slices"
	"strings"
)

// tree has the directives of a driver's sources.
type tree struct {
	root     string                     // the path at which the compiler finds the tree
	files    map[string]file            // by path in the tree
	byBase   map[string][]string        // by base name, the paths of all files with this base name
	closures map[string]map[string]bool // by header, the result of the method closure
}

type file struct {
	guard      string      // NAME, if #ifndef NAME and #define NAME enclose the whole file
	head       []directive // the definitions and includes at the beginning of the file
	includes   []string    // all includes of the file, with <> or ""
	conditions []string    // the names in the file's conditions
	computed   bool        // true if the name of an included file is in a macro
}

// directive is a #define, or an #include with its <> or "".
type directive struct {
	text, include string
}

const (
	maxFile = 8 << 20 // bytes
	maxHead = 128     // directives
)

var errTooLarge = errors.New("the file is too large for a source file of a driver")

func readTree(sources fs.FS) (*tree, error) {
	t := &tree{files: map[string]file{}, byBase: map[string][]string{}, closures: map[string]map[string]bool{}}
	err := fs.WalkDir(sources, ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() || !slices.Contains([]string{".c", ".h"}, path.Ext(name)) {
			return err
		}
		if info, err := d.Info(); err != nil {
			return err
		} else if info.Size() > maxFile {
			return &fs.PathError{Op: "read", Path: name, Err: errTooLarge}
		}
		text, err := fs.ReadFile(sources, name)
		if err != nil {
			return err
		}
		t.files[name] = parseFile(string(text))
		t.byBase[path.Base(name)] = append(t.byBase[path.Base(name)], name)
		return nil
	})
	return t, err
}

var (
	includeLine = regexp.MustCompile(`^#\s*include\s*(<[^<>"\s]+>|"[^<>"\s]+")$`)
	anyInclude  = regexp.MustCompile(`^#\s*(include|include_next|import)\b`)
	defineLine  = regexp.MustCompile(`^#\s*define\s+([A-Za-z_]\w*)(\s.*)?$`)
	ifndefLine  = regexp.MustCompile(`^#\s*ifndef\s+([A-Za-z_]\w*)$`)
	opens       = regexp.MustCompile(`^#\s*if(n?def)?\b`)
	condition   = regexp.MustCompile(`^#\s*(el)?if(n?def)?\b`)
	closes      = regexp.MustCompile(`^#\s*endif\b`)
	identifier  = regexp.MustCompile(`[A-Za-z_]\w*`)
)

func parseDirective(line string) (directive, bool) {
	if m := includeLine.FindStringSubmatch(line); m != nil {
		return directive{text: line, include: m[1]}, true
	}
	if defineLine.MatchString(line) && !strings.HasSuffix(line, `\`) {
		return directive{text: line}, true
	}
	return directive{}, false
}

// parseFile reads a file's directives.
func parseFile(text string) file {
	lines := codeLines(text)
	f := file{guard: findGuard(lines)}
	if f.guard != "" {
		lines = lines[2:]
	}
	for _, line := range lines {
		if m := includeLine.FindStringSubmatch(line); m != nil {
			f.includes = append(f.includes, m[1])
		} else if anyInclude.MatchString(line) {
			f.computed = true
		} else if condition.MatchString(line) {
			f.conditions = append(f.conditions, identifier.FindAllString(line, -1)...)
		}
	}
	for _, line := range lines {
		d, ok := parseDirective(line)
		if !ok || len(f.head) == maxHead {
			break
		}
		f.head = append(f.head, d)
	}
	return f
}

// findGuard returns the name of an include guard, or "". With a guard, the first two lines are #ifndef NAME and #define
// NAME, and the last line is the matching #endif.
func findGuard(lines []string) string {
	if len(lines) < 3 {
		return ""
	}
	m := ifndefLine.FindStringSubmatch(lines[0])
	d := defineLine.FindStringSubmatch(lines[1])
	if m == nil || d == nil || m[1] != d[1] {
		return ""
	}
	depth := 0
	for i, line := range lines {
		if opens.MatchString(line) {
			depth++
		} else if closes.MatchString(line) {
			depth--
		}
		if depth == 0 && i < len(lines)-1 {
			return ""
		}
	}
	return m[1]
}

// codeLines removes comments and blank lines. It does not change strings and character constants.
func codeLines(text string) []string {
	// In C, a backslash at the end of a line joins it with the next line, even in a comment.
	text = strings.ReplaceAll(strings.ReplaceAll(text, "\r\n", "\n"), "\\\n", "")
	var b strings.Builder
	for i := 0; i < len(text); {
		switch c := text[i]; {
		case strings.HasPrefix(text[i:], "/*"):
			end := strings.Index(text[i+2:], "*/")
			if end < 0 {
				end = len(text) - i - 4
			}
			b.WriteByte(' ')
			i = min(i+2+end+2, len(text))
		case strings.HasPrefix(text[i:], "//"):
			end := strings.IndexByte(text[i:], '\n')
			if end < 0 {
				end = len(text) - i
			}
			i += end
		case c == '"' || c == '\'':
			end := i + 1
			for end < len(text) && text[end] != c && text[end] != '\n' {
				if text[end] == '\\' {
					end++
				}
				end++
			}
			end = min(end+1, len(text))
			b.WriteString(text[i:end])
			i = end
		default:
			b.WriteByte(c)
			i++
		}
	}
	var lines []string
	for line := range strings.Lines(b.String()) {
		if line = strings.TrimSpace(line); line != "" {
			lines = append(lines, line)
		}
	}
	return lines
}
