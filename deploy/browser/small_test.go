package browser

import (
	"context"
	"crypto/sha256"
	"fmt"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/timeline"
)

// phases returns the first phases of a build, as builders report them.
func phases(begin time.Time, done int) []timeline.Phase {
	all := []timeline.Phase{
		{Name: "look up", Seconds: 0.2},
		{Name: "source", Seconds: 14.1, Note: "212 MB"},
		{Name: "compile", Seconds: 93.4, Note: "32 jobs"},
		{Name: "check", Seconds: 0.8},
		{Name: "load test", Seconds: 21.7},
		{Name: "sign", Seconds: 0.1},
		{Name: "package", Seconds: 6.3, Note: "96 MB"},
		{Name: "publish", Seconds: 2.9},
	}
	for i := range all {
		all[i].Start = begin
		begin = begin.Add(time.Duration(all[i].Seconds * float64(time.Second)))
	}
	return all[:done]
}

// story is one cell of the small set, and the state that it must reach.
type story struct {
	id, board, driver string
	flavour           target.Flavour
	state             api.State
}

// resolve asks the server for the state of the cell.
func (c story) resolve(t *testing.T, s *set) api.Resolution {
	t.Helper()
	r, err := s.client.Resolve(t.Context(), api.Question{
		BuildID: c.id, Board: c.board, Driver: c.driver, Flavour: string(c.flavour),
	})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// fillSmall brings cells into every possible state, with the API calls of builders, nodes and operators.
func fillSmall(t *testing.T, s *set) {
	t.Helper()
	known := 0
	for _, r := range releases {
		known += len(r.boards)
	}
	wait(t, "the mirrors are read", func() bool {
		kernels, err := s.client.Kernels(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		drivers, err := s.client.Drivers(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return len(kernels) == known && len(drivers) == 4
	})
	stories := []story{
		{"17800.66.78", "lakitu", "535.261.03", target.Proprietary, api.Published},
		{"17800.66.78", "lakitu", "535.261.03", target.Open, api.Published},
		{"17800.66.78", "anthos-amd64-vmware", "535.261.03", target.Proprietary, api.Published},
		{"17800.66.90", "lakitu", "535.261.03", target.Proprietary, api.Published},
		{"17800.66.90", "lakitu", "535.261.03", target.Open, api.Quarantined},
		{"18613.75.4", "lakitu", "550.163.01", target.Proprietary, api.Yanked},
		{"18613.75.4", "lakitu", "550.163.01", target.Open, api.Published},
		{"19216.104.25", "lakitu", "580.95.05", target.Open, api.Published},
		{"19216.104.25", "lakitu-arm64", "580.95.05", target.Open, api.Published},
		{"19216.104.25", "lakitu", "550.163.01", target.Open, api.Cancelled},
		{"19999.20.1", "lakitu", "535.261.03", target.Open, api.Failed},
		{"19999.20.1", "lakitu", "580.95.05", target.Proprietary, api.Unsupported},
		{"19999.20.1", "lakitu", "580.95.05", target.Open, api.Building},
		{"19999.20.1", "lakitu-arm64", "580.95.05", target.Open, api.Queued},
		{"17800.66.90", "anthos-amd64-vmware", "535.261.03", target.Proprietary, api.Queued},
	}
	for _, c := range stories {
		play(t, s, c)
	}
	storeWishList(t, s)
	for _, c := range stories {
		r := c.resolve(t, s)
		if r.State != c.state {
			t.Fatalf("Resolve(%v) = %s, %s; want %s", c, r.State, r.Reason, c.state)
		}
		if c.state == api.Yanked || c.state == api.Quarantined {
			s.Vars[string(c.state)] = cellPath(r)
		}
	}
	s.setCell(stories[0].resolve(t, s))
	s.Vars["unknown"] = "lakitu/18613.75.4/580.95.05/open"
}

// wishText is a wish list of cells that are already published, so that it plans no build.
const wishText = `version: 1
kernels:
  - build: 17800.66.78
    board: lakitu
drivers:
  - version: 535.261.03
flavours: [proprietary, open]
`

// storeWishList stores the wish list, and waits until the server has planned it.
func storeWishList(t *testing.T, s *set) {
	t.Helper()
	if _, err := s.client.PutWishList(t.Context(), "production", api.NewWishList{Text: wishText}); err != nil {
		t.Fatal(err)
	}
	wait(t, "the wish list is planned", func() bool {
		l, err := s.client.WishList(t.Context(), "production")
		if err != nil {
			t.Fatal(err)
		}
		return l.PlannedAt != nil
	})
}

// play brings a cell into its state.
func play(t *testing.T, s *set, c story) {
	t.Helper()
	b, err := s.client.RequestBuild(t.Context(), api.BuildRequest{
		BuildID: c.id, Board: c.board, Driver: c.driver, Flavour: string(c.flavour),
	})
	if err != nil {
		t.Fatal(err)
	}
	if s.Vars[string(c.state)] == "" {
		s.Vars[string(c.state)] = fmt.Sprint(b.ID)
	}
	update := func(u api.BuildUpdate) {
		t.Helper()
		u.Attempt = 1
		if _, err := s.client.UpdateBuild(t.Context(), b.ID, u); err != nil {
			t.Fatal(err)
		}
	}
	begin := time.Now()
	switch c.state {
	case api.Queued:
		return
	case api.Cancelled:
		if _, err := s.client.Cancel(t.Context(), b.ID); err != nil {
			t.Fatal(err)
		}
		return
	}
	update(api.BuildUpdate{State: api.Building, Worker: "builder-7c9f-1", Phase: "look up"})
	log := "look up 0.2 s\nsource 14.1 s (212 MB)\n"
	for i := range 200 {
		log += fmt.Sprintf("  CC [M]  nvidia/nv-%03d.o\n", i)
	}
	switch c.state {
	case api.Building:
		update(api.BuildUpdate{Phase: "compile", Phases: phases(begin, 2)})
		if err := s.client.AppendBuildLog(t.Context(), b.ID, 0, []byte(log)); err != nil {
			t.Fatal(err)
		}
		keepReporting(t, s, b.ID)
	case api.Failed:
		failed := phases(begin, 3)
		failed[2].Failed = true
		const text = "nvidia/nv-mmap.c:123:9: error: implicit declaration of function 'vm_flags_set'"
		log += text + "\n"
		update(api.BuildUpdate{
			State: api.Failed, Class: fault.APIBreak.String(), Error: text, Phase: "compile", Phases: failed,
			Hint: "this kernel is newer than the driver: ask for a newer version",
		})
	case api.Unsupported:
		update(api.BuildUpdate{
			State: api.Failed, Class: fault.Unsupported.String(), Phase: "source", Phases: phases(begin, 2),
			Error: "release 580.95.05 has no proprietary modules for this kernel",
		})
	default:
		publish(t, s, b, c, begin)
	}
	if err := s.client.PutBuildLog(t.Context(), b.ID, strings.NewReader(log)); err != nil {
		t.Fatal(err)
	}
}

// publish publishes a build's artifact as a builder does, and brings it into its state.
func publish(t *testing.T, s *set, b api.Build, c story, begin time.Time) {
	t.Helper()
	host := strings.TrimPrefix(s.URL, "http://")
	ref, err := name.ParseReference(fmt.Sprintf("%s/prebake/driver:build-%d", host, b.ID), name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	img, err := random.Image(1024, 3)
	if err != nil {
		t.Fatal(err)
	}
	login := remote.WithAuth(&authn.Basic{Username: "x", Password: secret})
	if err := remote.Write(ref, img, remote.WithContext(t.Context()), login); err != nil {
		t.Fatal(err)
	}
	digest, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	kernel := b.Kernel
	kernel.Release, kernel.Arch = "6.6."+strings.Split(c.id, ".")[1]+"+", target.BoardArch(c.board)
	finger := target.Fingerprint(fmt.Sprintf("sha256:%x", sha256.Sum256([]byte(kernel.String()))))
	if _, err := s.client.UpdateBuild(t.Context(), b.ID, api.BuildUpdate{
		State: api.Published, Attempt: 1, Digest: digest.String(), Kernel: &kernel, Fingerprint: finger,
		Phase: "publish", Phases: phases(begin, 8),
	}); err != nil {
		t.Fatal(err)
	}
	switch c.state {
	case api.Yanked:
		why := api.YankRequest{Reason: "panics when nvidia_uvm is unloaded"}
		if _, err := s.client.Yank(t.Context(), digest.String(), why); err != nil {
			t.Fatal(err)
		}
	case api.Quarantined:
		for i := range 4 {
			report(t, s, c, digest.String(), i)
		}
	}
}

// report sends a node's report that an artifact did not load. Each node reports from another network, because reports
// from a single network do not put an artifact in quarantine.
func report(t *testing.T, s *set, c story, digest string, node int) {
	t.Helper()
	from := &net.TCPAddr{IP: net.IPv4(127, 0, byte(node+1), 1)}
	transport := &http.Transport{DialContext: (&net.Dialer{LocalAddr: from}).DialContext}
	defer transport.CloseIdleConnections()
	client := api.NewClient(s.URL, secret, &http.Client{Transport: transport})
	if err := client.Report(t.Context(), api.NodeReport{
		BuildID: c.id, Board: c.board, Driver: target.Driver{Version: c.driver, Flavour: c.flavour}, Digest: digest,
		Outcome: api.NotLoad, Class: fault.Rejected.String(), Message: "load nvidia: Invalid argument",
		Node: fmt.Sprintf("%032x", node+1),
	}); err != nil {
		t.Fatal(err)
	}
}

// keepReporting sends reports about a build until the test ends. Without reports, the server would give the build to
// another builder.
func keepReporting(t *testing.T, s *set, id int64) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	var beating sync.WaitGroup
	beating.Go(func() {
		tick := time.NewTicker(api.HeartbeatInterval)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
			_, err := s.client.UpdateBuild(ctx, id, api.BuildUpdate{Attempt: 1, Phase: "compile"})
			if err != nil && ctx.Err() == nil {
				t.Errorf("report build %d: %v", id, err)
			}
		}
	})
	t.Cleanup(func() {
		cancel()
		beating.Wait()
	})
}
