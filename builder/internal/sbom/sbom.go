// Package sbom writes the contents of an artifact as an SPDX 2.3 document: the runfile, the kernel's header tree, the
// toolchain, and every module with its inputs. [Release] does the same for a program or an image of a release of
// Prebake. The same facts give the same bytes. The package never guesses licences. It writes only the licences of the
// runfile and of the kernel's headers, which a person has read. Everything else gets NOASSERTION, SPDX's word for "no
// statement".
package sbom

import (
	"crypto/sha1" //nolint:gosec // SPDX 2.3 (8.4) requires a SHA-1 of every file; Prebake decides nothing by it
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/spdx/tools-golang/spdx/v2/common"
	spdx "github.com/spdx/tools-golang/spdx/v2/v2_3"

	"github.com/prebake/prebake/builder/internal/sign"
	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/target"
)

// Facts is the information from which a document is made.
type Facts struct {
	// Digest is the artifact's manifest digest.
	Digest      string
	Kernel      target.Kernel
	Fingerprint target.Fingerprint
	Driver      target.Driver
	// Materials are the build's inputs, as the provenance lists them.
	Materials []sign.Material
	Layers    []bundle.Layer
	// Modules has the paths of the module files on this machine, by the module's name with or without .ko.
	Modules map[string]string
	// Created is the document's time. Zero means 1970, as in all parts of an artifact, so that two documents are equal.
	Created time.Time
}

// NVIDIA's licence text is in the artifact's user space layer and is not repeated here.
const (
	noAssertion   = "NOASSERTION"
	licenceNVIDIA = "LicenseRef-NVIDIA-driver"
	licenceKernel = "GPL-2.0-only" // the kernel's COPYING, for the kernel as a whole
)

// JSON returns the SPDX document in JSON. It needs a runfile and kernel headers as materials, and a module layer.
func JSON(f Facts) ([]byte, error) {
	raw, err := build(f)
	if err != nil {
		return nil, fmt.Errorf("list contents of %s: %w", f.Digest, err)
	}
	return raw, nil
}

func build(f Facts) ([]byte, error) {
	sum, ok := strings.CutPrefix(f.Digest, "sha256:")
	switch {
	case !ok || len(sum) != 2*sha256.Size:
		return nil, errors.New("the artifact's digest is not valid; want sha256: and 64 hex digits")
	case len(f.Modules) == 0:
		return nil, errors.New("the artifact has no modules")
	}
	created := f.Created
	if created.IsZero() {
		created = time.Unix(0, 0)
	}
	name := "nvidia-" + f.Driver.String() + "-" + f.Fingerprint.Short()
	d := &document{facts: f, Document: spdx.Document{
		SPDXVersion: spdx.Version, DataLicense: spdx.DataLicense, SPDXIdentifier: "DOCUMENT",
		DocumentName: name, DocumentNamespace: "https://prebake.dev/spdx/" + sum,
		CreationInfo: &spdx.CreationInfo{
			Creators: []common.Creator{{CreatorType: "Tool", Creator: "prebake-builder"}},
			Created:  created.UTC().Format(time.RFC3339),
		},
	}}
	d.Packages = append(d.Packages, &spdx.Package{
		PackageName: name, PackageSPDXIdentifier: artifact, PackageVersion: f.Driver.Version,
		PackageDownloadLocation: noAssertion,
		PackageChecksums:        sha256Sum(sum),
		PackageLicenseConcluded: noAssertion, PackageLicenseDeclared: noAssertion, PackageCopyrightText: noAssertion,
		PackageSummary: fmt.Sprintf("NVIDIA driver %s, flavour %s, for kernels of ABI fingerprint %s",
			f.Driver.Version, f.Driver.Flavour, f.Fingerprint),
		PrimaryPackagePurpose: "CONTAINER",
	})
	d.relate("DOCUMENT", common.TypeRelationshipDescribe, artifact)
	if err := d.addMaterials(); err != nil {
		return nil, err
	}
	if err := d.addLayers(); err != nil {
		return nil, err
	}
	return json.Marshal(d.Document)
}

// artifact is the id of the element that the document describes.
const artifact = "Artifact"

type document struct {
	spdx.Document
	facts Facts
	// driver, kernel and tools are the ids of the runfile, of the kernel's headers, and of all other inputs (build tools).
	driver, kernel, tools []common.ElementID
}

func (d *document) relate(a common.ElementID, how string, b common.ElementID) {
	d.Relationships = append(d.Relationships, &spdx.Relationship{
		RefA: common.DocElementID{ElementRefID: a}, RefB: common.DocElementID{ElementRefID: b}, Relationship: how,
	})
}

