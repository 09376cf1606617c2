package tarball

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/prebake/prebake/builder/internal/sign"
	"github.com/prebake/prebake/pkg/cosbucket"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/trust"
)

// Label is a label that a builder set on a driver version.
type Label struct {
	// Label is DEFAULT, LATEST or a branch such as R535.
	Label string `json:"label"`
	// GPUType is the gpu_type of the row in gpu_driver_versions that has the label. "" stands for the label's own object,
	// such as gpu_default_version, which the installers of older milestones read.
	GPUType string `json:"gpuType,omitempty"`
	Version string `json:"version"`
	// Builder is the URI of the builder that set the label. No other builder may move or remove the label.
	Builder string `json:"builder"`
	// Declared is true if an operator asked for the label, and false for a copy from COS's own list.
	Declared bool `json:"declared,omitempty"`
}

func (l Label) compare(o Label) int {
	return cmp.Or(strings.Compare(l.Label, o.Label), strings.Compare(l.GPUType, o.GPUType),
		strings.Compare(l.Version, o.Version), strings.Compare(l.Builder, o.Builder))
}

func (l Label) check(x Index) error {
	if err := target.CheckLabel(l.Label, l.Version); err != nil {
		return err
	}
	if _, ok := x.installable(l.Version); !ok {
		return fmt.Errorf("driver version %.40q is not in the index", l.Version)
	}
	if l.Builder == "" {
		return errors.New("the label does not name its builder")
	}
	return nil
}

// installable returns the index's entry of a version that Google's installer can use. It returns false if the index has
// no such entry.
func (x Index) installable(version string) (Entry, bool) {
	i := slices.IndexFunc(x.Drivers, func(e Entry) bool { return e.Version == version && forInstaller(e.Driver) })
	if i < 0 {
		return Entry{}, false
	}
	return x.Drivers[i], true
}

// Labelling describes the wanted labels of one COS build's drivers.
type Labelling struct {
	Kernel target.Kernel
	// Builder is the URI of the builder that sets the labels. Labels of other builders stay.
	Builder string
	// Declared maps each label that an operator declared to its version. "" means that the version is not known now; the
	// label stays as it is.
	Declared map[string]string
	// FromCOS maps each of COS's labels to its version at COS. Declared has precedence.
	FromCOS map[string]string
	// Complete is true if Declared and FromCOS have all labels that Builder wants. Then SetLabels removes Builder's other
	// labels.
	Complete bool
	// Signer signs the index and the lists.
	Signer *sign.Signer
	// Verifier verifies what was published before. If it is nil, only Signer's key is trusted.
	Verifier *trust.Verifier
}

// Labelled is the result of a labelling.
type Labelled struct {
	// URL is the URL of gpu_driver_versions.
	URL string `json:"url"`
	// Labels maps the wanted labels that are set now to their versions.
	Labels map[string]string `json:"labels,omitempty"`
	// Absent lists the declared labels whose version is not published in this bucket. SetLabels does not change them.
	Absent []string `json:"absent,omitempty"`
	// Existed is true if nothing had to be changed.
	Existed bool `json:"existed"`
	// Unsigned has the same meaning as in [Report].
	Unsigned []string `json:"unsigned,omitempty"`
}

// lister lists the drivers of a COS build, as a COS release bucket does.
type lister interface {
	Drivers(ctx context.Context, k target.Kernel) (cosbucket.DriverList, error)
}

// COSLabels returns the labels of a COS release bucket for a COS build, with their versions. If the COS build has no
// list of drivers, the result is empty.
func COSLabels(ctx context.Context, b lister, k target.Kernel) (map[string]string, error) {
	list, err := b.Drivers(ctx, k)
	if err != nil && !fault.Is(err, fault.InputMissing) {
		return nil, err
	}
	found := map[string]string{}
	maps.Copy(found, list.Branches)
	for label, version := range map[string]string{"DEFAULT": list.Default, "LATEST": list.Latest} {
		if version != "" {
			found[label] = version
		}
	}
	return found, nil
}

