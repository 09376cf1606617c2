// Package chaos contains a test of a farm whose parts fail. The test kills server, builders and PostgreSQL while they
// work, and fills their disks. Then it checks that every cell was published once or failed with a reason. Server and
// database are the real programs. Each builder is a process that runs package worker without the real pipeline.
package chaos
