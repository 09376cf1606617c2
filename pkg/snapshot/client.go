package snapshot

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/theupdateframework/go-tuf/v2/metadata/config"
	"github.com/theupdateframework/go-tuf/v2/metadata/updater"

	"github.com/prebake/prebake/pkg/fault"
)

// Config says where a snapshot comes from, and who must have signed it.
type Config struct {
	// From is the folder of the snapshot: an http or https URL, or an absolute path.
	From string
	// Root is TUF root metadata, of any version, that the node's owner trusts. Newer roots come from the source, each
	// signed by enough keys of the root before it.
	Root []byte
	// State is the path of the file that keeps the last list; "" means that no list is kept. The client refuses lists
	// older than the kept list. The kept list is valid without a network until it expires.
	State string
	// If ReadOnly is true, the client reads the state file but does not write it.
	ReadOnly bool
	// UserAgent is the User-Agent header for web servers; "" means Go's default.
	UserAgent string
	// HTTP is the client for URLs. nil means a client that limits the wait for a silent server.
	HTTP *http.Client
	// Now is the clock; nil means the system clock.
	Now func() time.Time
}

// Client keeps the newest snapshot of a source. It is not safe for concurrent use.
type Client struct {
	cfg  Config
	from source
}

// New checks the configuration, including the root. It reads no file and opens no connection.
func New(cfg Config) (*Client, error) {
	if err := checkRoot(cfg.Root); err != nil {
		return nil, err
	}
	from, err := openSource(cfg.From, cfg.HTTP, cfg.UserAgent)
	if err != nil {
		return nil, err
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	return &Client{cfg, from}, nil
}

// Limits of one refresh: its time, the number of new roots, and the sizes of the files in bytes.
const (
	refreshTime  = 5 * time.Minute
	maxRoots     = 256
	maxRoot      = 512 << 10
	maxTimestamp = 16 << 10
	maxMetadata  = 128 << 10
)

// state is the content of the state file.
type state struct {
	// Pinned is the configured root from which Files.Root, the newest root, follows.
	Pinned []byte `json:"pinned"`
	Files
	// ListPinned and ListRoot are the configured and the newest root at the time when the list was accepted. They are set
	// only if they differ from Pinned and Files.Root: a newer root can list keys that have not signed a list yet.
	ListPinned []byte `json:"listPinned,omitempty"`
	ListRoot   []byte `json:"listRoot,omitempty"`
}

// Last returns the last list that this node accepted, or nil. It opens no connection, and checks the signatures again.
// The caller checks whether the list has expired. If the configured root has changed, Last returns only the withdrawn
// artifacts, and sets [Snapshot.Former].
func (c *Client) Last() (*Snapshot, error) {
	st, err := c.loadState()
	if err != nil || st.Catalogue == nil {
		return nil, err
	}
	files := st.Files
	files.Root = st.ListRoot
	s, err := Verify(files)
	if err != nil {
		return nil, fmt.Errorf(
			"verify the stored snapshot %s: %w", c.cfg.State,
			fault.Wrap(fault.Unverified, err, "remove the file; the next run fetches the snapshot again"),
		)
	}
	if !bytes.Equal(st.ListPinned, c.cfg.Root) {
		s.Former = true
		s.Artifacts = slices.DeleteFunc(s.Artifacts, func(a Artifact) bool { return a.State == Published })
	}
	return s, nil
}

// loadState reads the state file. If the configured root has changed, it drops the stored root, which follows from the
// former one. It keeps the stored list, because the list's versions and withdrawn artifacts still count.
func (c *Client) loadState() (st state, err error) {
	if c.cfg.State == "" {
		return st, nil
	}
	fail := func(err error) (state, error) {
		return state{}, fault.Wrap(
			fault.Unverified,
			fmt.Errorf("read state file %s of the snapshot: %w", c.cfg.State, err),
			"remove the file; the next run fetches the snapshot again",
		)
	}
	f, err := os.Open(c.cfg.State)
	if errors.Is(err, fs.ErrNotExist) {
		return st, nil
	}
	if err != nil {
		return fail(err)
	}
	defer f.Close()
	const most = 2 * MaxFile // the JSON has the list in base64
	raw, err := io.ReadAll(io.LimitReader(f, most+1))
	if err == nil && len(raw) > most {
		err = fmt.Errorf("the file has more than %d bytes", most)
	}
	if err == nil {
		err = json.Unmarshal(raw, &st)
	}
	if err != nil {
		return fail(err)
	}
	if st.ListRoot == nil {
		st.ListPinned, st.ListRoot = st.Pinned, st.Root
	}
	if !bytes.Equal(st.Pinned, c.cfg.Root) {
		st.Pinned, st.Root = nil, nil
	}
	return st, nil
}

// Refresh reads the newest list from the source, and stores it. If the source does not answer (fault.Transient) or its
// list is refused (fault.Unverified), the stored list stays.
func (c *Client) Refresh(ctx context.Context) (*Snapshot, error) {
	ctx, cancel := context.WithTimeoutCause(
		ctx,
		refreshTime,
		fault.New(
			fault.Transient,
			fmt.Sprintf("the source of the snapshot took longer than %v", refreshTime),
			"check the network path to the source of the snapshot",
		),
	)
	defer cancel()
	s, err := c.refresh(ctx)
	if err != nil {
		return nil, fmt.Errorf("refresh snapshot from %s: %w", c.from, err)
	}
	return s, nil
}

func (c *Client) refresh(ctx context.Context) (_ *Snapshot, err error) {
	st, err := c.loadState()
	if err != nil {
		return nil, err
	}
	// The library writes the files of a list one by one into a work folder. The state file then gets all of them at once.
	work, err := c.workFolder()
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(work)) }()
	next, err := recoverPanic(func() (Files, error) { return c.update(ctx, work, st) })
	if err != nil {
		if next.Root != nil && !bytes.Equal(next.Root, st.Root) { // keeps the new root even though the list was refused
			st.Pinned, st.Root = c.cfg.Root, next.Root
			err = errors.Join(err, c.saveState(st))
		}
		return nil, err
	}
	s, err := Verify(next)
	if err != nil {
		return nil, err
	}
	return s, c.saveState(state{Pinned: c.cfg.Root, Files: next})
}

