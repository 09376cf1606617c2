package kmod_test

import (
	"errors"
	"strings"
	"syscall"
	"testing"
	"testing/fstest"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/prebake/prebake/fetcher/internal/kmod"
	"github.com/prebake/prebake/pkg/fault"
)

// system stands in for the kernel. It records the calls, and answers them with errnos.
type system struct {
	insert, remove map[string]error // by the image's text, and by the module's name
	log            []string
	calls          []string
	onInsert       func(image string)
}

func (s *system) InitModule(image []byte, params string) error {
	s.calls = append(s.calls, strings.TrimSpace("init "+string(image)+" "+params))
	if s.onInsert != nil {
		s.onInsert(string(image))
	}
	err := s.insert[string(image)]
	if err != nil {
		s.log = append(s.log, "<3>[   12.500000] "+string(image)+": the kernel's words")
	}
	return err
}

func (s *system) DeleteModule(name string) error {
	s.calls = append(s.calls, "delete "+name)
	return s.remove[name]
}

func (s *system) Log() ([]string, error) { return s.log, nil }

func image(name string) kmod.Image {
	return kmod.Image{Name: name, Version: "535.1.1", Bytes: func() ([]byte, error) { return []byte(name), nil }}
}

func modules(lines string) fstest.MapFS {
	return fstest.MapFS{
		"proc/modules":                  {Data: []byte(lines)},
		"sys/module/nvidia/version":     {Data: []byte("535.1.1\n")},
		"sys/module/nvidia_uvm/version": {Data: []byte("535.1.1\n")},
	}
}

func TestRefusals(t *testing.T) {
	t.Parallel()
	rows := []struct {
		errno syscall.Errno
		kind  fault.Kind
	}{
		{unix.ENODEV, fault.NoDevice}, {unix.ENOEXEC, fault.Rejected}, {unix.ENOENT, fault.Rejected},
		{unix.EINVAL, fault.Rejected},
		{unix.EKEYREJECTED, fault.Rejected}, {unix.ENOKEY, fault.Rejected}, {unix.EBADMSG, fault.Rejected},
		{unix.EPERM, fault.Rejected},
		{unix.EACCES, fault.Rejected}, {unix.EBUSY, fault.Busy}, {unix.EEXIST, fault.Busy}, {unix.ENOMEM, fault.Transient},
		{unix.EIO, fault.Unusable}, {unix.EXDEV, fault.Rejected},
	}
	for _, row := range rows {
		t.Run(row.errno.Error(), func(t *testing.T) {
			t.Parallel()
			s := &system{insert: map[string]error{"nvidia": row.errno}, log: []string{"<6>[    0.000000] old news"}}
			l := &kmod.Loader{System: s, Root: modules("")}
			_, err := l.Load(t.Context(), []kmod.Image{image("nvidia")})
			if !fault.Is(err, row.kind) || !errors.Is(err, row.errno) || fault.Hint(err) == "" {
				t.Errorf("Load = %v (%v, hint %q); want %v, the errno and a hint", err, fault.Of(err), fault.Hint(err), row.kind)
			}
			if err == nil || !strings.Contains(err.Error(), "nvidia: the kernel's words") ||
				strings.Contains(err.Error(), "old news") {
				t.Errorf("Load = %v; want the new kernel line and no other", err)
			}
		})
	}
}

