package chaos_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/queue"
	"github.com/prebake/prebake/pkg/testkit/program"
)

// size is the configuration of a run.
type size struct {
	// jobs is the number of cells. workers is the number of builders.
	jobs, workers int
	// phase is the maximum duration of one of a build's three phases. pause is the time between two faults.
	phase, pause time.Duration
	// If long is true, some builders end for good, and others are frozen until the farm considers them dead. After these
	// faults the farm needs up to a minute.
	long bool
}

// shortRun is the size of a run without the environment variable PREBAKE_CHAOS.
var shortRun = size{jobs: 12, workers: 2, phase: 700 * time.Millisecond, pause: 1500 * time.Millisecond}

// TestChaos kills processes of a working farm at random, and fills their disks. At the end every cell must be published
// once, or have failed with a reason.
func TestChaos(t *testing.T) {
	t.Parallel()
	if testing.Short() {
		t.Skip("left out with -short; make test runs it")
	}
	run := shortRun
	if text := os.Getenv("PREBAKE_CHAOS"); text != "" {
		jobs, err := strconv.Atoi(text)
		if err != nil {
			t.Fatalf("PREBAKE_CHAOS: %v", err)
		}
		run = size{jobs: jobs, workers: 3, phase: 2500 * time.Millisecond, pause: 6 * time.Second, long: true}
	}
	server := program.Build(t, "server", "")
	for _, database := range []string{"sqlite", "postgres"} {
		t.Run(database, func(t *testing.T) {
			if !run.long {
				t.Parallel()
			}
			began := time.Now()
			f := newFarm(t, server, database, run.workers, run.phase)
			s := &faultRun{farm: f, size: run, kills: map[string]int{}}
			s.injectFaults(t)
			v := s.judge(t)
			v.took = time.Since(began)
			t.Logf("%s\n%s", database, v.table(s.kills))
			v.check(t, run)
		})
	}
}

// injection is one fault that was injected into a process.
type injection struct {
	at   time.Time
	pid  int
	what string
}

// faultRun is a farm with the faults that were injected into it.
type faultRun struct {
	*farm
	size

	kills   map[string]int
	faults  []injection
	paused  sync.WaitGroup // to wait until every frozen builder runs again
	cold    *process       // the builder that was frozen last; at most one is frozen at a time
	resumed atomic.Bool    // true if the builder in cold runs again
}

// cell returns the BUILD_ID of job n.
func cell(n int) string { return fmt.Sprintf("18000.0.%d", n) }

const driver = "535.261.03"

