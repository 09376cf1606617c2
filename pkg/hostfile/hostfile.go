// Package hostfile copies files by path and computes their checksums. It never overwrites a file. For paths that
// somebody else chose, use an os.Root, and pass the open files to Fill.
package hostfile

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"io/fs"
	"os"
)

// Copy copies a file to a new file, with mode 0755 if the source is executable, else 0644. After an error, the caller
// removes the incomplete file.
func Copy(to, from string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	info, err := in.Stat()
	if err != nil {
		return err
	}
	mode := fs.FileMode(0o644)
	if info.Mode()&0o111 != 0 {
		mode = 0o755
	}
	out, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, mode)
	if err != nil {
		return err
	}
	return Fill(out, in)
}

// CopySum copies a file to a new file of mode 0644, and returns the SHA-256 of the copied bytes, in hex.
func CopySum(to, from string) (sum string, err error) {
	in, err := os.Open(from)
	if err != nil {
		return "", err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
	if err != nil {
		return "", err
	}
	h := sha256.New()
	if err := Fill(out, io.TeeReader(in, h)); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// Fill copies everything that the reader in has to the file out, and closes the file.
func Fill(out *os.File, in io.Reader) error {
	_, err := io.Copy(out, in)
	return errors.Join(err, out.Close())
}

// Sum returns a file's SHA-256, in hex.
func Sum(path string) (string, error) {
	in, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer in.Close()
	h := sha256.New()
	if _, err := io.Copy(h, in); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}
