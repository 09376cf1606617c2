package deploy_test

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// stockClients are other projects' clients for registries. deploy/tool.sh builds oras and regctl; the others are Debian
// packages.
var stockClients = []string{"oras", "regctl", "skopeo", "containerd", "ctr"}

// client runs stock programs against a server. Each client has a home folder of its own.
type client struct {
	t    *testing.T
	home string
	host string
}

func newClient(t *testing.T, r runningServer) client {
	t.Helper()
	for _, program := range stockClients {
		if _, err := exec.LookPath(program); err != nil {
			t.Skipf("%s is not on PATH: want %s, see deploy/tool.sh and deploy/setup.sh test", program,
				strings.Join(stockClients, ", "))
		}
	}
	return client{t, t.TempDir(), r.Host}
}

// try runs a program for at most one minute, and returns its stdout. The error of a failed program has all its output.
func (c client) try(input, program string, args ...string) (stdout string, err error) {
	ctx, cancel := context.WithTimeout(c.t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Dir = c.home
	cmd.Env = []string{"HOME=" + c.home, "XDG_RUNTIME_DIR=" + c.home, "PATH=" + os.Getenv("PATH")}
	cmd.Stdin = strings.NewReader(input)
	var out, said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &said
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("%s %s: %w: %s%s", program, strings.Join(args, " "), err, out.String(), said.String())
	}
	return strings.TrimSpace(out.String()), nil
}

func (c client) must(program string, args ...string) string {
	c.t.Helper()
	out, err := c.try("", program, args...)
	if err != nil {
		c.t.Fatal(err)
	}
	return out
}

// login runs a login command with the token as the password. The registry accepts any user name.
func (c client) login(program string, args ...string) {
	c.t.Helper()
	if out, err := c.try(secret+"\n", program, args...); err != nil {
		c.t.Fatalf("%v%s", err, out)
	}
}

// mustFail runs a command that must fail.
func (c client) mustFail(why, program string, args ...string) {
	c.t.Helper()
	if out, err := c.try("", program, args...); err == nil {
		c.t.Errorf("%s %s = %s; want an error: %s", program, strings.Join(args, " "), out, why)
	}
}

// checkDigest checks that ref has the digest want in the registry. "" means that ref must not exist. checkDigest uses
// another library than the clients, and no credentials.
func (c client) checkDigest(ref, want string) {
	c.t.Helper()
	parsed, err := name.ParseReference(c.host+"/"+ref, name.Insecure)
	if err != nil {
		c.t.Fatal(err)
	}
	got := ""
	d, err := remote.Head(parsed, remote.WithContext(c.t.Context()))
	if err == nil {
		got = d.Digest.String()
	} else if !strings.Contains(err.Error(), "404") {
		c.t.Fatal(err)
	}
	if got != want {
		c.t.Errorf("the registry has %q as %s; want %q", got, ref, want)
	}
}

// imageLayout writes an image for two platforms as an OCI layout, with the tag v1. It returns the image's digest.
func imageLayout(t *testing.T, dir string) string {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	index := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	for _, arch := range []string{"amd64", "arm64"} {
		img := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
		img, err := mutate.ConfigFile(img, &v1.ConfigFile{OS: "linux", Architecture: arch, RootFS: v1.RootFS{Type: "layers"}})
		must(err)
		for i := range 2 {
			var layer bytes.Buffer
			content := []byte(fmt.Sprintf("layer %d of %s for %s", i, arch, t.Name()))
			w := tar.NewWriter(&layer)
			must(w.WriteHeader(&tar.Header{Name: fmt.Sprintf("file%d", i), Mode: 0o644, Size: int64(len(content))}))
			_, err = w.Write(content)
			must(errors.Join(err, w.Close()))
			img, err = mutate.AppendLayers(img, static.NewLayer(layer.Bytes(), types.OCIUncompressedLayer))
			must(err)
		}
		index = mutate.AppendManifests(index, mutate.IndexAddendum{Add: img,
			Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: arch}}})
	}
	digest, err := index.Digest()
	must(err)
	folder, err := layout.Write(dir, empty.Index)
	must(err)
	must(folder.AppendIndex(index, layout.WithAnnotations(map[string]string{"org.opencontainers.image.ref.name": "v1"})))
	return digest.String()
}

// TestStockClients checks common clients with the registry. They log in with the token as the password, push, copy
// within the registry, read without a login, and delete.
func TestStockClients(t *testing.T) {
	r := startServer(t)
	t.Run("oras", func(t *testing.T) { orasClient(newClient(t, r)) })
	t.Run("regctl", func(t *testing.T) { regctlClient(newClient(t, r)) })
	t.Run("skopeo", func(t *testing.T) { skopeoClient(newClient(t, r)) })
	if os.Geteuid() == 0 { // only containerd needs root
		t.Run("ctr", func(t *testing.T) { ctrClient(newClient(t, r)) })
	}
}

