package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"path/filepath"
	"strings"
	"testing"

	"github.com/NVIDIA/go-nvml/pkg/nvml"
	"github.com/google/go-cmp/cmp"
)

// library stands in for NVML. The zero value of a field of type nvml.Return means success.
type library struct {
	init, version, count nvml.Return
	old                  bool // an older library, without the newer functions
	devices              []nvml.Return
}

func (l library) LookupSymbol(string) error {
	if l.old {
		return errors.New("undefined symbol")
	}
	return nil
}
func (l library) Init() nvml.Return     { return l.init }
func (l library) Shutdown() nvml.Return { return nvml.SUCCESS }
func (l library) SystemGetDriverVersion() (string, nvml.Return) {
	return "535.261.03", l.version
}
func (l library) SystemGetCudaDriverVersion_v2() (int, nvml.Return) { return 12020, nvml.SUCCESS }
func (l library) DeviceGetCount() (int, nvml.Return)                { return len(l.devices), l.count }
func (l library) DeviceGetHandleByIndex(i int) (nvml.Device, nvml.Return) {
	return gpu{}, l.devices[i]
}

type gpu struct {
	nvml.Device
	memory nvml.Return
	mode   *nvml.EnableState
	refuse nvml.Return
	fields func(*nvml.FieldValue) nvml.Return // nil means that the library does not have the field
}

func (g gpu) GetFieldValues(values []nvml.FieldValue) nvml.Return {
	if g.fields == nil {
		values[0].NvmlReturn = uint32(nvml.ERROR_NOT_SUPPORTED)
		return nvml.SUCCESS
	}
	return g.fields(&values[0])
}

func TestRecovery(t *testing.T) {
	t.Parallel()
	value := func(kind nvml.ValueType, bytes ...byte) func(*nvml.FieldValue) nvml.Return {
		return func(v *nvml.FieldValue) nvml.Return {
			if v.FieldId != nvml.FI_DEV_GET_GPU_RECOVERY_ACTION {
				return nvml.ERROR_INVALID_ARGUMENT
			}
			v.ValueType = uint32(kind)
			copy(v.Value[:], bytes)
			return nvml.SUCCESS
		}
	}
	for name, row := range map[string]struct {
		fields func(*nvml.FieldValue) nvml.Return
		want   *uint32
	}{
		"a reset":                {value(nvml.VALUE_TYPE_UNSIGNED_INT, 1, 0, 0, 0, 9), new(uint32(1))},
		"nothing":                {value(nvml.VALUE_TYPE_UNSIGNED_INT), new(uint32(0))},
		"another type of number": {value(nvml.VALUE_TYPE_DOUBLE, 1), nil},
		"a library without it":   {nil, nil},
		"a lost GPU":             {func(*nvml.FieldValue) nvml.Return { return nvml.ERROR_GPU_IS_LOST }, nil},
	} {
		if diff := cmp.Diff(row.want, recovery(gpu{fields: row.fields})); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
}

func (g gpu) GetPersistenceMode() (nvml.EnableState, nvml.Return) {
	if g.mode == nil {
		return 0, nvml.ERROR_NOT_SUPPORTED
	}
	return *g.mode, nvml.SUCCESS
}

func (g gpu) SetPersistenceMode(to nvml.EnableState) nvml.Return {
	if g.refuse == nvml.SUCCESS && g.mode != nil {
		*g.mode = to
	}
	return g.refuse
}

func TestPersistence(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name   string
		mode   *nvml.EnableState
		refuse nvml.Return
		on     bool
		want   string
		set    bool
	}{
		{"off, and stays so", new(nvml.EnableState), nvml.SUCCESS, false, "off", false},
		{"turned on", new(nvml.EnableState), nvml.SUCCESS, true, "on", true},
		{"refused", new(nvml.EnableState), nvml.ERROR_NO_PERMISSION, true, words(nvml.ERROR_NO_PERMISSION), false},
		{"a GPU that does not tell", nil, nvml.SUCCESS, false, "", false},
		{"nor lets itself be told", nil, nvml.ERROR_NOT_SUPPORTED, true, words(nvml.ERROR_NOT_SUPPORTED), false},
	} {
		if got := persistence(gpu{mode: row.mode, refuse: row.refuse}, row.on); got != row.want {
			t.Errorf("%s: %q; want %q", row.name, got, row.want)
		}
		if row.mode != nil && (*row.mode == nvml.FEATURE_ENABLED) != row.set {
			t.Errorf("%s: the mode is %v", row.name, *row.mode)
		}
	}
}

