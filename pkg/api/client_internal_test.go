package api

import "testing"

// TestClientBoundsNoTransfer checks that the default HTTP client has no timeout for a whole call, such as a long
// transfer.
func TestClientBoundsNoTransfer(t *testing.T) {
	t.Parallel()
	if got := NewClient("http://server.example", "", nil).http.Timeout; got != 0 {
		t.Errorf("NewClient().http.Timeout = %v; want none, because it would also end the transfer of a log", got)
	}
}
