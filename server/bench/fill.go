package main

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/timeline"
	"github.com/prebake/prebake/server/internal/store"
)

// world has the kernels and drivers that the measured calls ask about.
type world struct {
	kernels  []target.Kernel
	versions []string
}

// cursor returns the cursor of a random page of kernels, encoded as in package store.
func (w world) cursor() string {
	k := w.kernels[rand.IntN(len(w.kernels))]
	return base64.RawURLEncoding.EncodeToString(fmt.Appendf(nil, "[%q,%q]", target.SortKey(k.BuildID), k.Board))
}

// perFingerprint is the number of COS builds with the same ABI fingerprint. Most releases of real milestones do not
// change the kernel.
const perFingerprint = 4

var branches = []int{19999, 19506, 19216, 18867, 18613, 18244, 17800}

// fill writes a catalogue like that of a farm after a year.
func fill(ctx context.Context, url string, s settings) (w world, err error) {
	db, err := store.Open(ctx, url)
	if err != nil {
		return w, err
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	r := rand.New(rand.NewPCG(1, 2)) // fixed seeds, so the world is always the same
	for i := range s.drivers {
		w.versions = append(w.versions, fmt.Sprintf("%d.%d.%02d", 535+5*i, 100+i, i))
	}
	year := 365 * 24 * time.Hour
	begin := time.Now().Add(-year)
	fingers := make([]target.Fingerprint, s.kernels)
	for i := range s.kernels {
		branch := branches[i%len(branches)]
		id := fmt.Sprintf("%d.%d.%d", branch, i/len(branches)/100, i/len(branches)%100)
		m, _ := target.Milestone(id)
		w.kernels = append(w.kernels,
			target.Kernel{BuildID: id, Board: "lakitu", Milestone: m, Commit: fmt.Sprintf("%040x", i),
				Release: fmt.Sprintf("6.6.%d+", i/perFingerprint), Arch: target.AMD64})
		fingers[i] = target.Fingerprint(
			fmt.Sprintf("sha256:%x", sha256.Sum256(fmt.Appendf(nil, "%d %d", branch, i/len(branches)/perFingerprint))),
		)
	}
	err = db.Write(ctx, func(tx *store.Tx) error {
		for _, v := range w.versions {
			if err := tx.PutDriver(ctx, api.DriverRelease{Version: v, SeenAt: begin}); err != nil {
				return err
			}
		}
		for i, k := range w.kernels {
			entry := api.Kernel{Kernel: k, Fingerprint: fingers[i], Default: w.versions[0], Latest: w.versions[s.drivers-1],
				Branches: map[string]string{
					target.Branch(w.versions[0]): w.versions[0],
				}, SeenAt: begin.Add(year * time.Duration(i) / time.Duration(s.kernels))}
			if err := tx.PutKernel(ctx, entry); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return w, err
	}
	for i := range w.kernels {
		if i%500 == 0 && ctx.Err() != nil {
			return w, context.Cause(ctx)
		}
		err := db.Write(ctx, func(tx *store.Tx) error {
			return fillCells(ctx, tx, w, i, fingers[i], begin.Add(year*time.Duration(i)/time.Duration(s.kernels)))
		})
		if err != nil {
			return w, err
		}
	}
	return w, fillBuilds(ctx, db, w, s, r, begin)
}

// fillCells publishes most cells of a kernel.
func fillCells(ctx context.Context, tx *store.Tx, w world, i int, f target.Fingerprint, at time.Time) error {
	k := w.kernels[i]
	for n, v := range w.versions {
		for _, flavour := range []target.Flavour{target.Open, target.Proprietary} {
			if (i/perFingerprint+n)%7 == 0 && flavour == target.Proprietary {
				continue // this cell stays unknown, because nobody asked for it
			}
			d := target.Driver{Version: v, Flavour: flavour}
			a := api.Artifact{
				Digest:      fmt.Sprintf("sha256:%x", sha256.Sum256([]byte(string(f)+d.String()))),
				Repository:  "/prebake/driver",
				Fingerprint: f,
				Driver:      d,
				Arch:        k.Arch,
				Release:     k.Release,
				Kernels:     []target.Kernel{k},
				State:       api.Published,
				PublishedAt: at,
			}
			if err := tx.PutArtifact(ctx, a); err != nil {
				return err
			}
		}
	}
	return nil
}

// fillBuilds adds the builds of a year. The last s.queue of them wait for a builder.
func fillBuilds(ctx context.Context, db *store.Store, w world, s settings, r *rand.Rand, begin time.Time) error {
	const at = 1000 // builds in one transaction
	for done := 0; done < s.builds; done += at {
		err := db.Write(ctx, func(tx *store.Tx) error {
			for i := done; i < min(done+at, s.builds); i++ {
				b := api.Build{
					Kernel:    w.kernels[r.IntN(len(w.kernels))],
					State:     api.Published,
					CreatedAt: begin.Add(time.Duration(i) * time.Minute),
					Driver:    target.Driver{Version: w.versions[r.IntN(len(w.versions))], Flavour: target.Open},
				}
				if i >= s.builds-s.queue {
					b.State = api.Queued
				}
				b, added, err := tx.AddBuild(ctx, b)
				if err != nil || !added || b.State == api.Queued {
					return err
				}
				b.Phases = []timeline.Phase{
					{Name: "source", Seconds: 3},
					{Name: "compile", Seconds: 90},
					{Name: "publish", Seconds: 4},
				}
				if i%10 == 0 {
					b.State, b.Class, b.Error = api.Failed, "api-break", "nv-pci.c:1: error: too few arguments to function"
				}
				if err := tx.SetBuild(ctx, b); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}
