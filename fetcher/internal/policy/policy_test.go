package policy_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/fetcher/internal/policy"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/testkit"
	"github.com/prebake/prebake/pkg/testkit/snapshots"
	"github.com/prebake/prebake/pkg/trust"
)

// withKeys returns the text head with these keys in place of the farm's key.
func withKeys(keys string) string { return strings.Replace(head, "keys: [{file: farm.pub}]", keys, 1) }

// folder writes a policy with this text to a new folder, together with the keys that the example names. It returns the
// policy's path.
func folder(t *testing.T, text string) string {
	t.Helper()
	dir := t.TempDir()
	for name, content := range map[string][]byte{
		"policy.yaml": []byte(text), "farm.pub": testkit.NewKey(t).PEM(t), "rebuilder.pub": testkit.NewKey(t).PEM(t),
		"root.json": testkit.NewAuthority(t).Root(t, nil, nil), "1.root.json": listRoot(t),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return filepath.Join(dir, "policy.yaml")
}

func listRoot(t *testing.T) []byte {
	t.Helper()
	root, err := os.ReadFile(filepath.Join(snapshots.New(t, time.Now()).Dir, "1.root.json"))
	if err != nil {
		t.Fatal(err)
	}
	return root
}

// TestSnapshot checks that Read reads the snapshot settings, and that their relative paths count from the policy's
// folder.
func TestSnapshot(t *testing.T) {
	t.Parallel()
	name := folder(t, head+tail+
		"snapshot: {from: list, root: 1.root.json, maxAgeHours: 48, allowUnlisted: true, optional: true}\n")
	p, err := policy.Read(name)
	if err != nil {
		t.Fatal(err)
	}
	want := &policy.Snapshot{From: filepath.Join(filepath.Dir(name), "list"), Root: "1.root.json", MaxAgeHours: 48,
		AllowUnlisted: true, Optional: true}
	if diff := cmp.Diff(want, p.Snapshot); diff != "" || len(p.Root) == 0 {
		t.Errorf("Read: root of %d bytes, snapshot (-want +got):\n%s", len(p.Root), diff)
	}
	said := strings.Join(policy.Summary(p), "\n")
	if !strings.Contains(said,
		"must not be withdrawn in the snapshot from "+want.From+", at most 48 hours old, if there is a valid snapshot") {
		t.Errorf("Summary = %s", said)
	}
}

// TestExample checks that Read accepts the example policy in docs, and reads its values.
func TestExample(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("../../../docs/examples/policy.yaml")
	if err != nil {
		t.Fatal(err)
	}
	p, err := policy.Read(folder(t, string(text)))
	if err != nil {
		t.Fatal(err)
	}
	if len(p.Roles) != 2 || len(p.Rules) != 3 || p.LoadTest != trust.LoadTestTested || p.MaxAge != 400*24*time.Hour {
		t.Errorf("Read = %+v", p)
	}
	// notAfter names the last day on which the key is valid, so its time is the start of the next day.
	if until := p.Roles[0].Keys[0].NotAfter; until != time.Date(2028, 1, 1, 0, 0, 0, 0, time.UTC) {
		t.Errorf("notAfter = %v", until)
	}
	said := strings.Join(policy.Summary(p), "\n")
	for _, want := range []string{"role farm: key ", "to 2028-01-01 00:00:00", "signed by 1 of role rebuilder",
		"needs an artifact that passed the load test", "535.261.03, 550.163.01"} {
		if !strings.Contains(said, want) {
			t.Errorf("Summary lacks %q:\n%s", want, said)
		}
	}
}

const (
	head = "version: 1\nroles:\n  farm:\n    keys: [{file: farm.pub}]\n"
	tail = "signatures:\n  - {statement: provenance, role: farm}\n  - {statement: kernelMatch, role: farm}\n"
)

func TestRefuses(t *testing.T) {
	t.Parallel()
	for name, row := range map[string]struct{ text, words string }{
		"nothing":               {"", "EOF"},
		"another version":       {"version: 2\n", "version 2"},
		"a field nobody knows":  {head + tail + "revoke: [x]\n", "revoke"},
		"a typing error inside": {strings.Replace(head, "keys", "key", 1) + tail, "key"},
		"two documents":         {head + tail + "---\n" + head, "more than one document"},
		"no roles":              {"version: 1\n" + tail, "without a role"},
		"an empty role":         {"version: 1\nroles: {farm: {}}\n" + tail, "role farm: the role has no signer; want the field keys"},
		"a file that is away":   {strings.Replace(head, "farm.pub", "away.pub", 1) + tail, "away.pub"},
		"file and pem": {strings.Replace(head, "{file: farm.pub}", "{file: farm.pub, pem: x}", 1) + tail,
			"want exactly one of the fields file and pem"},
		"no key": {strings.Replace(head, "{file: farm.pub}", "{pem: hello}", 1) + tail, "key 1"},
		"a day that is none": {strings.Replace(head, "farm.pub", "farm.pub, notAfter: 2026-13-01", 1) + tail,
			"notAfter"},
		"a period of nothing": {strings.Replace(head, "farm.pub",
			"farm.pub, notBefore: 2026-02-02, notAfter: 2026-02-01", 1) + tail, "is not before"},
		"unknown statement": {head + tail + "  - {statement: oath, role: farm}\n", "oath"},
		"unknown role":      {head + tail + "  - {statement: reproduction, role: x}\n", `role "x"`},
		"too many": {head + strings.Replace(tail, "role: farm", "role: farm, count: 2", 1),
			"which has 1 keys and identities"},
		"no kernel match": {head + strings.Replace(tail, "  - {statement: kernelMatch, role: farm}\n", "", 1),
			"kernel match"},
		"identities alone": {withKeys("identities: [{subject: a@example.com, issuer: https://x}]") + tail,
			"trustedRoot"},
		"a root alone": {head + "trustedRoot: root.json\n" + tail, "trustedRoot"},
		"an identity of nobody": {withKeys("identities: [{issuer: https://x}]") + "trustedRoot: root.json\n" + tail,
			"identity 1"},
		"a broken pattern": {withKeys("identities: [{pattern: '(', issuer: https://x}]") +
			"trustedRoot: root.json\n" + tail, "missing closing"},
		"a load test of sorts": {head + tail + "loadTest: maybe\n", "maybe"},
		"an age below nothing": {head + tail + "maxAgeDays: -1\n", "maxAgeDays"},
		"no digest":            {head + tail + "revoked: [abc]\n", "abc"},
		"no version":           {head + tail + "minimumVersions: [new]\n", "new"},
		"builders of nobody":   {head + tail + "builders: []\n", "builders is empty"},
		"sources left out":     {head + tail + "sources:\n# - gs://cos-tools/\n", "sources is empty"},
		"no age":               {head + tail + "maxAgeDays: 0\n", "maxAgeDays is empty"},
		"a source like others": {head + tail + "sources: [gs://cos-tools]\n", "ends with a slash"},
		"a source of all":      {head + tail + "sources: ['']\n", "ends with a slash"},
		"a key in two roles": {strings.Replace(head, "  farm:", "  other:\n    keys: [{file: farm.pub}]\n  farm:",
			1) + tail, "listed twice"},
		"a snapshot without a root": {head + tail + "snapshot: {from: https://x/list}\n",
			"lacks the field from or the field root"},
		"a snapshot from elsewhere": {head + tail + "snapshot: {from: 'ftp://x', root: 1.root.json}\n", "ftp://x"},
		"a snapshot's root of nobody": {head + tail + "snapshot: {from: list, root: root.json}\n",
			"read root metadata of snapshot"},
		"a snapshot's root away": {head + tail + "snapshot: {from: list, root: away.json}\n", "away.json"},
		"a snapshot of old": {head + tail + "snapshot: {from: list, root: 1.root.json, maxAgeHours: -1}\n",
			"maxAgeHours"},
		"a rule of no snapshot": {head + tail + "snapshot: {from: list, root: 1.root.json, unlisted: true}\n",
			"unlisted"},
		"no snapshot":         {head + tail + "snapshot: {}\n", "snapshot is empty"},
		"an alias that grows": {"a: &a [1,1]\nb: &b [*a,*a]\n" + head, "field"},
	} {
		_, err := policy.Read(folder(t, row.text))
		if !fault.Is(err, fault.Usage) || !strings.Contains(err.Error(), row.words) || fault.Hint(err) == "" {
			t.Errorf("%s: Read = %v (%v), hint %q; want kind usage and %q", name, err, fault.Of(err), fault.Hint(err), row.words)
		}
	}
	if _, err := policy.Read(filepath.Join(t.TempDir(), "away")); !fault.Is(err, fault.Usage) {
		t.Errorf("Read of no file = %v", err)
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(head + tail))
	f.Add([]byte("a: &a [*a]"))
	f.Fuzz(func(t *testing.T, data []byte) {
		if p, err := policy.Parse(data); err == nil && p.Version != 1 {
			t.Errorf("Parse took version %d", p.Version)
		}
	})
}
