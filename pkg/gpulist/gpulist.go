// Package gpulist reports which GPUs a driver release supports, and which flavour of its kernel modules drives a GPU.
// The builder reads NVIDIA's supported-gpus.json. A node reads a short list from a signed statement.
//
// If a list has no entry for a GPU, the GPU's architecture decides.
package gpulist

import (
	"cmp"
	"encoding/json"
	"fmt"
	"regexp"
	"slices"
	"sort"
	"strconv"
	"strings"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
)

// PredicateType is the predicate type of the signed statement with the [List] of an artifact.
const PredicateType = "https://prebake.dev/supported-gpus/v1"

// File is the path of NVIDIA's list below a runfile's top folder.
const File = "supported-gpus/supported-gpus.json"

// Upper limits for the input. A list of 2026 has some 1,300 products in 400 KB.
const (
	MaxFile     = 8 << 20
	maxChips    = 20_000
	maxFeatures = 64
	maxText     = 160
)

// kernelOpen is NVIDIA's name of the feature "the open modules drive this product".
const kernelOpen = "kernelopen"

// Chip is one GPU product of NVIDIA.
type Chip struct {
	// Device is the PCI device id, such as 0x1eb8. SubVendor and SubDevice are the subsystem ids of a board. If they are
	// "", the entry is for all boards with this device.
	Device    string `json:"device"`
	SubVendor string `json:"subVendor,omitempty"`
	SubDevice string `json:"subDevice,omitempty"`
	// Name is NVIDIA's name of the product. A list from [List.Short] has no names.
	Name string `json:"name,omitempty"`
	// Features are NVIDIA's names of features. A list from [List.Short] has only kernelopen.
	Features []string `json:"features,omitempty"`
	// If the release no longer supports the product, Legacy is the older branch to use, such as 470.xx. Else Legacy is
	// "".
	Legacy string `json:"legacy,omitempty"`
}

// Open reports whether the list says that the open modules drive the product.
func (c Chip) Open() bool { return slices.Contains(c.Features, kernelOpen) }

// List has the products that one driver release supports.
type List struct {
	Version string `json:"version"`
	Chips   []Chip `json:"gpus"`
	// LeftOut says why entries of NVIDIA's file could not be read, for the first twenty of them.
	LeftOut []string `json:"-"`
}

const maxLeftOut = 20

var (
	idPattern     = regexp.MustCompile(`^0[xX][0-9a-fA-F]{4}$`)
	wordPattern   = regexp.MustCompile(`^[!-~]{1,64}$`)
	legacyPattern = regexp.MustCompile(`^[0-9]{1,4}(\.[0-9x]{1,4}){0,3}$`)
)

// ParseFile reads NVIDIA's supported-gpus.json. It ignores unknown fields, because the file may be newer than the
// program.
func ParseFile(version string, text []byte) (*List, error) {
	l, err := parseFile(version, text)
	if err != nil {
		return nil, fault.Wrap(fault.Unverified, fmt.Errorf("read supported-gpus.json: %w", err),
			"check that the object is NVIDIA's .run file, whole and unchanged")
	}
	return l, nil
}

func parseFile(version string, text []byte) (*List, error) {
	if len(text) > MaxFile {
		return nil, fmt.Errorf("the file has %d bytes; want at most %d bytes", len(text), MaxFile)
	}
	var file struct {
		Chips []json.RawMessage `json:"chips"`
	}
	if err := json.Unmarshal(text, &file); err != nil {
		return nil, err
	}
	if len(file.Chips) > maxChips {
		return nil, fmt.Errorf("the file has %d products; want at most %d products", len(file.Chips), maxChips)
	}
	l := &List{Version: version}
	for i, raw := range file.Chips {
		// An entry that cannot be read says nothing about the others, so ParseFile skips it.
		c, err := parseChip(raw)
		if err == nil {
			l.Chips = append(l.Chips, c)
		} else if len(l.LeftOut) < maxLeftOut {
			l.LeftOut = append(l.LeftOut, fmt.Sprintf("product %d: %v", i, err))
		}
	}
	return l, l.normalize()
}

func parseChip(raw []byte) (Chip, error) {
	var c struct {
		DevID       string   `json:"devid"`
		SubVendorID string   `json:"subvendorid"`
		SubDevID    string   `json:"subdevid"`
		Name        string   `json:"name"`
		Features    []string `json:"features"`
		Legacy      string   `json:"legacybranch"`
	}
	if err := json.Unmarshal(raw, &c); err != nil {
		return Chip{}, err
	}
	chip := Chip{Device: c.DevID, SubVendor: c.SubVendorID, SubDevice: c.SubDevID, Name: c.Name, Features: c.Features,
		Legacy: c.Legacy}
	return chip, chip.normalize()
}

