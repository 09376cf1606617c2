package gpucheck

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// CUDA is what cuInit of CUDA's library returned. Every CUDA program begins with this call. It may fail although NVML
// lists each GPU as healthy, because NVML needs neither nvidia-uvm nor the NVLink fabric.
type CUDA struct {
	// Code is the return value (CUresult of cuda.h); 0 is success. CUDASilent means that cuInit did not return in time.
	Code int `json:"code"`
	// Name is the library's name for Code, such as CUDA_ERROR_NO_DEVICE, or "" if it has none.
	Name string `json:"name,omitempty"`
}

// These are values of CUresult in cuda.h.
const (
	cudaNoDevice = 100 // CUDA_ERROR_NO_DEVICE
	cudaNotReady = 802 // CUDA_ERROR_SYSTEM_NOT_READY
)

// CUDASilent is a [CUDA].Code that is no value of CUresult.
const CUDASilent = -1

func (c CUDA) String() string {
	switch {
	case c.Code == 0:
		return "cuInit succeeded"
	case c.Code == CUDASilent:
		return "cuInit does not return"
	case c.Name == "":
		return fmt.Sprintf("cuInit returns error %d", c.Code)
	}
	return fmt.Sprintf("cuInit returns %s (%d)", c.Name, c.Code)
}

// MayPass reports whether a second call may succeed at once.
func (c CUDA) MayPass() bool {
	return c.Code != 0 && c.Code != CUDASilent && c.Code != cudaNotReady && c.Code != cudaNoDevice
}

// withCUDA changes a ready verdict if CUDA programs cannot start.
func (v Verdict) withCUDA() Verdict {
	if v.CUDA == nil {
		return v
	}
	switch v.CUDA.Code {
	case 0:
		return v
	case cudaNotReady:
		v.State = Starting
		v.Reason = fmt.Sprintf("CUDA programs cannot start yet: %s: nvidia-fabricmanager has not connected the "+
			"GPUs, or the ready state of a confidential node is not set", v.CUDA)
		return v
	case cudaNoDevice:
		if !slices.ContainsFunc(v.NVML.Devices, func(d Device) bool { return !d.MIG }) {
			v.Reason = "GPUs are in MIG mode; after the load there were no MIG instances for CUDA programs"
			return v
		}
	}
	v.State, v.UsableGPUs, v.OnlyCUDA = Unusable, 0, true
	v.Reason = fmt.Sprintf("every GPU answers NVML, but CUDA programs cannot start: %s", v.CUDA)
	return v
}

// noMPS names a folder without an MPS server. With the node's MPS server, cuInit would wait for other users' programs,
// or start a server that then holds the GPU (nvidia-cuda-mps-control(1)).
const noMPS = "CUDA_MPS_PIPE_DIRECTORY=/nonexistent"

// AskCUDA calls cuInit of the CUDA library at this path in the node's root. ErrHung means that the call did not return
// in time, or that an earlier probe still runs. Any other error means that there is no result, such as when the library
// does not open or the probe crashes.
func (p *Prober) AskCUDA(ctx context.Context, library string) (CUDA, error) {
	stdout, stderr, err := p.run(ctx, "CUDA", library, []string{noMPS}, "--cuda", library)
	if err != nil && stdout == nil {
		return CUDA{}, err
	}
	var a struct {
		Code  *int   `json:"code"`
		Name  string `json:"name"`
		Error string `json:"error"`
	}
	if parseErr := json.Unmarshal(stdout, &a); parseErr != nil {
		return CUDA{}, fmt.Errorf("ask CUDA: %w: %s", errors.Join(err, parseErr), Clip(strings.TrimSpace(stderr), 200))
	}
	if a.Code == nil {
		return CUDA{}, fmt.Errorf("ask CUDA: %s", Clip(a.Error, 200))
	}
	return CUDA{Code: *a.Code, Name: a.Name}, nil
}
