// Package kube reports the state of one node's driver to its cluster: by labels, annotations, a condition and Events.
// It also removes the node's startup taint. It never touches another node, or fields that it did not write. No other
// work waits for these reports.
package kube

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/prebake/prebake/pkg/fault"
)

// AccountDir is the folder with the token and the certificate authority of a pod's service account (Kubernetes
// documentation, "Accessing the Kubernetes API from a Pod").
const AccountDir = "/var/run/secrets/kubernetes.io/serviceaccount"

// callTime is the maximum time of one call to the API server.
const callTime = 20 * time.Second

// maxAnswer is the maximum size in bytes of a response of the API server. A node object has some hundred kilobytes.
const maxAnswer = 8 << 20

// client calls an API server as the service account of a pod.
type client struct {
	base  string
	http  *http.Client
	token string // the token file, read for each call because kubelet renews it
}

// inCluster returns a client for the pod in which this program runs.
func inCluster(dir string) (*client, error) {
	host, port := os.Getenv("KUBERNETES_SERVICE_HOST"), os.Getenv("KUBERNETES_SERVICE_PORT")
	token := filepath.Join(dir, "token")
	if _, err := os.Stat(token); host == "" || port == "" || err != nil {
		return nil, fault.New(fault.Usage, "--node-name needs a pod with a service account",
			"set automountServiceAccountToken: true in the pod's spec; outside of a cluster, remove --node-name")
	}
	pem, err := os.ReadFile(filepath.Join(dir, "ca.crt"))
	if err != nil {
		return nil, fmt.Errorf("read the cluster's certificate authority: %w", err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(pem) {
		return nil, fault.New(fault.Usage, "read the cluster's certificate authority: the file ca.crt has no certificate", "")
	}
	transport := &http.Transport{ // no proxy, because the API server is inside the cluster
		TLSClientConfig: &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}, ForceAttemptHTTP2: true,
		IdleConnTimeout: 90 * time.Second, TLSHandshakeTimeout: 10 * time.Second,
	}
	return &client{base: "https://" + net.JoinHostPort(host, port),
		http: &http.Client{Transport: transport, Timeout: callTime}, token: token}, nil
}

// statusError is a response of the API server with a status other than 2xx.
type statusError struct {
	what, message string
	code          int
}

func (e *statusError) Error() string {
	return fmt.Sprintf("%s: HTTP %d: %s", e.what, e.code, e.message)
}

// isDenied reports whether the service account lacks the right for the call.
func isDenied(err error) bool {
	var s *statusError
	return errors.As(err, &s) && (s.code == http.StatusForbidden || s.code == http.StatusUnauthorized)
}

// isConflict reports whether an object has changed since it was read.
func isConflict(err error) bool {
	var s *statusError
	return errors.As(err, &s) && s.code == http.StatusConflict
}

// isRefused reports whether the cluster does not allow the call. An admission policy refuses with status 422, unless it
// sets another reason (Kubernetes documentation, "Validating Admission Policy").
func isRefused(err error) bool {
	var s *statusError
	return isDenied(err) || errors.As(err, &s) && s.code == http.StatusUnprocessableEntity
}

// These are the content types of requests and patches (Kubernetes documentation, "API Concepts").
const (
	mergePatch     = "application/merge-patch+json"
	strategicPatch = "application/strategic-merge-patch+json"
	plain          = "application/json"
	// metadataOnly is the content type of a response with only the metadata of an object.
	metadataOnly = plain + ";as=PartialObjectMetadata;g=meta.k8s.io;v=v1"
)

// fieldManager is the name under which the API server records this program's changes.
const fieldManager = "prebake-fetcher"

// call sends a request to the API server, with an optional body of the given content type (kind). Without a body, kind
// is the content type of the response; "" means JSON. call decodes the response into out, unless out is nil.
func (c *client) call(ctx context.Context, method, path, kind string, in, out any) error {
	what := strings.ToLower(method) + " " + path
	token, err := os.ReadFile(c.token)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%s: %w", what, err)
	}
	var body io.Reader
	target := c.base + path
	if in != nil {
		raw, err := json.Marshal(in)
		if err != nil {
			return fmt.Errorf("%s: %w", what, err)
		}
		body = bytes.NewReader(raw)
		target += "?" + url.Values{"fieldManager": {fieldManager}}.Encode()
	}
	req, err := http.NewRequestWithContext(ctx, method, target, body)
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	req.Header.Set("Authorization", "Bearer "+strings.TrimSpace(string(token)))
	req.Header.Set("Accept", plain)
	if in == nil && kind != "" {
		req.Header.Set("Accept", kind)
	}
	req.Header.Set("User-Agent", fieldManager)
	if in != nil {
		req.Header.Set("Content-Type", kind)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	switch {
	case err != nil:
		return fmt.Errorf("%s: %w", what, err)
	case len(raw) > maxAnswer:
		return fmt.Errorf("%s: the response has more than %d bytes", what, maxAnswer)
	case resp.StatusCode/100 != 2:
		var status struct {
			Message string `json:"message"`
		}
		if json.Unmarshal(raw, &status) != nil || status.Message == "" {
			status.Message = string(raw[:min(len(raw), 200)])
		}
		return &statusError{what, status.Message, resp.StatusCode}
	case out == nil:
		return nil
	}
	if err := json.Unmarshal(raw, out); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return nil
}
