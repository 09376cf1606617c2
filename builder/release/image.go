package main

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/prebake/prebake/pkg/fault"
)

// image describes one container image of the release. Dockerfile.builder and Dockerfile.fetcher describe the same
// images. TestLock compares only their Debian packages, so change images and Dockerfiles together.
type image struct {
	name string
	// If debian is true, the image has all Debian packages. Otherwise it has only the CA certificates.
	debian   bool
	programs []string
	// links has the targets of the symbolic links, by the link's name.
	links map[string]string
	user  string
	port  string
}

var images = []image{
	{
		name: "builder", debian: true, user: "65532:65532",
		programs: []string{"builder", "fetcher", "guestinit", "nvmlprobe"},
	},
	{name: "server", programs: []string{"server"}, user: "65532:65532", port: "8440/tcp"},
	// If fetcher is started under the name cos-gpu-installer, it accepts the flags of Google's installer.
	{
		name: "fetcher", programs: []string{"fetcher", "nvmlprobe"},
		links: map[string]string{"cos-gpu-installer": "/usr/local/bin/fetcher"},
	},
}

const imagePath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// madeImage describes an image that was written.
type madeImage struct {
	name string
	// digest names the index over all architectures. arches has the image's digest for each architecture.
	digest string
	arches map[string]string
}

// buildImages writes an OCI archive with all architectures for each image into the release's folder. The programs come
// from the same folder.
func (c *config) buildImages(ctx context.Context, dir, work string, packages []debPackage) ([]madeImage, error) {
	type bases struct{ debian, certificates v1.Layer }
	layers := map[string]bases{}
	for _, arch := range c.arches {
		c.say("unpacking Debian packages for %s", arch)
		file := filepath.Join(work, "debian-"+arch+".tar")
		err := writeFile(file, func(w io.Writer) error { return writeRoot(ctx, w, arch, ofArch(packages, arch)) })
		if err != nil {
			return nil, err
		}
		text, err := fromTar(file, certificateFile)
		if err != nil {
			return nil, err
		}
		var b bases
		b.debian, err = tarball.LayerFromFile(file, tarball.WithCompressedCaching, tarball.WithMediaType(types.OCILayer))
		if err != nil {
			return nil, err
		}
		if b.certificates, err = filesLayer([]entry{{name: certificateFile, text: text}}); err != nil {
			return nil, err
		}
		layers[arch] = b
	}
	var all []madeImage
	for _, im := range images {
		c.say("writing image %s", im.name)
		made := madeImage{name: im.name, arches: map[string]string{}}
		index := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
		for _, arch := range c.arches {
			base := layers[arch].certificates
			if im.debian {
				base = layers[arch].debian
			}
			one, err := c.oneImage(im, arch, filepath.Join(dir, platform(arch)), base)
			if err != nil {
				return nil, fmt.Errorf("make image %s for %s: %w", im.name, arch, err)
			}
			digest, err := one.Digest()
			if err != nil {
				return nil, err
			}
			made.arches[arch] = digest.String()
			index = mutate.AppendManifests(index, mutate.IndexAddendum{
				Add: one, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: arch}},
			})
		}
		digest, err := index.Digest()
		if err != nil {
			return nil, err
		}
		made.digest = digest.String()
		name := filepath.Join(dir, "images", im.name+".tar")
		if err := writeArchive(name, filepath.Join(work, im.name), index, "prebake/"+im.name+":"+c.version); err != nil {
			return nil, err
		}
		all = append(all, made)
	}
	return all, nil
}

