package main

import (
	"context"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/prebake/prebake/pkg/fault"
)

// disk measures the free space on the disk of the data folder. If less than the reserve is free, uploads and build logs
// are refused. The reserve keeps space for the databases.
type disk struct {
	dir     string
	reserve uint64 // bytes

	mu   sync.Mutex
	at   time.Time
	free uint64
	err  error
}

// measurementLife is how long a measurement is used. Uploads are too frequent to measure each time. A measurement below
// the reserve is not used again, because the caller may have freed space meanwhile.
const measurementLife = time.Second

// Free returns how many bytes are free on the disk for this program.
func (d *disk) Free() (uint64, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if time.Since(d.at) < measurementLife && d.err == nil && d.free >= d.reserve {
		return d.free, nil
	}
	var s unix.Statfs_t
	if d.err = unix.Statfs(d.dir, &s); d.err == nil {
		d.free = s.Bavail * uint64(s.Bsize)
	}
	d.at = time.Now()
	return d.free, d.err
}

// CheckFree returns an error if less than the reserve is free.
func (d *disk) CheckFree() error {
	free, err := d.Free()
	if err != nil {
		return fmt.Errorf("measure the free space of the data folder's disk: %w", err)
	}
	if free < d.reserve {
		return fault.New(
			fault.DiskFull,
			fmt.Sprintf("%d MiB are left on the disk of %s, less than the reserve of %d MiB", free>>20, d.dir, d.reserve>>20),
			"free space on this disk, or start the server with a smaller --reserve",
		)
	}
	return nil
}

// Ping is [disk.CheckFree] under the name that the readiness check calls.
func (d *disk) Ping(context.Context) error { return d.CheckFree() }