// workFolder makes an empty folder beside the state file. Without a state file to write, the folder is temporary.
func (c *Client) workFolder() (string, error) {
	if c.cfg.State == "" || c.cfg.ReadOnly {
		work, err := os.MkdirTemp("", "prebake-snapshot-")
		return work, c.disk(err)
	}
	work := c.cfg.State + ".work" // the name is fixed, so that killed runs leave at most one folder
	err := errors.Join(os.MkdirAll(filepath.Dir(work), 0o755), os.RemoveAll(work), os.Mkdir(work, 0o700))
	return work, c.disk(err)
}

// disk adds a kind and a hint to the error of a full disk. The hint says which disk it is.
func (c *Client) disk(err error) error {
	if c.cfg.State == "" || c.cfg.ReadOnly {
		return fault.TempDisk(err)
	}
	return fault.Disk(err, hintDisk)
}

const hintDisk = "free space on the disk of the state folder"

// update runs the TUF library's client. It returns the newest root even if it also returns an error.
func (c *Client) update(ctx context.Context, work string, st state) (next Files, err error) {
	root := st.Root
	if root == nil {
		root = c.cfg.Root
	}
	file := func(role string) string { return filepath.Join(work, role+".json") }
	for role, data := range map[string][]byte{"timestamp": st.Timestamp, "snapshot": st.Snapshot, "targets": st.Targets} {
		if data == nil {
			continue
		}
		if err := os.WriteFile(file(role), data, 0o600); err != nil {
			return next, c.disk(err)
		}
	}
	up, err := updater.New(&config.UpdaterConfig{
		Fetcher: fetch(ctx, c.from), LocalTrustedRoot: root, LocalMetadataDir: work, LocalTargetsDir: work,
		RemoteMetadataURL: urlPrefix, RemoteTargetsURL: urlPrefix + "targets/", PrefixTargetsWithHash: true,
		MaxRootRotations: maxRoots, RootMaxLength: maxRoot, TimestampMaxLength: maxTimestamp, SnapshotMaxLength: maxMetadata,
		TargetsMaxLength: maxMetadata,
	})
	if err != nil {
		return next, explain(err)
	}
	up.UnsafeSetRefTime(c.cfg.Now()) // the name says Unsafe because the caller chooses the clock
	defer func() {
		var read error
		next.Root, read = os.ReadFile(file("root"))
		err = errors.Join(err, read)
	}()
	if err := up.Refresh(); err != nil {
		return next, explain(err)
	}
	info, err := up.GetTargetInfo(Name)
	if err != nil {
		return next, explain(err)
	}
	if st.Catalogue != nil && info.VerifyLengthHashes(st.Catalogue) == nil {
		next.Catalogue = st.Catalogue
	} else if _, next.Catalogue, err = up.DownloadTarget(info, filepath.Join(work, "list"), ""); err != nil {
		return next, explain(err)
	}
	for role, to := range map[string]*[]byte{"timestamp": &next.Timestamp, "snapshot": &next.Snapshot,
		"targets": &next.Targets} {
		if *to, err = os.ReadFile(file(role)); err != nil {
			return next, err
		}
	}
	return next, nil
}

// saveState writes the state file atomically.
func (c *Client) saveState(st state) (err error) {
	if c.cfg.State == "" || c.cfg.ReadOnly {
		return nil
	}
	defer func() {
		if err != nil {
			err = fault.Disk(fmt.Errorf("store the snapshot in %s: %w", c.cfg.State, err), hintDisk)
		}
	}()
	raw, err := json.Marshal(st)
	if err != nil {
		return err
	}
	dir := filepath.Dir(c.cfg.State)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	f, err := os.OpenFile(c.cfg.State+".new", os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	_, err = f.Write(raw)
	if err = errors.Join(err, f.Sync(), f.Close()); err == nil {
		err = os.Rename(f.Name(), c.cfg.State)
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
