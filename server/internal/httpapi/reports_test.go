package httpapi_test

import (
	"fmt"
	"testing"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
)

// TestReports sends reports of nodes with the typed client. The artifact must stay published, because all reports come
// from one network.
func TestReports(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	url := serve(t)
	c := api.NewClient(url, token, nil)
	d := target.Driver{Version: "535.261.03", Flavour: target.Open}
	_, err := c.AddArtifact(ctx, api.NewArtifact{Digest: digest, Fingerprint: finger, Driver: d,
		Kernels: []target.Kernel{{BuildID: "17800.0.47", Board: "lakitu"}}})
	check(t, err)
	r := api.NodeReport{BuildID: "17800.0.47", Board: "lakitu", Driver: d, Digest: digest, Outcome: api.NotLoad,
		Class: fault.Rejected.String(), Message: "unknown symbol"}
	for i := range 5 {
		r.Node = fmt.Sprintf("%064x", i)
		check(t, c.Report(ctx, r))
	}
	all, err := c.Reports(ctx, digest)
	if err != nil || len(all) != 1 || all[0].Failed != 5 {
		t.Errorf("Reports() = %+v, %v; want 5 failures", all, err)
	}
	if q, err := c.Quarantine(ctx); err != nil || q == nil || len(q) != 0 {
		t.Errorf("Quarantine() = %+v, %v; want none, because all reports come from one network", q, err)
	}
	if _, err := c.Lift(ctx, digest); !fault.Is(err, fault.Mismatch) {
		t.Errorf("Lift(published) = %v; want mismatch", err)
	}
	if err := api.NewClient(url, "", nil).Report(ctx, r); !fault.Is(err, fault.Unauthorized) {
		t.Errorf("Report() without a token = %v; want unauthorized", err)
	}
}
