// Package tarball publishes a built driver into a bucket, as a tarball in the layout that COS's own installer reads.
// The tarball has the modules and the firmware of an OCI artifact. The tarball has the same name as in a COS release
// bucket. The package also publishes checksums, a signature and an index. The bucket is a bucket of Google Cloud
// Storage or a folder.
//
// Most objects are created once and never change. The exceptions are index.json, gpu_driver_versions and the object of
// each label. The package changes them only if they are still in the state that it read. Publishing may be interrupted
// at any point and run again.
//
// The package never
//   - publishes different bytes under an existing name,
//   - adds to an index that no trusted key signed,
//   - signs entries of gpu_driver_versions that no trusted key signed before,
//   - lists a driver that Google's installer could not install,
//   - moves a label, such as DEFAULT or R535, that somebody else set.
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

// PredicateObject is the predicate type of the signed statement about each object. The statement names the object and
// its COS build. Without these names, the signature would stay valid if the object were moved to another COS build.
const PredicateObject = "https://prebake.dev/bucket-object/v1"

// ObjectFacts is the predicate of type PredicateObject.
type ObjectFacts struct {
	// Object is the object's name, relative to the bucket's prefix.
	Object  string `json:"object"`
	BuildID string `json:"buildId"`
	Board   string `json:"board"`
	// Driver, Artifact and Fingerprint are set for a tarball only.
	Driver      *target.Driver     `json:"driver,omitempty"`
	Artifact    string             `json:"artifact,omitempty"`
	Fingerprint target.Fingerprint `json:"fingerprint,omitempty"`
}

// Runfile is NVIDIA's runfile of a driver version.
type Runfile struct {
	// Path is the file's path; only Copy needs it.
	Path string
	// SHA256 is sha256: and 64 hex digits.
	SHA256 string
	// URI is the source of the runfile.
	URI string
	// Copy is true if Publish also copies the runfile into the bucket, unchanged, as NVIDIA's terms require.
	Copy bool
}

// Release is one driver for one COS build.
type Release struct {
	// Kernel is the COS build. Only BuildID, Board and Arch are used.
	Kernel      target.Kernel
	Driver      target.Driver
	Fingerprint target.Fingerprint
	// Modules is a folder with the *.ko files of the artifact.
	Modules string
	// Firmware is a folder that contains firmware/nvidia/VERSION/; "" means no firmware.
	Firmware string
	// Artifact is the manifest digest of the OCI artifact with these files.
	Artifact string
	// Runfile may be nil.
	Runfile *Runfile
	// GPUs is the driver's list of supported GPUs. It decides which rows of gpu_driver_versions get the version. If
	// GPUs is nil, only the rows for no particular product get the version.
	GPUs *gpulist.List
	// Signer signs everything that is written.
	Signer *sign.Signer
	// Verifier verifies what was published before. If it is nil, only Signer's key is trusted.
	Verifier *trust.Verifier
	// Scratch is a folder for temporary files; "" means the system's temporary folder.
	Scratch string
}

// Stored is one object of a release in the bucket.
type Stored struct {
	Name   string `json:"name"`
	Size   int64  `json:"size"`
	SHA256 string `json:"sha256"`
	// Existed is true if the object existed before.
	Existed bool `json:"existed"`
}

// Report is the result of publishing.
type Report struct {
	// URL is the tarball's URL, and SHA256 its digest.
	URL    string `json:"url"`
	SHA256 string `json:"sha256"`
	// Existed is true if all objects existed before and nothing changed.
	Existed bool     `json:"existed"`
	Objects []Stored `json:"objects"`
	// Unsigned has the URLs of the lists that were changed and have no signature, because no trusted key signed what was
	// in them before.
	Unsigned []string `json:"unsigned,omitempty"`
}

// Names of objects, relative to the bucket's prefix.
const (
	indexFile = "index.json"
	// RunfileFolder is the folder of the copies of runfiles, in the layout of COS's driver bucket.
	RunfileFolder = "drivers"
)

func under(k target.Kernel, name string) string { return path.Join(k.BuildID, k.Board, name) }

// TarballName returns the name of a driver's tarball. Google's installer expects open modules in
// nvidia-drivers-VERSION.tgz. A tarball with proprietary modules has the flavour in its name, and is in COS's folder of
// extensions.
func TarballName(k target.Kernel, d target.Driver) string {
	if d.Flavour == target.Open {
		return under(k, "nvidia-drivers-"+d.Version+".tgz")
	}
	return under(k, "extensions/gpu/nvidia-drivers-"+d.String()+".tgz")
}

// IndexName returns the name of a COS build's [Index].
func IndexName(k target.Kernel) string { return under(k, indexFile) }

// signatureName returns the name of the signature for an object that never changes.
func signatureName(name string) string { return name + ".sigstore.json" }

// stateSignatureName returns the name of a signature for one state of an object that changes. The signature is written
// before the object gets into this state.
func stateSignatureName(name, digest string) string {
	return name + ".sha256-" + digest[len("sha256:"):] + ".sigstore.json"
}

// object is an object that is created and never replaced.
type object struct {
	upload
	sha256 string
	// sign makes the content of a signature object. It is called only when the object is created, because two
	// signatures of the same content differ.
	sign func(ctx context.Context) (object, error)
	// checkExisting checks an existing object of this name. If it is nil, the existing content must equal the new
	// content.
	checkExisting func(have []byte) error
}

