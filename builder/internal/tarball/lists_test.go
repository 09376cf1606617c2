package tarball_test

import (
	"bytes"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/encoding/prototext"
	"google.golang.org/protobuf/proto"

	"github.com/prebake/prebake/builder/internal/tarball"
	"github.com/prebake/prebake/pkg/cosbucket/gpuversions"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/testkit/installed"
)

func none(string) bool { return false }

// cosText is a list in the format of COS's own gpu_driver_versions.
const cosText = `gpu_driver_version_info {
  gpu_device { gpu_type: "NVIDIA_TESLA_V100" }
  supported_driver_versions { label: "DEFAULT" version: "535.1.1" }
}
gpu_driver_version_info {
  gpu_device { gpu_type: "OTHERS" }
  supported_driver_versions { label: "DEFAULT" version: "535.1.1" }
  supported_driver_versions { label: "LATEST" version: "570.1.1" }
}
`

func TestEditVersions(t *testing.T) {
	t.Parallel()
	var list gpuversions.GPUDriverVersionInfoList
	if err := prototext.Unmarshal([]byte(cosText), &list); err != nil {
		t.Fatal(err)
	}
	bin, err := proto.Marshal(&list)
	if err != nil {
		t.Fatal(err)
	}
	text := []byte(cosText)
	for _, version := range []string{"535.261.03", "535.309.01", "535.261.03"} {
		if text, err = tarball.Text.Add(text, version, none); err != nil {
			t.Fatal(err)
		}
		if bin, err = tarball.Binary.Add(bin, version, none); err != nil {
			t.Fatal(err)
		}
	}
	want := `gpu_driver_version_info {
  gpu_device {
    gpu_type: "NVIDIA_TESLA_V100"
  }
  supported_driver_versions {
    label: "DEFAULT"
    version: "535.1.1"
  }
}
gpu_driver_version_info {
  gpu_device {
    gpu_type: "OTHERS"
  }
  supported_driver_versions {
    label: "DEFAULT"
    version: "535.1.1"
  }
  supported_driver_versions {
    label: "LATEST"
    version: "570.1.1"
  }
  supported_driver_versions {
    version: "535.261.03"
  }
  supported_driver_versions {
    version: "535.309.01"
  }
}
gpu_driver_version_info {
  gpu_device {
    gpu_type: "NO_GPU"
  }
  supported_driver_versions {
    version: "535.261.03"
  }
  supported_driver_versions {
    version: "535.309.01"
  }
}
`
	if string(text) != want {
		t.Errorf("text = %s\nwant %s", text, want)
	}
	var fromText, fromBin gpuversions.GPUDriverVersionInfoList
	if err := prototext.Unmarshal(text, &fromText); err != nil {
		t.Error(err)
	}
	if err := proto.Unmarshal(bin, &fromBin); err != nil || !proto.Equal(&fromText, &fromBin) {
		t.Errorf("binary = %v, %v; want the same list as the text form", &fromBin, err)
	}
	t.Run("protoc", func(t *testing.T) { // protoc is an independent reader of the text and writer of the binary
		program := installed.Program(t, "protoc")
		cmd := exec.CommandContext(t.Context(), program, "--proto_path=../../../pkg/cosbucket/gpuversions",
			"--encode=cos_gpu.GPUDriverVersionInfoList", "gpu_driver_versions.proto")
		cmd.Stdin = bytes.NewReader(text)
		if out, err := cmd.Output(); err != nil || !bytes.Equal(out, bin) {
			t.Errorf("protoc --encode = %q, %v; want %q", out, err, bin)
		}
	})
	// The binary format keeps a field that this package does not know. The text format cannot keep it, so the change is
	// refused.
	newer := protoBytes(bin, "\x9a\x06\x03new") // field 99
	if got, err := tarball.Binary.Add(newer, "580.1.1", none); err != nil || !bytes.Contains(got, []byte("new")) ||
		!bytes.Contains(got, []byte("580.1.1")) {
		t.Errorf("EditBinary(newer) = %q, %v; want the new field kept", got, err)
	}
	if got, err := tarball.Text.Add(append(text, "region: \"eu\"\n"...), "580.1.1", none); !fault.Is(err,
		fault.PublishRefused) || fault.Hint(err) == "" {
		t.Errorf("EditText(newer) = %q, %v; want publish refused with a hint", got, err)
	}
}

// writeCOSLists writes a copy of COS's lists into a folder.
func writeCOSLists(t testing.TB, dir string) {
	t.Helper()
	var list gpuversions.GPUDriverVersionInfoList
	if err := prototext.Unmarshal([]byte(cosText), &list); err != nil {
		t.Fatal(err)
	}
	for _, form := range []tarball.Form{tarball.Text, tarball.Binary} {
		data, err := form.Marshal(&list)
		if err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(dir, here, "gpu_driver_versions."+form.Name), string(data))
	}
}

func protoBytes(b []byte, more string) []byte { return append(bytes.Clone(b), more...) }

