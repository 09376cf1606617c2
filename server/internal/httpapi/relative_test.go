package httpapi

import "testing"

func TestRelative(t *testing.T) {
	t.Parallel()
	rows := []struct{ repository, asked, want string }{
		{"", "a:1", ""},
		{"/prebake/driver", "a:1", "/prebake/driver"},
		{"a:1/prebake/driver", "a:1", "/prebake/driver"},
		{"127.0.0.1:8440/prebake/driver", "prebake.example", "/prebake/driver"},
		{"localhost:8440/prebake/driver", "prebake.example", "/prebake/driver"},
		{"[::1]:8440/prebake/driver", "prebake.example", "/prebake/driver"},
		{"127.0.0.1:5000/prebake/driver", "127.0.0.1:8440", "127.0.0.1:5000/prebake/driver"},
		{"ghcr.io/x/y", "prebake.example", "ghcr.io/x/y"},
		{"nohost", "nohost", "nohost"},
	}
	for _, row := range rows {
		if got := withoutOwnHost(row.repository, row.asked, "8440"); got != row.want {
			t.Errorf("withoutOwnHost(%q, asked as %q) = %q; want %q", row.repository, row.asked, got, row.want)
		}
	}
}