// SetLabels sets labels in gpu_driver_versions. A version gets a label only if its tarball in the bucket is complete
// and signed. If somebody else set a declared label on another version, the error is [fault.PublishRefused] and nothing
// changes.
//
// The index must list every label with its builder, even if SetLabels is interrupted:
//   - New labels go to the index before they are set.
//   - Old labels leave the index after they are removed everywhere else.
func SetLabels(ctx context.Context, b *Bucket, l Labelling) (Labelled, error) {
	got, err := setLabels(ctx, b, l)
	if err != nil {
		return Labelled{}, fmt.Errorf("set the labels of drivers for %s: %w", l.Kernel, err)
	}
	return got, nil
}

func setLabels(ctx context.Context, b *Bucket, l Labelling) (_ Labelled, err error) {
	if err := l.check(); err != nil {
		return Labelled{}, err
	}
	p := &publisher{Release: Release{Kernel: l.Kernel, Signer: l.Signer}, bucket: b, verifier: l.Verifier,
		report: Report{Existed: true}}
	if p.verifier == nil {
		if p.verifier, err = l.Signer.Verifier(); err != nil {
			return Labelled{}, err
		}
	}
	url := b.URL(cosbucket.DriverVersionsBinName(l.Kernel))
	have, _, err := b.readSmall(ctx, IndexName(l.Kernel), maxIndex)
	if err != nil {
		return Labelled{}, err
	}
	if have == nil { // without an index nothing is published, and nothing has a label
		return Labelled{URL: url, Absent: slices.Sorted(maps.Keys(l.Declared)), Existed: true}, nil
	}
	var c claims
	if err := p.updateLabels(ctx, func(x Index) (_ []Label, err error) {
		if c, err = p.claim(ctx, x, l); err != nil {
			return nil, err
		}
		others := slices.DeleteFunc(slices.Clone(x.Labels), func(have Label) bool { return isLabelled(c.want, have) })
		return append(others, c.want...), nil
	}); err != nil {
		return Labelled{}, err
	}
	if len(c.want)+len(c.drop) > 0 {
		if err := p.updateVersions(ctx, withLabels(c.drop, c.want)); err != nil {
			return Labelled{}, err
		}
		if err := p.updateVersionObjects(ctx, c); err != nil {
			return Labelled{}, err
		}
	}
	if len(c.drop) > 0 {
		if err := p.updateLabels(ctx, func(x Index) ([]Label, error) {
			return slices.DeleteFunc(slices.Clone(x.Labels), func(have Label) bool { return isLabelled(c.drop, have) }), nil
		}); err != nil {
			return Labelled{}, err
		}
	}
	return Labelled{URL: url, Labels: c.given, Absent: c.absent, Existed: p.report.Existed,
		Unsigned: p.report.Unsigned}, nil
}

func (l Labelling) check() error {
	if _, err := target.ParseKernel(l.Kernel.BuildID, l.Kernel.Board); err != nil {
		return fault.Wrap(fault.Usage, err, "")
	}
	if l.Signer == nil {
		return fault.New(fault.Usage, "the signing key is missing", "give a signing key with --key")
	}
	if l.Builder == "" {
		return fault.New(fault.Usage, "the builder has no ID", "give the builder an ID, which is a URI, with --builder-id")
	}
	for label, version := range l.Declared {
		if _, err := target.ParseLabel(label); err != nil {
			return fault.Wrap(fault.Usage, err, "")
		}
		if version == "" {
			continue
		}
		if err := target.CheckLabel(label, version); err != nil {
			return fault.Wrap(fault.Usage, err, "give a driver the label DEFAULT, LATEST or the name of its own branch")
		}
	}
	return nil
}

