package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// sandboxCommand is like the command with which the builder runs kbuild. It prints 42 if the shell, make, bc and awk
// work.
const sandboxCommand = `bwrap --unshare-all --unshare-user --disable-userns --uid 1000 --gid 1000 --cap-drop ALL ` +
	`--new-session --die-with-parent --ro-bind /usr /usr --symlink usr/bin /bin ` +
	`--symlink usr/lib /lib --symlink usr/lib64 /lib64 --ro-bind /etc/alternatives /etc/alternatives ` +
	`--proc /proc --dev /dev --tmpfs /tmp --remount-ro / make -s -f - <<'END'
all:; @echo 6*7 | bc | awk "{ print \$$1 }"
END`

// checkStarts runs commands in the builder's image, to find out whether a Debian package is missing. copied is a folder
// with skopeo's copy of the image.
func checkStarts(t *testing.T, copied string, layers []v1.Descriptor) {
	t.Helper()
	root := filepath.Join(t.TempDir(), "root")
	if err := os.Mkdir(root, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, l := range layers {
		file := filepath.Join(copied, l.Digest.Hex)
		_, err := output(t.Context(), "", nil, "tar", "--gzip", "--extract", "--directory", root, "--file", file)
		if err != nil {
			t.Fatal(err)
		}
	}
	inside := []string{
		"--bind", root, "/", "--dev-bind", "/proc", "/proc", "--dev-bind", "/dev", "/dev", "--tmpfs", "/tmp", "--clearenv",
		"--setenv", "PATH", "/usr/local/bin:/usr/bin:/bin", "--setenv", "HOME", "/nonexistent",
	}
	if os.Geteuid() == 0 { // root must run the commands as the image's user
		inside = append(inside, "setpriv", "--reuid", "65532", "--regid", "65532", "--clear-groups")
	}
	for name, row := range map[string]struct {
		script string
		want   []string
	}{
		"sandbox": {sandboxCommand, []string{"42\n"}},
		"doctor":  {"builder doctor --cache /tmp/cache 2>&1 || true", []string{"ok    qemu amd64 "}},
		// QEMU's network card needs a boot ROM, which is in a Debian package of its own.
		"qemu": {
			"echo quit | qemu-system-x86_64 -accel tcg -machine q35 -display none -S -netdev user,id=n " +
				"-device virtio-net-pci,netdev=n -monitor stdio",
			[]string{"QEMU 7"},
		},
		"tools": {
			"pahole --version; xz --version; zstd --version; dpkg --status bubblewrap; id -un root; which awk",
			[]string{"liblzma 5", "Status: install ok installed", "\nroot\n", "/usr/bin/awk\n"},
		},
	} {
		out, err := output(t.Context(), "", nil, "bwrap", append(inside, "sh", "-ec", row.script)...)
		for _, want := range row.want {
			if err != nil || !strings.Contains(string(out), want) {
				t.Errorf("%s in the builder's image = %q, %v; want %q", name, out, err, want)
			}
		}
	}
}
