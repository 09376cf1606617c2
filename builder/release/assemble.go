package main

import (
	"bytes"
	"context"
	"debug/buildinfo"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	ocidigest "github.com/opencontainers/go-digest"

	"github.com/prebake/prebake/builder/internal/sbom"
	"github.com/prebake/prebake/builder/internal/sign"
	"github.com/prebake/prebake/pkg/fault"
)

// Names of files in a release that the check of a release reads, too.
const (
	sumsFile       = "SHA256SUMS"
	provenanceFile = "provenance.json"
	// signatureDir is the only folder that differs between two releases of the same commit.
	signatureDir  = "signatures"
	signatureFile = signatureDir + "/provenance.sigstore.json"
)

// imageHost is the registry from which the manifests pull the images, unless an overlay sets another registry.
const imageHost = "ghcr.io/prebake/"

// assemble makes the release in a temporary folder beside out, and renames it to out when it is complete.
func assemble(ctx context.Context, c config, out string) (err error) {
	if out, err = filepath.Abs(out); err != nil {
		return err
	}
	if err := checkRemovable(out); err != nil {
		return err
	}
	work, err := os.MkdirTemp(filepath.Dir(out), ".release-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(work)) }()
	dir := filepath.Join(work, "release")
	// Other users read the release. A folder of MkdirTemp is readable by its owner only.
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	packages, err := readLock(c.lock)
	if err != nil {
		return err
	}
	if err := c.fetch(ctx, packages); err != nil {
		return err
	}
	if err := c.buildPrograms(ctx, dir); err != nil {
		return err
	}
	made, err := c.buildImages(ctx, dir, work, packages)
	if err != nil {
		return err
	}
	for _, step := range []func() error{
		func() error { return c.writeTexts(dir) },
		func() error { return c.writeManifests(ctx, dir, made) },
		func() error { return c.writeContents(dir, made, packages) },
		func() error {
			if c.check == nil {
				return nil
			}
			return c.check(ctx)
		},
		func() error { return c.signAll(ctx, dir, work, made, packages) },
		func() error { return os.RemoveAll(out) },
		func() error { return os.Rename(dir, out) },
	} {
		if err := step(); err != nil {
			return err
		}
	}
	c.say("%s is %s of commit %s", out, c.version, c.commit)
	return nil
}

// checkRemovable returns an error if the folder has content that is not a release. assemble would delete this content.
func checkRemovable(out string) error {
	entries, err := os.ReadDir(out)
	if errors.Is(err, fs.ErrNotExist) || err == nil && len(entries) == 0 {
		return nil
	}
	for _, name := range []string{sumsFile, provenanceFile, signatureDir} {
		var info fs.FileInfo
		if err == nil {
			info, err = os.Lstat(filepath.Join(out, name))
		}
		if err == nil && info.IsDir() != (name == signatureDir) {
			err = fmt.Errorf("%s has the wrong type: it is a folder in place of a file, or a file in place of a folder", name)
		}
	}
	if err != nil {
		return fault.Wrap(fault.Usage, fmt.Errorf("replace %s: it is not the folder of a release: %w", out, err),
			"give another folder with -out")
	}
	return nil
}

func (c *config) writeTexts(dir string) error {
	changes, err := os.ReadFile(filepath.Join(c.source, "CHANGELOG.md"))
	if err != nil {
		return err
	}
	text, err := releaseNotes(changes, c.version)
	if err != nil {
		return err
	}
	return errors.Join(
		os.WriteFile(filepath.Join(dir, "NOTES.md"), text, 0o644),
		copyFile(filepath.Join(c.source, "LICENSE"), filepath.Join(dir, "LICENSE")),
	)
}

var imageName = regexp.MustCompile(regexp.QuoteMeta(imageHost) + `([a-z0-9-]+):latest`)

// archSelector matches the node selector for the architectures of the fetcher's image, with the comment behind it.
var archSelector = regexp.MustCompile(`(\{key: kubernetes\.io/arch, operator: In, values: \[)[a-z0-9, ]+(\]\})( #.*)?`)

// selectArches replaces the architectures on whose nodes the fetcher runs. It returns the number of replacements.
func selectArches(text []byte, arches []string) ([]byte, int) {
	n := len(archSelector.FindAll(text, -1))
	return archSelector.ReplaceAll(text, []byte("${1}"+strings.Join(arches, ", ")+"${2}")), n
}

// writeManifests copies the manifests. It replaces the tag of each image by the image's digest, and the architectures
// of the nodes by those of the images.
func (c *config) writeManifests(ctx context.Context, dir string, made []madeImage) error {
	digests, used, selectors := map[string]string{}, map[string]bool{}, 0
	for _, m := range made {
		digests[m.name] = m.digest
	}
	for _, folder := range []string{"kubernetes", "gce"} {
		root := filepath.Join("deploy", folder)
		names, err := c.trackedFiles(ctx, root)
		if err != nil {
			return fmt.Errorf("write manifests: %w", err)
		}
		for _, name := range names {
			path, to := filepath.Join(c.source, root, name), filepath.Join(dir, "manifests", folder, name)
			text, err := os.ReadFile(path)
			if err != nil {
				return fmt.Errorf("write manifests: %w", err)
			}
			var unknown error
			text = imageName.ReplaceAllFunc(text, func(match []byte) []byte {
				image := string(imageName.FindSubmatch(match)[1])
				if digests[image] == "" {
					unknown = fault.New(fault.Usage, fmt.Sprintf("%s has image %s, which is not in the release", path, image),
						"list the image in builder/release/image.go")
				}
				used[image] = true
				return []byte(imageHost + image + "@" + digests[image])
			})
			text, n := selectArches(text, c.arches)
			selectors += n
			err = errors.Join(unknown, os.MkdirAll(filepath.Dir(to), 0o755), os.WriteFile(to, text, 0o644))
			if err != nil {
				return fmt.Errorf("write manifests: %w", err)
			}
		}
	}
	for _, m := range made {
		if !used[m.name] {
			return fault.New(fault.Internal, "write manifests: no manifest has "+imageHost+m.name+":latest", "")
		}
	}
	if selectors == 0 {
		return fault.New(fault.Internal, "write manifests: no manifest selects nodes by "+archSelector.String(), "")
	}
	var text bytes.Buffer
	for _, m := range made {
		fmt.Fprintf(&text, "%s%s@%s\n", imageHost, m.name, m.digest)
	}
	return os.WriteFile(filepath.Join(dir, "images", "digests.txt"), text.Bytes(), 0o644)
}

// writeContents writes one SPDX document for each program and for each architecture of each image.
func (c *config) writeContents(dir string, made []madeImage, packages []debPackage) error {
	to := filepath.Join(dir, "contents")
	if err := os.Mkdir(to, 0o755); err != nil {
		return err
	}
	for _, arch := range c.arches {
		parts := map[string][]sbom.Part{}
		for _, p := range programs {
			file := filepath.Join(dir, platform(arch), p.name)
			modules, err := goModules(file)
			if err != nil {
				return fmt.Errorf("list contents of %s: %w", file, err)
			}
			sum, _, err := fileSum(file)
			if err != nil {
				return err
			}
			whole := sbom.Whole{
				Name: p.name + "-" + platform(arch), Version: c.version, Digest: "sha256:" + sum,
				Purpose: "APPLICATION", Created: c.date, Parts: modules,
			}
			if err := writeDocument(to, whole); err != nil {
				return err
			}
			own := sbom.Part{Name: p.name, Version: c.version, Digest: "sha256:" + sum, Licence: "Apache-2.0"}
			parts[p.name] = append([]sbom.Part{own}, modules...)
		}
		for i, im := range images {
			whole := sbom.Whole{
				Name: "image-" + im.name + "-" + platform(arch), Version: c.version, Digest: made[i].arches[arch],
				Purpose: "CONTAINER", Created: c.date,
			}
			for _, p := range ofArch(packages, arch) {
				if im.debian || p.name == "ca-certificates" {
					whole.Parts = append(whole.Parts, p.part(arch))
				}
			}
			for _, name := range im.programs {
				whole.Parts = append(whole.Parts, parts[name]...)
			}
			if err := writeDocument(to, whole); err != nil {
				return err
			}
		}
	}
	return nil
}

func writeDocument(dir string, whole sbom.Whole) error {
	text, err := sbom.Release(whole)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, whole.Name+".spdx.json"), text, 0o644)
}

