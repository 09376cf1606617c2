// Package policy reads the file in which a node's owner says what the node may load: whose signatures count for which
// statement, and which artifacts are refused. It does not decide about artifacts; package trust does.
package policy

import (
	"bytes"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/snapshot"
	"github.com/prebake/prebake/pkg/trust"
)

// File is a policy file.
type File struct {
	// Version is the version of the format: 1.
	Version int `json:"version" yaml:"version" jsonschema:"enum=1"`
	// Roles are groups of signers, by name. For example, one role is a farm, and another role is a party that builds
	// everything again.
	Roles map[string]Role `json:"roles" yaml:"roles" jsonschema:"minProperties=1"`
	// TrustedRoot is a file with a Sigstore trusted root (trusted_root.json). Roles with identities need it. A relative
	// path begins at the policy's folder.
	TrustedRoot string `json:"trustedRoot,omitempty" yaml:"trustedRoot"`
	// Signatures lists the required statements, and how many signers of a role must sign each. Provenance and kernel match
	// are always required. A policy may require others, too.
	Signatures []Signatures `json:"signatures" yaml:"signatures" jsonschema:"minItems=2"`
	// Builders are the builder ids that provenance may name. Default: any.
	Builders []string `json:"builders,omitempty" yaml:"builders" jsonschema:"minItems=1,uniqueItems=true"`
	// Sources are the places from which the build's inputs may come: URIs that end with a slash, such as gs://cos-tools/.
	// Default: any.
	Sources []string `json:"sources,omitempty" yaml:"sources" jsonschema:"minItems=1,uniqueItems=true"`
	// LoadTest is any or tested. The value tested demands that a kernel with the same ABI fingerprint has loaded the
	// modules. Default: any. Modules that failed their load test are refused in any case.
	LoadTest string `json:"loadTest,omitempty" yaml:"loadTest" jsonschema:"enum=any,enum=tested"`
	// MaxAgeDays is the highest age in days of a driver's build when a node takes the driver for the first time. Default:
	// no limit.
	MaxAgeDays int `json:"maxAgeDays,omitempty" yaml:"maxAgeDays" jsonschema:"minimum=1,maximum=36500"`
	// MinimumVersions are the oldest accepted driver versions, one for each branch. A driver of a branch without an entry
	// must be newer than all entries. Default: any version.
	MinimumVersions []string `json:"minimumVersions,omitempty" yaml:"minimumVersions" jsonschema:"minItems=1,uniqueItems=true"`
	// NodeBuilds lets nodes compile what nobody published, and load it. For such drivers, only minimumVersions and revoked
	// of this file apply, and only the node's own signature is needed. Default: false.
	NodeBuilds bool `json:"nodeBuilds,omitempty" yaml:"nodeBuilds"`
	// Revoked are digests of artifacts that a node never loads, no matter who signed them.
	Revoked []string `json:"revoked,omitempty" yaml:"revoked" jsonschema:"uniqueItems=true"`
	// Snapshot requires that a signed list of the farm contains the artifact to install. The command builder snapshot
	// makes the list. Default: no list is read.
	Snapshot *Snapshot `json:"snapshot,omitempty" yaml:"snapshot"`
}

// Snapshot says where the list comes from, and how strictly it applies.
type Snapshot struct {
	// From is the list's folder: its http or https URL, or a path. A relative path begins at the policy's folder.
	From string `json:"from" yaml:"from" jsonschema:"minLength=1"`
	// Root is a file with the trusted root metadata, such as 1.root.json. Newer root metadata comes from the list's
	// folder. A relative path begins at the policy's folder.
	Root string `json:"root" yaml:"root" jsonschema:"minLength=1"`
	// MaxAgeHours is the highest age in hours of the list when a node takes something new. Default: the list counts until
	// it expires.
	MaxAgeHours int `json:"maxAgeHours,omitempty" yaml:"maxAgeHours" jsonschema:"minimum=1,maximum=876000"`
	// AllowUnlisted accepts artifacts that are not in the list. Artifacts that the list has withdrawn are still refused.
	// Default: false.
	AllowUnlisted bool `json:"allowUnlisted,omitempty" yaml:"allowUnlisted"`
	// Optional accepts something new if the node can get no list, or only an expired one. It does not accept anything if
	// the list that the source serves fails verification. The last valid list still decides what is withdrawn. Default:
	// false.
	Optional bool `json:"optional,omitempty" yaml:"optional"`
}

// Role is a group of signers.
type Role struct {
	Keys       []Key      `json:"keys,omitempty" yaml:"keys"`
	Identities []Identity `json:"identities,omitempty" yaml:"identities"`
}

