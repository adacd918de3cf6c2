package store

import (
	"context"
	"time"
)

// Reader searches and sums the calls of a store. It is safe for concurrent use, and
// may stand beside the Store that writes, also in another process.
type Reader interface {
	// Calls hands the calls that f selects to yield, those that ended first, in the
	// order in which they ended, then those without outcome as they began. An error of
	// yield ends it and is returned as it is.
	Calls(ctx context.Context, f Filter, yield func(Call) error) error

	// OpenCalls returns the calls that have no outcome yet, as they began.
	OpenCalls(ctx context.Context) ([]Call, error)

	// LastFinish returns the greatest Finish so far, where a follower begins.
	LastFinish(ctx context.Context) (uint64, error)

	// Sums returns what the calls come to that began in the whole hours (UTC) from
	// that of since up to until, which is rounded up. A zero time leaves that end open.
	// Calls without outcome are not in it. They are apart by all that a Dim has but the
	// customer, which is empty. A store may bound the sums of a day: what would make
	// more of them says Other then.
	Sums(ctx context.Context, since, until time.Time) ([]Sum, error)

	// CustomerSums returns what Sums does, apart by customer instead of route, which is
	// empty.
	CustomerSums(ctx context.Context, since, until time.Time) ([]Sum, error)

	// Callers returns who made the calls that Sums counts.
	Callers(ctx context.Context, since, until time.Time) ([]Caller, error)

	// Tokens hands the tokens with an id of the calls that Sums counts to yield, in no
	// order; one that served in several hours may come as often. An error of yield ends
	// it and is returned as it is.
	Tokens(ctx context.Context, since, until time.Time, yield func(Token) error) error

	// Gaps counts the calls and outcomes between since and until that the ledger could
	// not take. Bounds are as those of Sums.
	Gaps(ctx context.Context, since, until time.Time) (calls, outcomes int64, err error)

	// Identities returns whom the user_refs stand for, as far as that is kept.
	Identities(ctx context.Context) (map[string]Identity, error)

	// Lag is how far the store is behind: the age of the oldest call that is in the
	// ledger only, zero when there is none.
	Lag(ctx context.Context) (time.Duration, error)

	// Instances returns the guards whose calls are in the store, by name, and how far
	// each is behind.
	Instances(ctx context.Context) ([]Instance, error)

	// Close releases what the Reader holds.
	Close() error
}

// Instance is a guard whose ledger a store follows.
type Instance struct {
	Name    string // as its configuration or host calls it; may be empty
	Ledger  string // the identity of its ledger, a UUID; may be empty with SQLite
	Version string // of its program; a fleet's only
	Seq     uint64 // the number of the last line of its ledger that is in the store
	// Newest is when its latest call in the store began; zero when there is none.
	Newest time.Time
	// Heard is when the database last heard of it, by the database's clock. A fleet's
	// only.
	Heard time.Time
	// Lag is how far the store is behind this guard. One that was not heard from for
	// half a minute and did not say that it stops lags by as much.
	Lag     time.Duration
	Stopped bool // it said so; a fleet's only
}
