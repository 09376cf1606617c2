package httpapi

import (
	"encoding/json"
	"testing"
)

// TestPushedMessage parses the examples in Google's documents "Push subscriptions" and "Pub/Sub notifications for Cloud
// Storage".
func TestPushedMessage(t *testing.T) {
	t.Parallel()
	notification := func(event, object string) string {
		return `{"message": {"attributes": {"notificationConfig": "projects/_/buckets/b/notificationConfigs/3", "eventType": "` + event + `",
"payloadFormat": "JSON_API_V1", "bucketId": "b", "objectId": "` + object + `", "objectGeneration": "1136592000", "eventTime": "2026-11-01T00:00:00Z"},
"data": "eyJraW5kIjogInN0b3JhZ2Ujb2JqZWN0In0=", "messageId": "2070443601311540", "message_id": "2070443601311540",
"publishTime": "2026-11-01T00:00:00.1Z", "publish_time": "2026-11-01T00:00:00.1Z"}, "subscription": "projects/p/subscriptions/s", "deliveryAttempt": 5}`
	}
	for name, row := range map[string]struct{ text, want string }{
		"headers written": {notification("OBJECT_FINALIZE", "17800.66.78/lakitu/kernel-headers.tgz"), "17800.66.78"},
		"under a folder": {notification("OBJECT_FINALIZE", "mirror/cos/17800.66.78/lakitu-arm64/kernel-headers.tgz"),
			"17800.66.78"},
		"another object":  {notification("OBJECT_FINALIZE", "17800.66.78/lakitu/toolchain.tar.xz"), ""},
		"headers removed": {notification("OBJECT_DELETE", "17800.66.78/lakitu/kernel-headers.tgz"), ""},
		"no build":        {notification("OBJECT_FINALIZE", "x/lakitu/kernel-headers.tgz"), ""},
		"an attribute":    {`{"message": {"attributes": {"buildId": "17800.66.78"}, "messageId": "1"}}`, "17800.66.78"},
		"data": {`{"message": {"data": "eyJidWlsZElkIjogIjE3ODAwLjY2Ljc4In0=", "messageId": "1"}}`,
			"17800.66.78"},
		"data that is no JSON":  {`{"message": {"data": "AAAA", "messageId": "1"}}`, ""},
		"an empty message":      {`{"message": {"messageId": "1"}}`, ""},
		"a path that goes back": {notification("OBJECT_FINALIZE", "../../kernel-headers.tgz"), ""},
	} {
		var m PushedMessage
		if err := json.Unmarshal([]byte(row.text), &m); err != nil {
			t.Fatal(err)
		}
		if got := m.buildID(); got != row.want {
			t.Errorf("buildID(%s) = %q; want %q", name, got, row.want)
		}
	}
}
