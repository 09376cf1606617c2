package kube

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/cenkalti/backoff/v5"

	"github.com/prebake/prebake/fetcher/internal/gpucheck"
	"github.com/prebake/prebake/pkg/fault"
)

// These are the labels and annotations of a node. Labels have few different values, because selectors use them.
const (
	labelVersion = "prebake.dev/driver-version"
	labelFlavour = "prebake.dev/driver-flavour"
	labelState   = "prebake.dev/driver-state"

	annotationDigest  = "prebake.dev/driver-digest"
	annotationReason  = "prebake.dev/driver-reason"
	annotationPending = "prebake.dev/driver-pending"

	// annotationGoogle is the prefix of the annotations with the driver's version. GKE's device plugin writes them with
	// the flag -publish-driver-version (container-engine-accelerators, cmd/nvidia_gpu).
	annotationGoogle = "cloud.google.com/cuda.driver-version."

	// Condition is the type of the condition on the node object.
	Condition = "GPUDriverReady"
)

// heartbeat is the longest time between two writes of the condition. 15,000 nodes make some 25 writes per second.
const heartbeat = 10 * time.Minute

// eventNamespace is the namespace for Events about objects without a namespace, such as nodes.
const eventNamespace = "default"

// Node reports the node on which this program runs to its cluster.
type Node struct {
	name, taint string
	api         *client
	log         *slog.Logger
	now         func() time.Time

	mu        sync.Mutex
	verdict   gpucheck.Verdict
	verdictAt time.Time     // when the verdict was reported
	maxAge    time.Duration // how long a verdict is valid; 0 means without end
	check     gpucheck.CheckTimer
	pending   string
	changed   chan struct{}
	// wanted is the value of the label that Wanted read last, or nil if there was no label. wantedRead is false before.
	wanted     *string
	wantedRead bool

	writing  sync.Mutex // held during a write to the cluster; guards the fields below
	written  state
	at       time.Time
	complain string
	told     state // the state of the last Event
	owes     bool  // an Event could not be written yet
	// former is what the node object showed before the first report of this process; nil means that it was not read yet.
	former *condition
}

// state is what the node object must show.
type state struct {
	verdict gpucheck.Verdict
	pending string
	// since is the time of the last verdict if that verdict is no longer valid (see [Node.Watch]). Otherwise it is zero.
	since time.Time
	// hung is the start of the check that hangs, or zero.
	hung time.Time
}

// ageCheck is the time between two comparisons of the last verdict's age, and of the time of the running check.
const ageCheck = 10 * time.Second

// same reports whether two states look the same in the cluster.
func (s state) same(o state) bool {
	return s.pending == o.pending && s.since.Equal(o.since) && s.hung.Equal(o.hung) &&
		s.verdict.State == o.verdict.State && s.verdict.Reason == o.verdict.Reason &&
		s.verdict.Driver == o.verdict.Driver && s.verdict.Digest == o.verdict.Digest
}

// New returns a reporter for a node. account is the folder of the service account ([AccountDir]). taint is the key of
// the startup taint, or "".
func New(name, taint, account string, log *slog.Logger) (*Node, error) {
	api, err := inCluster(account)
	if err != nil {
		return nil, err
	}
	return &Node{name: name, taint: taint, api: api, log: log, now: time.Now, changed: make(chan struct{}, 1)}, nil
}

// Watch sets how long a verdict stays valid. When the last verdict is older, the cluster gets the state unknown. With
// age 0, a verdict stays valid.
func (n *Node) Watch(age time.Duration) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.maxAge = age
}

// isOld reports whether the last verdict is no longer valid. The caller holds mu.
func (n *Node) isOld() bool {
	return n.maxAge > 0 && !n.verdictAt.IsZero() && n.now().Sub(n.verdictAt) > n.maxAge
}

// Report stores a verdict for the next write to the cluster. It does not wait for that write.
func (n *Node) Report(v gpucheck.Verdict) {
	n.mu.Lock()
	v.Reason = withoutPorts(v.Reason)
	n.verdict, n.verdictAt = v, n.now()
	n.check.Answer(n.verdictAt)
	n.mu.Unlock()
	n.wake()
}

// Alive tells the reporter that a check ended, with any result. If the last verdict is too old, the cluster gets the
// state unknown.
func (n *Node) Alive() {
	n.mu.Lock()
	unknown := n.isOld() || !n.check.HungSince(n.now()).IsZero()
	n.mu.Unlock()
	if unknown {
		n.wake()
	}
}

