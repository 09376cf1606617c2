// Package chaos contains one test. The test kills server, builders and PostgreSQL while they work, and fills their
// disks. Then it checks that every cell was published once or failed with a reason. Server and database are the real
// programs. Each builder is a separate process that runs package worker; a function of the test replaces the pipeline.
package chaos
