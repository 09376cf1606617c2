package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/trust"
)

// verifyRelease compares every file of a release with its checksum. It verifies the signed provenance, which contains
// the digest of the list of checksums. keys are the trusted public keys in PEM. verifyRelease returns the id of the key
// that signed. Every error is [fault.Unverified].
func verifyRelease(dir string, keys []byte) (signer string, err error) {
	if signer, err = verifyAll(dir, keys); err != nil {
		err = fault.Wrap(fault.Unverified, fmt.Errorf("verify release %s: %w", dir, err),
			"get the release again, and get the public key from the publisher of the release")
	}
	return signer, err
}

func verifyAll(dir string, keys []byte) (string, error) {
	public, err := trust.ParsePublicKeys(keys)
	if err != nil {
		return "", err
	}
	verifier, err := trust.NewVerifier(trust.Policy{Keys: public})
	if err != nil {
		return "", err
	}
	raw, err := os.ReadFile(filepath.Join(dir, signatureFile))
	if err != nil {
		return "", err
	}
	statement, err := verifier.Statement(raw)
	if err != nil {
		return "", err
	}
	if statement.PredicateType != trust.PredicateProvenance {
		return "", fmt.Errorf("the signed statement is of type %s; want %s", statement.PredicateType,
			trust.PredicateProvenance)
	}
	text, err := os.ReadFile(filepath.Join(dir, sumsFile))
	if err != nil {
		return "", err
	}
	if !statement.About(digestOf(text)) {
		return "", fmt.Errorf("the file %s does not have the digest in the signed statement", sumsFile)
	}
	if err := samePayload(raw, filepath.Join(dir, provenanceFile)); err != nil {
		return "", err
	}
	listed := map[string]string{}
	for line := range strings.Lines(string(text)) {
		sum, name, ok := strings.Cut(strings.TrimSuffix(line, "\n"), "  ")
		if !ok || !sumPattern.MatchString(sum) || !filepath.IsLocal(name) {
			return "", fmt.Errorf("%s: line %.200q: want a SHA-256, two spaces and a path in the release", sumsFile, line)
		}
		listed[name] = sum
	}
	names, err := regularFiles(dir)
	if err != nil {
		return "", err
	}
	for _, name := range names {
		if name == sumsFile || name == provenanceFile {
			continue
		}
		sum, ok := listed[name]
		if !ok {
			return "", fmt.Errorf("the file %s is not listed in %s", name, sumsFile)
		}
		if err := checkFileSum(filepath.Join(dir, name), sum); err != nil {
			return "", err
		}
	}
	for name := range listed {
		if !slices.Contains(names, name) {
			return "", fmt.Errorf("%s is missing", name)
		}
	}
	return statement.KeyID, nil
}

// samePayload returns an error if a file differs from the statement in the given Sigstore bundle.
func samePayload(signature []byte, file string) error {
	var bundle struct {
		Envelope struct {
			Payload []byte `json:"payload"`
		} `json:"dsseEnvelope"`
	}
	if err := json.Unmarshal(signature, &bundle); err != nil {
		return err
	}
	text, err := os.ReadFile(file)
	if err == nil && !bytes.Equal(text, bundle.Envelope.Payload) {
		err = fmt.Errorf("the file %s differs from the signed statement", filepath.Base(file))
	}
	return err
}
