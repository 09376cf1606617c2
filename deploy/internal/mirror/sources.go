package mirror

import (
	"bufio"
	"bytes"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"sort"
	"strings"

	"github.com/prebake/prebake/pkg/fault"
)

// components are the parts of Debian's archive that the mirror needs. main has the kernels, contrib has NVIDIA's open
// sources, and non-free has the rest.
const components = "main contrib non-free non-free-firmware"

// DeriveSources reads a machine's apt sources under etcApt (sources.list, sources.list.d/*.list and *.sources). It
// returns one deb822 sources file with the machine's archives, suites and keyrings for the given Debian release, and
// with all components. It leaves out other suites, such as third-party archives.
func DeriveSources(etcApt fs.FS, codename string) ([]byte, error) {
	names, err := fs.Glob(etcApt, "sources.list.d/*")
	if err != nil {
		return nil, fmt.Errorf("list apt sources: %w", err)
	}
	sort.Strings(names)
	var stanzas []stanza
	for _, name := range append([]string{"sources.list"}, names...) {
		text, err := fs.ReadFile(etcApt, name)
		if err != nil {
			if name == "sources.list" {
				continue
			}
			return nil, fmt.Errorf("read apt source %s: %w", name, err)
		}
		switch path.Ext(name) {
		case ".list":
			stanzas = append(stanzas, parseOneLine(text)...)
		case ".sources":
			stanzas = append(stanzas, parseDeb822(text)...)
		}
	}
	var out bytes.Buffer
	seen := map[string]bool{}
	for _, s := range stanzas {
		text, ok := s.derive(codename)
		if ok && !seen[text] {
			seen[text] = true
			out.WriteString(text)
		}
	}
	if out.Len() == 0 {
		return nil, fault.New(fault.Unsupported, "derive apt sources: no source of suite "+codename+" in /etc/apt",
			"add a source for "+codename+" under /etc/apt, or run on a Debian machine that has one")
	}
	return out.Bytes(), nil
}

// nextCodename is the Debian release after the machine's. Its packages are unpacked and never installed.
const nextCodename = "trixie"

// nextSources turns sources of a Debian release into sources of the next one, with the same archives and keyrings.
func nextSources(derived []byte, codename string) []byte {
	var out bytes.Buffer
	for line := range strings.Lines(string(derived)) {
		if suites, ok := strings.CutPrefix(line, "Suites: "); ok {
			// Older sources call the security suite <codename>/updates.
			line = "Suites: " + strings.NewReplacer(codename+"/updates", nextCodename+"-security", codename,
				nextCodename).Replace(suites)
		}
		out.WriteString(line)
	}
	return out.Bytes()
}

// stanza is one source. The field names are in lower case, and the values are unchanged.
type stanza struct {
	fields map[string]string
}

// ofRelease reports whether a suite belongs to the release: the release itself, its updates, or its security suite.
func ofRelease(suite, codename string) bool {
	return slices.Contains([]string{codename, codename + "-updates", codename + "-security", codename + "/updates"}, suite)
}

func (s stanza) derive(codename string) (string, bool) {
	if !slices.Contains(strings.Fields(s.fields["types"]), "deb") || s.fields["enabled"] == "no" ||
		!slices.Contains(strings.Fields(s.fields["components"]), "main") {
		return "", false
	}
	var suites []string
	for _, suite := range strings.Fields(s.fields["suites"]) {
		if ofRelease(suite, codename) {
			suites = append(suites, suite)
		}
	}
	if len(suites) == 0 {
		return "", false
	}
	var out strings.Builder
	fmt.Fprintf(&out, "Types: deb\nURIs: %s\nSuites: %s\nComponents: %s\n",
		strings.Join(strings.Fields(s.fields["uris"]), " "), strings.Join(suites, " "), components)
	for _, keep := range []struct{ field, name string }{
		{"signed-by", "Signed-By"}, {"trusted", "Trusted"}, {"check-valid-until", "Check-Valid-Until"},
		{"architectures", "Architectures"},
	} {
		if v := s.fields[keep.field]; v != "" {
			fmt.Fprintf(&out, "%s: %s\n", keep.name, v)
		}
	}
	out.WriteString("\n")
	return out.String(), true
}

// parseDeb822 reads the stanza format of *.sources files. A line with # is a comment. A line that begins with a blank
// continues the field.
func parseDeb822(text []byte) []stanza {
	var all []stanza
	cur, last := map[string]string{}, ""
	flush := func() {
		if len(cur) > 0 {
			all = append(all, stanza{cur})
		}
		cur, last = map[string]string{}, ""
	}
	scan := bufio.NewScanner(bytes.NewReader(text))
	for scan.Scan() {
		line := strings.TrimRight(scan.Text(), " \t\r")
		switch {
		case line == "":
			flush()
		case line[0] == '#':
		case (line[0] == ' ' || line[0] == '\t') && last != "":
			cur[last] += "\n" + line
		default:
			name, value, ok := strings.Cut(line, ":")
			if last = ""; ok {
				last = strings.ToLower(name)
				cur[last] = strings.TrimSpace(value)
			}
		}
	}
	flush()
	return all
}

// parseOneLine reads the format of sources.list: deb [options] uri suite components...
func parseOneLine(text []byte) []stanza {
	var all []stanza
	scan := bufio.NewScanner(bytes.NewReader(text))
	for scan.Scan() {
		line, _, _ := strings.Cut(scan.Text(), "#")
		rest, ok := strings.CutPrefix(strings.TrimSpace(line), "deb")
		if !ok || rest == "" || (rest[0] != ' ' && rest[0] != '\t') {
			continue
		}
		f := map[string]string{"types": "deb"}
		if rest = strings.TrimSpace(rest); strings.HasPrefix(rest, "[") {
			options, after, closed := strings.Cut(rest[1:], "]")
			if !closed {
				continue
			}
			for _, option := range strings.Fields(options) {
				name, value, _ := strings.Cut(option, "=")
				switch name {
				case "arch":
					f["architectures"] = strings.ReplaceAll(value, ",", " ")
				case "signed-by", "trusted", "check-valid-until":
					f[name] = value
				}
			}
			rest = after
		}
		words := strings.Fields(rest)
		if len(words) < 3 {
			continue
		}
		f["uris"], f["suites"], f["components"] = words[0], words[1], strings.Join(words[2:], " ")
		all = append(all, stanza{f})
	}
	return all
}
