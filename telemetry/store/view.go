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
	// Calls without outcome are not in it.
	Sums(ctx context.Context, since, until time.Time) ([]Sum, error)

	// Gaps counts the calls and outcomes between since and until that the ledger could
	// not take. Bounds are as those of Sums.
	Gaps(ctx context.Context, since, until time.Time) (calls, outcomes int64, err error)

	// Identities returns whom the user_refs stand for, as far as that is kept.
	Identities(ctx context.Context) (map[string]Identity, error)

	// Lag is how far the store is behind: the age of the oldest call that is in the
	// ledger only, zero when there is none.
	Lag(ctx context.Context) (time.Duration, error)

	// Close releases what the Reader holds.
	Close() error
}
