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
	// Code is the return value (CUresult of cuda.h); 0 is success.
	Code int `json:"code"`
	// Name is the library's name for Code, such as CUDA_ERROR_NO_DEVICE, or "" if it has none.
	Name string `json:"name,omitempty"`
}

// These are values of CUresult in cuda.h.
const (
	cudaNoDevice = 100 // CUDA_ERROR_NO_DEVICE
	cudaNotReady = 802 // CUDA_ERROR_SYSTEM_NOT_READY
)

func (c CUDA) String() string {
	if c.Name == "" {
		return fmt.Sprintf("error %d", c.Code)
	}
	return fmt.Sprintf("%s (%d)", c.Name, c.Code)
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
		v.Reason = fmt.Sprintf("CUDA programs cannot start yet: cuInit returns %s: nvidia-fabricmanager has not connected "+
			"the GPUs, or the ready state of a confidential node is not set", v.CUDA)
		return v
	case cudaNoDevice:
		if slices.ContainsFunc(v.NVML.Devices, func(d Device) bool { return d.MIG }) {
			v.Reason = "GPUs are in MIG mode, and CUDA programs cannot start before somebody makes MIG instances"
			return v
		}
	}
	v.State, v.UsableGPUs = Unusable, 0
	v.Reason = fmt.Sprintf("every GPU answers NVML, but CUDA programs cannot start: cuInit returns %s", v.CUDA)
	return v
}

// AskCUDA calls cuInit of the CUDA library at this path in the node's root. An error means that there is no answer: the
// library does not open, or the call does not return in time (ErrHung).
func (p *Prober) AskCUDA(ctx context.Context, library string) (CUDA, error) {
	stdout, stderr, err := p.run(ctx, library, "--cuda", library)
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