// ParsePredicate reads the predicate of a statement. The caller must verify the statement's signature first.
func ParsePredicate(text []byte) (*List, error) {
	l := &List{}
	err := json.Unmarshal(text, l)
	if err == nil {
		err = l.normalize()
	}
	if err != nil {
		return nil, fault.Errorf(fault.Unverified, "read supported GPUs: %w", err)
	}
	return l, nil
}

// normalize checks every field and sorts the list, so that a list has one form only.
func (l *List) normalize() error {
	if !target.ValidVersion(l.Version) {
		return fmt.Errorf("the version %.60q is not a driver version", l.Version)
	}
	if len(l.Chips) == 0 || len(l.Chips) > maxChips {
		return fmt.Errorf("the list has %d products; want 1 to %d products", len(l.Chips), maxChips)
	}
	for i := range l.Chips {
		if err := l.Chips[i].normalize(); err != nil {
			return fmt.Errorf("check product %d: %w", i, err)
		}
	}
	// Not slices.SortStableFunc, which adds 8 KB to each program.
	sort.SliceStable(l.Chips, func(i, j int) bool { return l.Chips[i].compare(l.Chips[j]) < 0 })
	return nil
}

// normalize checks every field and writes the ids in lower case, so that an id has one form only.
func (c *Chip) normalize() error {
	for _, id := range []*string{&c.Device, &c.SubVendor, &c.SubDevice} {
		if *id == "" && id != &c.Device {
			continue
		}
		if !idPattern.MatchString(*id) {
			return fmt.Errorf("id %.40q: want 0x and 4 hex digits", *id)
		}
		*id = strings.ToLower(*id)
	}
	if len(c.Name) > maxText || len(c.Features) > maxFeatures {
		return fmt.Errorf("the name has %d bytes, and there are %d features; want at most %d bytes and %d features",
			len(c.Name),
			len(c.Features), maxText, maxFeatures)
	}
	for _, f := range c.Features {
		if !wordPattern.MatchString(f) {
			return fmt.Errorf("feature %.80q is not one word", f)
		}
	}
	if c.Legacy != "" && !legacyPattern.MatchString(c.Legacy) {
		return fmt.Errorf("legacy branch %.40q: want a branch such as 470.xx", c.Legacy)
	}
	return nil
}

func (c Chip) compare(d Chip) int {
	return cmp.Or(strings.Compare(c.Device, d.Device), strings.Compare(c.SubVendor, d.SubVendor),
		strings.Compare(c.SubDevice, d.SubDevice), strings.Compare(c.Name, d.Name))
}

// Short returns a list with only the facts by which a node chooses a flavour. If these facts are equal for all boards
// of a device, the boards become one entry.
func (l *List) Short() *List {
	short := &List{Version: l.Version}
	rest := l.Chips
	for len(rest) > 0 {
		n := slices.IndexFunc(rest, func(c Chip) bool { return c.Device != rest[0].Device })
		if n < 0 {
			n = len(rest)
		}
		boards := rest[:n]
		rest = rest[n:]
		if !slices.ContainsFunc(boards,
			func(c Chip) bool { return c.Open() != boards[0].Open() || c.Legacy != boards[0].Legacy }) {
			short.Chips = append(short.Chips,
				shorten(Chip{Device: boards[0].Device, Legacy: boards[0].Legacy}, boards[0].Open()))
			continue
		}
		for _, c := range boards {
			short.Chips = append(short.Chips,
				shorten(Chip{Device: c.Device, SubVendor: c.SubVendor, SubDevice: c.SubDevice, Legacy: c.Legacy}, c.Open()))
		}
	}
	return short
}

func shorten(c Chip, open bool) Chip {
	if open {
		c.Features = []string{kernelOpen}
	}
	return c
}

// GPU is one GPU of a node, described by its PCI ids.
type GPU struct {
	// Address is the PCI address; only messages use it.
	Address string
	// Device is the PCI device id, such as 0x1eb8. SubVendor and SubDevice may be "".
	Device, SubVendor, SubDevice string
}

// String returns the address of the GPU, and its ids as lspci prints them.
func (g GPU) String() string {
	id := "10de:" + strings.TrimPrefix(g.Device, "0x")
	if g.Address == "" {
		return id
	}
	return g.Address + " (" + id + ")"
}

