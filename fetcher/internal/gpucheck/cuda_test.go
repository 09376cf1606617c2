package gpucheck_test

import (
	"errors"
	"io/fs"
	"os"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/fetcher/internal/gpucheck"
)

// TestCUDAString checks the text of results with and without a name.
func TestCUDAString(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		result gpucheck.CUDA
		want   string
	}{
		{gpucheck.CUDA{}, "cuInit succeeded"},
		{gpucheck.CUDA{Name: "CUDA_SUCCESS"}, "cuInit succeeded"},
		{gpucheck.CUDA{Code: 802}, "cuInit returns error 802"},
		{gpucheck.CUDA{Code: 100, Name: "CUDA_ERROR_NO_DEVICE"}, "cuInit returns CUDA_ERROR_NO_DEVICE (100)"},
		{gpucheck.CUDA{Code: gpucheck.CUDASilent}, "cuInit does not return"},
	} {
		if got := row.result.String(); got != row.want {
			t.Errorf("String() of %#v = %q; want %q", row.result, got, row.want)
		}
	}
}

// TestRealCUDA asks NVIDIA's own library. With a driver, as in make gpu, CUDA programs must be able to start. Without
// one, the library finds no device.
func TestRealCUDA(t *testing.T) {
	t.Parallel()
	program, library := os.Getenv("PREBAKE_CUDA_PROBE"), os.Getenv("PREBAKE_CUDA")
	if program == "" || library == "" {
		t.Skip("set PREBAKE_CUDA_PROBE to nvmlprobe, and PREBAKE_CUDA to NVIDIA's libcuda.so.1")
	}
	want := gpucheck.CUDA{Code: 0, Name: "CUDA_SUCCESS"}
	if _, err := os.Stat("/proc/driver/nvidia/version"); errors.Is(err, fs.ErrNotExist) {
		want = gpucheck.CUDA{Code: 100, Name: "CUDA_ERROR_NO_DEVICE"}
		if _, err := os.Stat("/dev/nvidiactl"); errors.Is(err, fs.ErrNotExist) {
			// As root, the library makes this device file.
			defer func() { _ = os.Remove("/dev/nvidiactl") }() // it does not exist if this is not root
		}
	}
	p := gpucheck.Prober{Program: program, Node: node(t, "/")}
	got, err := p.AskCUDA(t.Context(), library)
	if diff := cmp.Diff(want, got); err != nil || diff != "" {
		t.Errorf("AskCUDA: %v (-want +got):\n%s", err, diff)
	}
}
