// Package deploy has the files with which operators run Prebake: Kubernetes manifests, and a cloud-init example for
// plain COS machines. It also has the Makefile's scripts. Its tests check these files, and the whole repository's
// documents and imports.
package deploy
