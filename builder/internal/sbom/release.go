package sbom

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"github.com/spdx/tools-golang/spdx/v2/common"
	spdx "github.com/spdx/tools-golang/spdx/v2/v2_3"
)

// Whole is a program or an image of a release.
type Whole struct {
	Name, Version string
	// Digest is "sha256:" and the hash of the program's file or of the image's manifest.
	Digest string
	// Purpose is the primary package purpose of SPDX 2.3 (7.24): APPLICATION or CONTAINER.
	Purpose string
	// Created is the document's time. It comes from the released commit, not from a clock.
	Created time.Time
	Parts   []Part
}

// Part is something that a program or image contains: a program, a Go module or a Debian package.
type Part struct {
	Name, Version string
	// Digest is "sha256:" and the hash of the part's file. Empty means unknown.
	Digest string
	// PURL is the part's package URL. Empty means none.
	PURL string
	// Licence is an SPDX expression. Empty means NOASSERTION.
	Licence string
}

// Release returns the SPDX document of a program or image, as JSON. It lists each part once. The same input gives the
// same bytes.
func Release(w Whole) ([]byte, error) {
	sum, ok := strings.CutPrefix(w.Digest, "sha256:")
	if !ok || len(sum) != 2*sha256.Size {
		return nil, fmt.Errorf("list contents of %s: the digest is %.80q; want sha256: and 64 hex digits", w.Name, w.Digest)
	}
	d := &document{Document: spdx.Document{
		SPDXVersion: spdx.Version, DataLicense: spdx.DataLicense, SPDXIdentifier: "DOCUMENT",
		DocumentName: w.Name, DocumentNamespace: "https://prebake.dev/spdx/" + sum,
		CreationInfo: &spdx.CreationInfo{
			Creators: []common.Creator{{CreatorType: "Tool", Creator: "prebake-release"}},
			Created:  w.Created.UTC().Format(time.RFC3339),
		},
	}}
	add := func(id common.ElementID, p Part) *spdx.Package {
		licence := p.Licence
		if licence == "" {
			licence = noAssertion
		}
		one := &spdx.Package{
			PackageName: p.Name, PackageSPDXIdentifier: id, PackageVersion: p.Version,
			PackageDownloadLocation: noAssertion,
			PackageLicenseConcluded: noAssertion, PackageLicenseDeclared: licence, PackageCopyrightText: noAssertion,
		}
		if p.Digest != "" {
			one.PackageChecksums = sha256Sum(strings.TrimPrefix(p.Digest, "sha256:"))
		}
		if p.PURL != "" {
			one.PackageExternalReferences = []*spdx.PackageExternalReference{{
				Category: common.CategoryPackageManager, RefType: common.TypePackageManagerPURL, Locator: p.PURL,
			}}
		}
		d.Packages = append(d.Packages, one)
		return one
	}
	whole := add("Whole", Part{Name: w.Name, Version: w.Version, Digest: w.Digest, Licence: "Apache-2.0"})
	whole.PrimaryPackagePurpose = w.Purpose
	if w.Purpose == "CONTAINER" {
		whole.PackageLicenseDeclared = noAssertion // the Debian packages in the image have their own licences
	}
	d.relate("DOCUMENT", common.TypeRelationshipDescribe, "Whole")
	seen := map[Part]bool{}
	for _, p := range w.Parts {
		if seen[p] {
			continue
		}
		seen[p] = true
		id := elementID(fmt.Sprintf("Part-%d-%s", len(seen), p.Name))
		add(id, p)
		d.relate("Whole", common.TypeRelationshipContains, id)
	}
	return json.Marshal(d.Document)
}
