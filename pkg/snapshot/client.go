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

// Config says where a snapshot comes from, and who has to have signed it.
type Config struct {
	// From is the folder of a snapshot: its http or https URL, or an absolute path.
	From string
	// Root is the root metadata that the owner trusts, of any version; newer ones come from
	// the source, each signed by the one before.
	Root []byte
	// State is the file in which the last list is kept: what is older is refused, and what it
	// says counts without a network until it expires. "" stores nothing.
	State string
	// ReadOnly reads the state, and writes none.
	ReadOnly bool
	// UserAgent is told to web servers; "" means Go's own.
	UserAgent string
	// HTTP is for URLs; nil is a client that waits for no silent server.
	HTTP *http.Client
	// Now is the clock; nil means the machine's.
	Now func() time.Time
}

// Client keeps a snapshot. It is not for concurrent use.
type Client struct {
	cfg  Config
	from source
}

// New checks a configuration, the root among it. It reads nothing else.
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

// Bounds of one refresh.
const (
	refreshTime  = 5 * time.Minute
	maxRoots     = 256
	maxRoot      = 512 << 10
	maxTimestamp = 16 << 10
	maxMetadata  = 128 << 10
)

// state is what a node remembers.
type state struct {
	// Pinned is the root that the owner trusted when Root was taken, which is the newest.
	Pinned []byte `json:"pinned"`
	Files
	// ListPinned and ListRoot are those under which the list was taken, where they are others:
	// a newer root may name keys by which no list is signed yet.
	ListPinned []byte `json:"listPinned,omitempty"`
	ListRoot   []byte `json:"listRoot,omitempty"`
}

// Last returns the last list that this node took, and nil where there is none. It asks
// nobody, and its signatures are checked again, under the root of its time. Whether it has
// expired is for the caller. Of a list whose root the owner trusts no more, it returns only
// what was withdrawn, as [Snapshot.Former].
func (c *Client) Last() (*Snapshot, error) {
	st, err := c.remembered()
	if err != nil || st.Catalogue == nil {
		return nil, err
	}
	files := st.Files
	files.Root = st.ListRoot
	s, err := Verify(files)
	if err != nil {
		return nil, fmt.Errorf(
			"read %s: %w",
			c.cfg.State,
			fault.Wrap(fault.Unverified, err, "remove the file: the next run asks the source again"),
		)
	}
	if !bytes.Equal(st.ListPinned, c.cfg.Root) {
		s.Former = true
		s.Artifacts = slices.DeleteFunc(s.Artifacts, func(a Artifact) bool { return a.State == Published })
	}
	return s, nil
}

// remembered reads the state. A root that came after one which is trusted no more is left out;
// a list of that time tells what is older, and what was withdrawn.
func (c *Client) remembered() (st state, err error) {
	if c.cfg.State == "" {
		return st, nil
	}
	fail := func(err error) (state, error) {
		return state{}, fault.Wrap(
			fault.Unverified,
			fmt.Errorf("read state of snapshot %s: %w", c.cfg.State, err),
			"remove the file: the next run asks the source again",
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
	const most = 2 * MaxFile // in base 64
	raw, err := io.ReadAll(io.LimitReader(f, most+1))
	if err == nil && len(raw) > most {
		err = fmt.Errorf("more than %d bytes", most)
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

// Refresh takes the newest list from the source, and keeps it. What this node had before
// stays where the source is away (fault.Transient), and where its answer is refused
// (fault.Unverified).
func (c *Client) Refresh(ctx context.Context) (*Snapshot, error) {
	ctx, cancel := context.WithTimeoutCause(
		ctx,
		refreshTime,
		fault.New(
			fault.Transient,
			fmt.Sprintf("the source took longer than %v", refreshTime),
			"check the network path to it",
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
	st, err := c.remembered()
	if err != nil {
		return nil, err
	}
	// The library keeps files in a folder as it goes. What happens to them is decided here,
	// at once: half of a list must not take the place of a whole one.
	work, err := c.workFolder()
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(work)) }()
	next, err := recoverPanic(func() (Files, error) { return c.update(ctx, work, st) })
	if err != nil {
		if next.Root != nil && !bytes.Equal(next.Root, st.Root) { // a root that was replaced stays so
			st.Pinned, st.Root = c.cfg.Root, next.Root
			err = errors.Join(err, c.keep(st))
		}
		return nil, err
	}
	s, err := Verify(next)
	if err != nil {
		return nil, err
	}
	return s, c.keep(state{Pinned: c.cfg.Root, Files: next})
}

// workFolder makes an empty folder: beside the state, which is on a disk that may be written,
// or else where temporary files are.
func (c *Client) workFolder() (string, error) {
	if c.cfg.State == "" || c.cfg.ReadOnly {
		work, err := os.MkdirTemp("", "prebake-snapshot-")
		return work, fault.TempDisk(err)
	}
	work := c.cfg.State + ".work" // of one name, so that a run which was killed leaves one at most
	err := errors.Join(os.MkdirAll(filepath.Dir(work), 0o755), os.RemoveAll(work), os.Mkdir(work, 0o700))
	return work, fault.Disk(err, hintDisk)
}

const hintDisk = "free space on the disk of the state folder"

// update runs the library's client. The root that it came to is told in any case.
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
			return next, fault.TempDisk(err)
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
	up.UnsafeSetRefTime(c.cfg.Now()) // the caller's clock; "unsafe" since it is not the machine's
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

// keep writes the state atomically.
func (c *Client) keep(st state) (err error) {
	if c.cfg.State == "" || c.cfg.ReadOnly {
		return nil
	}
	defer func() {
		if err != nil {
			err = fault.Disk(fmt.Errorf("keep snapshot in %s: %w", c.cfg.State, err), hintDisk)
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