// addMaterials adds a package for every input.
func (d *document) addMaterials() error {
	for i, m := range d.facts.Materials {
		sum, ok := strings.CutPrefix(m.Digest, "sha256:")
		if !ok {
			return fmt.Errorf("input %s has the digest %.80q; want sha256: and a hash", m.Name, m.Digest)
		}
		p := &spdx.Package{
			PackageName: m.Name, PackageSPDXIdentifier: elementID(fmt.Sprintf("Input-%d-%s", i+1, m.Name)),
			PackageFileName:         m.Name,
			PackageDownloadLocation: location(m.URI), PackageChecksums: sha256Sum(sum),
			PackageLicenseConcluded: noAssertion, PackageLicenseDeclared: noAssertion, PackageCopyrightText: noAssertion,
			PrimaryPackagePurpose: "ARCHIVE",
		}
		switch {
		case strings.HasPrefix(m.Name, "NVIDIA-Linux-"):
			p.PackageVersion, p.PackageLicenseDeclared = d.facts.Driver.Version, licenceNVIDIA
			p.PackageSupplier = &common.Supplier{SupplierType: "Organization", Supplier: "NVIDIA Corporation"}
			d.OtherLicenses = []*spdx.OtherLicense{{
				LicenseIdentifier: licenceNVIDIA, LicenseName: "NVIDIA driver licence",
				ExtractedText: "The licence is the file LICENSE in the runfile, and share/LICENSE in the artifact. Sources of " +
					"the open kernel modules carry their own, MIT or GPL-2.0.",
			}}
			d.driver = append(d.driver, p.PackageSPDXIdentifier)
		case strings.HasPrefix(m.Name, "kernel-headers"):
			p.PackageVersion, p.PackageLicenseDeclared = d.facts.Kernel.BuildID, licenceKernel
			p.PackageSourceInfo = fmt.Sprintf("headers of kernel %s of COS build %s, board %s", d.facts.Kernel.Release,
				d.facts.Kernel.BuildID, d.facts.Kernel.Board)
			if c := d.facts.Kernel.Commit; c != "" {
				p.PackageSourceInfo += ", commit " + c
			}
			d.kernel = append(d.kernel, p.PackageSPDXIdentifier)
		default:
			d.tools = append(d.tools, p.PackageSPDXIdentifier)
			if !strings.HasPrefix(m.Name, "toolchain.tar") {
				p.PrimaryPackagePurpose = "OTHER"
			}
		}
		d.Packages = append(d.Packages, p)
	}
	if len(d.driver) == 0 || len(d.kernel) == 0 {
		return errors.New("the runfile or the kernel headers are missing in the list of inputs")
	}
	return nil
}

// addLayers adds a package for every layer, and the modules as files of the module layer.
func (d *document) addLayers() error {
	for _, l := range d.facts.Layers {
		id := elementID("Layer-" + string(l.Kind))
		p := &spdx.Package{
			PackageName: string(l.Kind) + " layer", PackageSPDXIdentifier: id, PackageDownloadLocation: noAssertion,
			PackageChecksums:        sha256Sum(strings.TrimPrefix(l.Digest, "sha256:")),
			PackageLicenseConcluded: noAssertion, PackageLicenseDeclared: noAssertion, PackageCopyrightText: noAssertion,
			PrimaryPackagePurpose: "ARCHIVE",
		}
		d.Packages = append(d.Packages, p)
		d.relate(artifact, common.TypeRelationshipContains, id)
		for _, from := range d.driver {
			d.relate(id, common.TypeRelationshipGeneratedFrom, from)
		}
		if l.Kind != bundle.LayerModules {
			continue
		}
		if err := d.addModules(p); err != nil {
			return err
		}
	}
	if len(d.Files) == 0 {
		return errors.New("the artifact has no layer with modules")
	}
	return nil
}

func (d *document) addModules(layer *spdx.Package) error {
	var sums []string
	for _, name := range slices.Sorted(maps.Keys(d.facts.Modules)) {
		weak, strong, err := hashFile(d.facts.Modules[name])
		if err != nil {
			return err
		}
		sums = append(sums, weak)
		file := strings.TrimSuffix(name, ".ko") + ".ko"
		id := elementID("Module-" + file)
		d.Files = append(d.Files, &spdx.File{
			FileName: "./drivers/" + file, FileSPDXIdentifier: id, FileTypes: []string{"BINARY"},
			Checksums: []common.Checksum{{Algorithm: common.SHA1, Value: weak},
				{Algorithm: common.SHA256, Value: strong}},
			LicenseConcluded: noAssertion, LicenseInfoInFiles: []string{noAssertion}, FileCopyrightText: noAssertion,
		})
		d.relate(layer.PackageSPDXIdentifier, common.TypeRelationshipContains, id)
		for _, from := range append(slices.Clone(d.driver), d.kernel...) {
			d.relate(id, common.TypeRelationshipGeneratedFrom, from)
		}
		for _, tool := range d.tools {
			d.relate(tool, common.TypeRelationshipBuildToolOf, id)
		}
	}
	layer.FilesAnalyzed, layer.PackageLicenseInfoFromFiles = true, []string{noAssertion}
	layer.PackageVerificationCode = &common.PackageVerificationCode{Value: verificationCode(sums)}
	return nil
}

// verificationCode returns the package verification code of SPDX 2.3, 7.9: the SHA-1 of the sorted SHA-1s.
func verificationCode(sums []string) string {
	slices.Sort(sums)
	h := sha1.Sum([]byte(strings.Join(sums, ""))) //nolint:gosec // see the import
	return hex.EncodeToString(h[:])
}

func sha256Sum(sum string) []common.Checksum {
	return []common.Checksum{{Algorithm: common.SHA256, Value: sum}}
}

// location returns a URI as SPDX's download location, or NOASSERTION if there is no usable URI.
func location(uri string) string {
	if uri == "" || strings.HasPrefix(uri, "file:") { // a file URI of this machine means nothing on other machines
		return noAssertion
	}
	return uri
}

var idPattern = regexp.MustCompile(`[^A-Za-z0-9.-]+`)

// elementID returns an SPDX identifier made from a name: other characters than letters, digits, - and . become -.
func elementID(name string) common.ElementID {
	return common.ElementID(idPattern.ReplaceAllString(name, "-"))
}

func hashFile(path string) (weak, strong string, err error) {
	f, err := os.Open(path)
	if err != nil {
		return "", "", err
	}
	defer f.Close()
	a, b := sha1.New(), sha256.New() //nolint:gosec // see the import
	if _, err := io.Copy(io.MultiWriter(a, b), f); err != nil {
		return "", "", err
	}
	return hex.EncodeToString(a.Sum(nil)), hex.EncodeToString(b.Sum(nil)), nil
}
