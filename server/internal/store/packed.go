package store

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"iter"
	"maps"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/timeline"
)

// KernelCells is a kernel with the facts that decide the state of its cells. Readers share it, so it must not be
// changed.
//
// The facts are stored as bytes: as Go values, they would be several hundred thousand objects for the garbage collector
// to read. All texts are in one string. Reading the facts about a cell takes less than a microsecond.
type KernelCells struct {
	Kernel api.Kernel
	// text has all texts of the cells, each once.
	text string
	// cells are the cells of the kernel, newest driver version first.
	cells []packedCell
	facts []byte
}

// packedCell is the driver of a cell, and the offset of its facts in KernelCells.facts. The other fields are offsets
// into KernelCells.text.
type packedCell struct{ version, versionEnd, flavour, flavourEnd, facts int }

// NewKernelCells packs the facts about the cells of a kernel.
func NewKernelCells(k api.Kernel, facts map[target.Driver]Facts) *KernelCells {
	drivers := slices.SortedFunc(maps.Keys(facts), newestFirst)
	w := &packer{places: map[string]int{}}
	cells := make([]packedCell, len(drivers))
	for i, d := range drivers {
		version, flavour := w.place(d.Version), w.place(string(d.Flavour))
		cells[i] = packedCell{version, version + len(d.Version), flavour, flavour + len(d.Flavour), len(w.stream)}
		f := facts[d]
		w.facts(&f)
	}
	return &KernelCells{Kernel: k, text: w.text(), cells: cells, facts: bytes.Clone(w.stream)}
}

// newestFirst orders the cells. Versions such as 535.1 and 535.01 are equal, but have two cells.
func newestFirst(a, b target.Driver) int {
	return cmp.Or(
		target.CompareVersions(b.Version, a.Version),
		cmp.Compare(a.Version, b.Version),
		cmp.Compare(a.Flavour, b.Flavour),
	)
}

// All returns the drivers that have facts, newest version first, with the facts about their cells.
func (k *KernelCells) All() iter.Seq2[target.Driver, Facts] {
	return func(yield func(target.Driver, Facts) bool) {
		for _, c := range k.cells {
			if !yield(k.driver(c), k.unpack(c)) {
				return
			}
		}
	}
}

// Drivers returns the drivers that have facts, newest version first.
func (k *KernelCells) Drivers() iter.Seq[target.Driver] {
	return func(yield func(target.Driver) bool) {
		for _, c := range k.cells {
			if !yield(k.driver(c)) {
				return
			}
		}
	}
}

// Facts returns the facts about a driver's cell. If there are none, the result is empty.
func (k *KernelCells) Facts(d target.Driver) Facts {
	i, known := slices.BinarySearchFunc(k.cells, d, func(c packedCell, d target.Driver) int {
		return newestFirst(k.driver(c), d)
	})
	if !known {
		return Facts{}
	}
	return k.unpack(k.cells[i])
}

func (k *KernelCells) driver(c packedCell) target.Driver {
	return target.Driver{
		Version: k.text[c.version:c.versionEnd],
		Flavour: target.Flavour(k.text[c.flavour:c.flavourEnd]),
	}
}

func (k *KernelCells) unpack(c packedCell) (f Facts) {
	r := &packer{from: k.text, stream: k.facts[c.facts:], reads: true}
	r.facts(&f)
	return f
}

// packer writes values to a stream of bytes or, if reads is set, reads them from there. Each method does both, so that
// writing and reading cannot differ. A text is stored as offset and length in the string of all texts.
type packer struct {
	stream []byte
	reads  bool

	from string // for reading: all texts

	texts  strings.Builder // for writing: all texts so far
	places map[string]int
}

func (p *packer) text() string { return strings.Clone(p.texts.String()) }

// place returns the offset of s in the string of all texts. It first adds s if it is new.
func (p *packer) place(s string) int {
	at, ok := p.places[s]
	if !ok {
		at = p.texts.Len()
		p.texts.WriteString(s)
		p.places[s] = at
	}
	return at
}

// uint writes *n to the stream as an unsigned varint or, if p.reads is set, reads it from there.
func (p *packer) uint(n *uint64) {
	if !p.reads {
		p.stream = binary.AppendUvarint(p.stream, *n)
		return
	}
	var size int
	*n, size = binary.Uvarint(p.stream)
	p.stream = p.stream[size:]
}