// Publish publishes a release into the bucket. It keeps existing objects that equal the new ones. If an existing object
// has other content, the error is [fault.PublishRefused] and nothing changes.
func Publish(ctx context.Context, b *Bucket, r Release) (Report, error) {
	report, err := publish(ctx, b, r)
	if err != nil {
		return Report{}, fmt.Errorf("publish driver %s for kernel %s: %w", r.Driver, r.Kernel, err)
	}
	return report, nil
}

// publisher is the state of one call of Publish or SetLabels.
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
	// Check everything before the first write, so that a refusal changes nothing.
	existed := make([]bool, len(objects))
	for i, o := range objects {
		if existed[i], err = p.exists(ctx, o); err != nil {
			return Report{}, err
		}
	}
	have, _, err := b.readSmall(ctx, IndexName(r.Kernel), maxIndex)
	if err != nil {
		return Report{}, err
	}
	if _, err := p.indexWith(ctx, have, entry); err != nil {
		return Report{}, err
	}
	for i, o := range objects {
		if err := p.create(ctx, o, existed[i]); err != nil {
			return Report{}, err
		}
	}
	if err := p.updateLists(ctx, entry); err != nil {
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
		return fault.New(fault.Usage, "the signing key is missing", "give a signing key with --key")
	}
	return nil
}

// objects returns all objects to create, in this order, and the release's entry for the index. A signature comes after
// the objects that a reader of the signature expects.
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
		return nil, Entry{}, fmt.Errorf("pack the tarball: %w", err)
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

// runfile returns the runfile's index entry and, if a copy of the runfile is wanted, the objects to write.
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
		return nil, nil, fault.Errorf(fault.Checksum, "read runfile %s: the file has digest %s; want %s", p.Runfile.Path,
			o.sha256,
			p.Runfile.SHA256)
	}
	e.Object = path.Join(RunfileFolder, name)
	o.name, o.contentType = e.Object, "application/octet-stream"
	sum := bytesObject(path.Join(RunfileFolder, cosbucket.RunfileSumName(p.Driver.Version, p.Kernel.Arch)), text,
		fmt.Appendf(nil, "%s  %s\n", o.sha256[len("sha256:"):], name))
	return []object{o, sum}, e, nil
}

// signature returns the object that holds the signed statement about an object with this digest.
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
	o.checkExisting = func(have []byte) error {
		_, err := Verify(p.verifier, have, digest, facts)
		return err
	}
	return o
}

// Verify checks the signature of an object with this digest. Facts that are empty in want are not compared.
func Verify(v *trust.Verifier, bundle []byte, digest string, want ObjectFacts) (ObjectFacts, error) {
	var got ObjectFacts
	st, err := v.Statement(bundle)
	if err != nil {
		return got, err
	}
	if st.PredicateType != PredicateObject || !st.About(digest) {
		return got, fault.Errorf(fault.Unverified, "%w: want a statement about %s of type %s", trust.ErrOtherDigest, digest,
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
			return got, fault.Errorf(fault.Mismatch, "the signature is for %s %.200q; want %q", f.what, f.got, f.want)
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

// maxSignature is the maximum size of a signature in bytes. A signature of this package has about 2 KB.
const maxSignature = trust.MaxBundleSize

// exists reports whether the object is in the bucket. If the object in the bucket has other content, the error is
// [fault.PublishRefused].
func (p *publisher) exists(ctx context.Context, o object) (bool, error) {
	refuse := func(why string) error {
		return fault.New(fault.PublishRefused, fmt.Sprintf("%s exists already: %s", p.bucket.URL(o.name), why),
			"compare the published object with the new one; if the published object is wrong, remove it by hand, "+
				"because this program never replaces it")
	}
	if o.checkExisting != nil {
		have, _, err := p.bucket.readSmall(ctx, o.name, maxSignature)
		if err != nil || have == nil {
			return false, err
		}
		if err := o.checkExisting(have); err != nil {
			return false, refuse(err.Error())
		}
		return true, nil
	}
	a, ok, err := p.bucket.s.stat(ctx, o.name)
	if err != nil || !ok {
		return false, err
	}
	if a.size != o.size {
		return false, refuse(fmt.Sprintf("the published object has %d bytes; the new object has %d bytes", a.size, o.size))
	}
	if sum := hex.EncodeToString(o.md5[:]); a.md5 != "" {
		if a.md5 != sum {
			return false, refuse(fmt.Sprintf("the published object has MD5 %s; the new object has MD5 %s", a.md5, sum))
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
		return false, refuse(fmt.Sprintf("the published object has digest %s; the new object has digest %s", have, o.sha256))
	}
	return true, nil
}

// create stores an object and adds it to the report. If the object existed, create only reports it.
func (p *publisher) create(ctx context.Context, o object, existed bool) error {
	if !existed {
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
			// Another publisher created the object, or the response to our own write was lost.
			if existed, err = p.exists(ctx, o); err == nil && !existed {
				err = fault.New(fault.Transient, "somebody removed the object after it was created",
					"find out who removes objects in the bucket, then publish again")
			}
			if err != nil {
				return fmt.Errorf("create %s: %w", p.bucket.URL(o.name), err)
			}
		case err != nil:
			return fmt.Errorf("create %s: %w", p.bucket.URL(o.name), err)
		}
		o.size, o.sha256 = made.size, made.sha256
	}
	p.reportObject(o.name, o.size, o.sha256, existed)
	return nil
}

func (p *publisher) reportObject(name string, size int64, digest string, existed bool) {
	p.report.Objects = append(p.report.Objects, Stored{Name: name, Size: size, SHA256: digest, Existed: existed})
	p.report.Existed = p.report.Existed && existed
}