func FuzzEditText(f *testing.F) {
	f.Add([]byte(cosText))
	f.Add([]byte(`gpu_driver_version_info { gpu_device { gpu_type: "\001\"\\é" } }`))
	f.Add([]byte(nil))
	f.Fuzz(func(t *testing.T, have []byte) {
		got, err := tarball.Text.Add(have, "535.261.03", none)
		if err != nil {
			return
		}
		var before, after gpuversions.GPUDriverVersionInfoList
		if err := prototext.Unmarshal(have, &before); err != nil {
			t.Fatal(err)
		}
		if err := prototext.Unmarshal(got, &after); err != nil {
			t.Fatalf("EditText(%q) = %q, which cannot be read: %v", have, got, err)
		}
		checkKept(t, &before, &after)
		if again, err := tarball.Text.Add(got, "535.261.03", none); err != nil || !bytes.Equal(again, got) {
			t.Errorf("EditText twice = %q, %v; want %q", again, err, got)
		}
	})
}

func FuzzEditBinary(f *testing.F) {
	var list gpuversions.GPUDriverVersionInfoList
	if err := prototext.Unmarshal([]byte(cosText), &list); err != nil {
		f.Fatal(err)
	}
	bin, err := proto.Marshal(&list)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(bin)
	f.Add([]byte("\x9a\x06\x03new"))
	f.Fuzz(func(t *testing.T, have []byte) {
		got, err := tarball.Binary.Add(have, "535.261.03", none)
		if err != nil {
			return
		}
		var before, after gpuversions.GPUDriverVersionInfoList
		if err := proto.Unmarshal(have, &before); err != nil {
			t.Fatal(err)
		}
		if err := proto.Unmarshal(got, &after); err != nil {
			t.Fatalf("EditBinary(%q) = %q, which cannot be read: %v", have, got, err)
		}
		checkKept(t, &before, &after)
	})
}

// checkKept checks that the list after has all entries of the list before.
func checkKept(t *testing.T, before, after *gpuversions.GPUDriverVersionInfoList) {
	t.Helper()
	if len(after.GetGpuDriverVersionInfo()) < len(before.GetGpuDriverVersionInfo()) {
		t.Fatalf("rows were lost: %v", after)
	}
	for i, info := range before.GetGpuDriverVersionInfo() {
		now := after.GetGpuDriverVersionInfo()[i]
		if now.GetGpuDevice().GetGpuType() != info.GetGpuDevice().GetGpuType() ||
			len(now.GetSupportedDriverVersions()) < len(info.GetSupportedDriverVersions()) {
			t.Errorf("row %d was %v; is %v", i, info, now)
			continue
		}
		for j, v := range info.GetSupportedDriverVersions() {
			if !proto.Equal(v, now.GetSupportedDriverVersions()[j]) {
				t.Errorf("row %d: version %v became %v", i, v, now.GetSupportedDriverVersions()[j])
			}
		}
	}
}

// TestForeignEntries publishes a driver in a bucket whose lists have entries that no trusted key signed. The lists must
// keep these entries, and have no signature from then on.
func TestForeignEntries(t *testing.T) {
	t.Parallel()
	s, _ := newSigner(t)
	v := verifier(t, s)
	const textList, binList = here + "gpu_driver_versions.textproto", here + "gpu_driver_versions.bin"
	stranger, _ := newSigner(t)
	strange := tarball.NewMemory()
	publishAll(t, strange.Bucket(), stranger, "535.1.1", v261)
	for _, row := range []struct {
		name     string
		before   func(dir string) // runs before the first driver is published
		between  func(dir string, published map[string]string)
		unsigned []string
	}{
		{"own lists", nil, nil, nil},
		{"a copy of COS's lists", func(dir string) { writeCOSLists(t, dir) }, nil, []string{textList, binList}},
		{"a row was added", nil, func(dir string, published map[string]string) {
			write(t, filepath.Join(dir, textList), published[textList]+cosText)
		}, []string{textList}},
		{"lists that a stranger signed", nil, func(dir string, _ map[string]string) {
			for name, text := range strange.Content() {
				if strings.HasPrefix(name, here+"gpu_driver_versions.") {
					write(t, filepath.Join(dir, name), text)
				}
			}
		}, []string{textList, binList}},
	} {
		dir := filepath.Join(t.TempDir(), "bucket")
		dest := "file://" + dir
		b := openBucket(t, dest)
		if row.before != nil {
			row.before(dir)
		}
		publishAll(t, b, s, v261)
		if row.between != nil {
			row.between(dir, content(t, dest))
		}
		report, err := tarball.Publish(t.Context(), b,
			newRelease(t, s, target.Driver{Version: v309, Flavour: target.Open}, ""))
		if err != nil {
			t.Fatalf("%s: Publish = %v", row.name, err)
		}
		labelled, err := tarball.SetLabels(t.Context(), b, labelling(s, labels{"R535": v309}, nil))
		if err != nil {
			t.Fatalf("%s: SetLabels = %v", row.name, err)
		}
		var unsigned, urls []string
		all := content(t, dest)
		for _, name := range []string{textList, binList} {
			digest := digestOf([]byte(all[name]))
			_, err := tarball.Verify(v, []byte(all[name+".sha256-"+digest[len("sha256:"):]+".sigstore.json"]), digest,
				tarball.ObjectFacts{Object: name, BuildID: kernel.BuildID, Board: kernel.Board})
			if err != nil {
				unsigned, urls = append(unsigned, name), append(urls, b.URL(name))
			}
			foreign := slices.Contains(row.unsigned, name)
			if !strings.Contains(all[name], v309) || strings.Contains(all[name], "535.1.1") != foreign {
				t.Errorf("%s: %s = %q; want the new version, and the foreign one: %v", row.name, name, all[name], foreign)
			}
		}
		if diff := cmp.Diff(row.unsigned, unsigned); diff != "" {
			t.Errorf("%s: lists without a signature (-want +got):\n%s", row.name, diff)
		}
		if !slices.Equal(report.Unsigned, urls) || !slices.Equal(labelled.Unsigned, urls) {
			t.Errorf("%s: Publish reports %q as unsigned, SetLabels %q; want %q", row.name, report.Unsigned,
				labelled.Unsigned, urls)
		}
		check(t, all, v)
	}
}

