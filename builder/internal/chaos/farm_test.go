package chaos_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/prebake/prebake/pkg/api"
)

const token = "token-of-the-chaos-run"

// farm has the processes of a farm, which the test can kill.
type farm struct {
	dir      string
	url      string // of the server
	queue    string
	client   *api.Client
	server   *process
	postgres *process // nil with SQLite
	builders []*process
	disks    []string // folders of small file systems; the base name is the name of its program, such as builder-3
	phase    time.Duration
	started  int // number of builders started so far
}

// newFarm starts the server with a database, and the builders.
func newFarm(t *testing.T, server, database string, builders int, phase time.Duration) *farm {
	t.Helper()
	f := &farm{dir: t.TempDir(), phase: phase}
	address := freeAddress(t)
	f.url = "http://" + address
	f.client = api.NewClient(f.url, token, nil)
	data := f.disk(t, "server", "128")
	args := []string{"serve", "--listen", address, "--data", filepath.Join(data, "data"), "--token", token, "--reserve",
		"4"}
	f.queue = "sqlite://" + filepath.Join(data, "data", "queue.db")
	if database == "postgres" {
		f.queue = f.startPostgres(t)
		args = append(args, "--database", f.queue)
	}
	f.server = launch(t, f.dir, "server", func() *exec.Cmd { return exec.Command(server, args...) })
	f.waitForServer(t)
	for range builders {
		f.startBuilder(t)
	}
	return f
}

func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// disk makes a folder on a small file system of its own, which the test can fill. Without root rights, the folder is on
// the common file system.
func (f *farm) disk(t *testing.T, name, size string) string {
	t.Helper()
	dir := filepath.Join(f.dir, name)
	if smallDisk(t, dir, size) {
		f.disks = append(f.disks, dir)
	}
	return dir
}

// waitForServer returns when the server answers.
func (f *farm) waitForServer(t *testing.T) {
	t.Helper()
	for end := time.Now().Add(time.Minute); ; time.Sleep(100 * time.Millisecond) {
		_, err := f.client.Builds(t.Context(), api.Queued)
		if err == nil {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("the server does not answer: %v", err)
		}
	}
}

// startBuilder starts one more builder with its own name and folder.
func (f *farm) startBuilder(t *testing.T) {
	t.Helper()
	f.started++
	id := "builder-" + strconv.Itoa(f.started)
	b := builder{ID: id, Queue: f.queue, Server: f.url, Token: token, Events: f.dir, Phase: f.phase,
		State: filepath.Join(f.disk(t, id, "8"), "state")}
	text, err := json.Marshal(b)
	if err != nil {
		t.Fatal(err)
	}
	f.builders = append(f.builders, launch(t, f.dir, id, func() *exec.Cmd {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), asBuilder+"="+string(text))
		return cmd
	}))
}

// startPostgres starts a PostgreSQL server for this farm, and returns its URL.
func (f *farm) startPostgres(t *testing.T) string {
	t.Helper()
	found, err := filepath.Glob("/usr/lib/postgresql/*/bin/initdb")
	if err != nil || len(found) == 0 {
		t.Fatalf("PostgreSQL is not installed: make setup installs it (deploy/setup.sh); %v", err)
	}
	bin := filepath.Dir(found[len(found)-1])
	// t.TempDir does not suit the socket: its path may have more than the 107 bytes that a socket's path can have, and
	// PostgreSQL's user cannot enter the folder.
	socket, err := os.MkdirTemp("", "prebake-chaos-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(socket); err != nil {
			t.Error(err)
		}
	})
	disk := filepath.Join(socket, "PostgreSQL")
	if smallDisk(t, disk, "192") {
		f.disks = append(f.disks, disk)
	}
	as, err := postgresUser(socket, disk)
	if err != nil {
		t.Fatal(err)
	}
	data := filepath.Join(disk, "data")
	command := func(program string, args ...string) *exec.Cmd {
		cmd := exec.Command(filepath.Join(bin, program), args...)
		cmd.Dir = socket
		cmd.Env = append(os.Environ(), "LC_ALL=C.UTF-8")
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: as}
		return cmd
	}
	out, err := command("initdb", "-D", data, "-U", "prebake", "-A", "trust", "-E", "UTF8", "--no-sync",
		"--wal-segsize=1").CombinedOutput()
	if err != nil {
		t.Fatalf("initdb: %v\n%s", err, out)
	}
	// fsync can be off: a killed process loses nothing that it wrote, because the kernel keeps running.
	f.postgres = launch(t, f.dir, "postgres", func() *exec.Cmd {
		return command("postgres", "-D", data, "-c", "listen_addresses=", "-c", "unix_socket_directories="+socket,
			"-c", "fsync=off", "-c", "min_wal_size=2MB", "-c", "max_wal_size=32MB", "-c", "max_connections=60")
	})
	return "postgres://prebake@/postgres?host=" + socket
}

// postgresUser returns a user for PostgreSQL, which refuses to run as root, and makes it the owner of the given
// folders. If the test does not run as root, postgresUser returns nil.
func postgresUser(folders ...string) (*syscall.Credential, error) {
	if os.Geteuid() != 0 {
		return nil, nil
	}
	u, err := user.Lookup("postgres")
	if err != nil {
		return nil, err
	}
	uid, err := strconv.ParseUint(u.Uid, 10, 32)
	gid, gerr := strconv.ParseUint(u.Gid, 10, 32)
	if err = errors.Join(err, gerr); err != nil {
		return nil, fmt.Errorf("user postgres: %w", err)
	}
	for _, folder := range folders {
		if err := os.Chown(folder, int(uid), int(gid)); err != nil {
			return nil, err
		}
	}
	return &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}, nil
}

// drop removes a builder from the list, so that the test does not use this builder any more.
func (f *farm) drop(p *process) {
	f.builders = slices.DeleteFunc(f.builders, func(b *process) bool { return b == p })
	f.disks = slices.DeleteFunc(f.disks, func(dir string) bool { return filepath.Base(dir) == p.name })
}

// disksOf returns the small file systems of one part of the farm: "server", "PostgreSQL" or "builder".
func (f *farm) disksOf(part string) (dirs []string) {
	for _, dir := range f.disks {
		if name, _, _ := strings.Cut(filepath.Base(dir), "-"); name == part {
			dirs = append(dirs, dir)
		}
	}
	return dirs
}