func TestLoad(t *testing.T) {
	t.Parallel()
	optional := image("nvidia-drm")
	optional.Optional = true
	params := image("nvidia")
	params.Params = "NVreg_A=1"
	unread := image("nvidia")
	unread.Bytes = func() ([]byte, error) { return nil, fault.New(fault.Unverified, "changed", "") }
	tampered := unread
	tampered.Name, tampered.Optional = "nvidia-drm", true
	rows := []struct {
		name   string
		lines  string
		images []kmod.Image
		insert map[string]error
		remove map[string]error
		calls  []string
		was    []string
		kind   fault.Kind // Internal means no error
	}{
		{"in order, with parameters", "", []kmod.Image{params, image("nvidia-uvm")}, nil, nil,
			[]string{"init nvidia NVreg_A=1", "init nvidia-uvm"}, []string{kmod.Loaded, kmod.Loaded}, fault.Internal},
		{"hyphen equals underscore", "nvidia_uvm 1 0 - Live\nnvidia 1 1 nvidia_uvm, Live\n",
			[]kmod.Image{image("nvidia"), image("nvidia-uvm")}, nil, nil,
			nil, []string{kmod.Already, kmod.Already}, fault.Internal},
		{"optional one refused", "", []kmod.Image{image("nvidia"), optional}, map[string]error{"nvidia-drm": unix.ENOENT},
			nil,
			[]string{"init nvidia", "init nvidia-drm"}, []string{kmod.Loaded, kmod.Skipped}, fault.Internal},
		{"second one refused, first one goes", "", []kmod.Image{image("nvidia"), image("nvidia-uvm")},
			map[string]error{"nvidia-uvm": unix.EINVAL}, nil,
			[]string{"init nvidia", "init nvidia-uvm", "delete nvidia"}, []string{kmod.Loaded}, fault.Rejected},
		{"one that was there stays", "nvidia 1 0 - Live\n", []kmod.Image{image("nvidia"), image("nvidia-uvm")},
			map[string]error{"nvidia-uvm": unix.EINVAL}, nil,
			[]string{"init nvidia-uvm"}, []string{kmod.Already}, fault.Rejected},
		{"bytes do not hold", "", []kmod.Image{unread}, nil, nil, nil, nil, fault.Unverified},
		{"bytes of an optional one do not hold", "", []kmod.Image{params, tampered}, nil, nil,
			[]string{"init nvidia NVreg_A=1", "delete nvidia"}, []string{kmod.Loaded}, fault.Unverified},
		{"third one refused, the others go in reverse", "",
			[]kmod.Image{image("nvidia"), image("nvidia-uvm"), image("nvidia-modeset")},
			map[string]error{"nvidia-modeset": unix.EINVAL}, nil,
			[]string{"init nvidia", "init nvidia-uvm", "init nvidia-modeset", "delete nvidia_uvm", "delete nvidia"},
			[]string{kmod.Loaded, kmod.Loaded}, fault.Rejected},
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			s := &system{insert: row.insert, remove: row.remove}
			done, err := (&kmod.Loader{System: s, Root: modules(row.lines)}).Load(t.Context(), row.images)
			if row.kind == fault.Internal && err != nil || row.kind != fault.Internal && !fault.Is(err, row.kind) {
				t.Errorf("Load = %v; want %v", err, row.kind)
			}
			var was []string
			for _, o := range done {
				was = append(was, o.Was)
			}
			if diff := cmp.Diff(row.was, was); diff != "" {
				t.Errorf("outcomes (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff(row.calls, s.calls); diff != "" {
				t.Errorf("system calls (-want +got):\n%s", diff)
			}
		})
	}
}

func TestLoadOverAnotherVersion(t *testing.T) {
	t.Parallel()
	root := modules("nvidia 1 0 - Live\n")
	root["sys/module/nvidia/version"].Data = []byte("470.1.1\n")
	s := &system{}
	_, err := (&kmod.Loader{System: s, Root: root}).Load(t.Context(), []kmod.Image{image("nvidia")})
	if !fault.Is(err, fault.Busy) || !strings.Contains(err.Error(), "470.1.1") || len(s.calls) > 0 {
		t.Errorf("Load over another version = %v, calls %v; want busy with that version, and no call", err, s.calls)
	}
}

