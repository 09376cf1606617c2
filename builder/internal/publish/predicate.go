package publish

import "encoding/json"

// predicateType reads the type of a statement out of a bundle that this
// program has just made; "" is unknown. It verifies nothing.
func predicateType(raw []byte) string {
	var b struct {
		Envelope struct {
			Payload []byte `json:"payload"`
		} `json:"dsseEnvelope"`
	}
	var st struct {
		PredicateType string `json:"predicateType"`
	}
	if json.Unmarshal(raw, &b) != nil || json.Unmarshal(b.Envelope.Payload, &st) != nil {
		return ""
	}
	return st.PredicateType
}
