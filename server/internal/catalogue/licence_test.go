package catalogue_test

import (
	"strings"
	"testing"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
)

// TestRecordsOfAPublicServer checks which artifacts a public server records. The licence restricts only artifacts in
// the server's own registry.
func TestRecordsOfAPublicServer(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name       string
		public     bool
		says       bundle.Redistribution
		repository string
		flavour    target.Flavour
		taken      bool
	}{
		{"private", false, "", "/prebake/driver", target.Proprietary, true},
		{"public", true, "", "/prebake/driver", target.Open, false},
		{"public by default repository", true, "", "", target.Proprietary, false},
		{"public, user space goes", true, bundle.RedistributeUserspace, "/prebake/driver", target.Open, true},
		{"public, proprietary modules do not", true, bundle.RedistributeUserspace, "/prebake/driver", target.Proprietary,
			false},
		{"public, all goes", true, bundle.RedistributeAll, "/prebake/driver", target.Proprietary, true},
		{"elsewhere", true, "", "registry.example.com/prebake/driver", target.Proprietary, true},
	} {
		c, _ := open(t)
		c.Repository, c.Public, c.Redistribute = "/prebake/driver", row.public, row.says
		_, err := c.AddArtifact(t.Context(), api.NewArtifact{
			Digest: digest("1"), Repository: row.repository, Fingerprint: fingerA,
			Driver:  target.Driver{Version: v261, Flavour: row.flavour},
			Kernels: []target.Kernel{{BuildID: first, Board: "lakitu"}},
		})
		if row.taken && err != nil || !row.taken &&
			(!fault.Is(err, fault.PublishRefused) || !strings.Contains(fault.Hint(err), "--redistribute")) {
			t.Errorf("%s: AddArtifact = %v, hint %q; want accepted %t, or publish-refused with --redistribute in the hint",
				row.name, err, fault.Hint(err), row.taken)
		}
	}
}