func (gpu) GetUUID() (string, nvml.Return) { return "GPU-1", nvml.SUCCESS }
func (gpu) GetName() (string, nvml.Return) { return "Tesla T4", nvml.SUCCESS }
func (gpu) GetPciInfo() (nvml.PciInfo, nvml.Return) {
	var p nvml.PciInfo
	for i, c := range []byte("00000001:00:00.0") {
		p.BusId[i] = p.BusId[i]*0 + convert(p.BusId[i], c)
	}
	return p, nvml.SUCCESS
}
func (g gpu) GetGpuFabricInfo() (nvml.GpuFabricInfo, nvml.Return) {
	return nvml.GpuFabricInfo{State: nvml.GPU_FABRIC_STATE_NOT_STARTED}, nvml.SUCCESS
}
func (gpu) GetMigMode() (int, int, nvml.Return) { return nvml.DEVICE_MIG_ENABLE, 0, nvml.SUCCESS }
func (g gpu) GetMemoryInfo() (nvml.Memory, nvml.Return) {
	return nvml.Memory{Total: 16 << 30}, g.memory
}

// convert converts b to the type of the first argument. That type differs between the versions of NVML.
func convert[T int8 | uint8](_ T, b byte) T { return T(b) }

func TestAsk(t *testing.T) {
	t.Parallel()
	good := Device{UUID: "GPU-1", Name: "Tesla T4", PCIBusID: "00000001:00:00.0", MemoryBytes: 16 << 30,
		Fabric: "not started", MIG: true}
	silent := good
	silent.Fabric, silent.MIG = "", false
	for _, row := range []struct {
		name string
		lib  library
		why  error
		want Answer
	}{
		{"no GPU", library{}, nil, Answer{DriverVersion: "535.261.03", CUDAVersion: "12.2", Devices: []Device{}}},
		{"one good GPU, one lost", library{devices: []nvml.Return{nvml.SUCCESS, nvml.ERROR_GPU_IS_LOST}}, nil,
			Answer{DriverVersion: "535.261.03", CUDAVersion: "12.2", Devices: []Device{good,
				{Error: "open GPU 1: " + words(nvml.ERROR_GPU_IS_LOST), Code: int(nvml.ERROR_GPU_IS_LOST)}}}},
		{"a library that knows neither fabric nor MIG", library{old: true, devices: []nvml.Return{nvml.SUCCESS}}, nil,
			Answer{DriverVersion: "535.261.03", CUDAVersion: "12.2", Devices: []Device{silent}}},
		{"library missing", library{init: nvml.ERROR_LIBRARY_NOT_FOUND}, errors.New("no such file"),
			Answer{Devices: []Device{}, Error: "open NVML: no such file", Code: int(nvml.ERROR_LIBRARY_NOT_FOUND)}},
		{"driver not loaded", library{init: nvml.ERROR_DRIVER_NOT_LOADED}, nil,
			Answer{Devices: []Device{}, Error: "open NVML: " + words(nvml.ERROR_DRIVER_NOT_LOADED),
				Code: int(nvml.ERROR_DRIVER_NOT_LOADED)}},
		{"no version", library{version: nvml.ERROR_UNKNOWN}, nil,
			Answer{Devices: []Device{}, Error: "read driver version: " + words(nvml.ERROR_UNKNOWN),
				Code: int(nvml.ERROR_UNKNOWN)}},
		{"no count", library{count: nvml.ERROR_UNKNOWN}, nil,
			Answer{DriverVersion: "535.261.03", CUDAVersion: "12.2", Devices: []Device{},
				Error: "count GPUs: " + words(nvml.ERROR_UNKNOWN), Code: int(nvml.ERROR_UNKNOWN)}},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			got := ask(row.lib, false, func() error { return row.why })
			if diff := cmp.Diff(row.want, got); diff != "" {
				t.Errorf("ask() (-want +got):\n%s", diff)
			}
		})
	}
}

func TestDescribeKeepsWhatItCouldRead(t *testing.T) {
	t.Parallel()
	got := describe(gpu{memory: nvml.ERROR_NOT_SUPPORTED})
	want := Device{UUID: "GPU-1", Name: "Tesla T4", PCIBusID: "00000001:00:00.0",
		Error: "read memory size: " + words(nvml.ERROR_NOT_SUPPORTED), Code: int(nvml.ERROR_NOT_SUPPORTED)}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("describe() (-want +got):\n%s", diff)
	}
}

func TestRunWithoutLibrary(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "libnvidia-ml.so.1")
	var out, errs bytes.Buffer
	if code := run([]string{"--lib", path}, &out, &errs); code != exitSilent {
		t.Errorf("run() = %d; want %d", code, exitSilent)
	}
	var a Answer
	if err := json.Unmarshal(out.Bytes(), &a); err != nil {
		t.Fatalf("answer %q: %v", out.String(), err)
	}
	if !strings.Contains(a.Error, path) || !strings.Contains(a.Error, "No such file") {
		t.Errorf("error = %q; want the loader's words about %s", a.Error, path)
	}
}

func TestRunUsage(t *testing.T) {
	t.Parallel()
	for _, args := range [][]string{{"--nothing"}, {"libnvidia-ml.so.1"}} {
		if code := run(args, &bytes.Buffer{}, &bytes.Buffer{}); code != exitUsage {
			t.Errorf("run(%q) = %d; want %d", args, code, exitUsage)
		}
	}
}
