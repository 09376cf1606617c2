// Command nvmlprobe asks NVML, NVIDIA's management library, for the driver's version and the GPUs, and prints a JSON
// object. With --cuda, it calls cuInit of CUDA's library instead. It is a separate program, because these libraries
// need cgo and dlopen, and the fetcher is static. It does not judge the answer. It changes nothing on a GPU except,
// with --persist, persistence mode.
package main

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"

	"github.com/NVIDIA/go-nvml/pkg/dl"
	"github.com/NVIDIA/go-nvml/pkg/nvml"
)

// These are the exit codes.
const (
	exitAnswered = 0 // the library answered; devices may be empty
	exitSilent   = 1 // the library could not be opened or did not answer; error says why
	exitUsage    = 2 // the arguments are wrong
)

// Answer is the JSON object that the probe prints.
type Answer struct {
	DriverVersion string `json:"driverVersion,omitempty"`
	// CUDAVersion is the highest CUDA version that the driver supports, such as 12.2.
	CUDAVersion string   `json:"cudaVersion,omitempty"`
	Devices     []Device `json:"devices"`
	Error       string   `json:"error,omitempty"`
	// Code is NVML's return value for Error, or 0 if the error came from elsewhere.
	Code int `json:"code,omitempty"`
}

// Device is one GPU.
type Device struct {
	UUID        string `json:"uuid,omitempty"`
	Name        string `json:"name,omitempty"`
	PCIBusID    string `json:"pciBusId,omitempty"`
	MemoryBytes uint64 `json:"memoryBytes,omitempty"`
	// Fabric is the GPU's progress in joining its NVLink fabric: not started, in progress or completed. It is "" without a
	// fabric, or if the library does not report one.
	Fabric string `json:"fabric,omitempty"`
	// Persistence is on, off, or the reason why it could not be turned on. It is "" if the GPU does not report it. In
	// persistence mode, the driver keeps an unused GPU initialised.
	Persistence string `json:"persistence,omitempty"`
	// MIG means that the GPU is in MIG mode: programs can only use the MIG instances that somebody makes.
	MIG bool `json:"mig,omitempty"`
	// Error is the reason why NVML cannot use or describe this GPU. Code is NVML's return value for it, or 0.
	Error string `json:"error,omitempty"`
	Code  int    `json:"code,omitempty"`
	// Recovery is what the driver wants done with the GPU: 0 nothing, 1 a reset, and so on
	// (nvmlDeviceGpuRecoveryAction_t). It is null if the driver does not report it.
	Recovery *uint32 `json:"recovery,omitempty"`
}

func main() { os.Exit(run(os.Args[1:], os.Stdout, os.Stderr)) }

func run(args []string, stdout, stderr io.Writer) int {
	flags := flag.NewFlagSet("nvmlprobe", flag.ContinueOnError)
	flags.SetOutput(stderr)
	lib := flags.String("lib", "libnvidia-ml.so.1", "NVML library: a path, or a name for the loader to find")
	cuda := flags.String("cuda", "", "call cuInit of this CUDA library (path or name), and do not ask NVML")
	persist := flags.Bool("persist", false, "turn persistence mode on, on every GPU")
	if err := flags.Parse(args); errors.Is(err, flag.ErrHelp) {
		return exitAnswered
	} else if err != nil {
		return exitUsage
	}
	if flags.NArg() > 0 {
		fmt.Fprintf(stderr, "nvmlprobe: unexpected argument %q; give the NVML library with --lib\n", flags.Arg(0))
		return exitUsage
	}
	var answer any
	var failure string
	if *cuda != "" {
		a := askCUDA(*cuda)
		answer, failure = a, a.Error
	} else {
		library := nvml.New(nvml.WithLibraryPath(*lib))
		a := ask(struct {
			nvml.Interface
			nvml.ExtendedInterface
		}{library, library.Extensions()}, *persist, func() error { return openable(*lib) })
		answer, failure = a, a.Error
	}
	if err := json.NewEncoder(stdout).Encode(answer); err != nil {
		fmt.Fprintf(stderr, "nvmlprobe: print answer: %v\n", err)
		return exitSilent
	}
	if failure != "" {
		return exitSilent
	}
	return exitAnswered
}

// openable returns the loader's error for a library, because NVML reports only "not found".
func openable(path string) error {
	lib := dl.New(path, dl.RTLD_LAZY)
	if err := lib.Open(); err != nil {
		return err
	}
	return lib.Close()
}

// asked is the part of NVML that the probe uses.
type asked interface {
	Init() nvml.Return
	Shutdown() nvml.Return
	SystemGetDriverVersion() (string, nvml.Return)
	SystemGetCudaDriverVersion_v2() (int, nvml.Return)
	DeviceGetCount() (int, nvml.Return)
	DeviceGetHandleByIndex(int) (nvml.Device, nvml.Return)
	LookupSymbol(string) error
}

