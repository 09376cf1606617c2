package main

import (
	"bytes"
	"errors"
	"maps"
	"path"
	"slices"
	"strings"
)

const (
	certificateDir  = "usr/share/ca-certificates/mozilla"
	certificateFile = "etc/ssl/certs/ca-certificates.crt"
	masterDir       = "usr/share/base-passwd"
)

// keeper returns the map that keeps the content of a file for [rootFS.finish], or nil if finish does not need the file.
func (r *rootFS) keeper(name string) map[string][]byte {
	switch path.Dir(name) {
	case certificateDir:
		return r.certificates
	case masterDir:
		return r.masters
	}
	return nil
}

// alternatives are names of commands with their programs. On an installed Debian, update-alternatives sets them up.
var alternatives = []struct{ name, program string }{
	{"awk", "usr/bin/mawk"},
	{"nawk", "usr/bin/mawk"},
	{"pager", "usr/bin/more"},
	{"which", "usr/bin/which.debianutils"},
}

// finish writes what maintainer scripts would write. It also writes dpkg's list of installed packages for image
// scanners.
func (r *rootFS) finish() (err error) {
	for _, dir := range []string{
		"etc", "etc/alternatives", "etc/ssl", "etc/ssl/certs", "usr/bin",
		"var", "var/lib", "var/lib/dpkg", "var/lib/dpkg/info",
	} {
		err = errors.Join(err, r.folder(dir))
	}
	for _, name := range []string{"passwd", "group"} {
		if text, ok := r.masters[masterDir+"/"+name+".master"]; ok {
			err = errors.Join(err, r.file("etc/"+name, text, 0o644))
		}
	}
	for _, a := range alternatives {
		if _, ok := r.seen[a.program]; ok {
			err = errors.Join(
				err,
				r.link("etc/alternatives/"+a.name, "/"+a.program),
				r.link("usr/bin/"+a.name, "/etc/alternatives/"+a.name),
			)
		}
	}
	if len(r.certificates) > 0 {
		err = errors.Join(err, r.file(certificateFile, certificateBundle(r.certificates), 0o644))
	}
	return errors.Join(err, r.file("var/lib/dpkg/status", r.status.Bytes(), 0o644))
}

// certificateBundle returns the bundle that update-ca-certificates writes: all certificates, sorted by name.
func certificateBundle(all map[string][]byte) []byte {
	var out bytes.Buffer
	for _, name := range slices.Sorted(maps.Keys(all)) {
		if strings.HasSuffix(name, ".crt") {
			out.Write(withNewline(all[name]))
		}
	}
	return out.Bytes()
}

func withNewline(text []byte) []byte {
	if !bytes.HasSuffix(text, []byte("\n")) {
		text = append(slices.Clone(text), '\n')
	}
	return text
}
