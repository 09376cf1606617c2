package queue_test

import (
	"context"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/queue"
)

// insert puts those of builds 1 to 3 into the queue that have a priority in the map.
func insert(t *testing.T, q *queue.Queue, priorities map[int64]int) {
	t.Helper()
	for _, build := range []int64{1, 2, 3} {
		if p, ok := priorities[build]; ok {
			if err := q.Insert(t.Context(), job(build), p); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// runWorker runs one worker until it has taken n builds. It returns them in the order in which the worker took them.
func runWorker(t *testing.T, q *queue.Queue, n int) (order []int64) {
	t.Helper()
	ctx, stop := context.WithTimeout(t.Context(), 30*time.Second)
	defer stop()
	var mu sync.Mutex
	err := q.Work(ctx, "w1", 1, func(_ context.Context, j api.BuildJob, _ int) error {
		mu.Lock()
		defer mu.Unlock()
		if order = append(order, j.Build); len(order) == n {
			stop()
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return order
}

// TestPriorities checks that a worker takes a build for which somebody waits before a build of a wish list, in whatever
// order they were inserted.
func TestPriorities(t *testing.T) {
	t.Parallel()
	eachDatabase(t, func(t *testing.T, open func(*testing.T) *queue.Queue) {
		q := open(t)
		insert(t, q, map[int64]int{1: queue.PriorityWarning, 2: queue.PriorityWanted, 3: queue.PriorityWarning})
		if err := q.SetPriority(t.Context(), 3, queue.PriorityAsked); err != nil {
			t.Fatal(err)
		}
		if err := q.SetPriority(t.Context(), 3, queue.PriorityWanted); err != nil { // this must not lower the priority
			t.Fatal(err)
		}
		if err := q.SetPriority(t.Context(), 99, queue.PriorityAsked); err != nil {
			t.Errorf("SetPriority(absent) = %v", err)
		}
		if got := runWorker(t, q, 3); !slices.Equal(got, []int64{3, 2, 1}) {
			t.Errorf("worked in the order %v; want 3, 2, 1", got)
		}
	})
}

// TestCancel checks that no worker gets a cancelled build. Cancel must accept a build that has ended, and an unknown
// one.
func TestCancel(t *testing.T) {
	t.Parallel()
	eachDatabase(t, func(t *testing.T, open func(*testing.T) *queue.Queue) {
		q := open(t)
		insert(t, q, map[int64]int{1: 1, 2: 1})
		for _, build := range []int64{1, 1, 99} {
			if err := q.Cancel(t.Context(), build); err != nil {
				t.Errorf("Cancel(%d) = %v", build, err)
			}
		}
		all, err := q.Open(t.Context())
		if _, open := all[1]; err != nil || len(all) != 1 || open || !all[2].Found {
			t.Errorf("Open() = %v, %v; want build 2 only", all, err)
		}
		if got := runWorker(t, q, 1); !slices.Equal(got, []int64{2}) {
			t.Errorf("worked %v; want 2 only", got)
		}
		if all, err = q.Open(t.Context()); err != nil || len(all) != 0 {
			t.Errorf("Open() at the end = %v, %v; want none", all, err)
		}
	})
}

// TestRelease checks that Release makes the running job of a dead worker available to any worker. It must not change a
// waiting job.
func TestRelease(t *testing.T) {
	t.Parallel()
	eachDatabase(t, func(t *testing.T, open func(*testing.T) *queue.Queue) {
		dead := open(t)
		insert(t, dead, map[int64]int{1: 1})
		wake := hang(t, dead, "dead", nil)
		q := open(t)
		insert(t, q, map[int64]int{2: 1})
		if err := q.Release(t.Context(), 1, 2, 99); err != nil {
			t.Fatal(err)
		}
		for build, want := range map[int64]queue.JobState{
			1: {Found: true, State: "available", Attempt: 1, Priority: 1, Error: "the worker ended during the build"},
			2: {Found: true, State: "available", Priority: 1},
		} {
			// The only worker hangs in its build, so it does not take the released job.
			if got, err := q.Lookup(t.Context(), build); err != nil || got != want {
				t.Errorf("Lookup(%d) = %+v, %v; want %+v", build, got, err, want)
			}
		}
		wake()
	})
}

// TestReleasedWorkerComesBack has a slow worker whose job was released and given to another worker. When the slow
// worker ends its build, it must not end the other worker's job.
func TestReleasedWorkerComesBack(t *testing.T) {
	t.Parallel()
	for name, end := range map[string]error{"success": nil,
		"failure": fault.New(fault.APIBreak, "nv-pci.c:1: error", "")} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			eachDatabase(t, func(t *testing.T, open func(*testing.T) *queue.Queue) {
				q, slow := open(t), open(t)
				insert(t, q, map[int64]int{1: queue.PriorityWarning})
				ctx, stop := context.WithTimeout(t.Context(), time.Minute)
				defer stop()
				started, back, gone := make(chan struct{}), make(chan struct{}), make(chan error, 1)
				go func() {
					ctx, stop := context.WithCancel(ctx)
					defer stop()
					gone <- slow.Work(ctx, "slow", 1, func(context.Context, api.BuildJob, int) error {
						close(started)
						<-back
						stop() // the worker takes no more builds
						return end
					})
				}()
				<-started
				if err := q.Release(t.Context(), 1); err != nil {
					t.Fatal(err)
				}
				tries := 0
				err := q.Work(ctx, "successor", 1, func(_ context.Context, _ api.BuildJob, attempt int) error {
					if tries++; tries == 2 {
						stop()
						return nil
					}
					close(back)
					if err := <-gone; err != nil { // now the slow worker's result is in the database
						t.Error(err)
					}
					if s, err := q.Lookup(ctx, 1); err != nil || s.State != "running" || attempt != 2 {
						t.Errorf("attempt %d; Lookup() = %+v, %v; want attempt 2, running", attempt, s, err)
					}
					return fault.New(fault.Transient, "mirror is away", "") // an error that is retried, so another attempt follows
				})
				if err != nil {
					t.Fatal(err)
				}
				if s, err := q.Lookup(t.Context(), 1); err != nil || s.State != "completed" || s.Attempt != 3 {
					t.Errorf("Lookup() = %+v, %v; want completed in attempt 3", s, err)
				}
			})
		})
	}
}

// TestDeadWorkersBuildIsNext checks that the build of a dead worker comes before all waiting builds: after Release, and
// after the worker has started again.
func TestDeadWorkersBuildIsNext(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"release", "same name"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			eachDatabase(t, func(t *testing.T, open func(*testing.T) *queue.Queue) {
				dead := open(t)
				for build := range int64(3) {
					// SQLite stores times in milliseconds, and builds of the same millisecond have no order.
					insert(t, dead, map[int64]int{build + 1: 1})
					time.Sleep(2 * time.Millisecond)
				}
				id := "dead"
				if name == "same name" {
					id = "w1" // the name of runWorker's worker
				}
				wake := hang(t, dead, id, queue.Requeue(context.Canceled))
				q := open(t)
				if name == "release" {
					if err := q.Release(t.Context(), 1); err != nil {
						t.Fatal(err)
					}
				}
				if got := runWorker(t, q, 3); !slices.Equal(got, []int64{1, 2, 3}) {
					t.Errorf("worked in the order %v; want 1, 2, 3", got)
				}
				wake()
			})
		})
	}
}

