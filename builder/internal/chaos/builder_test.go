package chaos_test

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"

	"github.com/prebake/prebake/builder/internal/pipeline"
	"github.com/prebake/prebake/builder/internal/worker"
	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/timeline"
)

// asBuilder is an environment variable. If it is set, this test program runs as a builder. Its value is a [builder] in
// JSON.
const asBuilder = "PREBAKE_CHAOS_BUILDER"

func TestMain(m *testing.M) {
	if text := os.Getenv(asBuilder); text != "" {
		if err := runBuilder(text); err != nil {
			fmt.Fprintln(os.Stderr, "builder:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// builder has the settings of one builder process.
type builder struct {
	ID, State, Queue, Server, Token string
	// Events is the folder with the file "notes", to which all builders write.
	Events string
	// Phase is the maximum duration of one phase. A build has three phases.
	Phase time.Duration
}

func runBuilder(text string) error {
	var b builder
	if err := json.Unmarshal([]byte(text), &b); err != nil {
		return err
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	err := worker.Run(context.Background(), worker.Config{
		ID: b.ID, State: b.State, QueueURL: b.Queue, Concurrency: 2,
		Server: api.NewClient(b.Server, b.Token, nil), Log: log, Make: b.build,
	})
	return err
}

// note is one line of the file "notes". It says that a builder began or ended a build.
type note struct {
	Cell string
	Pid  int
	At   time.Time
	// What is begin, end or broken; broken means that the build ended without an artifact.
	What string
}

const (
	begin  = "begin"
	end    = "end"
	broken = "broken"
)

func (b builder) note(cell, what string) (err error) {
	line, err := json.Marshal(note{cell, os.Getpid(), time.Now(), what})
	if err != nil {
		return err
	}
	f, err := os.OpenFile(filepath.Join(b.Events, "notes"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	_, err = f.Write(append(line, '\n'))
	return errors.Join(err, f.Close())
}

// number returns the last part of a BUILD_ID, which is the number of the cell: 7 for 18000.0.7.
func number(buildID string) int {
	n, _ := strconv.Atoi(buildID[strings.LastIndex(buildID, ".")+1:]) // an invalid number counts as 0
	return n
}

// apiBreak reports whether a cell does not compile. trouble reports whether a cell's first attempt has a transient
// failure.
func apiBreak(cell string) bool { return number(cell)%10 == 3 }
func trouble(cell string) bool  { return number(cell)%10 == 7 }

// build replaces the pipeline. Each artifact has random content, so a cell that is built twice has two digests.
func (b builder) build(ctx context.Context, r pipeline.Request, log io.Writer,
	line *timeline.Run) (res *pipeline.Result, err error) {
	cell := r.BuildID
	res = &pipeline.Result{
		Kernel:      target.Kernel{BuildID: cell, Board: r.Board, Release: "6.1.0-chaos"},
		Fingerprint: target.Fingerprint(fmt.Sprintf("sha256:%x", sha256.Sum256([]byte(cell)))),
	}
	if err := b.note(cell, begin); err != nil {
		return res, err
	}
	defer func() {
		what := end
		if err != nil {
			what = broken
		}
		err = errors.Join(err, b.note(cell, what))
	}()
	phase := func(name string, do func() error) {
		if err != nil {
			return
		}
		err = line.Do(name, func() (string, error) {
			if _, err := log.Write(make([]byte, 64<<10)); err != nil {
				return "", fault.Disk(err, "free space for logs")
			}
			select {
			case <-ctx.Done():
				return "", context.Cause(ctx)
			case <-time.After(b.Phase/4 + rand.N(b.Phase*3/4)):
			}
			return "", do()
		})
	}
	phase("source", func() error {
		if trouble(cell) {
			f, err := os.OpenFile(filepath.Join(b.Events, cell), os.O_CREATE|os.O_EXCL, 0o644)
			if err == nil {
				return errors.Join(fault.New(fault.Transient, "the mirror is away", "wait"), f.Close())
			}
		}
		return nil
	})
	phase("compile", func() error {
		if apiBreak(cell) {
			return fault.New(fault.APIBreak, "nvidia/nv-pci.c:1:2: error: too few arguments", "choose a newer driver")
		}
		return nil
	})
	phase("publish", func() (err error) {
		res.Digest, err = b.publish(ctx, cell)
		return err
	})
	res.Phases = line.Phases()
	return res, err
}

// publish pushes an artifact under the cell's tag. If another artifact has the tag already, it returns that artifact's
// digest. While the registry does not answer, it retries for some seconds.
func (b builder) publish(ctx context.Context, cell string) (digest string, err error) {
	ref, err := tagOf(b.Server, cell)
	if err != nil {
		return "", err
	}
	img, err := random.Image(2048, 1)
	if err != nil {
		return "", err
	}
	for range 8 {
		digest, err = digestOf(ctx, ref)
		if digest != "" {
			return digest, nil
		}
		if err == nil {
			err = remote.Write(ref, img, remote.WithContext(ctx),
				remote.WithAuth(&authn.Basic{Username: "x", Password: b.Token}))
		}
		if err == nil {
			var h v1.Hash
			h, err = img.Digest()
			return h.String(), err
		}
		select {
		case <-ctx.Done():
			return "", context.Cause(ctx)
		case <-time.After(time.Second):
		}
	}
	return "", fault.Wrap(fault.Transient, fmt.Errorf("push %s: %w", ref, err), "")
}

// tagOf returns a cell's tag in the server's registry. That registry never moves a tag to another artifact.
func tagOf(server, cell string) (name.Tag, error) {
	return name.NewTag(strings.TrimPrefix(server, "http://")+"/prebake/driver:"+cell, name.Insecure)
}

// digestOf returns the digest to which a tag points, or "" if the tag does not exist.
func digestOf(ctx context.Context, ref name.Tag) (digest string, err error) {
	desc, err := remote.Head(ref, remote.WithContext(ctx))
	var terr *transport.Error
	switch {
	case errors.As(err, &terr) && terr.StatusCode == http.StatusNotFound:
		return "", nil
	case err != nil:
		return "", err
	}
	return desc.Digest.String(), nil
}