// updateLabels replaces the labels in the index by the labels that the callback returns.
func (p *publisher) updateLabels(ctx context.Context, next func(Index) ([]Label, error)) error {
	return p.update(ctx, p.indexListing(func(have []byte) ([]byte, error) {
		x, err := p.readIndex(ctx, have)
		if err != nil {
			return nil, err
		}
		if x.Labels, err = next(x); err != nil {
			return nil, err
		}
		slices.SortFunc(x.Labels, Label.compare)
		if len(x.Labels) > maxLabels {
			return nil, fault.Errorf(fault.PublishRefused, "the index would have %d labels; readers accept at most %d labels",
				len(x.Labels), maxLabels)
		}
		return x.marshal()
	}))
}

// isLabelled reports whether the list has the label, without comparing Declared.
func isLabelled(all []Label, l Label) bool {
	return slices.ContainsFunc(all, func(have Label) bool { return have.compare(l) == 0 })
}

// claims has the labels that one call of SetLabels sets (want) and removes (drop).
type claims struct {
	want, drop []Label
	given      map[string]string // becomes Labelled.Labels
	absent     []string          // becomes Labelled.Absent
	conflicts  []error           // one for each declared label that somebody else set on another version
}

// claim computes which labels to set and to remove. It checks the tarball of each version that gets a new label.
func (p *publisher) claim(ctx context.Context, x Index, l Labelling) (claims, error) {
	s, err := p.labelState(ctx, x, l)
	if err != nil {
		return claims{}, err
	}
	c := l.claim(x, s)
	if err := errors.Join(c.conflicts...); err != nil {
		return claims{}, err
	}
	seen := map[string]bool{}
	for _, w := range c.want {
		if seen[w.Version] || isLabelled(x.Labels, w) {
			continue
		}
		seen[w.Version] = true
		e, _ := x.installable(w.Version)
		if err := p.checkStored(ctx, e); err != nil {
			return claims{}, err
		}
	}
	return c, nil
}

// checkStored returns an error if an entry's tarball is missing, damaged or not signed.
func (p *publisher) checkStored(ctx context.Context, e Entry) error {
	refuse := func(why string) error {
		return fault.New(fault.PublishRefused, fmt.Sprintf("%s gets no label: %s", p.bucket.URL(e.Object), why),
			"find out who changes objects in the bucket; to publish a missing object again, run: builder build")
	}
	a, ok, err := p.bucket.s.stat(ctx, e.Object)
	switch {
	case err != nil:
		return err
	case !ok:
		return refuse("the object does not exist")
	case a.size != e.Size || a.md5 != "" && a.md5 != e.MD5:
		return refuse(fmt.Sprintf("the object has %d bytes and MD5 %q; the index says %d bytes and MD5 %q", a.size, a.md5,
			e.Size, e.MD5))
	}
	signature, _, err := p.bucket.readSmall(ctx, e.Signature, maxSignature)
	if err != nil {
		return err
	}
	if signature == nil {
		return refuse("the object has no signature")
	}
	facts := ObjectFacts{Object: e.Object, BuildID: p.Kernel.BuildID, Board: p.Kernel.Board, Driver: &e.Driver,
		Artifact: e.Artifact, Fingerprint: e.Fingerprint}
	if _, err := Verify(p.verifier, signature, e.SHA256, facts); err != nil {
		return refuse(err.Error())
	}
	return nil
}

// wantedLabels returns the declared labels and COS's labels, with their versions.
func (l Labelling) wantedLabels() map[string]string {
	all := map[string]string{}
	for label, version := range l.FromCOS {
		if target.CheckLabel(label, version) == nil { // COS may add labels that this program does not know
			all[label] = version
		}
	}
	maps.Copy(all, l.Declared)
	return all
}

