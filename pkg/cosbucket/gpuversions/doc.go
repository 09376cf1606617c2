// Package gpuversions is the generated parser of COS's gpu_driver_versions.textproto. It does not check the values;
// package cosbucket does.
package gpuversions

// The command protoc is in Debian's package protobuf-compiler. protoc-gen-go has the same version as
// google.golang.org/protobuf in go.mod.
//go:generate go install google.golang.org/protobuf/cmd/protoc-gen-go@v1.36.12
//go:generate protoc --go_out=. --go_opt=paths=source_relative gpu_driver_versions.proto