// Key is one public key, or several of one file.
type Key struct {
	// File has public keys in PEM. A relative path begins at the policy's folder.
	File string `json:"file,omitempty" yaml:"file"`
	// PEM is the key itself.
	PEM string `json:"pem,omitempty" yaml:"pem"`
	// NotBefore and NotAfter are days (2026-12-31) or times (RFC 3339). Between them, a node takes something new that this
	// key signed. Artifacts that the node has already taken stay valid.
	NotBefore string `json:"notBefore,omitempty" yaml:"notBefore"`
	NotAfter  string `json:"notAfter,omitempty" yaml:"notAfter"`
}

// Identity is a name that a certificate must have.
type Identity struct {
	// Subject is the whole name. Pattern is a regular expression for the name. Set one of the two.
	Subject string `json:"subject,omitempty" yaml:"subject"`
	Pattern string `json:"pattern,omitempty" yaml:"pattern"`
	// Issuer is the URL of the OpenID Connect issuer.
	Issuer string `json:"issuer" yaml:"issuer"`
}

// Signatures requires signatures of one role on one statement.
type Signatures struct {
	// Statement is provenance, kernelMatch, testResult, reproduction or sbom.
	Statement string `json:"statement" yaml:"statement" jsonschema:"enum=provenance,enum=kernelMatch,enum=testResult,enum=reproduction,enum=sbom"`
	Role      string `json:"role" yaml:"role"`
	// Count is the required number of different keys or identities. Default: 1.
	Count int `json:"count,omitempty" yaml:"count" jsonschema:"minimum=1"`
}

var statements = map[string]string{
	"provenance": trust.PredicateProvenance, "kernelMatch": trust.PredicateKernelMatch,
	"testResult":   trust.PredicateTestResult,
	"reproduction": trust.PredicateReproduced, "sbom": trust.PredicateSBOM,
}

//go:embed policy.schema.json
var schema []byte

// Schema returns the JSON schema of a policy file.
func Schema() []byte { return bytes.Clone(schema) }

const (
	hint    = "see docs/examples/policy.yaml; to check the file in an editor: fetcher policy schema"
	maxFile = 1 << 20
)

// Policy is the content of a policy file, and of the files to which it refers.
type Policy struct {
	trust.Policy
	// NodeBuilds lets the node compile drivers itself.
	NodeBuilds bool
	// Snapshot has the file's settings for the list, with absolute paths, or is nil. Root is the content of the list's
	// root file.
	Snapshot *Snapshot
	Root     []byte
}

// Read reads a policy file, and the files to which it refers.
func Read(name string) (Policy, error) {
	p, err := read(name)
	if err != nil {
		if fault.Hint(err) != "" {
			return Policy{}, fmt.Errorf("read policy %s: %w", name, err)
		}
		return Policy{}, fault.Wrap(fault.Usage, fmt.Errorf("read policy %s: %w", name, err), hint)
	}
	return p, nil
}

func read(name string) (Policy, error) {
	data, err := readFile(name)
	if err != nil {
		return Policy{}, err
	}
	f, err := Parse(data)
	if err != nil {
		return Policy{}, err
	}
	p := Policy{NodeBuilds: f.NodeBuilds}
	if p.Policy, err = f.policy(filepath.Dir(name)); err != nil || f.Snapshot == nil {
		return p, err
	}
	p.Snapshot = new(*f.Snapshot)
	p.Root, err = p.Snapshot.read(filepath.Dir(name))
	return p, err
}

// read makes the paths of s absolute, and reads and checks the root file.
func (s *Snapshot) read(dir string) ([]byte, error) {
	switch {
	case s.From == "" || s.Root == "":
		return nil, errors.New("the field snapshot lacks the field from or the field root; want both")
	case s.MaxAgeHours < 0 || s.MaxAgeHours > 876000:
		return nil, fmt.Errorf("the field snapshot has maxAgeHours %d; want 1 to 876000", s.MaxAgeHours)
	}
	if !strings.Contains(s.From, "://") {
		abs, err := filepath.Abs(resolvePath(dir, s.From))
		if err != nil {
			return nil, fmt.Errorf("check the field snapshot: %w", err)
		}
		s.From = abs
	}
	root, err := readFile(resolvePath(dir, s.Root))
	if err == nil {
		_, err = snapshot.New(snapshot.Config{From: s.From, Root: root})
	}
	if err != nil {
		return nil, fmt.Errorf("check the field snapshot: %w", err)
	}
	return root, nil
}

func readFile(name string) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err == nil && len(data) > maxFile {
		err = fmt.Errorf("%s has more than %d bytes", name, maxFile)
	}
	return data, err
}

