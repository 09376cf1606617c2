package tarball

import (
	"bytes"
	"context"
	"io"
	"net/url"
	"os"
	"strconv"

	"google.golang.org/protobuf/encoding/prototext"
	"google.golang.org/protobuf/proto"
)

// Form is one of the two file formats of COS's list gpu_driver_versions.
type Form struct {
	Name      string
	edit      func(have []byte, change edit) ([]byte, error)
	Unmarshal func([]byte, proto.Message) error
	Marshal   func(proto.Message) ([]byte, error)
}

// Text and Binary are the two formats.
var (
	Text   = Form{"textproto", editText, prototext.Unmarshal, prototext.Marshal}
	Binary = Form{"bin", editBinary, proto.Unmarshal, proto.Marshal}
)

// Add adds a version to the list, as withVersion does.
func (f Form) Add(have []byte, version string, serves func(string) bool) ([]byte, error) {
	return f.edit(have, withVersion(version, serves))
}

// Relabel removes the labels in drop and sets the labels in give.
func (f Form) Relabel(have []byte, drop, give []Label) ([]byte, error) {
	return f.edit(have, withLabels(drop, give))
}

// Pack packs a release's files. xattr replaces the function that reads extended attributes, which the test's file
// system may lack. nil means the real function.
func Pack(ctx context.Context, r Release, dst string, xattr func(*os.File, string) ([]byte, error)) (digest string,
	err error) {
	files, err := r.sources()
	if err != nil {
		return "", err
	}
	if xattr == nil {
		xattr = readXattr
	}
	o, _, err := pack(ctx, files, dst, xattr)
	return o.sha256, err
}

// OpenFolder opens a folder as a destination. It syncs folders with flush, in place of (*os.File).Sync.
func OpenFolder(dir string, flush func(*os.File) error) (*Bucket, error) {
	f, err := openFolder(&url.URL{Scheme: "file", Path: dir}, flush)
	if err != nil {
		return nil, err
	}
	return &Bucket{f}, nil
}

// Breaking returns a destination whose calls can fail. Each call runs before at its start. A call that writes also runs
// after at its end. If one of them returns an error, the call returns this error.
func Breaking(b *Bucket, before, after func() error) *Bucket {
	return &Bucket{&breaking{b.s, before, after}}
}

type breaking struct {
	store
	before, after func() error
}

func (b *breaking) stat(ctx context.Context, name string) (attrs, bool, error) {
	if err := b.before(); err != nil {
		return attrs{}, false, err
	}
	return b.store.stat(ctx, name)
}

func (b *breaking) open(ctx context.Context, name string) (io.ReadCloser, string, error) {
	if err := b.before(); err != nil {
		return nil, "", err
	}
	return b.store.open(ctx, name)
}

func (b *breaking) create(ctx context.Context, u upload) error {
	if err := b.before(); err != nil {
		return err
	}
	if err := b.store.create(ctx, u); err != nil {
		return err
	}
	return b.after()
}

func (b *breaking) replace(ctx context.Context, u upload, token string) error {
	if err := b.before(); err != nil {
		return err
	}
	if err := b.store.replace(ctx, u, token); err != nil {
		return err
	}
	return b.after()
}

func (b *breaking) remove(ctx context.Context, name, token string) error {
	if err := b.before(); err != nil {
		return err
	}
	if err := b.store.remove(ctx, name, token); err != nil {
		return err
	}
	return b.after()
}

// Memory is a destination in memory, which is fast enough for tests that publish many times.
type Memory struct {
	objects map[string][]byte
	state   int
	states  map[string]string // the token of each object's state, by name
}

// NewMemory returns an empty Memory. It is not safe for concurrent use.
func NewMemory() *Memory {
	return &Memory{objects: map[string][]byte{}, states: map[string]string{}}
}

// Bucket returns the Memory as a destination.
func (m *Memory) Bucket() *Bucket { return &Bucket{m} }

// Content returns every object by name.
func (m *Memory) Content() map[string]string {
	all := map[string]string{}
	for name, data := range m.objects {
		all[name] = string(data)
	}
	return all
}

func (m *Memory) stat(_ context.Context, name string) (attrs, bool, error) {
	data, ok := m.objects[name]
	return attrs{size: int64(len(data))}, ok, nil
}

func (m *Memory) open(_ context.Context, name string) (io.ReadCloser, string, error) {
	data, ok := m.objects[name]
	if !ok {
		return nil, "", errAbsent
	}
	return io.NopCloser(bytes.NewReader(data)), m.states[name], nil
}

func (m *Memory) create(ctx context.Context, u upload) error {
	if _, ok := m.objects[u.name]; ok {
		return errExists
	}
	return m.replace(ctx, u, "")
}

func (m *Memory) replace(_ context.Context, u upload, token string) error {
	if m.states[u.name] != token {
		return errChanged
	}
	rc, err := u.open()
	if err != nil {
		return err
	}
	defer rc.Close()
	data, err := io.ReadAll(rc)
	if err != nil {
		return err
	}
	m.state++
	m.objects[u.name], m.states[u.name] = data, strconv.Itoa(m.state)
	return nil
}

func (m *Memory) remove(_ context.Context, name, token string) error {
	if m.states[name] != token {
		return errChanged
	}
	delete(m.objects, name)
	delete(m.states, name)
	return nil
}

func (m *Memory) url(name string) string { return "memory:" + name }
func (m *Memory) close() error           { return nil }
