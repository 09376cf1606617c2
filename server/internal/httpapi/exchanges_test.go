package httpapi_test

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/prebake/prebake/server/internal/catalogue"
	"github.com/prebake/prebake/server/internal/discover"
)

// cannotFail has the operations whose input is always valid.
var cannotFail = map[string]bool{"list-wish-lists": true, "read-coverage": true, "list-warnings": true}

// testedElsewhere has the operations that need clients in several networks, or a registry that lost an artifact. Tests
// of package catalogue, and of the commands reindex and free-tags, cover them.
var testedElsewhere = map[string]bool{"lift": true, "forget-artifact": true, "free-tags": true}

// serveMirrored starts a server as [serve] does, with a mirror that has two COS builds.
func serveMirrored(t testing.TB) string {
	t.Helper()
	mirror := t.TempDir()
	for _, id := range []string{"17800.0.47", "17800.66.78"} {
		build := filepath.Join(mirror, id, "lakitu")
		check(t, os.MkdirAll(build, 0o755))
		check(t, os.WriteFile(filepath.Join(build, "kernel_commit"), []byte(strings.Repeat("a", 40)+"\n"), 0o644))
		check(t, os.WriteFile(filepath.Join(build, "gpu_default_version"), []byte("535.261.03\n"), 0o644))
	}
	url, _ := serveLogging(t, slog.New(slog.DiscardHandler),
		func(c *catalogue.Config) { c.Mirror = discover.Mirror{URL: "file://" + mirror} })
	return url
}

// remember stores the ID of a new token in made, because later calls need it.
func remember(made map[string]string, e exchange, body []byte) {
	if e.operation == "create-token" && e.status < 400 {
		var is struct{ ID string }
		if json.Unmarshal(body, &is) == nil {
			made["TOKEN"] = is.ID
		}
	}
}

