// Package chaos contains one test. The test kills server, builders and PostgreSQL while they work, and fills their
// disks. Then it counts what happened to every cell. Server and database are the real programs. Each builder is a
// separate process that runs package worker, with a short replacement for the pipeline.
package chaos
