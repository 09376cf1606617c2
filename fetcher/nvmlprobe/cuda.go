package main

/*
#cgo LDFLAGS: -ldl
#include <dlfcn.h>
#include <stdlib.h>

// The declarations are those of cuda.h: CUresult is an enum.
static int init(void *function) { return ((int (*)(unsigned int))function)(0); }

static const char *name(void *function, int result) {
	const char *text = 0;
	if (function && ((int (*)(int, const char **))function)(result, &text) != 0)
		return 0;
	return text;
}
*/
import "C"

import (
	"errors"
	"runtime"
	"unsafe"
)

// CUDAAnswer is the JSON object that the probe prints about CUDA.
type CUDAAnswer struct {
	// Code is what cuInit returned (CUresult of cuda.h); 0 is success. Without Code, cuInit was not called, and Error says
	// why.
	Code *int `json:"code,omitempty"`
	// Name is the library's name for Code, such as CUDA_ERROR_NO_DEVICE, or "" if it has none.
	Name  string `json:"name,omitempty"`
	Error string `json:"error,omitempty"`
}

// askCUDA calls cuInit of a CUDA library: a path, or a name for the loader to find. A CUDA program begins with this
// call. It opens every GPU, and makes no context. As root, it also makes missing device files, as NVML does.
func askCUDA(path string) (a CUDAAnswer) {
	runtime.LockOSThread() // because dlerror is about the last call of its thread
	defer runtime.UnlockOSThread()
	text := C.CString(path)
	defer C.free(unsafe.Pointer(text))
	library := C.dlopen(text, C.RTLD_NOW)
	if library == nil {
		a.Error = "open CUDA: " + loaderError().Error()
		return a
	}
	cuInit := symbol(library, "cuInit")
	if cuInit == nil {
		a.Error = "open CUDA: " + loaderError().Error()
		return a
	}
	code := C.init(cuInit)
	if name := C.name(symbol(library, "cuGetErrorName"), code); name != nil {
		a.Name = C.GoString(name)
	}
	a.Code = new(int(code))
	return a
}

// symbol returns the address of a function, or nil.
func symbol(library unsafe.Pointer, name string) unsafe.Pointer {
	text := C.CString(name)
	defer C.free(unsafe.Pointer(text))
	return C.dlsym(library, text)
}

func loaderError() error {
	if text := C.dlerror(); text != nil {
		return errors.New(C.GoString(text))
	}
	return errors.New("the loader gives no reason")
}
