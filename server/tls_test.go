package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/prebake/prebake/pkg/fault"
)

// writePair writes a key and a self-signed certificate for localhost.
func writePair(t *testing.T, certFile, keyFile, name string) *x509.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), DNSNames: []string{"localhost"},
		IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	err = errors.Join(
		os.WriteFile(keyFile, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: raw}), 0o600),
		os.WriteFile(certFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600),
	)
	cert, perr := x509.ParseCertificate(der)
	if err = errors.Join(err, perr); err != nil {
		t.Fatal(err)
	}
	return cert
}

// TestTLS renews the certificate of a running server. While only one of the two files is new, the server must keep the
// former pair.
func TestTLS(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	certFile, keyFile := filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key")
	first := writePair(t, certFile, keyFile, "first")
	url, _, log := start(t, filepath.Join(dir, "state"), "--tls-cert", certFile, "--tls-key", keyFile)
	if !strings.HasPrefix(url, "https://127.0.0.1:") {
		t.Fatalf("address = %s; want https", url)
	}
	shown := func(trusted *x509.Certificate) string {
		pool := x509.NewCertPool()
		pool.AddCert(trusted)
		c := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool, ServerName: "localhost"},
			DisableKeepAlives: true}}
		resp, err := c.Get(url + "/healthz")
		if err != nil {
			return err.Error()
		}
		defer resp.Body.Close()
		return resp.TLS.PeerCertificates[0].Subject.CommonName
	}
	if got := shown(first); got != "first" {
		t.Fatalf("the server shows %s; want first", got)
	}
	later := time.Now().Add(time.Minute) // file times may have a coarse resolution
	if err := errors.Join(os.WriteFile(certFile, []byte("half"), 0o600), os.Chtimes(certFile, later, later)); err != nil {
		t.Fatal(err)
	}
	time.Sleep(reloadInterval)
	if got := shown(first); got != "first" || !strings.Contains(log.String(), "certificate not read again") {
		t.Errorf("with half a pair the server shows %s; want first, and a warning", got)
	}
	second := writePair(t, certFile, keyFile, "second")
	time.Sleep(reloadInterval)
	if got := shown(second); got != "second" {
		t.Errorf("after a renewal the server shows %s; want second", got)
	}
	if code, _, errs := run(t, "serve", "--data", t.TempDir(), "--tls-cert", certFile); code != fault.Usage.ExitCode() {
		t.Errorf("serve with half of TLS = %d %s; want usage", code, errs)
	}
}

// TestTokens creates a token, uses it, lists it, and revokes it.
func TestTokens(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "state")
	url, _, _ := start(t, dir)
	first := []string{"--server", url, "--token-file", filepath.Join(dir, "token")}
	code, secret, errs := run(t, append([]string{"tokens", "create", "--scope", "announce"}, append(first, "ci")...)...)
	if code != 0 || !strings.HasPrefix(secret, "prebake_") {
		t.Fatalf("tokens create = %d %q %s", code, secret, errs)
	}
	file := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(file, []byte(secret), 0o600); err != nil {
		t.Fatal(err)
	}
	request := []string{"request", "--server", url, "--token-file", file, "--build-id", "17800.0.47", "--driver",
		"535.261.03", "--flavour", "open"}
	if code, out, errs := run(t, request...); code != 0 {
		t.Errorf("request with the token = %d %s%s", code, out, errs)
	}
	if code, _, errs := run(t, "cancel", "--server", url, "--token-file", file, "1"); code != fault.Forbidden.ExitCode() ||
		!strings.Contains(errs, `no scope "operate"`) {
		t.Errorf("cancel with the token = %d %s; want forbidden", code, errs)
	}
	id, _, _ := strings.Cut(strings.TrimPrefix(secret, "prebake_"), "_")
	if code, out, errs := run(t, append([]string{"tokens", "list"}, first...)...); code != 0 ||
		!strings.Contains(out, id) || strings.Contains(out, strings.TrimSpace(secret)) {
		t.Errorf("tokens list = %d %s%s; want the id and no secret", code, out, errs)
	}
	if code, _, errs := run(t, append([]string{"tokens", "revoke"}, append(first, id)...)...); code != 0 {
		t.Errorf("tokens revoke = %d %s", code, errs)
	}
	if code, _, errs := run(t, request...); code != fault.Unauthorized.ExitCode() || !strings.Contains(errs, "revoked") {
		t.Errorf("request with the revoked token = %d %s; want unauthorized, revoked", code, errs)
	}
	if code, out, errs := run(t, append([]string{"audit", "--actor", "token:ci"}, first...)...); code != 0 ||
		!strings.Contains(out, "POST /v1/builds") {
		t.Errorf("audit = %d %s%s; want the request", code, out, errs)
	}
}
