package cli

import (
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prebake/prebake/pkg/timeline"
)

// On a terminal the running phase is on one line, which is drawn again while it runs and
// gives way to the line of the finished one.
func TestBar(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var out strings.Builder
		b := &bar{w: &out}
		b.watch(timeline.Event{Phase: "fetch"})
		time.Sleep(2*time.Second + barInterval/2)
		synctest.Wait()
		b.watch(timeline.Event{Phase: "fetch", Text: "1/2"})
		b.watch(timeline.Event{Done: &timeline.Phase{Name: "fetch", Seconds: 2}})
		time.Sleep(time.Second)
		got := out.String()
		for _, want := range []string{"\r\x1b[K| fetch  ", "[2s]", "fetch 1/2  ", "\r\x1b[K  ok   fetch"} {
			if !strings.Contains(got, want) {
				t.Errorf("bar writes %q; want %q in it", got, want)
			}
		}
		if n := strings.Count(got, "\r"); n != 13 || !strings.HasSuffix(got, "\n") {
			t.Errorf("bar draws %d times and ends with %q; want 13, and nothing after the last line", n, got[len(got)-5:])
		}
	})
}
