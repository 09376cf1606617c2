package kube

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"time"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
)

// LabelWanted is the label by which an operator asks for a driver on one node, or on the nodes of a pool. It does not
// begin with prebake.dev/driver-, so the policy in fetcher-rights.yaml does not let a fetcher write it.
const LabelWanted = "prebake.dev/wanted-driver"

// ErrLabel is wrapped in the error for a label with a malformed value.
var ErrLabel = errors.New("label " + LabelWanted)

// labelTimeout is the time limit for one read of the label. A run reads the label before it loads a driver, so a
// cluster that does not respond must not delay the run for long.
const labelTimeout = 5 * time.Second

// labelPause is the time between two reads of the label while a fetcher watches the driver. 15,000 nodes read 250
// labels per second.
const labelPause = time.Minute

// Wanted returns the driver that the label [LabelWanted] of the node asks for, or "" if the node has no such label. A
// malformed value is an error of kind Usage with [ErrLabel]. If the label cannot be read, the kind is Forbidden or
// Transient.
func (n *Node) Wanted(ctx context.Context) (target.Wish, error) {
	value, err := n.label(ctx, "")
	if err != nil {
		return "", err
	}
	n.mu.Lock()
	n.wanted, n.wantedRead = value, true
	n.mu.Unlock()
	if value == nil {
		return "", nil
	}
	wish, err := target.ParseWishLabel(*value)
	if err != nil {
		return "", fault.Wrap(fault.Usage, fmt.Errorf("read %w of node %s: %w", ErrLabel, n.name, err),
			"correct the label, as in kubectl label node "+n.name+" --overwrite "+LabelWanted+"=R535, or remove it: kubectl "+
				"label node "+n.name+" "+LabelWanted+"-")
	}
	return wish, nil
}

// AwaitLabel waits until the label [LabelWanted] has another value than the last call of [Node.Wanted] read, and then
// returns true. It returns false when the context ends. Errors are not logged: [Node.Run] calls the same API server,
// and logs its errors.
func (n *Node) AwaitLabel(ctx context.Context) bool {
	tick := time.NewTicker(labelPause)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return false
		case <-tick.C:
		}
		value, err := n.label(ctx, fromCache)
		if err != nil {
			continue
		}
		n.mu.Lock()
		same := n.wantedRead && (value == nil) == (n.wanted == nil) && (value == nil || *value == *n.wanted)
		n.mu.Unlock()
		if !same {
			return true
		}
	}
}

// fromCache is the query by which the API server may answer from its cache, which is cheaper than a read of the
// cluster's database (Kubernetes documentation, "API Concepts", "Resource versions"). The label may then be an older
// one.
const fromCache = "?resourceVersion=0"

// label returns the value of the label [LabelWanted], or nil if the node has no such label. query is fromCache, or ""
// for the newest value.
func (n *Node) label(ctx context.Context, query string) (*string, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, labelTimeout, errors.New("the API server did not answer in time"))
	defer cancel()
	var have node
	err := n.api.call(ctx, http.MethodGet, "/api/v1/nodes/"+url.PathEscape(n.name)+query, metadataOnly, nil, &have)
	switch {
	case isDenied(err):
		return nil, fault.Wrap(fault.Forbidden, fmt.Errorf("read label %s: %w", LabelWanted, err),
			"allow the service account prebake-fetcher to get nodes (fetcher-rights.yaml), or remove --driver-label")
	case err != nil:
		return nil, fault.Wrap(fault.Transient, fmt.Errorf("read label %s: %w", LabelWanted, err),
			"check that this node reaches the API server, and that --node-name is the node's name")
	}
	if value, ok := have.Metadata.Labels[LabelWanted]; ok {
		return &value, nil
	}
	return nil, nil
}
