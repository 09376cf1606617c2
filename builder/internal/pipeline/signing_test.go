package pipeline_test

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/builder/internal/pipeline"
	"github.com/prebake/prebake/pkg/target"
)

// TestSigning checks that Signing returns a different text for each way to sign modules, and the names of Google's
// objects on which the result depends.
func TestSigning(t *testing.T) {
	t.Parallel()
	k := target.Kernel{BuildID: "17800.0.9", Board: "lakitu"}
	const folder = "17800.0.9/lakitu/"
	detached := []string{folder + "extensions/gpu/nvidia-drivers-5.1-signature.tar.gz",
		folder + "extensions/gpu/5.1.signature.tar.gz"}
	met := map[string]bool{}
	for _, row := range []struct {
		cfg  pipeline.Config
		want []string
	}{
		{pipeline.Config{}, detached},
		{pipeline.Config{GoogleSignatures: pipeline.GoogleRequire}, detached},
		{pipeline.Config{GoogleSignatures: pipeline.GoogleOff}, nil},
		{pipeline.Config{GoogleModules: true}, []string{folder + "nvidia-drivers-5.1.tgz"}},
		{pipeline.Config{ModuleKey: "a"}, nil},
		{pipeline.Config{ModuleKey: "b"}, nil},
		{pipeline.Config{ModuleKey: "b", ModuleCert: "c"}, nil},
	} {
		how, objects := row.cfg.Signing()
		if met[how] {
			t.Errorf("Signing says %q twice", how)
		}
		met[how] = true
		var got []string
		if objects != nil {
			got = objects(k, "5.1")
		}
		if diff := cmp.Diff(row.want, got); diff != "" {
			t.Errorf("%s: objects (-want +got):\n%s", how, diff)
		}
	}
}
