package httpapi

import (
	"context"
	"encoding/json"
	"net/http"
	"path"
	"strings"

	"github.com/danielgtaylor/huma/v2"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/cosbucket"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/server/internal/auth"
)

// PushedMessage is a message that Cloud Pub/Sub sends to a push endpoint (https://cloud.google.com/pubsub/docs/push,
// "Receive push messages").
type PushedMessage struct {
	_       struct{} `json:"-" additionalProperties:"true"`
	Message struct {
		_          struct{}          `json:"-" additionalProperties:"true"`
		Attributes map[string]string `json:"attributes,omitempty" doc:"buildId, or the attributes of a bucket's notification"`
		Data       []byte            `json:"data,omitempty" maxLength:"65536" doc:"if there are no such attributes: {\"buildId\": …}"`
	} `json:"message"`
}

// buildID returns the COS build of a message, or "". The message may be a bucket's notification
// (https://cloud.google.com/storage/docs/pubsub-notifications) that kernel headers were written. A release has kernel
// headers for each board.
func (m PushedMessage) buildID() string {
	at := m.Message.Attributes
	id := at["buildId"]
	object := at["objectId"]
	if board := path.Base(path.Dir(object)); id == "" && at["eventType"] == "OBJECT_FINALIZE" {
		k, err := target.ParseKernel(path.Base(path.Dir(path.Dir(object))), board)
		if err == nil && strings.HasSuffix("/"+object, "/"+cosbucket.HeadersName(k)) { // a mirror may add a folder
			id = k.BuildID
		}
	}
	var note api.ReleaseNote
	if id == "" && object == "" && json.Unmarshal(m.Message.Data, &note) == nil {
		id = note.BuildID
	}
	return id
}

// eventRoutes registers the routes that other services call to report an event.
func (t table) eventRoutes() {
	huma.Register(
		t,
		t.write(
			"push-release",
			auth.Announce,
			http.MethodPost,
			"/v1/releases/push",
			"Accept a message of Cloud Pub/Sub about a COS build; other messages are dropped",
			http.StatusNoContent,
		),
		func(ctx context.Context, in *body[PushedMessage]) (*struct{}, error) {
			id := in.Body.buildID()
			if id == "" {
				t.Log.DebugContext(ctx, "message dropped: it is about no COS build")
				return nil, nil
			}
			// Announce returns an error if the upload of the release is incomplete. Pub/Sub then sends the message
			// again later.
			if _, err := t.Catalogue.Announce(ctx, id); err != nil {
				return nil, asProblem(err)
			}
			return nil, nil
		},
	)
}
