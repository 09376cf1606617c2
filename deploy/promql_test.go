package deploy_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/grafana/grafana-foundation-sdk/go/cog"
	"github.com/grafana/grafana-foundation-sdk/go/dashboard"
	promquery "github.com/grafana/grafana-foundation-sdk/go/prometheus"
	"github.com/grafana/grafana-foundation-sdk/go/stat"
	"github.com/grafana/grafana-foundation-sdk/go/timeseries"
	"github.com/prometheus/prometheus/promql/parser"
	"go.yaml.in/yaml/v3"
)

const monitoring = "deploy/kubernetes/components/monitoring/"

// rules has the fields of a PrometheusRule that the tests check. TestClusterTakesComponents checks all fields.
type rules struct {
	Spec struct {
		Groups []struct {
			Rules []alert
		}
	}
}

type alert struct {
	Alert, Expr, For    string
	Labels, Annotations map[string]string
}

// expressions returns all PromQL expressions of the manifests. The key says where an expression is.
func expressions(t *testing.T) map[string]string {
	t.Helper()
	all := map[string]string{}
	var r rules
	if err := yaml.Unmarshal([]byte(read(t, monitoring+"rules.yaml")), &r); err != nil {
		t.Fatal(err)
	}
	for _, g := range r.Spec.Groups {
		for _, rule := range g.Rules {
			all["alert "+rule.Alert] = rule.Expr
			if rule.For == "" || rule.Labels["severity"] == "" || rule.Annotations["summary"] == "" ||
				rule.Annotations["description"] == "" {
				t.Errorf("alert %s = %+v; want for, severity, summary and description", rule.Alert, rule)
			}
		}
	}
	alerts := len(all)
	for _, p := range panels(t) {
		for _, target := range p.Targets {
			all[fmt.Sprintf("panel %d, %s %s", p.ID, p.Title, target.RefID)] = target.Expr
		}
	}
	if alerts < 8 || len(all) < alerts+10 {
		t.Fatalf("%d alerts, %d expressions in all; want more", alerts, len(all))
	}
	all["KEDA's value"] = scaledObject(t).Spec.Triggers[0].Metadata["valueLocation"]
	return all
}

type panel struct {
	ID          int
	Type, Title string
	Targets     []struct{ RefID, Expr string }
}

func panels(t *testing.T) []panel {
	t.Helper()
	var d struct{ Panels []panel }
	if err := json.Unmarshal([]byte(read(t, monitoring+"prebake.json")), &d); err != nil {
		t.Fatal(err)
	}
	return d.Panels
}

type scaled struct {
	Kind string
	Spec struct {
		Target   struct{ Name string } `yaml:"scaleTargetRef"`
		Triggers []struct {
			Type     string
			Metadata map[string]string
		}
	}
}

func scaledObject(t *testing.T) scaled {
	t.Helper()
	var s scaled
	if err := yaml.Unmarshal([]byte(read(t, "deploy/kubernetes/components/keda/scaledobject.yaml")), &s); err != nil {
		t.Fatal(err)
	}
	if s.Kind != "ScaledObject" || len(s.Spec.Triggers) != 1 {
		t.Fatalf("the first object is %+v; want a ScaledObject with one trigger", s)
	}
	return s
}

// TestScaledObject checks that KEDA's setting valueLocation is a valid Prometheus selector, and that KEDA asks the
// server's address.
func TestScaledObject(t *testing.T) {
	t.Parallel()
	s := scaledObject(t)
	builder, _ := object(t, "Deployment/"+s.Spec.Target.Name)
	if builder.Metadata.Namespace != "prebake-privileged" {
		t.Errorf("KEDA scales %s of %s", s.Spec.Target.Name, builder.Metadata.Namespace)
	}
	trigger := s.Spec.Triggers[0]
	if _, err := parser.ParseMetricSelector(trigger.Metadata["valueLocation"]); err != nil {
		t.Errorf("KEDA's valueLocation %q: %v", trigger.Metadata["valueLocation"], err)
	}
	server := ""
	_, c := object(t, "Deployment/prebake-builder")
	for _, arg := range c.Args {
		if v, ok := strings.CutPrefix(arg, "--server="); ok {
			server = v
		}
	}
	if got := trigger.Metadata["url"]; got != server+"/metrics" {
		t.Errorf("KEDA asks %s; want the server of the builders, %s", got, server)
	}
}

// upMetric is a metric of Prometheus itself. It says whether Prometheus could read a program's metrics.
const upMetric = "up"

// conditionMetric is a metric of kube-state-metrics. It has one series for each condition of a node and each possible
// status. The value is 1 for the status that the condition has, and 0 for the others.
const conditionMetric = "kube_node_status_condition"