// indexText is a published index with one driver and two labels.
var indexText = `{
  "format": 1,
  "buildId": "17800.0.47",
  "board": "lakitu",
  "drivers": [
    {
      "version": "535.261.03",
      "flavour": "open",
      "object": "17800.0.47/lakitu/nvidia-drivers-535.261.03.tgz",
      "size": 10,
      "sha256": "D",
      "md5": "m",
      "signature": "17800.0.47/lakitu/nvidia-drivers-535.261.03.tgz.sigstore.json",
      "files": [
        {
          "name": "drivers/nvidia.ko",
          "size": 1,
          "sha256": "D"
        }
      ]
    }
  ],
  "labels": [
    {
      "label": "DEFAULT",
      "gpuType": "OTHERS",
      "version": "535.261.03",
      "builder": "b"
    },
    {
      "label": "LATEST",
      "version": "535.261.03",
      "builder": "b",
      "declared": true
    }
  ]
}
`

func sampleIndex() string {
	return strings.ReplaceAll(indexText, `"D"`, `"sha256:`+strings.Repeat("ab", 32)+`"`)
}

func TestParseIndex(t *testing.T) {
	t.Parallel()
	good := sampleIndex()
	if x, err := tarball.ParseIndex([]byte(good)); err != nil || len(x.Drivers) != 1 || x.Drivers[0].Driver != open ||
		len(x.Labels) != 2 {
		t.Fatalf("ParseIndex = %+v, %v", x, err)
	}
	for name, edit := range map[string][2]string{
		"newer format":       {`"format": 1`, `"format": 2`},
		"unknown field":      {`"format": 1`, `"format": 1, "x": 1`},
		"another build":      {`"buildId": "17800.0.47"`, `"buildId": "17800.0.48"`},
		"no build":           {`"buildId": "17800.0.47"`, `"buildId": ""`},
		"another object":     {`"object": "17800.0.47`, `"object": "../17800.0.47`},
		"another signature":  {`tgz.sigstore`, `tgz.x`},
		"flavour and name":   {`"flavour": "open"`, `"flavour": "proprietary"`},
		"no digest":          {"sha256:ab", "sha256:AB"},
		"no size":            {`"size": 10`, `"size": 0`},
		"not JSON":           {`{`, `[`},
		"data after the end": {"\n}\n", "\n}\n{}"},
		"label of nobody":    {`"builder": "b"`, `"builder": ""`},
		"no label":           {`"label": "DEFAULT"`, `"label": "BEST"`},
		"branch of another":  {`"label": "LATEST"`, `"label": "R580"`},
		"label of no version": {`"gpuType": "OTHERS",
      "version": "535.261.03"`, `"gpuType": "OTHERS",
      "version": "535.1.1"`},
		"label out of order": {`"label": "LATEST"`, `"label": "DEFAULT"`},
	} {
		bad := strings.Replace(good, edit[0], edit[1], 1)
		if bad == good {
			t.Fatalf("%s: nothing was spoiled", name)
		}
		if x, err := tarball.ParseIndex([]byte(bad)); !fault.Is(err, fault.Unverified) {
			t.Errorf("%s: ParseIndex = %+v, %v; want kind unverified", name, x, err)
		}
	}
}

func FuzzParseIndex(f *testing.F) {
	f.Add([]byte(sampleIndex()))
	f.Add([]byte(`{"format":1,"buildId":"1.2.3","board":"lakitu","drivers":[]}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		x, err := tarball.ParseIndex(text)
		if err != nil {
			if !fault.Is(err, fault.Unverified) {
				t.Errorf("ParseIndex = %v of kind %v; want unverified", err, fault.Of(err))
			}
			return
		}
		for _, e := range x.Drivers {
			if !strings.HasPrefix(e.Object, x.BuildID+"/"+x.Board+"/") || strings.Contains(e.Object, "..") {
				t.Errorf("object %q of %s/%s", e.Object, x.BuildID, x.Board)
			}
		}
	})
}