// injectFaults requests all cells, injects faults in rounds, and waits for the remaining cells. A short run has one
// round. A long run has rounds until at most one cell in twenty is open.
func (s *faultRun) injectFaults(t *testing.T) {
	t.Helper()
	seed := uint64(time.Now().UnixNano())
	if text := os.Getenv("PREBAKE_CHAOS_SEED"); text != "" {
		var err error
		if seed, err = strconv.ParseUint(text, 10, 64); err != nil {
			t.Fatalf("PREBAKE_CHAOS_SEED: %v", err)
		}
	}
	t.Logf("the seed is %d; with the seed in PREBAKE_CHAOS_SEED, a run has the same order of faults at other times", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	ctx, stop := context.WithTimeout(t.Context(), 45*time.Minute)
	defer stop()
	var asking sync.WaitGroup
	asking.Go(func() { s.requestCells(ctx, t) })
	blows := s.roundFaults(rng)
	for first := true; ; first = false {
		for _, n := range rng.Perm(len(blows)) {
			time.Sleep(s.pause/2 + time.Duration(rng.Int64N(int64(s.pause))))
			blows[n](t)
		}
		if open, err := s.openCells(ctx); (err == nil && open <= s.jobs/20) || (!s.long && first) {
			break
		}
		if ctx.Err() != nil {
			break
		}
	}
	asking.Wait()
	s.paused.Wait()
	for ; ; time.Sleep(200 * time.Millisecond) {
		open, err := s.openCells(ctx)
		if err == nil && open == 0 {
			return
		}
		if ctx.Err() != nil {
			t.Errorf("%d cells are open at the end, %v; want none", open, err)
			return
		}
	}
}

// requestCells requests every cell. It repeats a request until the server accepts it.
func (s *faultRun) requestCells(ctx context.Context, t *testing.T) {
	for n := range s.jobs {
		for {
			_, err := s.client.RequestBuild(ctx,
				api.BuildRequest{BuildID: cell(n), Board: "lakitu", Driver: driver, Flavour: "open"})
			if err == nil {
				break
			}
			if kind := fault.Of(err); !kind.Retryable() && kind != fault.Internal {
				t.Errorf("request %s: %v", cell(n), err)
				break
			}
			if ctx.Err() != nil {
				t.Errorf("request %s: %v", cell(n), err)
				return
			}
			time.Sleep(200 * time.Millisecond)
		}
	}
}

// openCells returns the number of cells that are not finished.
func (s *faultRun) openCells(ctx context.Context) (int, error) {
	all, err := s.client.Builds(ctx, "")
	if err != nil {
		return 0, err
	}
	over := map[string]bool{}
	for _, b := range all { // newest first
		if _, known := over[b.Kernel.BuildID]; !known {
			over[b.Kernel.BuildID] = b.State != api.Queued && b.State != api.Building
		}
	}
	n := s.jobs
	for _, is := range over {
		if is {
			n--
		}
	}
	return n, nil
}

// roundFaults returns the faults of one round, each as a function that injects it.
func (s *faultRun) roundFaults(rng *rand.Rand) (all []func(*testing.T)) {
	count := func(what string) { s.kills[what]++ }
	hit := func(p *process, sig syscall.Signal, what string) bool {
		at := time.Now()
		pid := p.signal(sig)
		if pid != 0 {
			count(what)
			s.faults = append(s.faults, injection{at, pid, what})
		}
		return pid != 0
	}
	some := func() *process { // returns a random builder that is not frozen
		for {
			if p := s.builders[rng.IntN(len(s.builders))]; p != s.cold {
				return p
			}
		}
	}
	all = append(all,
		func(*testing.T) { hit(s.server, syscall.SIGKILL, "server") },
		func(*testing.T) { hit(some(), syscall.SIGKILL, "builder") },
		func(*testing.T) { hit(some(), syscall.SIGKILL, "builder") },
	)
	if s.postgres != nil {
		all = append(all, func(*testing.T) { hit(s.postgres, syscall.SIGKILL, "PostgreSQL") })
	}
	for _, part := range []string{"server", "PostgreSQL", "builder"} {
		if len(s.disksOf(part)) == 0 {
			continue
		}
		all = append(all, func(t *testing.T) {
			disks := s.disksOf(part)
			count("full disk of " + part)
			fill(t, disks[rng.IntN(len(disks))], s.pause/2)
		})
	}
	if !s.long {
		return all
	}
	lose := func(t *testing.T) { // a machine is lost, and a new one replaces it
		p := some()
		at := time.Now()
		s.drop(p)
		if pid := p.retire(); pid != 0 {
			count("builder lost for good")
			s.faults = append(s.faults, injection{at, pid, "builder lost for good"})
		}
		s.startBuilder(t)
	}
	freeze := func(*testing.T) { // the farm considers the builder dead, and then the builder continues
		if s.cold != nil && !s.resumed.Load() {
			return
		}
		p := some()
		if !hit(p, syscall.SIGSTOP, "builder frozen for a minute") {
			return
		}
		s.cold = p
		s.resumed.Store(false)
		s.paused.Go(func() {
			time.Sleep(time.Minute)
			p.signal(syscall.SIGCONT)
			s.resumed.Store(true)
		})
	}
	all = append(all, lose)
	// With SQLite no builder is frozen: a process that is frozen during a write would keep the file locked for all others.
	if s.postgres != nil {
		all = append(all, freeze)
	}
	return all
}

// leftInQueue returns the number of jobs that the queue still offers. It waits up to a minute for the server's sweep,
// which removes the jobs of ended builds.
func (s *faultRun) leftInQueue(t *testing.T) (n int) {
	t.Helper()
	q, err := queue.Open(t.Context(), s.queue)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := q.Close(); err != nil {
			t.Error(err)
		}
	}()
	for left := range 60 {
		open, err := q.Open(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if n = len(open); n == 0 {
			break
		}
		if n > 0 && left == 59 {
			t.Logf("left in the queue: %+v", open)
		}
		time.Sleep(time.Second)
	}
	return n
}