// nameLabel is the label that has a metric's name ("Data model", prometheus.io/docs).
const nameLabel = "__name__"

// TestMetricsExist parses every expression as Prometheus does, and checks that a running server exports its metrics and
// labels. A test of fetcher/internal/report checks the fetcher's metrics.
func TestMetricsExist(t *testing.T) {
	t.Parallel()
	known := serverMetrics(t)
	for where, expr := range expressions(t) {
		tree, err := parser.ParseExpr(expr)
		if err != nil {
			t.Errorf("%s: %v\n%s", where, err, expr)
			continue
		}
		parser.Inspect(tree, func(node parser.Node, _ []parser.Node) error {
			selector, ok := node.(*parser.VectorSelector)
			if !ok || selector.Name == upMetric || selector.Name == conditionMetric ||
				strings.HasPrefix(selector.Name, "prebake_fetcher_") {
				return nil
			}
			has, ok := known[selector.Name]
			if !ok {
				t.Errorf("%s: the server exports no metric %q", where, selector.Name)
				return nil
			}
			for _, m := range selector.LabelMatchers {
				if m.Name != nameLabel && !slices.Contains(has, m.Name) {
					t.Errorf("%s: %s has no label %q, but %v", where, selector.Name, m.Name, has)
				}
			}
			return nil
		})
	}
}

// TestNodeAlert checks that the alert about nodes without a driver does not fire for a node that was removed. For the
// difference of the two ranges, the last metrics of such a node say that it has GPUs and is not ready. The difference
// must be shorter than the alert's "for".
func TestNodeAlert(t *testing.T) {
	t.Parallel()
	var r rules
	if err := yaml.Unmarshal([]byte(read(t, monitoring+"rules.yaml")), &r); err != nil {
		t.Fatal(err)
	}
	var all []alert
	for _, g := range r.Spec.Groups {
		all = append(all, g.Rules...)
	}
	for _, rule := range all {
		if rule.Alert != "PrebakeNodeWithoutDriver" {
			continue
		}
		tree, err := parser.ParseExpr(rule.Expr)
		if err != nil {
			t.Fatal(err)
		}
		ranges := map[string]time.Duration{}
		parser.Inspect(tree, func(node parser.Node, _ []parser.Node) error {
			if m, ok := node.(*parser.MatrixSelector); ok {
				if v, ok := m.VectorSelector.(*parser.VectorSelector); ok {
					ranges[v.Name] = m.Range
				}
			}
			return nil
		})
		wait, err := time.ParseDuration(rule.For)
		gpus, ready := ranges["prebake_fetcher_gpus_present"], ranges["prebake_fetcher_ready"]
		if err != nil || ready == 0 || gpus <= ready || gpus-ready >= wait {
			t.Errorf("ranges %v, for %s (%v); want gpus_present longer than ready, and by less than for", ranges, rule.For, err)
		}
		return
	}
	t.Error("there is no alert PrebakeNodeWithoutDriver")
}

// TestDashboard checks the dashboard with the types that Grafana generates from its own schema.
func TestDashboard(t *testing.T) {
	t.Parallel()
	runtime := cog.NewRuntime()
	runtime.RegisterPanelcfgVariant(stat.VariantConfig())
	runtime.RegisterPanelcfgVariant(timeseries.VariantConfig())
	runtime.RegisterDataqueryVariant(promquery.VariantConfig())
	text := read(t, monitoring+"prebake.json")
	strict := func(text string) error {
		var d dashboard.Dashboard //nolint:staticcheck // the format that dashboards in a ConfigMap have; its successor is a Kubernetes object
		err := errors.Join(d.UnmarshalJSONStrict([]byte(text)), d.Validate())
		if err == nil || err.Error() == "" { // the library returns lists of errors that have no entries
			return nil
		}
		return err
	}
	if err := strict(text); err != nil {
		t.Error(err)
	}
	for _, row := range []struct{ from, to string }{
		{`"gridPos"`, `"gridPosition"`}, {`"colorMode": "value"`, `"colourMode": "value"`}, {`"expr"`, `"query"`},
	} {
		if bad := strings.Replace(text, row.from, row.to, 1); bad == text || strict(bad) == nil {
			t.Errorf("a dashboard with %s for %s passed", row.to, row.from)
		}
	}
	ids := map[int]bool{}
	for _, p := range panels(t) {
		if ids[p.ID] || p.Title == "" || len(p.Targets) == 0 {
			t.Errorf("panel %d %q: %d targets, id used before %v", p.ID, p.Title, len(p.Targets), ids[p.ID])
		}
		ids[p.ID] = true
	}
}