// packNumber writes *n to the stream as a signed varint or, if p.reads is set, reads it from there.
func packNumber[T int | int64](p *packer, n *T) {
	if !p.reads {
		p.stream = binary.AppendVarint(p.stream, int64(*n))
		return
	}
	got, size := binary.Varint(p.stream)
	*n, p.stream = T(got), p.stream[size:]
}

// packText writes offset and length of *s to the stream or, if p.reads is set, reads *s.
func packText[T ~string](p *packer, s *T) {
	var at, size uint64
	if !p.reads {
		at, size = uint64(p.place(string(*s))), uint64(len(*s))
	}
	p.uint(&at)
	p.uint(&size)
	if p.reads {
		*s = T(p.from[at : at+size])
	}
}

func (p *packer) bool(b *bool) {
	var n uint64
	if *b {
		n = 1
	}
	p.uint(&n)
	if p.reads {
		*b = n == 1
	}
}

// time writes *t to the stream or, if p.reads is set, reads it from there, in UTC.
func (p *packer) time(t *time.Time) {
	seconds, nanos := t.Unix(), t.Nanosecond()
	packNumber(p, &seconds)
	packNumber(p, &nanos)
	if p.reads {
		*t = time.Unix(seconds, int64(nanos)).UTC()
	}
}

// packOptional writes *v, which may be nil, to the stream or, if p.reads is set, reads it from there. pack does the
// same for the value.
func packOptional[T any](p *packer, v **T, pack func(*T)) {
	present := *v != nil
	p.bool(&present)
	if !present {
		return
	}
	if p.reads {
		*v = new(T)
	}
	pack(*v)
}

// packList writes a list to the stream or, if p.reads is set, reads it from there. pack does the same for an entry. An
// empty list is read as nil.
func packList[T any](p *packer, all *[]T, pack func(*T)) {
	size := uint64(len(*all))
	p.uint(&size)
	if p.reads && size > 0 {
		*all = make([]T, size)
	}
	for i := range *all {
		pack(&(*all)[i])
	}
}

func (p *packer) facts(f *Facts) {
	packList(p, &f.Artifacts, p.candidate)
	packOptional(p, &f.Newest, p.build)
}

func (p *packer) candidate(c *Candidate) {
	p.artifact(&c.Artifact)
	p.bool(&c.Attested)
	p.time(&c.AttestedAt)
}

// artifact writes *a to the stream or, if p.reads is set, reads it from there, in both cases without its list of
// kernels.
func (p *packer) artifact(a *api.Artifact) {
	packText(p, &a.Digest)
	packText(p, &a.Repository)
	packText(p, &a.Fingerprint)
	p.driver(&a.Driver)
	packText(p, &a.Arch)
	packText(p, &a.Release)
	packText(p, &a.State)
	packText(p, &a.Reason)
	packText(p, &a.Replacement)
	p.time(&a.PublishedAt)
	packOptional(p, &a.WithdrawnAt, p.time)
}

func (p *packer) driver(d *target.Driver) {
	packText(p, &d.Version)
	packText(p, &d.Flavour)
}

func (p *packer) build(b *api.Build) {
	packNumber(p, &b.ID)
	p.kernel(&b.Kernel)
	p.driver(&b.Driver)
	packText(p, &b.State)
	packText(p, &b.Phase)
	packText(p, &b.Worker)
	packNumber(p, &b.Attempt)
	packText(p, &b.Class)
	packText(p, &b.Error)
	packText(p, &b.Hint)
	packText(p, &b.Digest)
	packList(p, &b.Phases, p.phase)
	packNumber(p, &b.Priority)
	packNumber(p, &b.Tries)
	p.time(&b.CreatedAt)
	packOptional(p, &b.StartedAt, p.time)
	packOptional(p, &b.FinishedAt, p.time)
	packOptional(p, &b.HeartbeatAt, p.time)
	packOptional(p, &b.LogRemovedAt, p.time)
}

func (p *packer) kernel(k *target.Kernel) {
	packText(p, &k.BuildID)
	packText(p, &k.Board)
	packNumber(p, &k.Milestone)
	packText(p, &k.Commit)
	packText(p, &k.Release)
	packText(p, &k.Version)
	packText(p, &k.Arch)
}

func (p *packer) phase(f *timeline.Phase) {
	packText(p, &f.Name)
	p.time(&f.Start)
	bits := math.Float64bits(f.Seconds)
	p.uint(&bits)
	if p.reads {
		f.Seconds = math.Float64frombits(bits)
	}
	packText(p, &f.Note)
	packText(p, &f.Of)
	p.bool(&f.Failed)
}