// CheckStarted tells the reporter that a check started. During a check that hangs, the cluster gets the condition
// unknown, with or without [Node.Watch].
func (n *Node) CheckStarted() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.check.Start(n.now())
}

// CheckStopped tells the reporter that a check ended without a finding about the driver.
func (n *Node) CheckStopped() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.check.Stop(n.now())
}

// Pending stores the reason why the node does not have the wanted driver, or nil if it has.
func (n *Node) Pending(why error) {
	n.mu.Lock()
	n.pending = ""
	if why != nil {
		n.pending = withoutPorts(why.Error())
	}
	n.mu.Unlock()
	n.wake()
}

// localPort is the port of this node in the text of a network error: "read tcp 10.4.1.7:43512->10.8.0.10:443: …".
var localPort = regexp.MustCompile(`:[0-9]+->`)

// withoutPorts removes this node's ports from a reason. They differ in each run, and a changed reason costs an Event.
func withoutPorts(reason string) string { return localPort.ReplaceAllString(reason, "->") }

func (n *Node) wake() {
	select {
	case n.changed <- struct{}{}:
	default: // a wake-up is already queued
	}
}

// Run writes each change to the cluster until the context ends. After an error it tries again with growing pauses.
func (n *Node) Run(ctx context.Context) error {
	pause := backoff.NewExponentialBackOff()
	pause.InitialInterval, pause.MaxInterval = 2*time.Second, 2*time.Minute
	tick := time.NewTicker(ageCheck)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C: // a check that hangs wakes nobody
			n.Alive()
			continue
		case <-n.changed:
		}
		for n.write(ctx) != nil {
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(pause.NextBackOff()):
			}
		}
		pause.Reset()
	}
}

// Flush writes the last state. It returns after the write, or when the context ends.
func (n *Node) Flush(ctx context.Context) {
	for n.write(ctx) != nil {
		select {
		case <-ctx.Done():
			return
		case <-time.After(time.Second):
		}
	}
}

// write writes the last verdict to the node object.
func (n *Node) write(ctx context.Context) error {
	for !n.writing.TryLock() { // another write is running, and its own context limits its time
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(50 * time.Millisecond):
		}
	}
	defer n.writing.Unlock()
	n.mu.Lock()
	s := state{verdict: n.verdict, pending: n.pending, hung: n.check.HungSince(n.now())}
	if n.isOld() {
		s.since = n.verdictAt
	}
	n.mu.Unlock()
	if s.verdict.State == "" || s.same(n.written) && n.now().Sub(n.at) < heartbeat {
		return nil
	}
	err := n.patch(ctx, s)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil {
		if text := err.Error(); text != n.complain {
			n.complain = text
			n.log.WarnContext(ctx, "could not report to the cluster", "node", n.name, "err", err, "hint", fault.Hint(err))
		}
		return err
	}
	n.complain, n.written, n.at = "", s, n.now()
	return nil
}

// node has the fields that this program reads of a node object.
type node struct {
	Metadata metadata `json:"metadata"`
	Spec     struct {
		Taints []map[string]any `json:"taints"`
	} `json:"spec"`
	Status struct {
		Conditions []condition `json:"conditions"`
	} `json:"status"`
}

type metadata struct {
	UID             string            `json:"uid"`
	ResourceVersion string            `json:"resourceVersion"`
	Labels          map[string]string `json:"labels,omitempty"`
}

type condition struct {
	Type               string    `json:"type"`
	Status             string    `json:"status"`
	Reason             string    `json:"reason"`
	Message            string    `json:"message"`
	LastHeartbeatTime  time.Time `json:"lastHeartbeatTime"`
	LastTransitionTime time.Time `json:"lastTransitionTime"`
}