// claim computes which labels to set and to remove, without checking any tarball.
func (l Labelling) claim(x Index, s labelState) claims {
	c := claims{given: map[string]string{}}
	var mine []Label
	for _, have := range x.Labels {
		if have.Builder == l.Builder {
			mine = append(mine, have)
		}
	}
	settled := map[string]bool{}
	wanted := l.wantedLabels()
	for _, label := range slices.Sorted(maps.Keys(wanted)) {
		before := slices.DeleteFunc(slices.Clone(mine), func(have Label) bool { return have.Label != label })
		_, declared := l.Declared[label]
		rows := s.rows(wanted[label])
		_, ready := x.installable(wanted[label])
		ready = ready && len(rows) > 0
		switch {
		case declared && !ready:
			c.absent = append(c.absent, label)
			c.want = append(c.want, before...)
		case !declared && !l.Complete && slices.ContainsFunc(before, func(have Label) bool { return have.Declared }):
			// The operator declared this label in another run, so COS's version does not replace it.
			c.want = append(c.want, before...)
		case ready:
			settled[label] = true
			c.assign(s, x, mine, rows, Label{Label: label, Version: wanted[label], Builder: l.Builder, Declared: declared})
		}
	}
	for _, have := range mine {
		if !isLabelled(c.want, have) && (l.Complete || settled[have.Label]) {
			c.drop = append(c.drop, have)
		}
	}
	return c
}

// assign adds a label to the claims, once for each given row of gpu_driver_versions and once for the label's own
// object. A label from COS goes only to rows for no particular product (see isGeneral). A list with rows for products
// was copied from COS, and has COS's labels already.
func (c *claims) assign(s labelState, x Index, mine []Label, rows []string, l Label) {
	for _, row := range append(rows, "") {
		if _, given := c.given[l.Label]; row == "" && !given || row != "" && !l.Declared && !isGeneral(row) {
			continue
		}
		l.GPUType = row
		version, by := s.foreignVersion(x, mine, l)
		switch {
		case version == "":
			c.want = append(c.want, l)
		case version != l.Version && l.Declared:
			c.conflicts = append(c.conflicts, taken(l, version, by))
			continue
		case version != l.Version:
			continue
		}
		if isGeneral(row) {
			c.given[l.Label] = l.Version
		}
	}
}

func taken(l Label, version, by string) error {
	where := "for " + l.GPUType
	if l.GPUType == "" {
		where = "in the label's own object"
	}
	return fault.New(fault.PublishRefused,
		fmt.Sprintf("set label %s on version %s: version %s has this label already, %s, set by %s", l.Label, l.Version,
			version, where, by),
		"choose another label, with --label or in the wish list; or ask whoever set this label to remove it from the "+
			"bucket, because a builder never moves a label of somebody else")
}

// versionObject returns the name of the label's own object, which contains only the label's version.
func versionObject(k target.Kernel, label string) string {
	switch label {
	case "DEFAULT":
		return cosbucket.DefaultVersionName(k)
	case "LATEST":
		return cosbucket.LatestVersionName(k)
	}
	return cosbucket.BranchVersionName(k, label)
}

// updateVersionObjects writes and removes the labels' own objects.
func (p *publisher) updateVersionObjects(ctx context.Context, c claims) error {
	for _, w := range c.want {
		if w.GPUType != "" {
			continue
		}
		if err := p.update(ctx, listing{name: versionObject(p.Kernel, w.Label), contentType: text, limit: maxVersions,
			next: func(have []byte) ([]byte, error) {
				is := strings.TrimSpace(string(have))
				if have != nil && is != w.Version && !hasVersion(c.drop, w.Label, is) {
					return nil, taken(w, is, "somebody else")
				}
				return []byte(w.Version + "\n"), nil
			}}); err != nil {
			return err
		}
	}
	for _, d := range c.drop {
		if d.GPUType != "" {
			continue
		}
		removed, err := p.bucket.remove(ctx, versionObject(p.Kernel, d.Label), maxVersions, func(have []byte) bool {
			return strings.TrimSpace(string(have)) == d.Version
		})
		if err != nil {
			return err
		}
		p.report.Existed = p.report.Existed && !removed
	}
	return nil
}

// hasVersion reports whether the list has an entry for a label's own object with this version.
func hasVersion(all []Label, label, version string) bool {
	return slices.ContainsFunc(all,
		func(l Label) bool { return l.GPUType == "" && l.Label == label && l.Version == version })
}