func orasClient(c client) {
	t := c.t
	repo, other := c.host+"/oras/files", c.host+"/oras/copy"
	if err := os.WriteFile(filepath.Join(c.home, "notes.txt"), []byte("some notes\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	push := []string{"push", "--plain-http", "--artifact-type", "application/vnd.example.notes", repo + ":v1",
		"notes.txt:text/plain"}
	c.mustFail("nobody is logged in", "oras", push...)
	c.mustFail("the password is wrong", "oras", append(push, "-u", "x", "-p", "wrong")...)
	c.login("oras", "login", "--plain-http", "-u", "prebake", "--password-stdin", c.host)
	c.must("oras", push...)
	digest := c.must("oras", "resolve", "--plain-http", repo+":v1")
	c.checkDigest("oras/files:v1", digest)
	c.must("oras", "attach", "--plain-http", "--artifact-type", "application/vnd.example.signature", repo+":v1",
		"--annotation", "is=signed")
	if out := c.must("oras", "discover", "--plain-http", "--format", "json", repo+":v1"); strings.Count(out,
		"application/vnd.example.signature") != 1 {
		t.Errorf("oras discover = %s; want what was attached", out)
	}
	c.must("oras", "cp", "--recursive", "--from-plain-http", "--to-plain-http", repo+":v1", other+":v1,v2")
	c.checkDigest("oras/copy:v2", digest)
	if out := c.must("oras", "discover", "--plain-http", "--format", "json", other+":v2"); strings.Count(out,
		"application/vnd.example.signature") != 1 {
		t.Errorf("oras discover of the copy = %s; want what was attached", out)
	}
	if got := c.must("oras", "repo", "tags", "--plain-http", other); got != "v1\nv2" {
		t.Errorf("oras repo tags = %q; want both", got)
	}
	if got := c.must("oras", "repo", "ls", "--plain-http", c.host+"/oras/"); got != "copy\nfiles" {
		t.Errorf("oras repo ls = %q; want both repositories", got)
	}
	c.must("oras", "logout", c.host)
	c.must("oras", "pull", "--plain-http", "-o", "pulled", other+":v1")
	if text, err := os.ReadFile(filepath.Join(c.home, "pulled", "notes.txt")); err != nil ||
		string(text) != "some notes\n" {
		t.Errorf("oras pull left %q, %v; want the file", text, err)
	}
	c.mustFail("nobody is logged in", "oras", "manifest", "delete", "--plain-http", "--force", other+"@"+digest)
	c.login("oras", "login", "--plain-http", "-u", "prebake", "--password-stdin", c.host)
	c.must("oras", "manifest", "delete", "--plain-http", "--force", other+"@"+digest)
	c.checkDigest("oras/copy:v2", "")
	c.checkDigest("oras/files:v1", digest)
}

func regctlClient(c client) {
	t := c.t
	repo, other := c.host+"/regctl/image", c.host+"/regctl/copy"
	digest := imageLayout(t, filepath.Join(c.home, "layout"))
	c.must("regctl", "registry", "set", "--tls", "disabled", c.host)
	push := []string{"image", "copy", "ocidir://layout:v1", repo + ":v1"}
	c.mustFail("nobody is logged in", "regctl", push...)
	c.login("regctl", "registry", "login", "-u", "prebake", "--pass-stdin", c.host)
	c.must("regctl", push...)
	c.checkDigest("regctl/image:v1", digest)
	c.must("regctl", "image", "copy", repo+":v1", other+":v1")
	c.must("regctl", "image", "copy", repo+":v1", other+":v2")
	c.checkDigest("regctl/copy:v1", digest)
	c.must("regctl", "tag", "delete", other+":v1")
	if got := c.must("regctl", "tag", "ls", other); got != "v2" {
		t.Errorf("regctl tag ls = %q after a deletion; want v2", got)
	}
	c.must("regctl", "registry", "logout", c.host)
	c.must("regctl", "image", "copy", other+":v2", "ocidir://pulled:v2")
	if got := c.must("regctl", "image", "digest", "ocidir://pulled:v2"); got != digest {
		t.Errorf("regctl copied %s; want %s", got, digest)
	}
	c.login("regctl", "registry", "login", "-u", "prebake", "--pass-stdin", c.host)
	c.must("regctl", "manifest", "delete", other+"@"+digest)
	c.checkDigest("regctl/copy:v2", "")
	c.checkDigest("regctl/image:v1", digest)
}

func skopeoClient(c client) {
	t := c.t
	repo, other := "docker://"+c.host+"/skopeo/image", "docker://"+c.host+"/skopeo/copy"
	imageLayout(t, filepath.Join(c.home, "layout"))
	cp := func(from, to string) []string {
		return []string{"--insecure-policy", "copy", "--all", "--digestfile", "digest", "--src-tls-verify=false",
			"--dest-tls-verify=false", from, to}
	}
	c.mustFail("nobody is logged in", "skopeo", cp("oci:layout:v1", repo+":v1")...)
	c.login("skopeo", "login", "--tls-verify=false", "-u", "prebake", "--password-stdin", c.host)
	c.must("skopeo", cp("oci:layout:v1", repo+":v1")...)
	// Debian's skopeo re-encodes an index, which changes its digest.
	said, err := os.ReadFile(filepath.Join(c.home, "digest"))
	if err != nil {
		t.Fatal(err)
	}
	digest := string(said)
	c.checkDigest("skopeo/image:v1", digest)
	c.must("skopeo", cp(repo+":v1", other+":v1")...)
	c.must("skopeo", cp(repo+":v1", other+":v2")...)
	c.checkDigest("skopeo/copy:v2", digest)
	if got := c.must("skopeo", "list-tags", "--tls-verify=false", other); !strings.Contains(got, `"v1"`) ||
		!strings.Contains(got, `"v2"`) {
		t.Errorf("skopeo list-tags = %s; want both", got)
	}
	c.must("skopeo", "logout", c.host)
	c.must("skopeo", cp(other+":v1", "dir:pulled")...)
	c.mustFail("nobody is logged in", "skopeo", "delete", "--tls-verify=false", other+":v1")
	c.login("skopeo", "login", "--tls-verify=false", "-u", "prebake", "--password-stdin", c.host)
	c.must("skopeo", "delete", "--tls-verify=false", other+":v1") // deletes by digest, so both tags disappear
	c.checkDigest("skopeo/copy:v1", "")
	c.checkDigest("skopeo/copy:v2", "")
	c.checkDigest("skopeo/image:v1", digest)
}

// ctrClient tests ctr. ctr cannot delete an image in a registry. Therefore regctl deletes the image, and then ctr must
// not find it.
func ctrClient(c client) {
	t := c.t
	repo, other := c.host+"/ctr/image", c.host+"/ctr/copy"
	digest := imageLayout(t, filepath.Join(c.home, "layout"))
	socket := startContainerd(c)
	ctr := func(args ...string) []string { return append([]string{"--address", socket, "images"}, args...) }
	push := func(ref string, more ...string) []string {
		return ctr(append(append([]string{"push", "--plain-http"}, more...), ref)...)
	}
	c.must("tar", "-C", "layout", "-cf", "layout.tar", ".")
	c.must("ctr", ctr("import", "--all-platforms", "--no-unpack", "--base-name", repo, "layout.tar")...)
	c.mustFail("there are no credentials", "ctr", push(repo+":v1")...)
	c.must("ctr", push(repo+":v1", "--user", "prebake:"+secret)...)
	c.checkDigest("ctr/image:v1", digest)
	c.must("ctr", ctr("tag", repo+":v1", other+":v1")...)
	c.must("ctr", push(other+":v1", "--user", "prebake:"+secret)...)
	c.checkDigest("ctr/copy:v1", digest)
	c.must("ctr", ctr("remove", "--sync", repo+":v1", other+":v1")...)
	pull := ctr("pull", "--plain-http", "--all-platforms", "--snapshotter", "native", other+":v1")
	c.must("ctr", pull...)
	if got := c.must("ctr", ctr("list")...); !strings.Contains(got, digest) {
		t.Errorf("ctr images list = %s; want %s", got, digest)
	}
	c.must("regctl", "registry", "set", "--tls", "disabled", c.host)
	c.login("regctl", "registry", "login", "-u", "prebake", "--pass-stdin", c.host)
	c.must("regctl", "manifest", "delete", other+"@"+digest)
	c.checkDigest("ctr/copy:v1", "")
	c.mustFail("it was deleted", "ctr", pull...)
}

// startContainerd runs a separate containerd until the test ends, and returns the path of its socket.
func startContainerd(c client) string {
	t := c.t
	t.Helper()
	// The path of a socket has at most 107 bytes, and the path of a test's folder may be longer.
	dir, err := os.MkdirTemp("", "prebake-ctr-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) }) // a folder in the system's temporary folder
	socket := filepath.Join(dir, "s")
	file := filepath.Join(dir, "config.toml")
	// The test runs no container. It disables the plugins cri and opt, because they need a network and /opt.
	text := fmt.Sprintf("version = 2\nroot = %q\nstate = %q\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\", "+
		"\"io.containerd.internal.v1.opt\"]\n[grpc]\naddress = %q\n",
		filepath.Join(dir, "root"), filepath.Join(dir, "state"), socket)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	var said bytes.Buffer
	cmd := exec.Command("containerd", "--config", file)
	cmd.Stdout, cmd.Stderr = &said, &said
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		_ = cmd.Wait() // the signal has stopped it
		if t.Failed() {
			t.Logf("containerd said: %s", said.String())
		}
	})
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		_, err := c.try("", "ctr", "--address", socket, "version")
		if err == nil {
			return socket
		}
		if time.Now().After(end) {
			t.Fatalf("containerd does not answer: %v", err)
		}
	}
}
