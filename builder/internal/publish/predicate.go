package publish

import (
	"encoding/json"

	"github.com/prebake/prebake/pkg/trust"
)

// labels returns the labels of a statement in a bundle that this program has just made. labels does not verify the
// bundle.
func labels(raw []byte) map[string]string {
	var b struct {
		Envelope struct {
			Payload []byte `json:"payload"`
		} `json:"dsseEnvelope"`
	}
	var st struct {
		PredicateType string          `json:"predicateType"`
		Predicate     json.RawMessage `json:"predicate"`
	}
	if json.Unmarshal(raw, &b) != nil || json.Unmarshal(b.Envelope.Payload, &st) != nil {
		return nil
	}
	return trust.Labels(&trust.Statement{PredicateType: st.PredicateType, Predicate: st.Predicate})
}
