package cosbucket_test

import (
	"bytes"
	"crypto/md5"
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/pkg/cosbucket"
	"github.com/prebake/prebake/pkg/fault"
)

// mirror is a web server that sends the same checksums as Google's. Its fields say how it fails.
type mirror struct {
	objects map[string]string
	sums    map[string]string // for some objects, other bytes, whose checksums the mirror sends
	down    bool
	cut     int // break each response after this many bytes; 0 means never

	mu     sync.Mutex
	ranges []string
}

func (m *mirror) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	name := strings.TrimPrefix(r.URL.Path, "/")
	m.mu.Lock()
	m.ranges = append(m.ranges, name+" "+r.Header.Get("Range"))
	m.mu.Unlock()
	text, ok := m.objects[name]
	switch {
	case m.down:
		http.Error(w, "down", http.StatusBadGateway)
		return
	case !ok:
		http.NotFound(w, r)
		return
	}
	of := text
	if other, ok := m.sums[name]; ok {
		of = other
	}
	sum := md5.Sum([]byte(of))
	crc := binary.BigEndian.AppendUint32(nil, crc32.Checksum([]byte(of), crc32.MakeTable(crc32.Castagnoli)))
	w.Header().Set("X-Goog-Hash",
		"crc32c="+base64.StdEncoding.EncodeToString(crc)+",md5="+base64.StdEncoding.EncodeToString(sum[:]))
	w.Header().Set("Etag", fmt.Sprintf(`"%x"`, sum))
	if m.cut > 0 {
		w = &cutter{w, m.cut}
	}
	http.ServeContent(w, r, name, time.Time{}, strings.NewReader(text))
}

// cutter breaks the connection after it has written left bytes.
type cutter struct {
	http.ResponseWriter
	left int
}

func (c *cutter) Write(p []byte) (int, error) {
	n, err := c.ResponseWriter.Write(p[:min(len(p), c.left)])
	if c.left -= n; c.left == 0 && err == nil {
		_ = http.NewResponseController(c.ResponseWriter).Flush() // the bytes before the break must arrive
		panic(http.ErrAbortHandler)
	}
	return n, err
}

func (m *mirror) start(t *testing.T) string {
	t.Helper()
	s := httptest.NewServer(m)
	t.Cleanup(s.Close)
	return s.URL
}

func (m *mirror) asked() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return append([]string(nil), m.ranges...)
}

var long = strings.Repeat("0123456789abcdef", 1000)

func TestMirrors(t *testing.T) {
	t.Parallel()
	whole := map[string]string{"a": long, "b": "b\n"}
	rows := []struct {
		name          string
		first, second *mirror
		want          string // content of object a
		kind          fault.Kind
		secondAsked   bool
	}{
		{name: "the first has it", first: &mirror{objects: whole}, second: &mirror{objects: whole}, want: long},
		{name: "the first is down", first: &mirror{down: true}, second: &mirror{objects: whole}, want: long,
			secondAsked: true},
		{name: "both are down", first: &mirror{down: true}, second: &mirror{down: true}, kind: fault.Transient,
			secondAsked: true},
		{name: "what the first lacks does not exist", first: &mirror{}, second: &mirror{objects: whole},
			kind: fault.InputMissing},
		{name: "what is damaged at the first stays an error",
			first: &mirror{objects: map[string]string{"a": "damage"}, sums: whole}, second: &mirror{objects: whole},
			kind: fault.Checksum},
		{name: "breaks, and goes on there", first: &mirror{objects: whole, cut: 6000}, second: &mirror{objects: whole},
			want: long},
		{name: "breaks for good, and goes on at the second", first: &mirror{objects: whole, cut: 500},
			second: &mirror{objects: whole}, want: long, secondAsked: true},
		{name: "breaks for good, and the second has another object", first: &mirror{objects: whole, cut: 500},
			second: &mirror{objects: map[string]string{"a": "x" + long[1:]}}, kind: fault.Checksum, secondAsked: true},
		{name: "breaks for good, and the second's is damaged", first: &mirror{objects: whole, cut: 500},
			second: &mirror{objects: map[string]string{"a": long[:len(long)-1] + "x"}, sums: whole}, kind: fault.Checksum,
			secondAsked: true},
		{name: "breaks for good at both", first: &mirror{objects: whole, cut: 100}, second: &mirror{objects: whole, cut: 100},
			kind: fault.Transient, secondAsked: true},
	}
	for _, r := range rows {
		t.Run(r.name, func(t *testing.T) {
			t.Parallel()
			one, two := r.first.start(t), r.second.start(t)
			b := openQuick(t, one+","+two)
			text, err := b.ReadSmall(t.Context(), "a", 1<<20)
			if r.want != "" && (err != nil || string(text) != r.want) || r.want == "" && !fault.Is(err, r.kind) {
				t.Errorf("ReadSmall = %d bytes, %v; want %d, %v", len(text), err, len(r.want), r.kind)
			}
			if err != nil && fault.Hint(err) == "" {
				t.Errorf("ReadSmall = %v without a hint", err)
			}
			if asked := len(r.second.asked()) > 0; asked != r.secondAsked {
				t.Errorf("second mirror asked %t; want %t", asked, r.secondAsked)
			}
		})
	}
}