// patch writes a state to the node object. The startup taint is removed before the condition is written: pods must not
// wait for a condition that the cluster refuses.
func (n *Node) patch(ctx context.Context, s state) error {
	path := "/api/v1/nodes/" + url.PathEscape(n.name)
	var have node
	if err := n.api.call(ctx, http.MethodGet, path, "", nil, &have); err != nil {
		return err
	}
	now := n.condition(s, have.Status.Conditions)
	if n.former == nil {
		n.former = &condition{}
		if i := slices.IndexFunc(have.Status.Conditions, func(o condition) bool { return o.Type == now.Type }); i >= 0 {
			n.former = &have.Status.Conditions[i]
		}
	}
	shown := isShown(now, have.Status.Conditions) || n.isKnown(now)
	var labelled node // a new variable: the decoder would mix the taints of two responses
	if err := n.api.call(ctx, http.MethodPatch, path, mergePatch, map[string]any{"metadata": s.metadata()},
		&labelled); err != nil {
		return err
	}
	var held error // the condition does not wait for the taint either
	if s.verdict.State == gpucheck.Ready && s.since.IsZero() && s.hung.IsZero() {
		held = n.removeTaint(ctx, path, labelled)
	}
	status := map[string]any{"status": map[string]any{"conditions": []condition{now}}}
	err := n.api.call(ctx, http.MethodPatch, path+"/status", strategicPatch, status, nil)
	if err = n.tolerate(ctx, err, s, "the service account may not write the node's condition"); err != nil {
		return errors.Join(held, err)
	}
	if n.owes = n.owes || !shown && !s.same(n.told); n.owes {
		err = n.event(ctx, have.Metadata.UID, now, s)
		if err = n.tolerate(ctx, err, s, "the service account may write no Events"); err == nil {
			n.told, n.owes = s, false
		}
	}
	return errors.Join(held, err)
}

// tolerate logs the error of a call for which the service account lacks the right, and returns other errors. The owner
// may withhold such rights: the rest works without them.
func (n *Node) tolerate(ctx context.Context, err error, s state, message string) error {
	if !isDenied(err) {
		return err
	}
	if !s.same(n.written) {
		n.log.InfoContext(ctx, message, "err", err)
	}
	return nil
}

// isShown reports whether the node object already shows a condition, apart from its times.
func isShown(c condition, have []condition) bool {
	return slices.ContainsFunc(have, func(o condition) bool {
		return o.Type == c.Type && o.Status == c.Status && o.Reason == c.Reason && o.Message == c.Message
	})
}

// isKnown reports whether an earlier process wrote an Event about a condition. This process cannot see that Event, so
// it compares c with the condition that the node object had at first (former). In the first report, the message may
// differ, because the earlier process may have learned its cause later. Without this exception, a process that fails
// and starts again and again would write Events each time.
func (n *Node) isKnown(c condition) bool {
	first := n.written.verdict.State == ""
	return n.told.verdict.State == "" && c.Status == n.former.Status && c.Reason == n.former.Reason &&
		(first || c.Message == n.former.Message)
}

// metadata returns the labels and annotations. A null value removes an entry. A hung check changes no label: node
// selectors use them, and the check may only be slow. The label changes when the last verdict is no longer valid.
func (s state) metadata() map[string]any {
	v := s.verdict
	labels := map[string]any{labelState: string(v.State), labelVersion: nil, labelFlavour: nil}
	if !s.since.IsZero() {
		labels[labelState] = "unknown"
	}
	annotations := map[string]any{annotationDigest: orNull(v.Digest), annotationReason: orNull(cut(v.Reason)),
		annotationPending: orNull(cut(s.pending))}
	parts := []any{nil, nil, nil, nil}
	if v.Driver.Version != "" && v.State != gpucheck.Absent {
		labels[labelVersion], labels[labelFlavour] = v.Driver.Version, orNull(string(v.Driver.Flavour))
	}
	if v.State == gpucheck.Ready {
		version := v.Driver.Modules().Version
		number := append(strings.Split(version, "."), "", "")
		parts = []any{number[0], orNull(number[1]), orNull(number[2]), version}
	}
	for i, part := range []string{"major", "minor", "revision", "full"} {
		annotations[annotationGoogle+part] = parts[i]
	}
	return map[string]any{"labels": labels, "annotations": annotations}
}

func orNull(s string) any {
	if s == "" {
		return nil
	}
	return s
}

// reasons maps each state to the condition's reason.
var reasons = map[gpucheck.State]string{
	gpucheck.Ready: "DriverReady", gpucheck.NoDevice: "NoGPU", gpucheck.Unusable: "GPUUnusable",
	gpucheck.Drifted: "DriverDrifted", gpucheck.Loaded: "DriverNotChecked",
	gpucheck.Staged: "DriverNotLoaded", gpucheck.Absent: "NoDriver", gpucheck.Starting: "FabricStarting",
	gpucheck.Foreign: "ForeignDriver",
}