func (c *config) oneImage(im image, arch, programs string, base v1.Layer) (v1.Image, error) {
	entries := []entry{}
	for _, name := range im.programs {
		text, err := os.ReadFile(filepath.Join(programs, name))
		if err != nil {
			return nil, err
		}
		entries = append(entries, entry{name: "usr/local/bin/" + name, text: text, program: true})
	}
	for name, to := range im.links {
		entries = append(entries, entry{name: name, link: to})
	}
	own, err := filesLayer(entries)
	if err != nil {
		return nil, err
	}
	start := mutate.MediaType(mutate.ConfigMediaType(empty.Image, types.OCIConfigJSON), types.OCIManifestSchema1)
	created := v1.Time{Time: c.date}
	layer := func(l v1.Layer, comment string) mutate.Addendum {
		return mutate.Addendum{Layer: l, MediaType: types.OCILayer, History: v1.History{Created: created, Comment: comment}}
	}
	one, err := mutate.Append(
		start, layer(base, "Debian packages of packages.lock"), layer(own, "programs of Prebake "+c.version),
	)
	if err != nil {
		return nil, err
	}
	file, err := one.ConfigFile()
	if err != nil {
		return nil, err
	}
	file = file.DeepCopy()
	file.Architecture, file.OS, file.Created = arch, "linux", created
	file.Config = v1.Config{
		User: im.user, Env: []string{"PATH=" + imagePath}, Entrypoint: []string{"/usr/local/bin/" + im.name},
		Labels: map[string]string{
			"org.opencontainers.image.version": c.version, "org.opencontainers.image.revision": c.commit,
			"org.opencontainers.image.title": "prebake-" + im.name, "org.opencontainers.image.licenses": "Apache-2.0",
		},
	}
	if im.port != "" {
		file.Config.ExposedPorts = map[string]struct{}{im.port: {}}
	}
	return mutate.ConfigFile(one, file)
}

// entry is one file or link of a small layer.
type entry struct {
	name    string
	text    []byte
	link    string
	program bool
}

// filesLayer makes a layer of a few files and the folders above them.
func filesLayer(entries []entry) (v1.Layer, error) {
	slices.SortFunc(entries, func(a, b entry) int { return bytes.Compare([]byte(a.name), []byte(b.name)) })
	var buf bytes.Buffer
	r := &rootFS{tw: tar.NewWriter(&buf), seen: map[string]bool{}}
	for _, e := range entries {
		var above []string
		for dir := filepath.Dir(e.name); dir != "."; dir = filepath.Dir(dir) {
			above = append(above, dir)
		}
		for _, dir := range slices.Backward(above) {
			if err := r.folder(dir); err != nil {
				return nil, err
			}
		}
		write := func() error { return r.file(e.name, e.text, 0o644) }
		if e.program {
			write = func() error { return r.file(e.name, e.text, 0o755) }
		}
		if e.link != "" {
			write = func() error { return r.link(e.name, e.link) }
		}
		if err := write(); err != nil {
			return nil, err
		}
	}
	if err := r.tw.Close(); err != nil {
		return nil, err
	}
	open := func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(buf.Bytes())), nil }
	return tarball.LayerFromOpener(open, tarball.WithCompressedCaching, tarball.WithMediaType(types.OCILayer))
}

// writeArchive writes an index as an OCI image layout in a tar. The layout is first written to the given folder.
func writeArchive(file, dir string, index v1.ImageIndex, ref string) error {
	path, err := layout.Write(dir, empty.Index)
	if err != nil {
		return err
	}
	name := layout.WithAnnotations(map[string]string{"org.opencontainers.image.ref.name": ref})
	if err := path.AppendIndex(index, name); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return err
	}
	return errors.Join(writeFile(file, func(w io.Writer) error { return tarFolder(w, dir) }), os.RemoveAll(dir))
}

// tarFolder writes a folder's files to a tar, sorted by name, without owner and time.
func tarFolder(w io.Writer, dir string) error {
	r := &rootFS{tw: tar.NewWriter(w), seen: map[string]bool{}}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || path == dir {
			return err
		}
		name, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		if d.IsDir() {
			return r.folder(name)
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		return r.file(name, text, 0o644)
	})
	return errors.Join(err, r.tw.Close())
}

func writeFile(file string, fill func(io.Writer) error) error {
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	return errors.Join(fill(f), f.Close())
}

// fromTar returns the content of one file of a tar.
func fromTar(file, name string) ([]byte, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	tr := tar.NewReader(f)
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return nil, fault.New(fault.Usage, "read packages: no package has the file "+name,
				"add ca-certificates to builder/release/packages.sh, then run: make release-packages")
		}
		if err != nil {
			return nil, err
		}
		if h.Name == name {
			return io.ReadAll(tr)
		}
	}
}
