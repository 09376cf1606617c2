// Package bundle is the artifact's format: how an identity, three layers and
// a config become one OCI image manifest, and how a layer's bytes become files
// again. It refuses to fetch, to sign, and to write outside the folder it was
// given.
package bundle

// MediaTypeLayer is the media type of every layer (OCI image-spec 1.1, layer.md).
const MediaTypeLayer = "application/vnd.oci.image.layer.v1.tar+zstd"

// FormatVersion is the value of [AnnotationFormat] that this code writes and
// the only one that it reads.
const FormatVersion = "1"

// Annotations of the manifest. Together they carry the whole identity of an
// artifact. BUILD_IDs are not among them: one artifact serves every COS build
// of its fingerprint, and a signed statement for each build says so.
const (
	AnnotationFormat        = "dev.prebake.format"
	AnnotationFingerprint   = "dev.prebake.kernel.fingerprint"
	AnnotationRelease       = "dev.prebake.kernel.release"
	AnnotationVermagic      = "dev.prebake.kernel.vermagic"
	AnnotationArch          = "dev.prebake.kernel.arch"
	AnnotationDriverVersion = "dev.prebake.driver.version"
	AnnotationDriverFlavour = "dev.prebake.driver.flavour"
)

// AnnotationLayer is on each layer's descriptor and holds a [LayerKind].
const AnnotationLayer = "dev.prebake.layer"

// LayerKind says what a layer holds.
type LayerKind string

// The three layers, in manifest order. Paths inside them are those of the
// install folder that COS nodes and the GKE device plugin expect.
const (
	// LayerModules holds drivers/*.ko: small, made for one fingerprint.
	LayerModules LayerKind = "modules"
	// LayerUserspace holds bin/, lib64/, share/, vulkan/: one for each driver version.
	LayerUserspace LayerKind = "userspace"
	// LayerFirmware holds firmware/nvidia/<VERSION>/*.bin: one for each driver version.
	LayerFirmware LayerKind = "firmware"
)

// LayerKinds returns the three kinds in manifest order.
func LayerKinds() []LayerKind { return []LayerKind{LayerModules, LayerUserspace, LayerFirmware} }

// annotationTitle is on each layer's descriptor; under this name oras keeps the
// layer as a file (OCI image-spec, annotations.md).
const annotationTitle = "org.opencontainers.image.title"

// title is the file name of a layer of this kind.
func (k LayerKind) title() string { return string(k) + ".tar.zst" }

// ImageRecipe names the way a manifest and a config are made of layers. It changes
// whenever equal layers would give another manifest.
const ImageRecipe = "image-3"
