package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// cudaSource is a CUDA library of two functions. The codes in TestCUDA are those that NVIDIA's library returned on a
// machine with an H200 and driver 580.159.04: with the GPU, without /dev/nvidia-uvm, and with no visible GPU.
// TestRealCUDA in deploy/e2e asks NVIDIA's own library.
const cudaSource = `int cuInit(unsigned int flags) { return flags ? 1 : %d; }
int cuGetErrorName(int code, const char **name) { if (code == 7777) return 1; *name = "NAME"; return 0; }`

func TestCUDA(t *testing.T) {
	t.Parallel()
	for code, name := range map[int]string{0: "NAME", 999: "NAME", 100: "NAME", 7777: ""} {
		dir := t.TempDir()
		source, library := filepath.Join(dir, "cuda.c"), filepath.Join(dir, "libcuda.so.1")
		if err := os.WriteFile(source, fmt.Appendf(nil, cudaSource, code), 0o600); err != nil {
			t.Fatal(err)
		}
		if out, err := exec.CommandContext(t.Context(), "gcc", "-shared", "-fPIC", "-o", library, source).
			CombinedOutput(); err != nil {
			t.Fatalf("gcc: %v\n%s", err, out)
		}
		got, exit := cudaAnswer(t, library)
		if diff := cmp.Diff(CUDAAnswer{Code: &code, Name: name}, got); diff != "" || exit != exitAnswered {
			t.Errorf("cuInit returns %d: exit status %d, answer (-want +got):\n%s", code, exit, diff)
		}
	}
}

// TestNoCUDA checks the answers about a file that is missing, no library, or another library.
func TestNoCUDA(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	text := filepath.Join(dir, "text")
	if err := os.WriteFile(text, []byte("no library"), 0o600); err != nil {
		t.Fatal(err)
	}
	for library, want := range map[string]string{
		filepath.Join(dir, "libcuda.so.1"): "No such file", text: "file too short", "libm.so.6": "cuInit",
	} {
		if got, exit := cudaAnswer(t, library); exit != exitSilent || got.Code != nil || !strings.Contains(got.Error, want) {
			t.Errorf("%s: exit status %d, %+v; want an error with %q", library, exit, got, want)
		}
	}
}

func cudaAnswer(t *testing.T, library string) (a CUDAAnswer, exit int) {
	t.Helper()
	var out, errs bytes.Buffer
	exit = run([]string{"--cuda", library}, &out, &errs)
	if err := json.Unmarshal(out.Bytes(), &a); err != nil {
		t.Fatalf("answer %q, %q: %v", out.String(), errs.String(), err)
	}
	return a, exit
}
