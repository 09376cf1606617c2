package tarball

import (
	"context"
	"slices"
	"strings"

	"google.golang.org/protobuf/encoding/prototext"
	"google.golang.org/protobuf/proto"

	"github.com/prebake/prebake/pkg/cosbucket"
	"github.com/prebake/prebake/pkg/cosbucket/gpuversions"
)

// labelState has all labels of one COS build in a bucket, also those that others set.
type labelState struct {
	lists   [2]*gpuversions.GPUDriverVersionInfoList // gpu_driver_versions as text, then binary
	objects map[string]string                        // maps a label to the version in its own object, if that exists
}

func (p *publisher) labelState(ctx context.Context, x Index, l Labelling) (labelState, error) {
	s := labelState{lists: [2]*gpuversions.GPUDriverVersionInfoList{{}, {}}, objects: map[string]string{}}
	for i, form := range []struct {
		name  string
		parse func([]byte, proto.Message) error
	}{{cosbucket.DriverVersionsName(p.Kernel), prototext.Unmarshal},
		{cosbucket.DriverVersionsBinName(p.Kernel), proto.Unmarshal}} {
		data, _, err := p.bucket.readSmall(ctx, form.name, maxVersions)
		if err != nil {
			return s, err
		}
		if err := form.parse(data, s.lists[i]); err != nil {
			return s, unreadable(err)
		}
	}
	for label := range l.wantedLabels() {
		data, _, err := p.bucket.readSmall(ctx, versionObject(p.Kernel, label), maxVersions)
		if err != nil {
			return s, err
		}
		if data != nil {
			s.objects[label] = strings.TrimSpace(string(data))
		}
	}
	return s, nil
}

// foreignVersion returns a version on which somebody else set the label, and who set it. If nobody else set it, the
// version is "". If others set it on several versions, foreignVersion returns one other than l.Version. mine has the
// labels that this builder set.
func (s labelState) foreignVersion(x Index, mine []Label, l Label) (version, by string) {
	type holder struct{ version, by string }
	var all []holder
	for _, o := range x.Labels {
		if o.Builder != l.Builder && o.Label == l.Label && o.GPUType == l.GPUType {
			all = append(all, holder{o.Version, "builder " + o.Builder})
		}
	}
	for _, v := range s.versionsWith(l) {
		have := l
		have.Version = v
		if !isLabelled(mine, have) {
			all = append(all, holder{v, "somebody else"})
		}
	}
	if i := slices.IndexFunc(all, func(h holder) bool { return h.version != l.Version }); i >= 0 {
		return all[i].version, all[i].by
	}
	if len(all) > 0 {
		return l.Version, all[0].by
	}
	return "", ""
}

func (s labelState) versionsWith(l Label) []string {
	if l.GPUType == "" {
		if version, ok := s.objects[l.Label]; ok {
			return []string{version}
		}
		return nil
	}
	var all []string
	for _, list := range s.lists {
		all = append(all, versionsWith(list, l.GPUType, l.Label)...)
	}
	return all
}

// rows returns the gpu_type of each row that has the version in both formats of gpu_driver_versions.
func (s labelState) rows(version string) []string {
	binary := rows(s.lists[1], version)
	both := slices.DeleteFunc(rows(s.lists[0], version), func(t string) bool { return !slices.Contains(binary, t) })
	slices.Sort(both)
	return slices.Compact(both)
}
