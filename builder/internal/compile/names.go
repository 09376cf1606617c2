package compile

import (
	"io/fs"
	"path"
	"path/filepath"
	"slices"
	"strings"
)

// driverNames has the paths of a driver's files. They are among an object's inputs: a dependency list names the files
// that the compiler found, but not the folders in which the compiler looked before.
type driverNames struct {
	byBase map[string][]string // sorted slash paths, by base name
	// kernel has the paths that may hide a header of the kernel: one of their folders has the name of a folder with the
	// kernel's headers, such as linux.
	kernel string
}

// like returns the paths of all files of the driver with the same base name as the given file.
func (n driverNames) like(name string) string { return strings.Join(n.byBase[path.Base(name)], "\n") }

// driverNames lists the driver's original sources.
func (b *build) driverNames() (driverNames, error) {
	n := driverNames{byBase: map[string][]string{}}
	list, err := fs.ReadDir(hostFS(b.r.Headers), "include")
	if err != nil {
		return n, err
	}
	folders := []string{"asm"} // below arch/
	for _, e := range list {
		folders = append(folders, e.Name())
	}
	var beside []string
	err = walkHost(b.r.Source, func(file string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		rel, err := filepath.Rel(b.r.Source, file)
		if err != nil {
			return err
		}
		rel = filepath.ToSlash(rel)
		n.byBase[path.Base(rel)] = append(n.byBase[path.Base(rel)], rel)
		if slices.ContainsFunc(strings.Split(path.Dir(rel), "/"), func(folder string) bool {
			return slices.Contains(folders, folder)
		}) {
			beside = append(beside, rel)
		}
		return nil
	})
	for _, paths := range n.byBase {
		slices.Sort(paths)
	}
	slices.Sort(beside)
	n.kernel = strings.Join(beside, "\n")
	return n, err
}
