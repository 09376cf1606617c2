// Package deploy holds what runs Prebake elsewhere: Kubernetes manifests, a
// cloud-init example for plain COS machines, and the scripts behind the
// Makefile. Its tests read those, and the whole repository's documents and imports, and hold them to the rules. It
// refuses to hold any code of the product.
package deploy
