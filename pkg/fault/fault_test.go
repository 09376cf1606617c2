package fault_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"syscall"
	"testing"

	"github.com/prebake/prebake/pkg/fault"
)

func TestTable(t *testing.T) {
	t.Parallel()
	names, exits := map[string]bool{}, map[int]bool{}
	for _, k := range fault.Kinds() {
		if k.String() == "" || k.What() == "" || k.ExitCode() <= 0 || k.ExitCode() >= 126 || k.HTTPStatus() < 400 {
			t.Errorf("kind %d has an incomplete row: %q exit %d http %d", k, k, k.ExitCode(), k.HTTPStatus())
		}
		if names[k.String()] || exits[k.ExitCode()] {
			t.Errorf("kind %v shares its name or exit code %d with another", k, k.ExitCode())
		}
		names[k.String()], exits[k.ExitCode()] = true, true
		if got, err := fault.Parse(k.String()); err != nil || got != k {
			t.Errorf("Parse(%q) = %v, %v; want %v", k.String(), got, err, k)
		}
	}
	if _, err := fault.Parse("nonsense"); err == nil {
		t.Error("Parse(nonsense) succeeded; want an error")
	}
}

func TestDisk(t *testing.T) {
	t.Parallel()
	for _, cause := range []error{syscall.ENOSPC, syscall.EDQUOT} {
		err := fault.Disk(fmt.Errorf("write: %w", cause), "free space")
		if fault.Of(err) != fault.DiskFull || fault.Hint(err) != "free space" || !errors.Is(err, cause) {
			t.Errorf("Disk(%v) = %v (%v, %q); want disk-full with its hint", cause, err, fault.Of(err), fault.Hint(err))
		}
	}
	for name, disk := range map[string]func(error) error{"cache": fault.CacheDisk, "TMPDIR": fault.TempDisk} {
		if err := disk(syscall.ENOSPC); fault.Of(err) != fault.DiskFull || !strings.Contains(fault.Hint(err), name) {
			t.Errorf("full disk of the folder of %s: %v, hint %q; want disk-full with a hint that names it", name, err,
				fault.Hint(err))
		}
	}
	for _, other := range []error{nil, syscall.EIO, fault.New(fault.Busy, "lock", "")} {
		if got := fault.Disk(other, "free space"); got != other { //nolint:errorlint // the very same value
			t.Errorf("Disk(%v) = %v; want it unchanged", other, got)
		}
	}
}

func TestJoin(t *testing.T) {
	t.Parallel()
	first, second, third := errors.New("first"), fault.New(fault.Busy, "second", "wait"), errors.New("third")
	err := fault.Join(nil, first, nil, second, third)
	if err == nil || err.Error() != "first; second; third" || fault.Of(err) != fault.Busy || fault.Hint(err) != "wait" {
		t.Errorf("Join = %v (%v, %q); want the three errors in one line", err, fault.Of(err), fault.Hint(err))
	}
	for _, one := range []error{first, second, third} {
		if !errors.Is(err, one) {
			t.Errorf("Join = %v; want that it wraps %v", err, one)
		}
	}
	if got := fault.Join(nil, second); got != second { //nolint:errorlint // the very same value
		t.Errorf("Join(nil, err) = %v; want err unchanged", got)
	}
	if err := fault.Join(nil, nil); err != nil {
		t.Errorf("Join(nil, nil) = %v; want nil", err)
	}
}

func TestOfAndHint(t *testing.T) {
	t.Parallel()
	inner := fault.New(fault.Checksum, "sha256 differs", "fetch it again")
	outer := fault.Wrap(fault.InputMissing, fmt.Errorf("headers: %w", inner), "")
	rows := []struct {
		name string
		err  error
		kind fault.Kind
		hint string
	}{
		{"plain", errors.New("x"), fault.Internal, ""},
		{"classified", inner, fault.Checksum, "fetch it again"},
		{"wrapped by text", fmt.Errorf("build: %w", inner), fault.Checksum, "fetch it again"},
		{"outermost kind, first hint", outer, fault.InputMissing, "fetch it again"},
		{"cancelled", fmt.Errorf("x: %w", context.Canceled), fault.Cancelled, ""},
		{"deadline", context.DeadlineExceeded, fault.TimedOut, ""},
		{"formatted", fault.Errorf(fault.Busy, "lock: %w", inner), fault.Busy, "fetch it again"},
	}
	for _, row := range rows {
		if got := fault.Of(row.err); got != row.kind {
			t.Errorf("%s: Of = %v; want %v", row.name, got, row.kind)
		}
		if got := fault.Hint(row.err); got != row.hint {
			t.Errorf("%s: Hint = %q; want %q", row.name, got, row.hint)
		}
	}
	if fault.Wrap(fault.Busy, nil, "x") != nil {
		t.Error("Wrap(nil) is not nil")
	}
}