// goModules returns the standard library and the modules that are linked into a program.
func goModules(file string) ([]sbom.Part, error) {
	info, err := buildinfo.ReadFile(file)
	if err != nil {
		return nil, err
	}
	version := strings.TrimPrefix(info.GoVersion, "go")
	all := []sbom.Part{{Name: "stdlib", Version: version, PURL: "pkg:golang/stdlib@" + version}}
	for _, m := range info.Deps {
		if m.Replace != nil {
			m = m.Replace
		}
		// The purl specification encodes the "+" of a version as %2B.
		purl := "pkg:golang/" + m.Path + "@" + strings.ReplaceAll(m.Version, "+", "%2B")
		all = append(all, sbom.Part{Name: m.Path, Version: m.Version, PURL: purl})
	}
	return all, nil
}

func (p debPackage) part(arch string) sbom.Part {
	return sbom.Part{Name: p.name, Version: p.version, Digest: "sha256:" + p.sum, PURL: p.purl(arch)}
}

// purl returns the package URL of a Debian package, which has the type deb: https://github.com/package-url/purl-spec.
func (p debPackage) purl(arch string) string {
	if p.arch == "all" {
		arch = "all"
	}
	escape := strings.NewReplacer("+", "%2B", ":", "%3A")
	name := escape.Replace(p.name) + "@" + escape.Replace(p.version)
	return "pkg:deb/debian/" + name + "?arch=" + arch + "&distro=debian-12"
}

