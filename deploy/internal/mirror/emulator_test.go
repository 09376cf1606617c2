package mirror

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/pkg/fault"
)

// TestURIs reads lines of apt-get 2.6.1 for the qemu of the next Debian release (2026-11-29). Only the host is changed.
func TestURIs(t *testing.T) {
	const printed = `'http://deb.example/debian/pool/main/q/qemu/qemu-system-x86_10.0.13%2bds-0%2bdeb13u1_amd64.deb' ` +
		`qemu-system-x86_1%3a10.0.13+ds-0+deb13u1_amd64.deb 10278596 SHA256:00
'http://deb.example/debian/pool/main/g/glibc/libc6_2.41-12%2bdeb13u5_amd64.deb' libc6_2.41-12+deb13u5_amd64.deb ` +
		`2850108 MD5Sum:3cf652965605c5dc915ff47a929bbe84
`
	want := []pkg{{"libc6", "2.41-12+deb13u5"}, {"qemu-system-x86", "1:10.0.13+ds-0+deb13u1"}}
	got, err := parseURIs([]byte(printed))
	if err != nil || !cmp.Equal(got, want) {
		t.Errorf("parseURIs(apt's lines) = %v, %v; want %v", got, err, want)
	}
	for _, bad := range []string{"E: nothing\n", "'http://deb.example/x' x.deb 1\n"} {
		if got, err := parseURIs([]byte(bad)); !fault.Is(err, fault.Unsupported) {
			t.Errorf("parseURIs(%q) = %v, %v; want Unsupported", bad, got, err)
		}
	}
}