// TestEnd checks that End ends a job that waits, and a job that runs with a dead worker. It must accept a job that has
// ended already.
func TestEnd(t *testing.T) {
	t.Parallel()
	eachDatabase(t, func(t *testing.T, open func(*testing.T) *queue.Queue) {
		dead := open(t)
		insert(t, dead, map[int64]int{1: 1, 2: 1})
		wake := hang(t, dead, "dead", nil)
		q := open(t)
		for _, build := range []int64{1, 1, 2, 99} {
			if err := q.End(t.Context(), build); err != nil {
				t.Errorf("End(%d) = %v", build, err)
			}
		}
		if all, err := q.Open(t.Context()); err != nil || len(all) != 0 {
			t.Errorf("Open() = %v, %v; want none", all, err)
		}
		wake()
	})
}

// TestRemove checks that Remove removes waiting jobs without a record, so that the same builds can be inserted again.
// It must change no job that runs or has ended.
func TestRemove(t *testing.T) {
	t.Parallel()
	eachDatabase(t, func(t *testing.T, open func(*testing.T) *queue.Queue) {
		busy := open(t)
		insert(t, busy, map[int64]int{1: 1})
		wake := hang(t, busy, "busy", nil)
		q := open(t)
		insert(t, q, map[int64]int{2: 1, 3: 1})
		if err := q.Cancel(t.Context(), 3); err != nil {
			t.Fatal(err)
		}
		if n, err := q.Remove(t.Context(), 1, 2, 3, 99); err != nil || n != 1 {
			t.Errorf("Remove() = %d, %v; want 1", n, err)
		}
		for build, want := range map[int64]string{1: "running", 2: "", 3: "cancelled"} {
			if got, err := q.Lookup(t.Context(), build); err != nil || got.State != want {
				t.Errorf("Lookup(%d) = %+v, %v; want state %q", build, got, err, want)
			}
		}
		insert(t, q, map[int64]int{2: 1})
		if got, err := q.Lookup(t.Context(), 2); err != nil || got.Ended || !got.Found {
			t.Errorf("Lookup(2) after another Insert = %+v, %v; want a waiting job", got, err)
		}
		wake()
	})
}

// TestNewest checks that ended jobs count, and that numbers are compared as numbers.
func TestNewest(t *testing.T) {
	t.Parallel()
	eachDatabase(t, func(t *testing.T, open func(t *testing.T) *queue.Queue) {
		q := open(t)
		for _, step := range []struct{ insert, want int64 }{{0, 0}, {9, 9}, {10, 10}, {2, 10}} {
			if step.insert > 0 {
				if err := q.Insert(t.Context(), job(step.insert), 0); err != nil {
					t.Fatal(err)
				}
			}
			if got, err := q.Newest(t.Context()); err != nil || got != step.want {
				t.Errorf("Newest() after Insert(%d) = %d, %v; want %d", step.insert, got, err, step.want)
			}
		}
		if err := q.Cancel(t.Context(), 10); err != nil {
			t.Fatal(err)
		}
		if got, err := q.Newest(t.Context()); err != nil || got != 10 {
			t.Errorf("Newest() after Cancel(10) = %d, %v; want 10", got, err)
		}
	})
}
