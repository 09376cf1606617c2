// Package tarball publishes a built driver into a bucket, as a tarball in the
// layout that COS's own installer reads: the modules and the firmware of an OCI
// artifact under the names of a COS release bucket, with sums, a signature and
// an index. The bucket is one of Google Cloud Storage or a folder.
//
// Objects are created and never replaced; the lists that have to grow
// (index.json and gpu_driver_versions) and the labels in them change only from
// the very state that was read. Publishing may be interrupted anywhere and run
// again. The package refuses to publish other bytes under a name that is taken,
// to extend an index that nobody trusted signed, to list a driver for Google's
// installer that it could not install, and to move a label that somebody else
// set.
package tarball

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"

	"github.com/prebake/prebake/builder/internal/sign"
	"github.com/prebake/prebake/pkg/cosbucket"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/gpulist"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/trust"
)

// PredicateObject is the type of the statement beside each object: what it is,
// under which name, for which COS build. A signature over bytes alone would
// also hold for another build's file under this build's name.
const PredicateObject = "https://prebake.dev/bucket-object/v1"

// ObjectFacts is the predicate of that name.
type ObjectFacts struct {
	// Object is the name below the bucket's prefix.
	Object  string `json:"object"`
	BuildID string `json:"buildId"`
	Board   string `json:"board"`
	// Driver, Artifact and Fingerprint are those of a tarball.
	Driver      *target.Driver     `json:"driver,omitempty"`
	Artifact    string             `json:"artifact,omitempty"`
	Fingerprint target.Fingerprint `json:"fingerprint,omitempty"`
}

// Runfile is NVIDIA's own file for a driver version.
type Runfile struct {
	// Path is the file, for Copy.
	Path string
	// SHA256 is sha256: and 64 hex digits.
	SHA256 string
	// URI is where it came from.
	URI string
	// Copy puts it into the bucket too, unchanged as NVIDIA's terms have it.
	Copy bool
}

// Release is what is published at once: one driver for one COS build.
type Release struct {
	// Kernel is the COS build; BuildID, Board and Arch count.
	Kernel      target.Kernel
	Driver      target.Driver
	Fingerprint target.Fingerprint
	// Modules is a folder with the *.ko files of the artifact.
	Modules string
	// Firmware is a folder that holds firmware/nvidia/VERSION/; "" is none.
	Firmware string
	// Artifact is the manifest digest of the OCI artifact with these files.
	Artifact string
	// Runfile may be nil.
	Runfile *Runfile
	// GPUs is the release's list, which decides in which rows of
	// gpu_driver_versions the version goes; nil leaves it to the general rows.
	GPUs *gpulist.List
	// Signer signs what is written.
	Signer *sign.Signer
	// Verifier judges what was published before; nil trusts Signer's key only.
	Verifier *trust.Verifier
	// Scratch is a folder for the tarball while it is made; "" means the system's.
	Scratch string
}

// Stored is one object that a release consists of.
type Stored struct {
	Name   string `json:"name"`
	Size   int64  `json:"size"`
	SHA256 string `json:"sha256"`
	// Existed says that nothing had to be written.
	Existed bool `json:"existed"`
}

// Report says what came of publishing.
type Report struct {
	// URL is the tarball's, and SHA256 its digest.
	URL    string `json:"url"`
	SHA256 string `json:"sha256"`
	// Existed says that everything was there already, and nothing was changed.
	Existed bool     `json:"existed"`
	Objects []Stored `json:"objects"`
}

// Names of objects below the bucket's prefix.
const (
	indexFile = "index.json"
	// RunfileFolder holds copies of runfiles, in the layout of COS's driver
	// bucket.
	RunfileFolder = "drivers"
)

func under(k target.Kernel, name string) string { return path.Join(k.BuildID, k.Board, name) }

// TarballName returns the name of a driver's tarball. Google's installer takes
// nvidia-drivers-VERSION.tgz for the open modules, so those of the proprietary
// flavour have a name that says so, among COS's extensions.
func TarballName(k target.Kernel, d target.Driver) string {
	if d.Flavour == target.Open {
		return under(k, "nvidia-drivers-"+d.Version+".tgz")
	}
	return under(k, "extensions/gpu/nvidia-drivers-"+d.String()+".tgz")
}

// IndexName returns the name of a COS build's [Index].
func IndexName(k target.Kernel) string { return under(k, indexFile) }

// signatureName is the object beside one that never changes.
func signatureName(name string) string { return name + ".sigstore.json" }

// stateSignatureName is the object beside one that changes: every state has a
// signature of its own, which is there before the state is to be seen.
func stateSignatureName(name, digest string) string {
	return name + ".sha256-" + digest[len("sha256:"):] + ".sigstore.json"
}