// exchanges returns calls of every operation. Their order is such that each call finds what it needs on the server.
func exchanges() []exchange {
	nobody, text := map[string]string{"Authorization": ""}, map[string]string{"Content-Type": "text/plain"}
	kernel := `{"buildId": "17800.0.47", "board": "lakitu", "release": "6.1.0-47", "arch": "amd64"}`
	artifact :=
		fmt.Sprintf(`{"digest": %q, "fingerprint": %q, "driver": {"version": "535.261.03", "flavour": "open"}, "kernels": [%s]}`, digest, finger, kernel)
	pushed := `{"message": {"attributes": {%s}, "messageId": "1"}, "subscription": "s"}`
	report := fmt.Sprintf(`{"buildId": "17800.0.47", "board": "lakitu", "driver": {"version": "535.261.03", "flavour": "open"}, "digest": %q, "outcome": "%%s", "node": %q}`,
		digest, strings.Repeat("0", 32))
	ask := `{"buildId": "17800.0.47", "board": "lakitu", "driver": "%s", "flavour": "open"}`
	return []exchange{
		{operation: "list-kernels", method: "GET", path: "/v1/kernels?limit=0&milestone=109", status: 200},
		{operation: "list-kernels", method: "GET", path: "/v1/kernels?limit=1001", status: 400, foreign: true},
		{operation: "list-kernels", method: "GET", path: "/v1/kernels?after=x", status: 400},
		{operation: "list-kernels", method: "GET", path: "/v1/kernels?gke=1.33.5-gke.1080000", status: 200},
		{operation: "list-kernels", method: "GET", path: "/v1/kernels?gke=x", status: 400},
		{operation: "list-drivers", method: "GET", path: "/v1/drivers", status: 200},
		{operation: "list-drivers", method: "GET", path: "/v1/drivers?limit=-1", status: 400, foreign: true},
		{operation: "list-cells", method: "GET", path: "/v1/cells", status: 200},
		{operation: "list-cells", method: "GET", path: "/v1/cells?gke=1.33", status: 200},
		{operation: "list-cells", method: "GET", path: "/v1/cells?milestone=-1", status: 400, foreign: true},

		{operation: "request-build", method: "POST", path: "/v1/builds", body: fmt.Sprintf(ask, "535.261.03"), status: 202},
		{operation: "request-build", method: "POST", path: "/v1/builds", body: fmt.Sprintf(ask, "535.309.01"), status: 202},
		{operation: "request-build", method: "POST", path: "/v1/builds", body: fmt.Sprintf(ask, "new"), status: 400},
		{operation: "request-build", method: "POST", path: "/v1/builds", body: `{"buildId": "17800.0.47"}`, status: 400,
			foreign: true},
		{operation: "request-build", method: "POST", path: "/v1/builds", body: `{"odd": 1}`, status: 400, foreign: true},
		{operation: "request-build", method: "POST", path: "/v1/builds", body: fmt.Sprintf(ask, "535.261.03"), header: nobody,
			status: 401, foreign: true},
		{operation: "read-build", method: "GET", path: "/v1/builds/1", status: 200},
		{operation: "read-build", method: "GET", path: "/v1/builds/99", status: 404},
		{operation: "read-build", method: "GET", path: "/v1/builds/0", status: 400, foreign: true},
		{operation: "list-builds", method: "GET", path: "/v1/builds?state=queued&flavour=open", status: 200},
		{operation: "list-builds", method: "GET", path: "/v1/builds?limit=1", status: 200}, // the answer has a next page
		{operation: "list-builds", method: "GET", path: "/v1/builds?flavour=odd", status: 400, foreign: true},
		{operation: "list-builds", method: "GET", path: "/v1/builds?state=odd", status: 400},
		{operation: "update-build", method: "PATCH", path: "/v1/builds/1", body: fmt.Sprintf(
			`{"state": "building", "worker": "w", "attempt": 1, "phase": "compile", "kernel": %s, "fingerprint": %q}`, kernel,
			finger), status: 200},
		{operation: "update-build", method: "PATCH", path: "/v1/builds/1", body: `{"state": "odd"}`, status: 400},
		{operation: "update-build", method: "PATCH", path: "/v1/builds/1", body: `{"attempt": "1"}`, status: 400,
			foreign: true},
		{operation: "append-log", method: "PATCH", path: "/v1/builds/1/log?offset=0", body: "line 1\n", header: text,
			status: 204},
		{operation: "append-log", method: "PATCH", path: "/v1/builds/1/log?offset=3", body: "x", header: text, status: 409},
		{operation: "append-log", method: "PATCH", path: "/v1/builds/1/log?offset=x", body: "line 1\n", header: text,
			status: 400, foreign: true},
		{operation: "append-log", method: "PATCH", path: "/v1/builds/99/log?offset=0", body: "x", header: text, status: 404},
		{operation: "put-log", method: "PUT", path: "/v1/builds/1/log", body: "line 1\nline 2\n", header: text, status: 204},
		{operation: "put-log", method: "PUT", path: "/v1/builds/99/log", body: "x", header: text, status: 404},
		{operation: "read-log", method: "GET", path: "/v1/builds/1/log", status: 200},
		{operation: "read-log", method: "GET", path: "/v1/builds/1/log", header: map[string]string{"Range": "bytes=7-"},
			status: 206},
		{operation: "read-log", method: "GET", path: "/v1/builds/1/log", header: map[string]string{"Range": "bytes=700-"},
			status: 416},
		{operation: "read-log", method: "GET", path: "/v1/builds/2/log", status: 404},
		{operation: "read-log", method: "GET", path: "/v1/builds/x/log", status: 400, foreign: true},
		{operation: "update-build", method: "PATCH", path: "/v1/builds/1", body: fmt.Sprintf(
			`{"state": "published", "digest": %q, "phases": [{"name": "compile", "start": "2026-11-01T00:00:00Z", "seconds": 5}]}`, digest), status: 200},
		{operation: "update-build", method: "PATCH", path: "/v1/builds/1", body: `{"state": "queued"}`, status: 409},
		{operation: "read-build", method: "GET", path: "/v1/builds/1", status: 200},
		{operation: "cancel-build", method: "POST", path: "/v1/builds/2/cancel", status: 200},
		{operation: "watch-build", method: "GET", path: "/v1/builds/2/events", status: 200}, // the build has ended
		{operation: "watch-build", method: "GET", path: "/v1/builds/99/events", status: 404},
		{operation: "cancel-build", method: "POST", path: "/v1/builds/99/cancel", status: 404},
		{operation: "resolve", method: "GET",
			path: "/v1/resolve?buildId=17800.0.47&board=lakitu&driver=535.261.03&flavour=open", status: 200},
		{operation: "resolve", method: "GET", path: "/v1/resolve?board=lakitu", status: 400},
		{operation: "list-cells", method: "GET", path: "/v1/cells?driver=535.261.03", status: 200},

		{operation: "add-artifact", method: "POST", path: "/v1/artifacts", body: artifact, status: 200},
		{operation: "add-artifact", method: "POST", path: "/v1/artifacts", body: `{"digest": "latest"}`, status: 400,
			foreign: true},
		{operation: "add-artifact", method: "POST", path: "/v1/artifacts",
			body: strings.Replace(artifact, "sha256:c", "sha256:x", 1), status: 400},
		{operation: "list-artifacts", method: "GET", path: "/v1/artifacts", status: 200},
		{operation: "list-artifacts", method: "GET", path: "/v1/artifacts?flavour=odd", status: 400, foreign: true},
		{operation: "read-artifact", method: "GET", path: "/v1/artifacts/" + digest, status: 200},
		{operation: "read-artifact", method: "GET", path: "/v1/artifacts/latest", status: 400},
		{operation: "yank", method: "POST", path: "/v1/artifacts/" + digest + "/yank", body: `{"reason": "panics"}`,
			status: 200},
		{operation: "yank", method: "POST", path: "/v1/artifacts/" + digest + "/yank", body: `{}`, status: 400,
			foreign: true},
		{operation: "read-artifact", method: "GET", path: "/v1/artifacts/" + digest, status: 200},
		{operation: "unyank", method: "POST", path: "/v1/artifacts/" + digest + "/unyank", status: 200},
		{operation: "unyank", method: "POST", path: "/v1/artifacts/sha256:" + strings.Repeat("0", 64) + "/unyank",
			status: 404},
		{operation: "forget-artifact", method: "DELETE", path: "/v1/artifacts/" + digest, status: 409},
		{operation: "forget-artifact", method: "DELETE", path: "/v1/artifacts/latest", status: 400},
		{operation: "free-tags", method: "POST", path: "/v1/artifacts/" + digest + "/free-tags", status: 404},
		{operation: "free-tags", method: "POST", path: "/v1/artifacts/latest/free-tags", status: 400},

		{operation: "put-wish-list", method: "PUT", path: "/v1/wish-lists/production", status: 200,
			body: `{"text": "version: 1\nkernels: [{build: 17800.66.78}]\ndrivers: [default, {version: 550.54.15, flavours: [open]}]\n"}`},
		{operation: "put-wish-list", method: "PUT", path: "/v1/wish-lists/production", body: `{"text": "version: 9"}`,
			status: 400},
		{operation: "put-wish-list", method: "PUT", path: "/v1/wish-lists/production", body: `{"text": 1}`, status: 400,
			foreign: true},
		{operation: "announce-release", method: "POST", path: "/v1/releases", body: `{"buildId": "17800.66.78"}`,
			status: 200},
		{operation: "announce-release", method: "POST", path: "/v1/releases", body: `{"buildId": "newest"}`, status: 400},
		{operation: "announce-release", method: "POST", path: "/v1/releases", body: `{}`, status: 400, foreign: true},
		{operation: "push-release", method: "POST", path: "/v1/releases/push",
			body: fmt.Sprintf(pushed, `"buildId": "17800.66.78"`), status: 204},
		{operation: "push-release", method: "POST", path: "/v1/releases/push",
			body: fmt.Sprintf(pushed, `"buildId": "newest"`), status: 400},
		{operation: "push-release", method: "POST", path: "/v1/releases/push", body: fmt.Sprintf(pushed, `"buildId": 1`),
			status: 400, foreign: true},
		{operation: "list-releases", method: "GET", path: "/v1/releases?board=lakitu&limit=10", status: 200},
		{operation: "list-releases", method: "GET", path: "/v1/releases?after=x", status: 400},
		{operation: "read-release", method: "GET", path: "/v1/releases/17800.66.78", status: 200},
		{operation: "read-release", method: "GET", path: "/v1/releases/17800.66.79", status: 404},
		{operation: "read-ready-times", method: "GET", path: "/v1/ready-times?days=7", status: 200},
		{operation: "read-ready-times", method: "GET", path: "/v1/ready-times?days=0", status: 400, foreign: true},
		{operation: "list-kernels", method: "GET", path: "/v1/kernels", status: 200}, // one kernel has driver lists
		{operation: "list-cells", method: "GET", path: "/v1/cells", status: 200},     // some cells have builds
		{operation: "list-wish-lists", method: "GET", path: "/v1/wish-lists", status: 200},
		{operation: "read-wish-list", method: "GET", path: "/v1/wish-lists/production", status: 200},
		{operation: "read-wish-list", method: "GET", path: "/v1/wish-lists/absent", status: 404},
		{operation: "drop-wish-list", method: "DELETE", path: "/v1/wish-lists/production", status: 204},
		{operation: "drop-wish-list", method: "DELETE", path: "/v1/wish-lists/production", status: 404},
		{operation: "preflight", method: "POST", path: "/v1/preflight",
			body: `{"pools": [{"name": "a", "buildId": "17800.66.78", "board": "lakitu"}]}`, status: 200},
		{operation: "preflight", method: "POST", path: "/v1/preflight", body: `{"pools": [{"name": "a"}]}`, status: 400,
			foreign: true},
		{operation: "preflight", method: "POST", path: "/v1/preflight", body: `{"pools": []}`, status: 400},

		{operation: "report", method: "POST", path: "/v1/reports", body: fmt.Sprintf(report, "loaded"), status: 204},
		{operation: "report", method: "POST", path: "/v1/reports", body: fmt.Sprintf(report, "odd"), status: 400,
			foreign: true},
		{operation: "read-reports", method: "GET", path: "/v1/reports?digest=" + digest, status: 200},
		{operation: "read-reports", method: "GET", path: "/v1/reports", status: 400},
		{operation: "list-quarantine", method: "GET", path: "/v1/quarantine", status: 200},
		{operation: "list-quarantine", method: "GET", path: "/v1/quarantine?limit=1001", status: 400, foreign: true},
		{operation: "lift", method: "POST", path: "/v1/artifacts/" + digest + "/lift", status: 409},
		{operation: "lift", method: "POST", path: "/v1/artifacts/sha256:" + strings.Repeat("0", 64) + "/lift", status: 404},
		{operation: "read-coverage", method: "GET", path: "/v1/coverage", status: 200},
		{operation: "list-warnings", method: "GET", path: "/v1/warnings", status: 200},

		{operation: "create-token", method: "POST", path: "/v1/tokens", body: `{"name": "ci", "scopes": ["announce"]}`,
			status: 201},
		{operation: "create-token", method: "POST", path: "/v1/tokens", body: `{"name": "ci", "scopes": ["odd"]}`,
			status: 400},
		{operation: "create-token", method: "POST", path: "/v1/tokens", body: `{"scopes": "announce"}`, status: 400,
			foreign: true},
		{operation: "list-tokens", method: "GET", path: "/v1/tokens", status: 200},
		{operation: "list-tokens", method: "GET", path: "/v1/tokens", header: nobody, status: 401, foreign: true},
		{operation: "revoke-token", method: "DELETE", path: "/v1/tokens/TOKEN", status: 204},
		{operation: "revoke-token", method: "DELETE", path: "/v1/tokens/absent", status: 404},
		{operation: "list-audit", method: "GET", path: "/v1/audit", status: 200},
		{operation: "list-audit", method: "GET", path: "/v1/audit", header: nobody, status: 401, foreign: true},
	}
}
