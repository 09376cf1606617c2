package wire

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestWriteRead(t *testing.T) {
	t.Parallel()
	want := []Event{
		{Type: Hello},
		{Type: Ready, Kernel: "[    0.000000] Linux version 6.1\n"},
		{Type: Begin, Step: 1},
		{Type: Output, Step: 1, Stream: "stdout", Data: []byte{0, '\n', 0xff}},
		{Type: End, Step: 1, Exit: 19, Error: "no such device", Seconds: 1.5},
		{Type: Finished},
	}
	var stream bytes.Buffer
	for _, e := range want {
		if err := Write(&stream, e); err != nil {
			t.Fatal(err)
		}
	}
	stream.WriteString("\r\n{\"type\":\"by") // the machine was switched off in the middle of a line
	var got []Event
	if err := Read(&stream, func(e Event) error { got = append(got, e); return nil }); err != nil {
		t.Fatalf("Read() = %v", err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("Read() (-want +got):\n%s", diff)
	}
}

func TestReadRefuses(t *testing.T) {
	t.Parallel()
	for _, row := range []struct{ name, stream, want string }{
		{"no JSON", "Booting...\n", "invalid character"},
		{"unknown type", `{"type":"shrug"}` + "\n", "the protocol has no event of type"},
		{"negative step", `{"type":"begin","step":-1}` + "\n", "want 0 or more"},
		{"unknown stream", `{"type":"output","stream":"stdnull"}` + "\n", "want stdout or stderr"},
		{"endless line", strings.Repeat("x", MaxLine+1), "the line has more than"},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			err := Read(strings.NewReader(row.stream), func(Event) error { return nil })
			if err == nil || !strings.Contains(err.Error(), row.want) {
				t.Errorf("Read() = %v; want %q in it", err, row.want)
			}
		})
	}
	stop := errors.New("stop")
	if err := Read(strings.NewReader(`{"type":"hello"}`+"\n"), func(Event) error { return stop }); !errors.Is(err, stop) {
		t.Errorf("Read() = %v; want the callback's error", err)
	}
}

func FuzzRead(f *testing.F) {
	f.Add([]byte(`{"type":"hello"}` + "\n"))
	f.Add([]byte(`{"type":"output","step":3,"stream":"stderr","data":"aGVsbG8="}` + "\r\n\n"))
	f.Add([]byte(`{"type":"end","step":0,"exit":1,"seconds":1e999}` + "\n"))
	f.Add([]byte("{}\n"))
	f.Fuzz(func(t *testing.T, stream []byte) {
		if len(stream) > 1<<16 {
			return
		}
		var events []Event
		if Read(bytes.NewReader(stream), func(e Event) error { events = append(events, e); return nil }) != nil {
			return
		}
		var again bytes.Buffer
		for _, e := range events {
			if err := Write(&again, e); err != nil {
				t.Fatal(err)
			}
		}
		var back []Event
		if err := Read(&again, func(e Event) error { back = append(back, e); return nil }); err != nil {
			t.Fatalf("Read(Write()) = %v", err)
		}
		if len(back) != len(events) {
			t.Fatalf("Read(Write()) = %d events; want %d", len(back), len(events))
		}
	})
}