// Parse reads the text of a policy file. An unknown field is an error, because somebody may rely on it.
func Parse(data []byte) (*File, error) {
	if err := refuseEmpty(data); err != nil {
		return nil, err
	}
	dec := yaml.NewDecoder(bytes.NewReader(data))
	dec.KnownFields(true)
	var f File
	if err := dec.Decode(&f); err != nil {
		return nil, err
	}
	if err := dec.Decode(new(any)); !errors.Is(err, io.EOF) {
		return nil, errors.New("the file has more than one document")
	}
	if f.Version != 1 {
		return nil, fmt.Errorf("the file has format version %d; want version 1", f.Version)
	}
	return &f, nil
}

// refuseEmpty returns an error if a field has no value. Otherwise a list whose entries are all commented out would
// allow everything.
func refuseEmpty(data []byte) error {
	var fields map[string]yaml.Node
	if err := yaml.Unmarshal(data, &fields); err != nil {
		return nil // the parser reports this error
	}
	for name, n := range fields {
		if name == "revoked" && n.Kind == yaml.SequenceNode {
			continue // an empty list revokes nothing
		}
		if (n.Kind == yaml.SequenceNode || n.Kind == yaml.MappingNode) && len(n.Content) == 0 || n.Kind == yaml.ScalarNode &&
			(n.Tag == "!!null" || n.Value == "" || n.Value == "0") {
			return fmt.Errorf("line %d: the field %s is empty: give the field a value, or remove the field", n.Line, name)
		}
	}
	return nil
}

// policy converts the file into the policy type of package trust.
func (f *File) policy(dir string) (p trust.Policy, err error) {
	p = trust.Policy{Builders: f.Builders, Sources: f.Sources, MinVersions: f.MinimumVersions, Revoked: f.Revoked,
		MaxAge: time.Duration(f.MaxAgeDays) * 24 * time.Hour}
	if f.MaxAgeDays < 0 || f.MaxAgeDays > 36500 {
		return p, fmt.Errorf("maxAgeDays %d: want 1 to 36500", f.MaxAgeDays)
	}
	if f.LoadTest != "" {
		if p.LoadTest, err = trust.ParseLoadTestPolicy(f.LoadTest); err != nil {
			return p, err
		}
	}
	for _, source := range f.Sources {
		if u, err := url.Parse(source); err != nil || u.Scheme == "" || u.Host == "" && u.Path == "" ||
			!strings.HasSuffix(source, "/") || strings.Contains(source, "..") {
			return p, fmt.Errorf("source %.80q: want a URI that ends with a slash, such as gs://cos-tools/", source)
		}
	}
	for _, builder := range f.Builders {
		if builder == "" {
			return p, errors.New("the field builders has an empty entry; want the URI of a builder in each entry")
		}
	}
	names := make([]string, 0, len(f.Roles))
	for name := range f.Roles {
		names = append(names, name)
	}
	slices.Sort(names)
	identities := false
	for _, name := range names {
		role, err := f.Roles[name].role(name, dir)
		if err != nil {
			return p, fmt.Errorf("role %s: %w", name, err)
		}
		identities = identities || len(role.Identities) > 0
		p.Roles = append(p.Roles, role)
	}
	if f.TrustedRoot != "" {
		if p.Root, err = trust.ReadRoot(resolvePath(dir, f.TrustedRoot)); err != nil {
			return p, err
		}
	}
	if identities != (p.Root != nil) {
		return p, errors.New("the field trustedRoot and a role with identities go together: give both, or neither")
	}
	for i, s := range f.Signatures {
		predicate, ok := statements[s.Statement]
		if !ok {
			return p, fmt.Errorf("signatures, entry %d: statement %.60q: want provenance, kernelMatch, testResult, "+
				"reproduction or sbom", i+1, s.Statement)
		}
		count := s.Count
		if count == 0 {
			count = 1
		}
		p.Rules = append(p.Rules, trust.Rule{Statement: predicate, Role: s.Role, Count: count})
	}
	if len(p.Roles) == 0 {
		return p, errors.New("the field roles is missing or empty: without a role, no signature is trusted")
	}
	_, err = trust.NewVerifier(p) // reports rules that no signature can satisfy
	return p, err
}

func (r Role) role(name, dir string) (trust.Role, error) {
	role := trust.Role{Name: name}
	for i, k := range r.Keys {
		keys, err := k.keys(dir)
		if err != nil {
			return role, fmt.Errorf("read key %d: %w", i+1, err)
		}
		role.Keys = append(role.Keys, keys...)
	}
	for i, id := range r.Identities {
		if (id.Subject == "") == (id.Pattern == "") || id.Issuer == "" {
			return role, fmt.Errorf("identity %d: want the field issuer, and one of the fields subject and pattern", i+1)
		}
		role.Identities = append(role.Identities, trust.Identity{Subject: id.Subject, Pattern: id.Pattern, Issuer: id.Issuer})
	}
	if len(role.Keys)+len(role.Identities) == 0 {
		return role, errors.New("the role has no signer; want the field keys, the field identities, or both")
	}
	return role, nil
}

