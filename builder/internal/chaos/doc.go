// Package chaos holds a test and nothing else: it kills server, builders and
// PostgreSQL while they work, and fills their disks, and then counts what happened to
// every cell. Server and database are the real programs; a builder is a process of
// its own that runs package worker with a stand-in for the compile.
package chaos
