package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"slices"
	"strings"

	"github.com/prebake/prebake/fetcher/internal/host"
	"github.com/prebake/prebake/fetcher/internal/kmod"
	"github.com/prebake/prebake/pkg/modinfo"
)

// foreignFiles are the open files of a foreign driver. They stay readable after a rename or removal. A file belongs to
// a loaded module if the build ids are the same.
type foreignFiles struct {
	driver string
	// modules are the modules that an activation unloads. The list is empty if the activation unloads no foreign driver.
	modules []host.Module
	images  []kmod.Image
	files   []fs.File
	// unknown has the names of the modules whose files were not found.
	unknown []string
}

func (f *foreignFiles) close() {
	for _, file := range f.files {
		_ = file.Close() // the file was only read
	}
}

// findForeign finds the files of modules that are loaded, or were loaded in this boot, in load order.
func (a *Agent) findForeign(facts *host.Facts, driver string, modules []host.Module) *foreignFiles {
	f := &foreignFiles{driver: driver, modules: modules}
	byID := map[string]string{}
	for _, name := range a.moduleFiles(facts) {
		if m, err := readInfo(a.node, name); err == nil && m.BuildID != "" {
			byID[m.BuildID] = name
		}
	}
	for _, m := range slices.Backward(modules) { // in /proc/modules, the module that was loaded last comes first
		name, ok := byID[m.BuildID]
		file, err := a.node.Open(name)
		if m.BuildID == "" || !ok || err != nil {
			f.unknown = append(f.unknown, m.Name)
			continue
		}
		f.files = append(f.files, file)
		f.images = append(f.images, kmod.Image{
			Name: m.Name, Version: m.Version, Optional: slices.Contains(optional, strings.ReplaceAll(m.Name, "_", "-")),
			Bytes: func() ([]byte, error) { return readAll(file) },
		})
	}
	return f
}

// moduleFiles lists the files that may contain a driver's modules.
func (a *Agent) moduleFiles(facts *host.Facts) []string {
	var all []string
	dirs := []string{path.Join(a.cfg.InstallDir, "drivers"), path.Join(a.cfg.InstallDir, ".prebake/adopted/drivers")}
	for _, dir := range nvmlFolders {
		dirs = append(dirs, path.Join(dir, "drivers"))
	}
	kernel := path.Join("/lib/modules", facts.Kernel.Release)
	for _, sub := range []string{"updates/dkms", "updates", "extra", "kernel/drivers/video", "nvidia", "video"} {
		dirs = append(dirs, path.Join(kernel, sub))
	}
	for _, dir := range dirs {
		found, err := fs.Glob(a.node, path.Join(strings.TrimPrefix(dir, "/"), "nvidia*.ko"))
		if err == nil {
			all = append(all, found...)
		}
	}
	return all
}

func readInfo(root fs.FS, name string) (*modinfo.Module, error) {
	file, err := root.Open(name)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil || !info.Mode().IsRegular() || info.Size() > maxModule {
		return nil, errors.Join(err, fs.ErrInvalid)
	}
	at, ok := file.(io.ReaderAt)
	if !ok {
		return nil, fs.ErrInvalid
	}
	return modinfo.Read(at, info.Size())
}

func readAll(file fs.File) ([]byte, error) {
	at, ok := file.(io.ReaderAt)
	if !ok {
		return nil, fs.ErrInvalid
	}
	return io.ReadAll(io.NewSectionReader(at, 0, maxModule))
}

// reload loads the foreign driver again, after the driver of this program failed.
func (f *foreignFiles) reload(ctx context.Context, a *Agent, r *Report) error {
	for _, name := range []string{"nvidia", "nvidia_uvm"} {
		if slices.Contains(f.unknown, name) {
			return fmt.Errorf("load driver %s, which another installer installed, again: found no file on this node for "+
				"module %s; reboot the node, or run the installer of that driver",
				f.driver, strings.Join(f.unknown, ", "))
		}
	}
	if _, err := a.loader.Load(ctx, f.images); err != nil {
		return fmt.Errorf("load driver %s, which another installer installed, again: %w", f.driver, err)
	}
	r.did("loaded %s again, which was there before", f.driver)
	if len(f.unknown) > 0 {
		r.did("did not find a file of %s, which was loaded before", strings.Join(f.unknown, ", "))
	}
	return a.makeNodes()
}
