// Package bundle defines the artifact's format. It makes an OCI image from an identity and three layers, and it unpacks
// a layer into files. It does not download or sign, and it does not write outside the given folder. The offline file
// that the commands and the glossary call a bundle is another thing: package offline of the builder makes it.
package bundle

// MediaTypeLayer is the media type of every layer (OCI image-spec 1.1, layer.md).
const MediaTypeLayer = "application/vnd.oci.image.layer.v1.tar+zstd"

// FormatVersion is the value of [AnnotationFormat]. This code writes and reads only this version.
const FormatVersion = "1"

// Annotations of the manifest. Together they are the whole identity of an artifact. BUILD_IDs are not among them: the
// signed kernel-match statements have them.
const (
	AnnotationFormat        = "dev.prebake.format"
	AnnotationFingerprint   = "dev.prebake.kernel.fingerprint"
	AnnotationRelease       = "dev.prebake.kernel.release"
	AnnotationVermagic      = "dev.prebake.kernel.vermagic"
	AnnotationArch          = "dev.prebake.kernel.arch"
	AnnotationDriverVersion = "dev.prebake.driver.version"
	AnnotationDriverFlavour = "dev.prebake.driver.flavour"
)

// AnnotationLayer is an annotation on each layer's descriptor. Its value is a [LayerKind].
const AnnotationLayer = "dev.prebake.layer"

// LayerKind is the kind of a layer's content.
type LayerKind string

// Kinds of layers, in manifest order. Paths in layers are relative to the install folder of COS nodes and the GKE
// device plugin.
const (
	// LayerModules has drivers/*.ko. Each fingerprint needs its own layer.
	LayerModules LayerKind = "modules"
	// LayerUserspace has bin/, lib64/, share/ and vulkan/. One driver version has the same layer for all kernels of an
	// architecture.
	LayerUserspace LayerKind = "userspace"
	// LayerFirmware has firmware/nvidia/<VERSION>/*.bin. One driver version has the same layer for all kernels of an
	// architecture.
	LayerFirmware LayerKind = "firmware"
)

// LayerKinds returns the three kinds in manifest order.
func LayerKinds() []LayerKind { return []LayerKind{LayerModules, LayerUserspace, LayerFirmware} }

// annotationTitle is an annotation on each layer's descriptor: the file name under which oras saves the layer (OCI
// image-spec, annotations.md).
const annotationTitle = "org.opencontainers.image.title"

// title returns the file name of a layer of this kind.
func (k LayerKind) title() string { return string(k) + ".tar.zst" }

// ImageRecipe is the version of the code that makes a manifest and a config from layers. A change of that code must
// also change ImageRecipe if the same layers would then give another manifest or config.
const ImageRecipe = "image-3"
