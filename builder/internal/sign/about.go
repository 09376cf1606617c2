package sign

import (
	"fmt"

	intoto "github.com/in-toto/attestation/go/v1"
	"google.golang.org/protobuf/types/known/structpb"
)

// About makes a statement about the file or object with this digest. The name is for people; no program compares it.
func About(name, digest, predicateType string, predicate any) (Statement, error) {
	s, err := about(name, digest, predicateType, predicate)
	if err != nil {
		return Statement{}, fmt.Errorf("make the statement of type %s: %w", predicateType, err)
	}
	return s, nil
}

func about(name, digest, predicateType string, predicate any) (Statement, error) {
	body, err := toStruct(predicate)
	if err != nil {
		return Statement{}, err
	}
	return statementOf(name, digest, predicateType, body)
}

// statementOf makes a statement about the file or object with this digest, with a predicate in JSON.
func statementOf(name, digest, predicateType string, body *structpb.Struct) (Statement, error) {
	subject, err := resource(name, "", digest)
	if err != nil {
		return Statement{}, fmt.Errorf("add the subject to the statement: %w", err)
	}
	st := &intoto.Statement{
		Type: intoto.StatementTypeUri, Subject: []*intoto.ResourceDescriptor{subject},
		PredicateType: predicateType, Predicate: body,
	}
	if err := st.Validate(); err != nil {
		return Statement{}, err
	}
	payload, err := marshal(st)
	if err != nil {
		return Statement{}, err
	}
	return Statement{PredicateType: predicateType, payload: payload}, nil
}