// signAll writes the checksums, the provenance and the signature of the provenance.
func (c *config) signAll(ctx context.Context, dir, work string, made []madeImage, packages []debPackage) error {
	names, err := regularFiles(dir)
	if err != nil {
		return err
	}
	facts := sign.ReleaseFacts{Version: c.version, Commit: c.commit, BuilderID: c.builderID}
	var text bytes.Buffer
	for _, name := range names {
		sum, _, err := fileSum(filepath.Join(dir, name))
		if err != nil {
			return err
		}
		fmt.Fprintf(&text, "%s  %s\n", sum, name)
		// The provenance lists programs and images. It covers all other files by the digest of the checksums file.
		if strings.HasPrefix(name, "linux-") || strings.HasPrefix(name, "images/") {
			facts.Files = append(facts.Files, sign.Material{Name: name, Digest: "sha256:" + sum})
		}
	}
	if err := os.WriteFile(filepath.Join(dir, sumsFile), text.Bytes(), 0o644); err != nil {
		return err
	}
	facts.Files = append(facts.Files, sign.Material{Name: sumsFile, Digest: digestOf(text.Bytes())})
	for _, m := range made {
		facts.Files = append(facts.Files, sign.Material{Name: imageHost + m.name, Digest: m.digest})
	}
	for _, p := range packages {
		facts.Inputs = append(facts.Inputs, sign.Material{
			Name: filepath.Base(p.path), URI: p.purl(p.arch), Digest: "sha256:" + p.sum,
		})
	}
	info, err := buildinfo.ReadFile(filepath.Join(dir, platform(c.arches[0]), "builder"))
	if err != nil {
		return err
	}
	facts.Toolchain = info.GoVersion
	statement, err := sign.Release(facts)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, provenanceFile), statement.JSON(), 0o644); err != nil {
		return err
	}
	return c.sign(ctx, dir, work, statement)
}

func digestOf(text []byte) string {
	return ocidigest.FromBytes(text).String()
}

// sign writes the signature and the public key. Without -key, it makes a key pair, and assemble deletes the private
// key. A user who got the release from elsewhere must not trust the public key of that pair.
func (c *config) sign(ctx context.Context, dir, work string, statement sign.Statement) error {
	key, name := c.key, "release.pub"
	if key == "" {
		key, name = filepath.Join(work, "key"), "throw-away.pub"
		if err := sign.GenerateKey(key); err != nil {
			return err
		}
		c.say("no -key: signing with a new key, which is deleted afterwards; other people cannot know who signed")
	}
	signer, err := sign.LoadSigner(ctx, key)
	if err != nil {
		return err
	}
	signature, err := sign.Bundle(ctx, signer, statement)
	if err != nil {
		return err
	}
	public, err := signer.PublicPEM()
	if err != nil {
		return err
	}
	return errors.Join(
		os.Mkdir(filepath.Join(dir, signatureDir), 0o755),
		os.WriteFile(filepath.Join(dir, signatureFile), signature, 0o644),
		os.WriteFile(filepath.Join(dir, signatureDir, name), public, 0o644),
	)
}

// regularFiles returns the sorted names of the files below a folder, without the folder of signatures.
func regularFiles(dir string) (names []string, err error) {
	err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		switch {
		case d.IsDir() && name == signatureDir:
			return fs.SkipDir
		case d.IsDir():
			return nil
		case !d.Type().IsRegular():
			return fault.New(fault.Unverified, fmt.Sprintf("%s is not a regular file", path), "")
		}
		names = append(names, filepath.ToSlash(name))
		return nil
	})
	slices.Sort(names)
	return names, err
}
