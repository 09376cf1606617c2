// Package chaos contains one test. It kills server, builders and PostgreSQL while they work, fills their disks, and
// then counts what happened to every cell. Server and database are the real programs. A builder is a process of its own
// that runs package worker with a replacement for the compile.
package chaos
