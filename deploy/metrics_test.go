package deploy_test

import (
	"cmp"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// metric is one metric, as the source of a program declares it.
type metric struct {
	program, name, kind, help string
	labels                    []string
}

// TestGeneratedMetrics checks that the table on the page equals the metrics that the programs declare.
func TestGeneratedMetrics(t *testing.T) {
	t.Parallel()
	var all []metric
	for _, name := range files(t, ".go") {
		if strings.HasSuffix(name, "_test.go") || !strings.Contains(read(t, name), "client_golang/prometheus\"") {
			continue
		}
		file, err := parser.ParseFile(token.NewFileSet(), filepath.Join(root, name), nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		program, _, _ := strings.Cut(name, "/")
		all = append(all, metricsOf(program, file)...)
	}
	slices.SortFunc(all, func(a, b metric) int {
		return cmp.Or(cmp.Compare(a.program, b.program), cmp.Compare(a.name, b.name))
	})
	all = slices.CompactFunc(all, func(a, b metric) bool { return a.program == b.program && a.name == b.name })
	var table strings.Builder
	table.WriteString("| program | metric | labels | meaning |\n|---|---|---|---|\n")
	for _, m := range all {
		fmt.Fprintf(&table, "| %s | `%s` %s | %s | %s |\n", m.program, m.name, m.kind, strings.Join(m.labels, ", "), m.help)
	}
	checkPart(t, "docs/reference/metrics.md", "metrics", table.String())
}

// metricsOf finds the metrics that a file declares. It reads calls such as
// prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: …}, labels) and prometheus.NewDesc(name, help, labels, nil). It
// also reads calls of functions in the file that wrap such a call, and put a prefix before the name.
func metricsOf(program string, file *ast.File) (all []metric) {
	wrappers := map[string]metric{}
	ast.Inspect(file, func(n ast.Node) bool {
		if a, ok := n.(*ast.AssignStmt); ok && len(a.Lhs) == 1 {
			if f, ok := a.Rhs[0].(*ast.FuncLit); ok {
				ast.Inspect(f, func(n ast.Node) bool {
					if m, ok := parseMetric(n); ok && strings.HasSuffix(m.name, "_") {
						wrappers[fmt.Sprint(a.Lhs[0])] = m
					}
					return true
				})
			}
		}
		if m, ok := parseMetric(n); ok && !strings.HasSuffix(m.name, "_") {
			m.program = program
			all = append(all, m)
		}
		return true
	})
	ast.Inspect(file, func(n ast.Node) bool {
		if call, ok := n.(*ast.CallExpr); ok && len(call.Args) == 2 {
			if m, ok := wrappers[fmt.Sprint(call.Fun)]; ok {
				all = append(all, metric{program: program, name: m.name + text(call.Args[0]), kind: m.kind,
					help: text(call.Args[1])})
			}
		}
		return true
	})
	return all
}

// parseMetric reads one call of the Prometheus library. ok is false if the node is no such call.
func parseMetric(n ast.Node) (m metric, ok bool) {
	call, ok := n.(*ast.CallExpr)
	if !ok || len(call.Args) == 0 {
		return m, false
	}
	fun, ok := call.Fun.(*ast.SelectorExpr)
	if !ok || fmt.Sprint(fun.X) != "prometheus" {
		return m, false
	}
	kind, isNew := strings.CutPrefix(fun.Sel.Name, "New")
	if isNew && kind == "Desc" {
		return metric{name: text(call.Args[0]), help: text(call.Args[1]), labels: texts(call.Args[2])}, true
	}
	opts, ok := call.Args[0].(*ast.CompositeLit)
	if !isNew || !ok {
		return m, false
	}
	m.kind = strings.ToLower(strings.TrimSuffix(strings.TrimSuffix(kind, "Vec"), "Func"))
	for _, e := range opts.Elts {
		field, ok := e.(*ast.KeyValueExpr)
		if !ok {
			continue
		}
		switch fmt.Sprint(field.Key) {
		case "Namespace":
			m.name = text(field.Value) + "_" + m.name
		case "Name":
			m.name += text(field.Value)
		case "Help":
			m.help = text(field.Value)
		case "ConstLabels":
			m.labels = texts(field.Value)
		}
	}
	if len(call.Args) > 1 && strings.HasSuffix(kind, "Vec") {
		m.labels = texts(call.Args[1])
	}
	return m, m.name != ""
}

// text returns the value of a string constant in the source; "" means that the expression is no string constant.
func text(e ast.Expr) string {
	switch e := e.(type) {
	case *ast.BasicLit:
		if s, err := strconv.Unquote(e.Value); err == nil {
			return s
		}
	case *ast.BinaryExpr:
		return text(e.X) + text(e.Y)
	}
	return ""
}

// texts returns the strings of a list, or the keys of a map.
func texts(e ast.Expr) (all []string) {
	list, ok := e.(*ast.CompositeLit)
	if !ok {
		return nil
	}
	for _, e := range list.Elts {
		if pair, ok := e.(*ast.KeyValueExpr); ok {
			e = pair.Key
		}
		all = append(all, text(e))
	}
	return all
}
