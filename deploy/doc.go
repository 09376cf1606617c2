// Package deploy holds the files that run Prebake elsewhere: Kubernetes manifests, a cloud-init example for plain COS
// machines, and the scripts that the Makefile calls. Its tests check these files, and also the documents and imports of
// the whole repository. The package has no code of the product.
package deploy