// find returns the entry for a GPU's board, or else the entry for the GPU's device.
func (l *List) find(g GPU) (Chip, bool) {
	if l == nil {
		return Chip{}, false
	}
	var found *Chip
	for i, c := range l.Chips {
		switch {
		case c.Device != strings.ToLower(g.Device):
		case c.SubDevice != "" && c.SubDevice == strings.ToLower(g.SubDevice) && c.SubVendor == strings.ToLower(g.SubVendor):
			return c, true
		case c.SubDevice == "":
			found = &l.Chips[i]
		}
	}
	if found == nil {
		return Chip{}, false
	}
	return *found, true
}

// listsOpen reports whether any entry has the feature kernelopen. A list in which no entry has it says nothing about
// the open modules.
func (l *List) listsOpen() bool { return l != nil && slices.ContainsFunc(l.Chips, Chip.Open) }

// firstTuring is lower than the PCI device id of every GPU with a GSP (TU102, 0x1e02 and up). The open modules need a
// GSP. NVIDIA assigns ids in ascending order: Volta, the generation before Turing, ends at 0x1df6.
const firstTuring = 0x1e00

func turing(device string) bool {
	id, err := strconv.ParseUint(strings.TrimPrefix(strings.ToLower(device), "0x"), 16, 16)
	return err == nil && id >= firstTuring
}

// Serves reports whether modules of this flavour drive a GPU, and why not. If the list has no entry for the GPU, or
// does not say which products the open modules drive, the GPU's architecture decides: the open modules need Turing or
// newer.
func (l *List) Serves(g GPU, f target.Flavour) (ok bool, why string) {
	c, listed := l.find(g)
	switch {
	case listed && c.Legacy != "":
		return false, fmt.Sprintf("driver %s no longer supports GPU %s, which needs branch %s", l.Version, g, c.Legacy)
	case f != target.Open:
		return true, ""
	case listed && l.listsOpen() && !c.Open():
		return false, fmt.Sprintf("the open modules of driver %s do not drive GPU %s", l.Version, g)
	case (!listed || !l.listsOpen()) && !turing(g.Device):
		return false, fmt.Sprintf("the open modules drive Turing GPUs and newer ones, and GPU %s is older", g)
	}
	return true, ""
}

// Drives reports whether modules of this flavour drive any product of a gpu_type of COS's gpu_driver_versions, such as
// NVIDIA_TESLA_P100. A product's name must contain the words of the type, except NVIDIA and TESLA, next to each other
// and in the same order.
func (l *List) Drives(gpuType string, f target.Flavour) bool {
	words := strings.FieldsFunc(strings.ToUpper(gpuType), func(r rune) bool { return r == '_' })
	words = slices.DeleteFunc(words, func(w string) bool { return w == "NVIDIA" || w == "TESLA" })
	if l == nil || len(words) == 0 {
		return false
	}
	return slices.ContainsFunc(l.Chips, func(c Chip) bool {
		name := strings.FieldsFunc(strings.ToUpper(c.Name), func(r rune) bool { return r == ' ' || r == '-' || r == '_' })
		for i := range name {
			if len(name)-i >= len(words) && slices.Equal(name[i:i+len(words)], words) {
				ok, _ := l.Serves(GPU{Device: c.Device, SubVendor: c.SubVendor, SubDevice: c.SubDevice}, f)
				return ok
			}
		}
		return false
	})
}

// Offer is one available flavour, with the list of GPUs that it supports.
type Offer struct {
	Flavour target.Flavour
	// List is nil if no signed statement lists the GPUs that the artifact supports.
	List *List
}

// Choose returns the index of the offer that a node with these GPUs should use. Like COS itself, it prefers the open
// modules if they drive every GPU. For a node without GPUs, every offer fits.
func Choose(gpus []GPU, offers []Offer) (int, error) {
	var whys []string
	for _, f := range []target.Flavour{target.Open, target.Proprietary} {
		i := slices.IndexFunc(offers, func(o Offer) bool { return o.Flavour == f })
		if i < 0 {
			continue
		}
		why := ""
		for _, g := range gpus {
			if _, why = offers[i].List.Serves(g, f); why != "" {
				break
			}
		}
		if why == "" {
			return i, nil
		}
		if !slices.Contains(whys, why) {
			whys = append(whys, why)
		}
	}
	if len(offers) == 0 {
		return 0, fault.New(fault.NoArtifact, "choose flavour: no flavour of this driver is published", "")
	}
	hint := "ask for another driver version with --driver"
	if len(offers) == 1 && offers[0].Flavour == target.Open {
		hint = "ask for another driver version with --driver; to publish the proprietary flavour of this one, run: " +
			"builder build --flavour proprietary"
	}
	return 0, fault.New(fault.Unsupported, "choose flavour: "+strings.Join(whys, "; "), hint)
}
