package snapshot

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/theupdateframework/go-tuf/v2/metadata"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/stall"
)

// source reads the files of a snapshot by their names in its folder.
type source interface {
	// open returns a stream, or [fs.ErrNotExist] if the file is missing.
	open(ctx context.Context, name string) (io.ReadCloser, error)
	String() string
}

// openSource returns a web source for a URL, and a folder for an absolute path.
func openSource(from string, client *http.Client, agent string) (source, error) {
	bad := func(why string) error {
		return fault.New(
			fault.Usage,
			fmt.Sprintf("snapshot from %.200q: %s", from, why),
			"give the http:// or https:// URL of the folder that \"builder snapshot make\" wrote, or the folder's absolute path",
		)
	}
	if !strings.Contains(from, "://") {
		if !filepath.IsAbs(from) {
			return nil, bad("want a URL, or an absolute path")
		}
		return folder(from), nil
	}
	u, err := url.Parse(from)
	if err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" || u.RawQuery != "" || u.Fragment != "" {
		return nil, bad("want http://HOST/FOLDER or https://HOST/FOLDER")
	}
	if client == nil {
		t := http.DefaultTransport.(*http.Transport).Clone() // net/http documents that DefaultTransport has this type
		t.DisableCompression = true                          // the signatures are over the bytes as they are stored
		t.ResponseHeaderTimeout = idleTimeout
		client = &http.Client{Transport: t}
	}
	return &web{base: strings.TrimSuffix(u.String(), "/") + "/", client: client, agent: agent}, nil
}

// idleTimeout is the longest time for which a server may send nothing, or less than 64 KiB of a longer file.
const idleTimeout = 30 * time.Second

type web struct {
	base, agent string
	client      *http.Client
}

func (w *web) String() string { return w.base }

func (w *web) open(ctx context.Context, name string) (io.ReadCloser, error) {
	ctx, cancel := context.WithCancel(ctx)
	rc, err := w.get(ctx, name)
	if err != nil {
		cancel()
		return nil, err
	}
	return stall.Watch(rc, w.base+name, idleTimeout, cancel), nil
}

func (w *web) get(ctx context.Context, name string) (io.ReadCloser, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, w.base+name, nil)
	if err != nil {
		return nil, err
	}
	if w.agent != "" {
		req.Header.Set("User-Agent", w.agent)
	}
	req.Header.Set("Cache-Control", "no-cache") // timestamp.json changes under a fixed name
	resp, err := w.client.Do(req)
	if err != nil {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		return nil, fault.Wrap(fault.Transient, err, "check the network, and that the source of the snapshot answers")
	}
	switch resp.StatusCode {
	case http.StatusOK:
		return resp.Body, nil
	case http.StatusNotFound, http.StatusGone, http.StatusForbidden:
		// A bucket responds with 403 for a missing file if the client may not list the bucket.
		err = fs.ErrNotExist
	default:
		err = fault.New(
			fault.Transient,
			fmt.Sprintf("GET %s%s: the server answered %s", w.base, name, resp.Status),
			"check that the source of the snapshot answers",
		)
	}
	return nil, errors.Join(err, resp.Body.Close())
}

// folder is a snapshot in a folder on a disk.
type folder string

func (f folder) String() string { return string(f) }

func (f folder) open(_ context.Context, name string) (io.ReadCloser, error) {
	root, err := os.OpenRoot(string(f))
	if err != nil {
		// The error is not wrapped: callers must not treat a missing folder as a missing file.
		return nil, fault.New(fault.Transient, "open folder: "+err.Error(), "check that the folder of the snapshot exists")
	}
	defer root.Close()
	info, err := root.Stat(name) // checked before Open, because opening a pipe blocks until its other end is open
	if err == nil && !info.Mode().IsRegular() {
		err = refusal(fmt.Errorf("%w: %s is not a regular file", ErrMalformed, filepath.Join(string(f), name)))
	}
	if err != nil {
		return nil, err
	}
	return root.Open(name)
}

// urlPrefix is the beginning of the URLs that the TUF library makes.
const urlPrefix = "snapshot:/"

// download reads one file of the source, with at most this number of bytes.
type download func(name string, most int64) ([]byte, error)

// DownloadFile implements the Fetcher of the TUF library.
func (d download) DownloadFile(address string, most int64, _ time.Duration) ([]byte, error) {
	return d(strings.TrimPrefix(address, urlPrefix), most)
}

// fetch returns the download function of one refresh. The download function keeps this ctx, because the library passes
// no context to it.
func fetch(ctx context.Context, from source) download {
	return func(name string, most int64) ([]byte, error) {
		if most <= 0 || most > MaxFile {
			return nil, &metadata.ErrDownloadLengthMismatch{
				Msg: fmt.Sprintf("the signed size of %s is %d bytes; want 1 to %d bytes", name, most, MaxFile),
			}
		}
		rc, err := from.open(ctx, name)
		if errors.Is(err, fs.ErrNotExist) {
			return nil, &metadata.ErrDownloadHTTP{
				StatusCode: http.StatusNotFound,
				URL:        strings.TrimSuffix(from.String(), "/") + "/" + name,
			}
		}
		if err != nil {
			return nil, err
		}
		data, err := io.ReadAll(io.LimitReader(rc, most+1))
		if err := errors.Join(err, rc.Close()); err != nil {
			if ctx.Err() != nil {
				return nil, context.Cause(ctx)
			}
			if fault.Of(err) == fault.Internal {
				err = fault.Wrap(fault.Transient, fmt.Errorf("read %s: %w", name, err), "try again")
			}
			return nil, err
		}
		if int64(len(data)) > most {
			return nil, &metadata.ErrDownloadLengthMismatch{Msg: fmt.Sprintf("%s has more than %d bytes", name, most)}
		}
		return data, nil
	}
}