// object is one that is created and never replaced.
type object struct {
	upload
	sha256 string
	// sign makes the object when it has to be created: signatures of the same
	// thing differ, and so have no bytes before.
	sign func(ctx context.Context) (object, error)
	// same judges what is there under the name; nil wants equal bytes.
	same func(have []byte) error
}

// Publish puts a release into the bucket. Objects that are there already stay;
// other bytes under one of their names is [fault.PublishRefused], and nothing
// was changed.
func Publish(ctx context.Context, b *Bucket, r Release) (Report, error) {
	report, err := publish(ctx, b, r)
	if err != nil {
		return Report{}, fmt.Errorf("publish driver %s for %s: %w", r.Driver, r.Kernel, err)
	}
	return report, nil
}

// publisher is one call of Publish.
type publisher struct {
	Release
	bucket   *Bucket
	verifier *trust.Verifier
	report   Report
}

func publish(ctx context.Context, b *Bucket, r Release) (_ Report, err error) {
	p := &publisher{Release: r, bucket: b, verifier: r.Verifier, report: Report{Existed: true}}
	if err := p.check(); err != nil {
		return Report{}, err
	}
	if p.verifier == nil {
		if p.verifier, err = r.Signer.Verifier(); err != nil {
			return Report{}, err
		}
	}
	dir, err := os.MkdirTemp(r.Scratch, "prebake-twin-")
	if err != nil {
		return Report{}, fault.TempDisk(err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	objects, entry, err := p.objects(ctx, filepath.Join(dir, "tgz"))
	if err != nil {
		return Report{}, err
	}
	// Look at everything before the first byte is sent.
	there := make([]bool, len(objects))
	for i, o := range objects {
		if there[i], err = p.present(ctx, o); err != nil {
			return Report{}, err
		}
	}
	have, _, err := b.small(ctx, IndexName(r.Kernel), maxIndex)
	if err != nil {
		return Report{}, err
	}
	if _, err := p.indexWith(ctx, have, entry); err != nil {
		return Report{}, err
	}
	for i, o := range objects {
		if err := p.create(ctx, o, there[i]); err != nil {
			return Report{}, err
		}
	}
	if err := p.lists(ctx, entry); err != nil {
		return Report{}, err
	}
	p.report.URL, p.report.SHA256 = b.URL(entry.Object), entry.SHA256
	return p.report, nil
}

func (p *publisher) check() error {
	if _, err := target.ParseKernel(p.Kernel.BuildID, p.Kernel.Board); err != nil {
		return fault.Wrap(fault.Usage, err, "")
	}
	if _, err := target.ParseDriver(p.Driver.Version, string(p.Driver.Flavour)); err != nil {
		return fault.Wrap(fault.Usage, err, "")
	}
	if p.Signer == nil {
		return fault.New(fault.Usage, "no signing key", "name one with --key")
	}
	return nil
}

// objects are all that is created, in the order of creation: a name that says
// that something is whole comes behind it.
func (p *publisher) objects(ctx context.Context, tarball string) ([]object, Entry, error) {
	var all []object
	entry := Entry{Driver: p.Driver, Artifact: p.Artifact, Fingerprint: p.Fingerprint}
	if p.Runfile != nil {
		var err error
		if all, entry.Runfile, err = p.runfile(ctx); err != nil {
			return nil, Entry{}, err
		}
	}
	files, err := p.sources()
	if err != nil {
		return nil, Entry{}, err
	}
	tgz, list, err := pack(ctx, files, tarball, readXattr)
	if err != nil {
		return nil, Entry{}, fmt.Errorf("pack: %w", err)
	}
	tgz.name, tgz.contentType = TarballName(p.Kernel, p.Driver), "application/gzip"
	sum := hex.EncodeToString(tgz.md5[:])
	facts := ObjectFacts{Object: tgz.name, Driver: &p.Driver, Artifact: p.Artifact, Fingerprint: p.Fingerprint}
	all = append(all, tgz,
		bytesObject(cosbucket.MD5Name(tgz.name), text, []byte(sum)),
		bytesObject(tgz.name+".sha256", text, fmt.Appendf(nil, "%s  %s\n", tgz.sha256[len("sha256:"):], path.Base(tgz.name))),
		p.signature(signatureName(tgz.name), tgz.sha256, facts))
	entry.Object, entry.Size, entry.SHA256, entry.MD5, entry.Signature =
		tgz.name, tgz.size, tgz.sha256, sum, signatureName(tgz.name)
	entry.Files = list
	return all, entry, nil
}

const text = "text/plain; charset=utf-8"

// runfile returns the copy of NVIDIA's file, if it is wanted, and how the
// index names it.
func (p *publisher) runfile(ctx context.Context) ([]object, *RunfileEntry, error) {
	name := cosbucket.RunfileName(p.Driver.Version, p.Kernel.Arch)
	e := &RunfileEntry{Name: name, SHA256: p.Runfile.SHA256, URI: p.Runfile.URI}
	if !p.Runfile.Copy {
		return nil, e, nil
	}
	o, err := fileObject(ctx, p.Runfile.Path)
	if err != nil {
		return nil, nil, fmt.Errorf("read runfile: %w", err)
	}
	if o.sha256 != p.Runfile.SHA256 {
		return nil, nil, fault.Errorf(fault.Checksum, "read runfile %s: it has %s; want %s", p.Runfile.Path, o.sha256,
			p.Runfile.SHA256)
	}
	e.Object = path.Join(RunfileFolder, name)
	o.name, o.contentType = e.Object, "application/octet-stream"
	sum := bytesObject(path.Join(RunfileFolder, cosbucket.RunfileSumName(p.Driver.Version, p.Kernel.Arch)), text,
		fmt.Appendf(nil, "%s  %s\n", o.sha256[len("sha256:"):], name))
	return []object{o, sum}, e, nil
}

// signature is the statement about an object with this digest.
func (p *publisher) signature(name, digest string, facts ObjectFacts) object {
	facts.BuildID, facts.Board = p.Kernel.BuildID, p.Kernel.Board
	o := object{upload: upload{name: name}}
	o.sign = func(ctx context.Context) (object, error) {
		statement, err := sign.About(path.Base(facts.Object), digest, PredicateObject, facts)
		if err != nil {
			return object{}, err
		}
		raw, err := sign.Bundle(ctx, p.Signer, statement)
		if err != nil {
			return object{}, err
		}
		return bytesObject(name, trust.ArtifactTypeBundle, raw), nil
	}
	o.same = func(have []byte) error {
		_, err := Verify(p.verifier, have, digest, facts)
		return err
	}
	return o
}

// Verify checks the signature of an object with this digest: that it holds, and
// that it is about this very name, build and driver. Facts that want leaves out
// may be anything.
func Verify(v *trust.Verifier, bundle []byte, digest string, want ObjectFacts) (ObjectFacts, error) {
	var got ObjectFacts
	st, err := v.Statement(bundle)
	if err != nil {
		return got, err
	}
	if st.PredicateType != PredicateObject || !st.About(digest) {
		return got, fault.Errorf(fault.Unverified, "%w, not about %s of type %s", trust.ErrOtherDigest, digest,
			PredicateObject)
	}
	if err := json.Unmarshal(st.Predicate, &got); err != nil {
		return got, fault.Errorf(fault.Unverified, "%w: %w", trust.ErrMalformed, err)
	}
	for _, f := range []struct{ what, got, want string }{
		{"object", got.Object, want.Object},
		{"build", got.BuildID, want.BuildID},
		{"board", got.Board, want.Board},
		{"driver", driverText(got.Driver), driverText(want.Driver)},
		{"artifact", got.Artifact, want.Artifact},
		{"fingerprint", string(got.Fingerprint), string(want.Fingerprint)},
	} {
		if f.want != "" && f.got != f.want {
			return got, fault.Errorf(fault.Mismatch, "it is signed as %s %.200q; want %q", f.what, f.got, f.want)
		}
	}
	return got, nil
}

func driverText(d *target.Driver) string {
	if d == nil {
		return ""
	}
	return d.String()
}

// maxSignature bounds one; a statement here has some 2 KB.
const maxSignature = trust.MaxBundleSize

// present says whether an object is there. Another one under its name is refused.
func (p *publisher) present(ctx context.Context, o object) (bool, error) {
	refuse := func(why string) error {
		return fault.New(fault.PublishRefused, fmt.Sprintf("%s is there already: %s", p.bucket.URL(o.name), why),
			"what is published is never replaced: find out what differs, and remove it by hand if it is wrong")
	}
	if o.same != nil {
		have, _, err := p.bucket.small(ctx, o.name, maxSignature)
		if err != nil || have == nil {
			return false, err
		}
		if err := o.same(have); err != nil {
			return false, refuse(err.Error())
		}
		return true, nil
	}
	a, ok, err := p.bucket.s.stat(ctx, o.name)
	if err != nil || !ok {
		return false, err
	}
	if a.size != o.size {
		return false, refuse(fmt.Sprintf("it has %d bytes, this has %d", a.size, o.size))
	}
	if sum := hex.EncodeToString(o.md5[:]); a.md5 != "" {
		if a.md5 != sum {
			return false, refuse(fmt.Sprintf("it has md5 %s, this has %s", a.md5, sum))
		}
		return true, nil
	}
	rc, _, err := p.bucket.s.open(ctx, o.name)
	if err != nil {
		return false, fmt.Errorf("read %s: %w", p.bucket.URL(o.name), err)
	}
	s := newSums()
	_, err = io.Copy(s, &ctxReader{ctx, rc})
	if err = errors.Join(err, rc.Close()); err != nil {
		return false, fmt.Errorf("read %s: %w", p.bucket.URL(o.name), err)
	}
	if have := s.object().sha256; have != o.sha256 {
		return false, refuse(fmt.Sprintf("it has %s, this has %s", have, o.sha256))
	}
	return true, nil
}

// create stores an object that was not there when it was looked at.
func (p *publisher) create(ctx context.Context, o object, there bool) error {
	if !there {
		made := o
		if o.sign != nil {
			var err error
			if made, err = o.sign(ctx); err != nil {
				return err
			}
		}
		err := p.bucket.s.create(ctx, made.upload)
		switch {
		case errors.Is(err, errExists):
			// Another publisher, or a write whose answer was lost.
			if there, err = p.present(ctx, o); err == nil && !there {
				err = fault.New(fault.Transient, "the object appears and disappears", "find out who removes objects there")
			}
			if err != nil {
				return fmt.Errorf("create %s: %w", p.bucket.URL(o.name), err)
			}
		case err != nil:
			return fmt.Errorf("create %s: %w", p.bucket.URL(o.name), err)
		}
		o.size, o.sha256 = made.size, made.sha256
	}
	p.stored(o.name, o.size, o.sha256, there)
	return nil
}

func (p *publisher) stored(name string, size int64, digest string, existed bool) {
	p.report.Objects = append(p.report.Objects, Stored{Name: name, Size: size, SHA256: digest, Existed: existed})
	p.report.Existed = p.report.Existed && existed
}

// listing is an object that changes.
type listing struct {
	name, contentType string
	limit             int64
	// next makes the next state of the present one, nil where there is none.
	next func(have []byte) ([]byte, error)
}

// lists adds the release to the objects that change, the index last.
func (p *publisher) lists(ctx context.Context, entry Entry) error {
	if forInstaller(p.Driver) {
		serves := func(gpuType string) bool { return p.GPUs.Drives(gpuType, p.Driver.Flavour) }
		if err := p.versions(ctx, withVersion(p.Driver.Version, serves)); err != nil {
			return err
		}
	}
	return p.change(ctx, listing{IndexName(p.Kernel), "application/json", maxIndex,
		func(have []byte) ([]byte, error) { return p.indexWith(ctx, have, entry) }})
}

// versions changes gpu_driver_versions in both its forms.
func (p *publisher) versions(ctx context.Context, change edit) error {
	if err := p.change(ctx, listing{cosbucket.DriverVersionsName(p.Kernel), text, maxVersions,
		func(have []byte) ([]byte, error) { return editText(have, change) }}); err != nil {
		return err
	}
	return p.change(ctx, listing{cosbucket.DriverVersionsBinName(p.Kernel), "application/octet-stream", maxVersions,
		func(have []byte) ([]byte, error) { return editBinary(have, change) }})
}

// change changes an object. The signature of the next state is there before it.
func (p *publisher) change(ctx context.Context, l listing) error {
	changed, data, err := p.bucket.update(ctx, l.name, l.contentType, l.limit, l.next, func(data []byte) error {
		digest := bytesObject(l.name, "", data).sha256
		o := p.signature(stateSignatureName(l.name, digest), digest, ObjectFacts{Object: l.name})
		there, err := p.present(ctx, o)
		if err != nil {
			return err
		}
		return p.create(ctx, o, there)
	})
	if err != nil {
		return err
	}
	o := bytesObject(l.name, "", data)
	p.stored(l.name, o.size, o.sha256, !changed)
	return nil
}

// indexWith adds the entry to an index, nil where there is none.
func (p *publisher) indexWith(ctx context.Context, have []byte, entry Entry) ([]byte, error) {
	x, err := p.index(ctx, have)
	if err != nil {
		return nil, err
	}
	if x, err = x.with(entry); err != nil {
		return nil, err
	}
	return x.marshal()
}

// index reads an index that is about to be changed. One that nobody trusted
// signed is not: to sign it would vouch for all of it.
func (p *publisher) index(ctx context.Context, have []byte) (Index, error) {
	x, err := p.bucket.verifyIndex(ctx, p.verifier, p.Kernel, have)
	if fault.Is(err, fault.Unverified) || fault.Is(err, fault.Mismatch) {
		return Index{}, fault.Wrap(fault.PublishRefused, fmt.Errorf("extend the index: %w", err),
			"publish with the key that signed it, or remove it by hand if it is wrong")
	}
	return x, err
}