func (n *Node) condition(s state, have []condition) condition {
	v := s.verdict
	c := condition{Type: Condition, Status: "False", Reason: reasons[v.State], Message: v.Reason,
		LastHeartbeatTime: n.now().UTC()}
	if v.State == gpucheck.Ready {
		c.Status = "True"
		c.Message = fmt.Sprintf("driver %s, %d of %d GPUs usable; %s", v.Driver, v.UsableGPUs, v.PCIGPUs, v.Reason)
		c.Message = strings.TrimSuffix(c.Message, "; ")
	}
	switch {
	case !s.hung.IsZero():
		c.Status, c.Reason, c.Message = "Unknown", "CheckHangs", "the driver has not answered the check since "+
			s.hung.UTC().Format(time.RFC3339)+"; before: "+c.Message
	case !s.since.IsZero():
		c.Status, c.Reason, c.Message = "Unknown", "CheckFailed", "no check of the driver has finished since "+
			s.since.UTC().Format(time.RFC3339)+"; before: "+c.Message
	}
	if s.pending != "" {
		c.Message = strings.TrimPrefix(c.Message+"; pending: "+s.pending, "; ")
	}
	c.Message = cut(c.Message)
	c.LastTransitionTime = c.LastHeartbeatTime
	if i := slices.IndexFunc(have, func(o condition) bool { return o.Type == c.Type }); i >= 0 &&
		have[i].Status == c.Status {
		c.LastTransitionTime = have[i].LastTransitionTime
	}
	return c
}

// maxMessage is the maximum length of an Event's message in bytes (validation of core/v1 Events).
const maxMessage = 1000

// cut shortens a text to maxMessage bytes. All annotations of a node together may have 256 KiB.
func cut(s string) string { return strings.ToValidUTF8(s[:min(len(s), maxMessage)], "") }

// removeTaint removes the startup taint. The patch names the version of the node that was read, because a concurrent
// change of the taints must not be lost: the API server refuses the patch of an older version with status 409.
func (n *Node) removeTaint(ctx context.Context, path string, have node) error {
	if n.taint == "" {
		return nil
	}
	rest := slices.DeleteFunc(slices.Clone(have.Spec.Taints), func(t map[string]any) bool { return t["key"] == n.taint })
	if len(rest) == len(have.Spec.Taints) {
		return nil
	}
	patch := map[string]any{
		"metadata": map[string]any{"resourceVersion": have.Metadata.ResourceVersion},
		"spec":     map[string]any{"taints": rest},
	}
	err := n.api.call(ctx, http.MethodPatch, path, mergePatch, patch, nil)
	switch {
	case isConflict(err): // the next try reads it again
		return fmt.Errorf("remove taint %s: the node changed meanwhile: %w", n.taint, err)
	case isRefused(err):
		return fault.Wrap(fault.Forbidden, fmt.Errorf("remove taint %s: the cluster refuses it: %w", n.taint, err),
			"allow the service account prebake-fetcher to remove this taint, or remove it by hand: "+
				"kubectl taint nodes "+n.name+" "+n.taint+"-")
	case err != nil:
		return fmt.Errorf("remove taint %s: %w", n.taint, err)
	}
	return nil
}

// event writes an Event about a change. kubectl describe node shows it.
func (n *Node) event(ctx context.Context, uid string, c condition, s state) error {
	kind := "Warning"
	if c.Status == "True" || s.verdict.State == gpucheck.Starting {
		kind = "Normal"
	}
	now := n.now().UTC().Format(time.RFC3339)
	return n.api.call(ctx, http.MethodPost, "/api/v1/namespaces/"+eventNamespace+"/events", plain, map[string]any{
		"metadata":       map[string]any{"name": n.name + "." + strings.ToLower(rand.Text()), "namespace": eventNamespace},
		"involvedObject": map[string]any{"apiVersion": "v1", "kind": "Node", "name": n.name, "uid": uid},
		"reason":         c.Reason, "message": c.Message, "type": kind, "count": 1,
		"firstTimestamp": now, "lastTimestamp": now, "source": map[string]any{"component": fieldManager, "host": n.name},
		"reportingComponent": fieldManager, "reportingInstance": n.name,
	}, nil)
}
