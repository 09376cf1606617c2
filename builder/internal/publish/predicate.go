package publish

import (
	"encoding/json"

	"github.com/prebake/prebake/pkg/trust"
)

// labels returns the annotations by which a client finds a statement (see [trust.Labels]). The given Sigstore bundle is
// not verified, because this program has just signed it.
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
