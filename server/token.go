package main

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
)

// loadToken returns the server's first token: from --token, --token-file, or the file token in the data folder. If that
// file is missing, loadToken makes it with a random value. The value is never logged.
func loadToken(s settings, log *slog.Logger) (string, error) {
	if s.Token != "" {
		return s.Token, checkToken(s.Token, "--token")
	}
	if s.TokenFile != "" {
		return readToken(s.TokenFile)
	}
	name := filepath.Join(s.Data, "token")
	token, err := readToken(name)
	if err == nil {
		log.Info("token read", "file", name)
		return token, nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	token = rand.Text()
	f, err := os.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return "", fmt.Errorf("make the first token: %w", err)
	}
	_, err = f.WriteString(token + "\n")
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return "", fmt.Errorf("make the first token: %w", err)
	}
	log.Info("token made", "file", name)
	return token, nil
}

// readToken reads a token from a file and checks it.
func readToken(name string) (string, error) {
	token, err := api.ReadToken(name)
	if err != nil {
		return "", err
	}
	return token, checkToken(token, name)
}

func checkToken(token, where string) error {
	if len(token) < 16 || strings.ContainsAny(token, " \t\r\n") {
		return fault.New(
			fault.Usage,
			"the token in "+where+" is not one word of at least 16 characters",
			"make a token: openssl rand -hex 16",
		)
	}
	return nil
}