// ask fills the answer as far as NVML responds. If NVML's library is not found, ask calls why for the loader's error.
func ask(lib asked, persist bool, why func() error) (a Answer) {
	a.Devices = []Device{}
	if ret := lib.Init(); ret != nvml.SUCCESS {
		a.Error, a.Code = "open NVML: "+words(ret), int(ret)
		if ret == nvml.ERROR_LIBRARY_NOT_FOUND {
			if err := why(); err != nil {
				a.Error = "open NVML: " + err.Error()
			}
		}
		return a
	}
	defer lib.Shutdown()
	version, ret := lib.SystemGetDriverVersion()
	if ret != nvml.SUCCESS {
		a.Error, a.Code = "read driver version: "+words(ret), int(ret)
		return a
	}
	a.DriverVersion = version
	if cuda, ret := lib.SystemGetCudaDriverVersion_v2(); ret == nvml.SUCCESS {
		a.CUDAVersion = fmt.Sprintf("%d.%d", cuda/1000, cuda%1000/10)
	}
	count, ret := lib.DeviceGetCount()
	if ret != nvml.SUCCESS {
		a.Error, a.Code = "count GPUs: "+words(ret), int(ret)
		return a
	}
	for i := range count {
		d, ret := lib.DeviceGetHandleByIndex(i)
		if ret != nvml.SUCCESS {
			a.Devices = append(a.Devices, Device{Error: fmt.Sprintf("open GPU %d: %s", i, words(ret)), Code: int(ret)})
			continue
		}
		device := describe(d)
		device.Persistence, device.Recovery = persistence(d, persist), recovery(d)
		// Drivers before R525 lack this function. A call of a missing function ends the program.
		if lib.LookupSymbol("nvmlDeviceGetGpuFabricInfo") == nil {
			device.Fabric = fabric(d)
		}
		if lib.LookupSymbol("nvmlDeviceGetMigMode") == nil { // since R450
			mode, _, ret := d.GetMigMode()
			device.MIG = ret == nvml.SUCCESS && mode == nvml.DEVICE_MIG_ENABLE
		}
		a.Devices = append(a.Devices, device)
	}
	return a
}

// facts is the part of NVML's device interface that describe uses.
type facts interface {
	GetUUID() (string, nvml.Return)
	GetName() (string, nvml.Return)
	GetPciInfo() (nvml.PciInfo, nvml.Return)
	GetMemoryInfo() (nvml.Memory, nvml.Return)
}

// describe reads the properties of a GPU. Error is about the first property that NVML did not report.
func describe(d facts) (out Device) {
	note := func(what string, ret nvml.Return) bool {
		if ret != nvml.SUCCESS && out.Error == "" {
			out.Error, out.Code = "read "+what+": "+words(ret), int(ret)
		}
		return ret == nvml.SUCCESS
	}
	var ret nvml.Return
	out.UUID, ret = d.GetUUID()
	note("UUID", ret)
	out.Name, ret = d.GetName()
	note("name", ret)
	if pci, ret := d.GetPciInfo(); note("PCI address", ret) {
		out.PCIBusID = cString(pci.BusId[:])
	}
	if mem, ret := d.GetMemoryInfo(); note("memory size", ret) {
		out.MemoryBytes = mem.Total
	}
	return out
}

// persistence returns whether persistence mode is on. If on is true, it first turns the mode on.
func persistence(d interface {
	SetPersistenceMode(nvml.EnableState) nvml.Return
	GetPersistenceMode() (nvml.EnableState, nvml.Return)
}, on bool) string {
	mode, ret := d.GetPersistenceMode()
	if on && (ret != nvml.SUCCESS || mode != nvml.FEATURE_ENABLED) {
		if ret := d.SetPersistenceMode(nvml.FEATURE_ENABLED); ret != nvml.SUCCESS {
			return words(ret)
		}
		mode, ret = d.GetPersistenceMode()
	}
	switch {
	case ret != nvml.SUCCESS:
		return ""
	case mode == nvml.FEATURE_ENABLED:
		return "on"
	}
	return "off"
}

// fabric returns a GPU's progress in joining its NVLink fabric, or "" without one.
func fabric(d interface {
	GetGpuFabricInfo() (nvml.GpuFabricInfo, nvml.Return)
}) string {
	info, ret := d.GetGpuFabricInfo()
	if ret != nvml.SUCCESS {
		return "" // most GPUs have no fabric
	}
	switch info.State {
	case nvml.GPU_FABRIC_STATE_NOT_STARTED:
		return "not started"
	case nvml.GPU_FABRIC_STATE_IN_PROGRESS:
		return "in progress"
	case nvml.GPU_FABRIC_STATE_COMPLETED:
		return "completed"
	}
	return ""
}

// recovery returns the recovery action of a GPU, or nil if the driver does not report one.
func recovery(d interface {
	GetFieldValues(values []nvml.FieldValue) nvml.Return
}) *uint32 {
	values := []nvml.FieldValue{{FieldId: nvml.FI_DEV_GET_GPU_RECOVERY_ACTION}}
	if ret := d.GetFieldValues(values); ret != nvml.SUCCESS || nvml.Return(values[0].NvmlReturn) != nvml.SUCCESS ||
		nvml.ValueType(values[0].ValueType) != nvml.VALUE_TYPE_UNSIGNED_INT {
		return nil
	}
	action := binary.NativeEndian.Uint32(values[0].Value[:])
	return &action
}

func words(ret nvml.Return) string { return nvml.ErrorString(ret) }

// cString returns the text before the terminating zero.
func cString[T int8 | uint8](chars []T) string {
	out := make([]byte, 0, len(chars))
	for _, c := range chars {
		if c == 0 {
			break
		}
		out = append(out, byte(c))
	}
	return string(out)
}
