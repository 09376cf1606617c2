package mirror

import (
	"context"
	"crypto/md5" //nolint:gosec // COS buckets publish md5 beside each file; it is a format here, not a protection
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/prebake/prebake/pkg/fault"
)

// revision is part of every recipe. Change it whenever the code makes other bytes from the same packages: otherwise the
// cache returns objects of older code.
const revision = 3

// recipe has everything that decides the content of an object. The cache stores an object under a hash of its recipe.
type recipe struct {
	Revision int      `json:"revision"`
	Kind     string   `json:"kind"`
	Packages []pkg    `json:"packages"`
	Tools    []string `json:"tools,omitempty"`
	Params   []string `json:"params,omitempty"`
}

func (r recipe) key() (string, error) {
	r.Revision = revision
	text, err := json.Marshal(r)
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(text)
	return hex.EncodeToString(sum[:16]), nil
}

// object is one finished file in the cache.
type object struct {
	path   string
	cached bool
	Size   int64  `json:"size"`
	MD5    string `json:"md5"`
	SHA256 string `json:"sha256"`
}

// store keeps finished objects in a folder, by their recipes.
type store struct{ dir string }

// make returns the object of this recipe. If the store lacks it, the callback writes it. A file in the store is always
// complete.
func (s store) make(ctx context.Context, r recipe, write func(ctx context.Context, w io.Writer) error) (object, error) {
	key, err := r.key()
	if err != nil {
		return object{}, err
	}
	o := object{path: filepath.Join(s.dir, r.Kind+"-"+key)}
	if text, err := os.ReadFile(o.path + ".json"); err == nil && json.Unmarshal(text, &o) == nil {
		if info, err := os.Stat(o.path); err == nil && info.Size() == o.Size {
			o.cached = true
			return o, nil
		}
	}
	if err := os.MkdirAll(s.dir, 0o755); err != nil {
		return object{}, err
	}
	m, h, c := md5.New(), sha256.New(), &counter{}
	err = writeAtomic(o.path, func(w io.Writer) error { return write(ctx, io.MultiWriter(w, m, h, c)) })
	if err != nil {
		return object{}, err
	}
	o.Size, o.MD5, o.SHA256 = c.n, hex.EncodeToString(m.Sum(nil)), hex.EncodeToString(h.Sum(nil))
	text, err := json.Marshal(o)
	if err != nil {
		return object{}, err
	}
	return o, writeAtomic(o.path+".json", func(w io.Writer) error {
		_, err := w.Write(text)
		return err
	})
}

// publish copies the object to dst. It makes no link: a test that damages a mirror must not damage the cache. If the
// object is damaged in the cache, publish removes it there, and returns an error.
func (o object) publish(dst string) error {
	bad := false
	err := writeAtomic(dst, func(w io.Writer) error {
		f, err := os.Open(o.path)
		if err != nil {
			return err
		}
		defer f.Close()
		h := sha256.New()
		if _, err := io.Copy(io.MultiWriter(w, h), f); err != nil {
			return err
		}
		if got := hex.EncodeToString(h.Sum(nil)); got != o.SHA256 {
			bad = true
			return fault.New(fault.Checksum, fmt.Sprintf("copy %s: the content has sha256 %s; want %s", o.path, got, o.SHA256),
				"check the disk for errors, then run again: the next run makes a new file")
		}
		return nil
	})
	if bad {
		err = errors.Join(err, os.Remove(o.path+".json"), os.Remove(o.path))
	}
	return err
}

// writeMD5 writes <file>.md5 with only the checksum in hex, as COS does.
func writeMD5(file, sum string) error { return putFile(file+".md5", sum) }

// publishText writes a small file and its .md5 file.
func publishText(dst, text string) error {
	if err := putFile(dst, text); err != nil {
		return err
	}
	sum := md5.Sum([]byte(text))
	return writeMD5(dst, hex.EncodeToString(sum[:]))
}

func putFile(dst, text string) error {
	return writeAtomic(dst, func(w io.Writer) error {
		_, err := io.WriteString(w, text)
		return err
	})
}

// writeAtomic writes a temporary file beside dst and renames it to dst, so that dst is never incomplete.
func writeAtomic(dst string, write func(io.Writer) error) error {
	f, err := os.CreateTemp(filepath.Dir(dst), "."+filepath.Base(dst)+".tmp-")
	if err != nil {
		return err
	}
	err = write(f)
	if err == nil {
		err = f.Chmod(0o644)
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), dst)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("write %s: %w", dst, diskFull(err)), os.Remove(f.Name()))
	}
	return nil
}

func diskFull(err error) error {
	return fault.Disk(err, "free some space: a mirror and its cache take about 4 GB")
}

type counter struct{ n int64 }

func (c *counter) Write(p []byte) (int, error) {
	c.n += int64(len(p))
	return len(p), nil
}
