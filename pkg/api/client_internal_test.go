package api

import "testing"

// TestClientBoundsNoTransfer checks that the default HTTP client has no time limit for a whole call. Such a limit would
// end the transfer of a large log.
func TestClientBoundsNoTransfer(t *testing.T) {
	t.Parallel()
	if got := NewClient("http://server.example", "", nil).http.Timeout; got != 0 {
		t.Errorf("NewClient().http.Timeout = %v; want none, because it would also end the transfer of a log", got)
	}
}