func (k Key) keys(dir string) ([]trust.RoleKey, error) {
	if (k.File == "") == (k.PEM == "") {
		return nil, errors.New("want exactly one of the fields file and pem")
	}
	text := []byte(k.PEM)
	if k.File != "" {
		var err error
		if text, err = readFile(resolvePath(dir, k.File)); err != nil {
			return nil, err
		}
	}
	parsed, err := trust.ParsePublicKeys(text)
	if err != nil {
		return nil, err
	}
	from, err := parseTime(k.NotBefore, 0)
	if err != nil {
		return nil, fmt.Errorf("read the field notBefore: %w", err)
	}
	until, err := parseTime(k.NotAfter, 24*time.Hour) // the key is valid until the end of that day
	if err != nil {
		return nil, fmt.Errorf("read the field notAfter: %w", err)
	}
	if !from.IsZero() && !until.IsZero() && !from.Before(until) {
		return nil, fmt.Errorf("notBefore %s is not before notAfter %s", k.NotBefore, k.NotAfter)
	}
	var keys []trust.RoleKey
	for _, key := range parsed {
		keys = append(keys, trust.RoleKey{Key: key, NotBefore: from, NotAfter: until})
	}
	return keys, nil
}

// parseTime reads a time (RFC 3339), or a day in UTC. A day means its beginning plus add.
func parseTime(text string, add time.Duration) (time.Time, error) {
	if text == "" {
		return time.Time{}, nil
	}
	if day, err := time.Parse(time.DateOnly, text); err == nil {
		return day.Add(add), nil
	}
	at, err := time.Parse(time.RFC3339, text)
	if err != nil {
		return at, fmt.Errorf("%.40q: want a day such as 2026-12-31, or a time such as 2026-12-31T12:00:00Z", text)
	}
	return at, nil
}

func resolvePath(dir, name string) string {
	if filepath.IsAbs(name) {
		return name
	}
	return filepath.Join(dir, name)
}

// Summary describes in lines of text what a policy requires.
func Summary(p Policy) []string {
	var lines []string
	add := func(format string, args ...any) { lines = append(lines, fmt.Sprintf(format, args...)) }
	day := func(t time.Time, open string) string {
		if t.IsZero() {
			return open
		}
		return t.UTC().Format(time.DateTime)
	}
	for _, r := range p.Roles {
		for _, k := range r.Keys {
			period := ""
			if !k.NotBefore.IsZero() || !k.NotAfter.IsZero() {
				period = fmt.Sprintf(", from %s to %s", day(k.NotBefore, "ever"), day(k.NotAfter, "ever"))
			}
			add("role %s: key %s%s", r.Name, k.Key.ID(), period)
		}
		for _, i := range r.Identities {
			add("role %s: %s", r.Name, i)
		}
	}
	for _, rule := range p.Rules {
		for name, predicate := range statements {
			if predicate == rule.Statement {
				add("needs %s signed by %d of role %s", name, rule.Count, rule.Role)
			}
		}
	}
	if p.LoadTest == trust.LoadTestTested {
		add("needs an artifact that passed the load test")
	}
	for _, l := range []struct {
		what string
		list []string
	}{{"builders", p.Builders}, {"sources", p.Sources}, {"minimum versions", p.MinVersions}} {
		if len(l.list) > 0 {
			add("%s: %s", l.what, strings.Join(l.list, ", "))
		}
	}
	if p.MaxAge > 0 {
		add("artifacts at most %d days old when a node first installs them", int(p.MaxAge.Hours()/24))
	}
	if p.NodeBuilds {
		add("nodes may compile drivers for themselves")
	}
	if len(p.Revoked) > 0 {
		add("%d digests revoked", len(p.Revoked))
	}
	if s := p.Snapshot; s != nil {
		add("%s", s)
	}
	return lines
}

// String describes in one line what a policy requires of the signed list.
func (s *Snapshot) String() string {
	text := "needs to be in the snapshot from " + s.From
	if s.AllowUnlisted {
		text = "must not be withdrawn in the snapshot from " + s.From
	}
	if s.MaxAgeHours > 0 {
		text += fmt.Sprintf(", at most %d hours old", s.MaxAgeHours)
	}
	if s.Optional {
		text += ", if there is a valid snapshot"
	}
	return text
}
