// Package cluster runs a real kube-apiserver with etcd for one test. It cannot run pods: it has no kubelet, no
// scheduler and no controller. Only test files import the package.
package cluster

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// Env is the environment variable with the folder of kube-apiserver and kubectl. deploy/kubernetes.sh prints that
// folder. If the variable is not set, tests that need the programs are skipped.
const Env = "PREBAKE_KUBERNETES"

// Cluster is a running API server.
type Cluster struct {
	t testing.TB
	// Host and Port are the address of the API server.
	Host, Port string
	// CA is the self-signed certificate of the API server, in PEM. Clients verify connections with it.
	CA []byte

	dir, bin, admin string
	http            *http.Client
}

// Start runs an empty cluster until the test ends.
func Start(t testing.TB) *Cluster {
	t.Helper()
	bin := os.Getenv(Env)
	if bin == "" {
		t.Skipf("%s is not set: want the folder that deploy/kubernetes.sh prints", Env)
	}
	c := &Cluster{t: t, Host: "127.0.0.1", dir: t.TempDir(), bin: bin, admin: rand.Text()}
	ports := freePorts(t, 3)
	c.Port = ports[2]
	c.write("tokens.csv", c.admin+",admin,admin,system:masters\n")
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	c.write("accounts.key", string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})))
	etcd := "http://127.0.0.1:" + ports[0]
	c.run("etcd", "etcd", "--data-dir", filepath.Join(c.dir, "etcd"), "--listen-client-urls", etcd,
		"--advertise-client-urls", etcd,
		"--listen-peer-urls", "http://127.0.0.1:"+ports[1], "--unsafe-no-fsync", "--log-level", "error")
	c.run("kube-apiserver", filepath.Join(bin, "kube-apiserver"), "--etcd-servers", etcd, "--secure-port", c.Port,
		"--bind-address", c.Host,
		"--cert-dir", filepath.Join(c.dir, "certs"), "--token-auth-file", filepath.Join(c.dir, "tokens.csv"),
		"--authorization-mode", "Node,RBAC",
		"--service-account-issuer", "https://cluster.test", "--service-account-key-file",
		filepath.Join(c.dir, "accounts.key"),
		"--service-account-signing-key-file", filepath.Join(c.dir, "accounts.key"), "--service-cluster-ip-range",
		"10.0.0.0/24", "--allow-privileged")
	c.waitReady()
	// In a real cluster, a controller makes this service account in each namespace. Here no controller runs.
	c.Must(http.MethodPost, "/api/v1/namespaces/default/serviceaccounts",
		map[string]any{"metadata": map[string]any{"name": "default"}}, nil)
	return c
}

func (c *Cluster) write(name, text string) {
	c.t.Helper()
	if err := os.WriteFile(filepath.Join(c.dir, name), []byte(text), 0o600); err != nil {
		c.t.Fatal(err)
	}
}

// freePorts returns n ports on which nothing was listening a moment ago.
func freePorts(t testing.TB, n int) (ports []string) {
	t.Helper()
	for range n {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		_, port, _ := net.SplitHostPort(l.Addr().String())
		ports = append(ports, port)
	}
	return ports
}

// run starts a program, and stops it at the end of the test. A failed test logs the end of the program's output.
func (c *Cluster) run(name string, argv ...string) {
	c.t.Helper()
	var said bytes.Buffer
	ctx, cancel := context.WithCancel(context.Background())
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Stdout, cmd.Stderr = &said, &said
	if err := cmd.Start(); err != nil {
		cancel()
		c.t.Fatalf("start %s: %v", name, err)
	}
	c.t.Cleanup(func() {
		cancel()
		_ = cmd.Wait() // the error says only that cancel killed the program
		if c.t.Failed() {
			text := said.Bytes()
			c.t.Logf("%s said: %s", name, text[max(0, len(text)-4000):])
		}
	})
}

// waitReady waits until the API server reports that it is ready.
func (c *Cluster) waitReady() {
	c.t.Helper()
	end := time.Now().Add(3 * time.Minute)
	for {
		ca, err := os.ReadFile(filepath.Join(c.dir, "certs", "apiserver.crt")) // a self-signed certificate
		if err == nil {
			roots := x509.NewCertPool()
			roots.AppendCertsFromPEM(ca)
			c.CA, c.http = ca, &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots,
				MinVersion: tls.VersionTLS12}}}
			if _, err = c.Do(http.MethodGet, "/readyz", nil); err == nil {
				if _, err = c.Do(http.MethodGet, "/api/v1/namespaces/default", nil); err == nil {
					return
				}
			}
		}
		if time.Now().After(end) {
			c.t.Fatalf("the API server is not ready: %v", err)
		}
		time.Sleep(200 * time.Millisecond)
	}
}