// TestEEXIST checks a load that fails with EEXIST, because another process loaded the module at the same time. If that
// module has the same version, the load counts as success.
func TestEEXIST(t *testing.T) {
	t.Parallel()
	for version, kind := range map[string]fault.Kind{"535.1.1": fault.Internal, "470.1.1": fault.Busy} {
		root := modules("")
		s := &system{insert: map[string]error{"nvidia": unix.EEXIST}, onInsert: func(string) {
			root["proc/modules"] = &fstest.MapFile{Data: []byte("nvidia 1 0 - Live\n")}
			root["sys/module/nvidia/version"] = &fstest.MapFile{Data: []byte(version + "\n")}
		}}
		l := &kmod.Loader{System: s, Root: root}
		done, err := l.Load(t.Context(), []kmod.Image{image("nvidia")})
		if kind == fault.Internal && (err != nil || done[0].Was != kmod.Already) || kind != fault.Internal &&
			!fault.Is(err, kind) {
			t.Errorf("Load against a racing %s = %v, %v; want kind %v, or already loaded", version, done, err, kind)
		}
	}
	// If the kernel refuses a later module, the module that another process loaded must stay.
	root := modules("")
	s := &system{insert: map[string]error{"nvidia": unix.EEXIST, "nvidia-uvm": unix.EINVAL}, onInsert: func(string) {
		root["proc/modules"] = &fstest.MapFile{Data: []byte("nvidia 1 0 - Live\n")}
	}}
	_, err := (&kmod.Loader{System: s, Root: root}).Load(t.Context(), []kmod.Image{image("nvidia"), image("nvidia-uvm")})
	if diff := cmp.Diff([]string{"init nvidia", "init nvidia-uvm"}, s.calls); diff != "" ||
		!fault.Is(err, fault.Rejected) {
		t.Errorf("Load = %v; want rejected, and nothing unloaded (-want +got):\n%s", err, diff)
	}
}

func TestUnload(t *testing.T) {
	t.Parallel()
	s := &system{remove: map[string]error{"nvidia_uvm": unix.ENOENT, "nvidia": unix.EAGAIN}}
	done, err := (&kmod.Loader{System: s}).Unload(t.Context(), []string{"nvidia-modeset", "nvidia-uvm", "nvidia", "never"})
	if !fault.Is(err, fault.Busy) || fault.Hint(err) == "" {
		t.Errorf("Unload of a module in use = %v; want busy with a hint", err)
	}
	if diff := cmp.Diff([]string{"nvidia-modeset"}, done); diff != "" {
		t.Errorf("unloaded (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]string{"delete nvidia_modeset", "delete nvidia_uvm", "delete nvidia"}, s.calls); diff != "" {
		t.Errorf("system calls (-want +got):\n%s", diff)
	}
}

func TestNVRM(t *testing.T) {
	t.Parallel()
	s := &system{log: []string{"<4>[    1.0] a"}}
	l := &kmod.Loader{System: s}
	mark := l.Mark()
	s.log = append(s.log, "<4>[    2.0] NVRM: one", "<6>[    2.1] other", "[    2.2] NVRM: two",
		"<4>[    3.0] NVRM: three")
	if diff := cmp.Diff([]string{"NVRM: two", "NVRM: three"}, kmod.NVRM(l.Since(mark), 2)); diff != "" {
		t.Errorf("NVRM (-want +got):\n%s", diff)
	}
}

// TestFollow checks which lines of the kernel log are new since a mark. If the kernel log no longer has the marked
// line, all lines are new.
func TestFollow(t *testing.T) {
	t.Parallel()
	s := &system{log: []string{"<4>[    1.0] a"}}
	l := &kmod.Loader{System: s}
	for _, row := range []struct {
		name string
		mark kmod.Mark
		log  []string
		want []string
	}{
		{"no mark", kmod.Mark{}, []string{"<4>[    2.0] b"}, nil},
		{"nothing new", l.Mark(), s.log, nil},
		{"new lines", l.Mark(), append(s.log, "<4>[    2.0] b", "<4>[    3.0] c"), []string{"b", "c"}},
		{"the mark has left the log", l.Mark(), []string{"<4>[    2.0] b", "<4>[    3.0] c"}, []string{"b", "c"}},
		{"an empty log", l.Mark(), nil, nil},
	} {
		s.log = row.log
		got, end := l.Follow(row.mark)
		if diff := cmp.Diff(row.want, got); diff != "" {
			t.Errorf("%s: Follow (-want +got):\n%s", row.name, diff)
		}
		if again, _ := l.Follow(end); len(again) > 0 {
			t.Errorf("%s: Follow from the end = %q; want nothing", row.name, again)
		}
	}
}
