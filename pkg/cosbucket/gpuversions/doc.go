// Package gpuversions is the generated reader of COS's
// gpu_driver_versions.textproto. It refuses to judge what it reads; package
// cosbucket does.
package gpuversions

// protoc is Debian's protobuf-compiler; protoc-gen-go has the version of
// google.golang.org/protobuf in go.mod.
//go:generate go install google.golang.org/protobuf/cmd/protoc-gen-go@v1.36.12
//go:generate protoc --go_out=. --go_opt=paths=source_relative gpu_driver_versions.proto
