// Package chaos contains one test. The test kills server, builders and PostgreSQL while they work, and fills their
// disks. Then it counts what happened to every cell. Server and database are the real programs. A builder is a process
// of its own that runs package worker with a replacement for the compile.
package chaos
