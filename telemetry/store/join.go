package store

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"time"

	"github.com/google/uuid"
	"github.com/partnerguard/partnerguard/telemetry/ledger"
)

// backend is a database that a Store writes. After an error but errBusy the Store
// closes it, and opens it again: its memory may be ahead of the database.
type backend interface {
	// open makes the database ready to be written and returns what it holds.
	open(ctx context.Context) (*joiner, error)
	// begin comes before the first record of a batch is read.
	begin(ctx context.Context) error
	// holds reports whether the call has ended in the database.
	holds(ctx context.Context, call string) (bool, error)
	// commit writes the batch whole, or nothing of it.
	commit(ctx context.Context, b *batch) error
	// idle comes when no record was to be read.
	idle(ctx context.Context, caughtUp bool) error
	// prune removes a bounded number of the calls that began in hours, or days, that
	// ended before cutoff. done says that none is left.
	prune(ctx context.Context, cutoff time.Time) (done bool, err error)
	// recover makes room for a new database where err says that this one is no good,
	// and returns what remains of err. The database is closed then.
	recover(err error) error
	// name is the database to the operator.
	name() string
	// close ends what open began. It may come twice, and before open.
	close() error
	// release closes it, and lets another process have it.
	release() error
}

// joiner makes calls of the ledger's lines: it is what a Store knows of the calls
// that are open, and how far the database has come.
type joiner struct {
	pace func() // called within long work, every few calls

	position ledger.Position
	seq      uint64
	newest   time.Time            // the latest beginning of a call
	open     map[string]*openCall // by call
}

// openCall is a decision that waits for its outcome.
type openCall struct {
	seq    uint64
	call   Call
	line   string // to be stored; empty when it is
	stored bool
}

// abandoned is the age at which a call without outcome counts as interrupted,
// measured against the newest call. No call of Partner Center's takes hours; the
// ledger itself ends the calls that a crash left open.
const abandoned = 24 * time.Hour

// batch is what one transaction writes.
type batch struct {
	in          *joiner
	known       func(ctx context.Context, call string) (bool, error) // backend.holds
	calls       []*openCall                                          // that ended, with call.Finish set
	gone        []string                                             // open calls that the database holds and that ended
	started     []*openCall
	gaps        []gap
	checkpoints []checkpoint
	position    ledger.Position
	seq         uint64
	caughtUp    bool  // nothing was behind it
	err         error // of the database, met while adding
}

type checkpoint struct {
	seq uint64
	ledger.Checkpoint
}

type gap struct {
	seq      uint64
	Calls    int64     `json:"calls"`
	Outcomes int64     `json:"outcomes"`
	Since    time.Time `json:"since"`
	Until    time.Time `json:"until"`
	Cause    string    `json:"cause"`
}

// add takes one record in. An error says that it cannot be read; the batch goes on
// without it.
func (b *batch) add(ctx context.Context, e ledger.Entry) error {
	b.position, b.seq = e.Next, e.Seq
	switch e.Type {
	case ledger.TypeDecision:
		o := &openCall{seq: e.Seq, line: string(e.Line)}
		if err := decodeDecision(o.line, &o.call); err != nil {
			return err
		}
		if o.call.Time.IsZero() {
			o.call.Time = timeOf(o.call.ID)
		}
		if o.call.Time.After(b.in.newest) {
			b.in.newest = o.call.Time
		}
		b.in.open[o.call.ID] = o
		b.started = append(b.started, o)
	case ledger.TypeOutcome:
		var end Call
		if err := decode(string(e.Line), &end); err != nil {
			return err
		}
		o := b.in.open[end.ID]
		if o == nil {
			return b.orphan(ctx, e.Seq, end)
		}
		o.call.end(end.Finished)
		b.finish(o, e.Seq)
	case ledger.TypeGap:
		g := gap{seq: e.Seq}
		if err := json.Unmarshal(e.Line, &g); err != nil {
			return err
		}
		b.gaps = append(b.gaps, g)
	case ledger.TypeCheckpoint:
		c, err := ledger.ParseCheckpoint(e.Line)
		if err != nil {
			return err
		}
		b.checkpoints = append(b.checkpoints, checkpoint{e.Seq, c})
	}
	return nil
}

// orphan takes in an outcome whose decision the ledger does not hold, or no longer.
func (b *batch) orphan(ctx context.Context, seq uint64, end Call) error {
	known := slices.ContainsFunc(b.calls, func(o *openCall) bool { return o.call.ID == end.ID })
	if !known {
		if known, b.err = b.known(ctx, end.ID); b.err != nil {
			return nil
		}
	}
	if known {
		return fmt.Errorf("second outcome of call %s", end.ID)
	}
	if end.Time.IsZero() {
		end.Time = timeOf(end.ID)
	}
	end.end(end.Finished)
	b.finish(&openCall{call: end}, seq)
	return nil
}

// finish ends the call o at ledger number seq: it becomes a row and counts.
func (b *batch) finish(o *openCall, seq uint64) {
	o.call.Finish = seq
	b.calls = append(b.calls, o)
	delete(b.in.open, o.call.ID)
	if o.stored {
		b.gone = append(b.gone, o.call.ID)
	}
}

// abandon ends the calls that have been open for too long, in their order.
func (b *batch) abandon() {
	var old []*openCall
	for _, o := range b.in.open {
		if b.in.newest.Sub(o.call.Time) > abandoned {
			old = append(old, o)
		}
	}
	slices.SortFunc(old, func(a, b *openCall) int { return cmp.Compare(a.seq, b.seq) })
	for _, o := range old {
		o.call.Error = Interrupted
		b.finish(o, o.seq)
	}
}

// timeOf is the time in a call id, a UUIDv7; 1970 for another id.
func timeOf(call string) time.Time {
	id, err := uuid.Parse(call)
	if err != nil || id.Version() != 7 {
		return time.Unix(0, 0).UTC()
	}
	return time.Unix(id.Time().UnixTime()).UTC()
}
