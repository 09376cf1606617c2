// Package deploy has the files with which operators run Prebake: Kubernetes manifests, and a cloud-init example for
// plain COS machines. It also has the scripts that the Makefile calls. Its tests check these files, and the documents
// and imports of the whole repository.
package deploy