// TestMirrorStays has a first mirror that is down. After the client has read from the second mirror, it must ask the
// second mirror first.
func TestMirrorStays(t *testing.T) {
	t.Parallel()
	down, up := &mirror{down: true}, &mirror{objects: map[string]string{"a": "a\n", "b": "b\n"}}
	one, two := down.start(t), up.start(t)
	b := openQuick(t, one+", "+two)
	for _, name := range []string{"a", "b"} {
		r, attrs, err := b.Get(t.Context(), name)
		if err != nil {
			t.Fatal(err)
		}
		if text, err := io.ReadAll(r); err != nil || string(text) != name+"\n" {
			t.Errorf("object %s = %q, %v", name, text, err)
		}
		if err := r.Close(); err != nil {
			t.Error(err)
		}
		if attrs.URL != two+"/"+name {
			t.Errorf("object %s came from %s; want %s", name, attrs.URL, two)
		}
	}
	if diff := cmp.Diff([]string{"a ", "a ", "a ", "a ", "a "}, down.asked()); diff != "" {
		t.Errorf("the mirror that is down was asked for (-want +got)\n%s", diff)
	}
}

// TestMirrorInErrors checks an error about the content of an object. It must have the object's URL on the mirror that
// had the object.
func TestMirrorInErrors(t *testing.T) {
	t.Parallel()
	commit, version := cosbucket.CommitName(kernel47), cosbucket.DefaultVersionName(kernel47)
	up := &mirror{objects: map[string]string{commit: "no commit\n", version: "no version\n"}}
	one, two := (&mirror{down: true}).start(t), up.start(t)
	for name, read := range map[string]func(b *cosbucket.Bucket) error{
		commit:  func(b *cosbucket.Bucket) error { _, err := b.Describe(t.Context(), kernel47); return err },
		version: func(b *cosbucket.Bucket) error { _, err := b.Drivers(t.Context(), kernel47); return err },
	} {
		if err := read(openQuick(t, one+","+two)); err == nil || !strings.Contains(err.Error(), "read "+two+"/"+name) {
			t.Errorf("error about %s is %v; want the URL below %s in it", name, err, two)
		}
	}
}

// TestResumption checks that a resumed download requests only the missing bytes.
func TestResumption(t *testing.T) {
	t.Parallel()
	m := &mirror{objects: map[string]string{"a": long}, cut: 6000}
	b := openQuick(t, m.start(t))
	text, err := b.ReadSmall(t.Context(), "a", 1<<20)
	if err != nil || !bytes.Equal(text, []byte(long)) {
		t.Fatalf("ReadSmall = %d bytes, %v; want %d", len(text), err, len(long))
	}
	if diff := cmp.Diff([]string{"a ", "a bytes=6000-", "a bytes=12000-"}, m.asked()); diff != "" {
		t.Errorf("requests (-want +got)\n%s", diff)
	}
}

// TestMirrorThatLists has a web server, which cannot list objects, as the first mirror. The client must list the second
// mirror, and still ask the web server first for objects.
func TestMirrorThatLists(t *testing.T) {
	t.Parallel()
	web := &mirror{objects: objects}
	server := web.start(t)
	b := openQuick(t, server+",file://"+folder(t))
	builds, err := b.Builds(t.Context())
	if err != nil || len(builds) != 3 {
		t.Errorf("Builds = %v, %v; want three", builds, err)
	}
	if _, attrs, err := b.Get(t.Context(), cosbucket.DefaultVersionName(kernel47)); err != nil ||
		!strings.HasPrefix(attrs.URL, server) {
		t.Errorf("Get behind a listing = %s, %v; want it from %s", attrs.URL, err, server)
	}
}

func TestSplit(t *testing.T) {
	t.Parallel()
	for list, want := range map[string][]string{
		"gs://cos-tools":                                  {"gs://cos-tools"},
		"gs://cos-tools-eu, gs://cos-tools":               {"gs://cos-tools-eu", "gs://cos-tools"},
		"file:///srv/a,b,https://host/x,gs://abc,ftp://z": {"file:///srv/a,b", "https://host/x", "gs://abc", "ftp://z"},
		"":  {""},
		",": {","},
	} {
		if diff := cmp.Diff(want, cosbucket.Split(list)); diff != "" {
			t.Errorf("split(%q) (-want +got)\n%s", list, diff)
		}
	}
}
