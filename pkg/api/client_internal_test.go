package api

import "testing"

// A client that the caller does not bring bounds no whole call: the time of one that
// carries a log is that of the log.
func TestClientBoundsNoTransfer(t *testing.T) {
	t.Parallel()
	if got := NewClient("http://server.example", "", nil).http.Timeout; got != 0 {
		t.Errorf("NewClient().http.Timeout = %v; want none, since it counts for logs, too", got)
	}
}
