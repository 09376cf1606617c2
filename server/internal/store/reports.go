package store

import (
	"context"
	"fmt"
	"time"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
)

// MaxReports is the maximum number of nodes of one network that may report on an artifact in one period, such as a day.
// It protects the disk from a client that invents nodes.
const MaxReports = 1000

// PutReport stores a node's report about an artifact, and replaces the node's earlier report. source is the node's
// network. Reports after since count for [MaxReports].
func (tx *Tx) PutReport(ctx context.Context, r api.NodeReport, source string, at, since time.Time) error {
	what := "store the report on " + r.Digest
	var others int
	err := tx.QueryRowContext(ctx, `SELECT COUNT(*) FROM (
    SELECT 1 FROM reports WHERE digest = $1 AND source = $2 AND node <> $3 AND at > $5 LIMIT $4) c`,
		r.Digest, source, r.Node, MaxReports, micros(since)).Scan(&others)
	if err != nil {
		return classify(what, err)
	}
	if others >= MaxReports {
		return fault.New(fault.TooMany,
			fmt.Sprintf("%s: %d nodes of network %s reported on this artifact already", what, others, source), "")
	}
	_, err = tx.ExecContext(ctx, `
INSERT INTO reports (digest, build_id, board, node, source, outcome, class, message, at)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9) ON CONFLICT (digest, node) DO UPDATE SET
    build_id = excluded.build_id, board = excluded.board, source = excluded.source, outcome = excluded.outcome,
    class = excluded.class, message = excluded.message, at = excluded.at`,
		r.Digest, r.BuildID, r.Board, r.Node, source, string(r.Outcome), r.Class, r.Message, micros(at))
	return classify(what, err)
}

// OutcomeCount is the number of nodes of one network that reported the same outcome for an artifact.
type OutcomeCount struct {
	Source  string
	Outcome api.Outcome
	Class   string
	Nodes   int
	Recent  int // the number of these nodes whose report is recent
}

// OutcomeCounts counts the last reported outcomes of an artifact's nodes for each network. It leaves out reports up to
// since, and failures that [Tx.IgnoreFailuresBefore] excludes. Reports after recent are recent.
func (tx *Tx) OutcomeCounts(ctx context.Context, digest string, since, recent time.Time) ([]OutcomeCount, error) {
	if tx.postgres { // with the lock, the second of two reports at the same time sees the first
		_, err := tx.ExecContext(ctx, `SELECT 1 FROM artifacts WHERE digest = $1 FOR NO KEY UPDATE`, digest)
		if err != nil {
			return nil, classify("read reports on "+digest, err)
		}
	}
	var all []OutcomeCount
	err := query(ctx, tx, func(row func(...any) error) error {
		var s OutcomeCount
		err := row(&s.Source, &s.Outcome, &s.Class, &s.Nodes, &s.Recent)
		all = append(all, s)
		return err
	}, `
SELECT source, outcome, class, COUNT(*), SUM(CASE WHEN at > $3 THEN 1 ELSE 0 END) FROM reports
WHERE digest = $1 AND at > $2 AND (outcome = 'loaded' OR at > (SELECT judged_from FROM artifacts WHERE digest = $1))
GROUP BY source, outcome, class ORDER BY source, outcome, class`, digest, micros(since), micros(recent))
	return all, classify("read reports on "+digest, err)
}

// IgnoreFailuresBefore excludes the reported failures of an artifact up to this time from the results of
// [Tx.OutcomeCounts].
func (tx *Tx) IgnoreFailuresBefore(ctx context.Context, digest string, at time.Time) error {
	_, err := tx.ExecContext(ctx, `UPDATE artifacts SET judged_from = $2 WHERE digest = $1`, digest, micros(at))
	return classify("mark the artifact "+digest, err)
}

// Reports counts the reported outcomes for each pair of kernel and artifact, newest first. Empty arguments match any.
// It returns at most limit pairs.
func (s *Store) Reports(ctx context.Context, digest, buildID, board string, limit int) ([]api.ReportCounts, error) {
	w := &where{}
	addEqual(w, "digest", digest)
	addEqual(w, "build_id", buildID)
	addEqual(w, "board", board)
	all := []api.ReportCounts{}
	err := query(ctx, s.readers, func(row func(...any) error) error {
		var c api.ReportCounts
		var last int64
		err := row(&c.BuildID, &c.Board, &c.Digest, &c.Loaded, &c.Failed, &c.FellBack, &last)
		c.LastAt = timeOf(last)
		all = append(all, c)
		return err
	}, `SELECT build_id, board, digest, SUM(CASE outcome WHEN 'loaded' THEN 1 ELSE 0 END),
    SUM(CASE outcome WHEN 'failed' THEN 1 ELSE 0 END), SUM(CASE outcome WHEN 'fell-back' THEN 1 ELSE 0 END), MAX(at)
FROM reports`+w.String()+fmt.Sprintf(` GROUP BY build_id, board, digest ORDER BY MAX(at) DESC, build_id, board, digest LIMIT %d`, limit),
		w.args...)
	return all, classify("count the reports", err)
}

// forgottenAtOnce is the maximum number of reports that one transaction removes.
const forgottenAtOnce = 5000

// ForgetReports removes all reports that are older than the given time.
func (s *Store) ForgetReports(ctx context.Context, before time.Time) error {
	for {
		var n int64
		err := s.Write(ctx, func(tx *Tx) error {
			done, err := tx.ExecContext(ctx, `DELETE FROM reports WHERE (digest, node) IN (
    SELECT digest, node FROM reports WHERE at < $1 LIMIT $2)`, micros(before), forgottenAtOnce)
			if err != nil {
				return err
			}
			n, err = done.RowsAffected()
			return err
		})
		if err != nil || n < forgottenAtOnce {
			return err
		}
	}
}