// Do calls the API as its administrator, and returns the body of the response.
func (c *Cluster) Do(method, path string, in any) ([]byte, error) {
	return c.as(c.admin, method, path, in)
}

func (c *Cluster) as(token, method, path string, in any) ([]byte, error) {
	var body io.Reader
	if in != nil {
		raw, err := json.Marshal(in)
		if err != nil {
			return nil, err
		}
		body = bytes.NewReader(raw)
	}
	req, err := http.NewRequestWithContext(c.t.Context(), method, "https://"+net.JoinHostPort(c.Host, c.Port)+path, body)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Authorization", "Bearer "+token)
	req.Header.Set("Content-Type", "application/json")
	if method == http.MethodPatch {
		req.Header.Set("Content-Type", "application/merge-patch+json")
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode/100 != 2 {
		err = fmt.Errorf("%s %s: HTTP %d: %s", method, path, resp.StatusCode, raw)
	}
	return raw, err
}

// Must is like Do, but decodes the response into out, and fails the test if there is an error.
func (c *Cluster) Must(method, path string, in, out any) {
	c.t.Helper()
	raw, err := c.Do(method, path, in)
	if err == nil && out != nil {
		err = json.Unmarshal(raw, out)
	}
	if err != nil {
		c.t.Fatal(err)
	}
}

// As returns a function that calls the API with a token, and returns the error of the call.
func (c *Cluster) As(token string) func(method, path string, in any) error {
	return func(method, path string, in any) error {
		_, err := c.as(token, method, path, in)
		return err
	}
}

// Kubectl runs kubectl as the administrator, and returns its output.
func (c *Cluster) Kubectl(stdin string, args ...string) (string, error) {
	ca := filepath.Join(c.dir, "ca.crt")
	if err := os.WriteFile(ca, c.CA, 0o600); err != nil {
		return "", err
	}
	cmd := exec.CommandContext(c.t.Context(), filepath.Join(c.bin, "kubectl"), append([]string{
		"--server", "https://" + net.JoinHostPort(c.Host, c.Port), "--certificate-authority", ca, "--token", c.admin},
		args...)...)
	cmd.Env = []string{"HOME=" + c.dir, "PATH=" + os.Getenv("PATH"), "KUBECONFIG=/dev/null"}
	cmd.Stdin = strings.NewReader(stdin)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return stdout.String(), fmt.Errorf("kubectl %s: %w: %s", strings.Join(args, " "), err, stderr.String())
	}
	return stdout.String() + stderr.String(), nil
}

// Environ returns the environment for a script. In this environment, kubectl is the administrator of this cluster.
func (c *Cluster) Environ() []string {
	c.t.Helper()
	c.write("ca.crt", string(c.CA))
	c.write("admin.conf", fmt.Sprintf(`apiVersion: v1
kind: Config
current-context: admin
contexts: [{name: admin, context: {cluster: here, user: admin}}]
clusters: [{name: here, cluster: {server: "https://%s", certificate-authority: %q}}]
users: [{name: admin, user: {token: %q}}]
`, net.JoinHostPort(c.Host, c.Port), filepath.Join(c.dir, "ca.crt"), c.admin))
	return []string{"HOME=" + c.dir, "PATH=" + c.bin + ":" + os.Getenv("PATH"),
		"KUBECONFIG=" + filepath.Join(c.dir, "admin.conf")}
}

// Account makes a pod that uses a service account and runs on a node. The node must exist. Account returns a token like
// the one that kubelet gives to the pod.
func (c *Cluster) Account(namespace, account, node string) string {
	c.t.Helper()
	pod := "pod-" + strings.ToLower(rand.Text())
	var made struct{ Metadata struct{ UID string } }
	c.Must(http.MethodPost, "/api/v1/namespaces/"+namespace+"/pods", map[string]any{
		"metadata": map[string]any{"name": pod},
		"spec": map[string]any{"serviceAccountName": account, "nodeName": node,
			"containers": []any{map[string]any{"name": "c", "image": "none"}}},
	}, &made)
	var token struct{ Status struct{ Token string } }
	c.Must(http.MethodPost, "/api/v1/namespaces/"+namespace+"/serviceaccounts/"+account+"/token", map[string]any{
		"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest",
		"spec": map[string]any{"boundObjectRef": map[string]any{"apiVersion": "v1", "kind": "Pod", "name": pod,
			"uid": made.Metadata.UID}},
	}, &token)
	if token.Status.Token == "" {
		c.t.Fatal(errors.New("the API server gave no token"))
	}
	return token.Status.Token
}
