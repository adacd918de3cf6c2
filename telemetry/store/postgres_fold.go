package store

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgtype"
)

// pgPending is what the calls come to that the sums do not count yet: those of the
// ledger behind seq ledgers.folded.
type pgPending struct {
	tally
	calls  int
	seq    uint64 // the greatest
	behind bool   // one has a seq that is folded
}

// count counts a call among those that are not folded.
func (p *postgres) count(r *pgRow) {
	hour, at := hourOf(r.Time), r.Time.UnixMicro()
	p.pending.count(byRoute, hour, sumKey{dim: r.dim.id}, at)
	p.pending.count(byCustomer, hour, sumKey{r.customer, r.customerDim.id}, at)
	p.pending.calls++
	p.pending.seq = max(p.pending.seq, r.Finish)
	p.pending.behind = p.pending.behind || r.Finish <= p.folded
}

// foldEnded folds what is pending of the days that ended: their partitions may be
// dropped some day, also by another guard.
func (p *postgres) foldEnded(ctx context.Context) error {
	if !p.pending.before(int64(dayOf(p.cfg.Now())) * 24) {
		return nil
	}
	if err := p.start(ctx); err != nil {
		return err
	}
	var rest pgx.Batch
	if err := p.fold(ctx, &rest); err != nil {
		return err
	}
	rest.Queue("COMMIT")
	return p.finish(ctx, &rest)
}

// finish sends what ends a transaction.
func (p *postgres) finish(ctx context.Context, rest *pgx.Batch) error {
	if err := p.conn.SendBatch(ctx, rest).Close(); err != nil {
		return err
	}
	if p.conn.PgConn().TxStatus() != 'I' {
		return errors.New("the transaction did not end")
	}
	return nil
}

// fold queues the writing of what is pending: sums of hours always, of days once a
// later one has begun. Then a report over a month reads some thirty rows.
func (p *postgres) fold(ctx context.Context, rest *pgx.Batch) error {
	days := map[int32][]int64{}
	if p.lastHour > 0 {
		days[dayOfHour(p.lastHour)] = nil // it may have ended
	}
	for hour := range p.pending.tally[byRoute] {
		days[dayOfHour(hour)] = append(days[dayOfHour(hour)], hour)
		p.lastHour = max(p.lastHour, hour)
	}
	for day, hours := range days {
		p.joiner.pace()
		ended := day < dayOfHour(p.lastHour)
		if !ended && len(hours) == 0 {
			continue
		}
		read := hours
		if ended {
			read = nil
		}
		stored, err := p.storedSums(ctx, day, read)
		if err != nil {
			return err
		}
		for _, by := range [...]int{byRoute, byCustomer} {
			for _, hour := range hours {
				stored[by][hour] = mergeSums(stored[by][hour], sortedSums(p.pending.tally[by][hour]))
				p.queueSums(rest, day, by+ofHour, hour, stored[by][hour])
			}
			if ended {
				p.queueSums(rest, day, by+ofDay, int64(day), allSums(stored[by]))
			}
		}
		delete(p.stripped, day) // a call that came late
	}
	p.folded = max(p.folded, p.pending.seq)
	p.pending = pgPending{tally: newTally()}
	rest.Queue("UPDATE ledgers SET folded = $2 WHERE ledger = $1", p.ledger, int64(p.folded))
	return nil
}

// allSums are the sums of hours, added up.
func allSums(hours map[int64][]sumEntry) []sumEntry {
	var all []sumEntry
	for _, sums := range hours {
		all = mergeSums(all, sums)
	}
	return all
}

// storedSums returns the sums of hours of a day, by kind and hour: of all of them if
// hours is nil.
func (p *postgres) storedSums(ctx context.Context, day int32, hours []int64) (map[int]map[int64][]sumEntry, error) {
	var w conditions
	w.add("ledger = ?", p.ledger)
	w.add("day = ?", dayTime(day))
	w.add("kind IN (?, ?)", byRoute+ofHour, byCustomer+ofHour)
	if hours != nil {
		w.add("start = ANY(?)", hours)
	}
	stored := map[int]map[int64][]sumEntry{byRoute: {}, byCustomer: {}}
	rows, err := p.conn.Query(ctx, "SELECT kind, start, entries FROM tallies WHERE "+w.String(), w.args...)
	if err != nil {
		return nil, err
	}
	return stored, eachTally(rows, func(kind int, start int64, e sumEntry) bool {
		stored[kind][start] = append(stored[kind][start], e)
		return true
	})
}

// eachTally hands the entries of tallies to visit, those of a row until it returns
// false. rows are kind, start and entries.
func eachTally(rows pgx.Rows, visit func(kind int, start int64, e sumEntry) bool) error {
	var kind int
	var start int64
	var entries pgtype.DriverBytes // no copy
	_, err := pgx.ForEachRow(rows, []any{&kind, &start, &entries}, func() error {
		return decodeSums(entries, startMicros(kind, start), func(e sumEntry) bool { return visit(kind, start, e) })
	})
	return err
}

func (p *postgres) queueSums(rest *pgx.Batch, day int32, kind int, start int64, sums []sumEntry) {
	if len(sums) == 0 {
		rest.Queue("DELETE FROM tallies WHERE ledger = $1 AND kind = $2 AND start = $3 AND day = $4", p.ledger, kind, start, dayTime(day))
		return
	}
	rest.Queue(insertSums, p.ledger, kind, start, dayTime(day), appendSums(nil, sums, startMicros(kind, start)))
}

const insertSums = `INSERT INTO tallies (ledger, kind, start, day, entries) VALUES ($1, $2, $3, $4, $5)
	ON CONFLICT (ledger, kind, start, day) DO UPDATE SET entries = excluded.entries`

// loadFold reads how far the sums are, and what is pending.
func (p *postgres) loadFold(ctx context.Context) error {
	p.pending = pgPending{tally: newTally()}
	var folded int64
	err := p.conn.QueryRow(ctx, `SELECT folded, greatest(
			(SELECT max(start) FROM tallies t WHERE t.ledger = l.ledger AND kind = $2),
			(SELECT max(start) * 24 + 24 FROM tallies t WHERE t.ledger = l.ledger AND kind = $3), 0)
		FROM ledgers l WHERE ledger = $1`, p.ledger, byRoute+ofHour, byRoute+ofDay).Scan(&folded, &p.lastHour)
	if err != nil {
		return err
	}
	p.folded = uint64(folded)
	rows, err := p.conn.Query(ctx, `SELECT seq, "time", dim, `+customerText+", "+narrowColumns+" FROM calls JOIN dims USING (dim) WHERE ledger = $1 AND seq > $2 ORDER BY seq",
		p.ledger, folded)
	if err != nil {
		return err
	}
	type row struct {
		Call
		dim     Dim
		id, seq int64
	}
	var all []row
	var one row
	into := append([]any{&one.seq, &one.Time, &one.id, &one.Customer}, one.dim.narrowFields()...)
	if _, err := pgx.ForEachRow(rows, into, func() error {
		all = append(all, one)
		return nil
	}); err != nil {
		return err
	}
	need := dimDays{}
	counted := make([]pgRow, 0, len(all))
	for i := range all {
		c := &all[i]
		c.Finish = uint64(c.seq)
		a, err := p.admittedOn(ctx, dayOf(c.Time))
		if err != nil {
			return err
		}
		r := pgRow{Call: &c.Call}
		c.dim.into(r.Call)
		r.dim = p.entry(r.Call)
		r.dim.id = c.id
		a.dims[r.dim.hash] = true
		p.underCustomer(a, &r, r.Call)
		need.add(&r)
		counted = append(counted, r)
	}
	if err := p.storeDims(ctx, need); err != nil {
		return err
	}
	for i := range counted {
		p.count(&counted[i])
	}
	return nil
}

// customerText is a call's customer.
const customerText = "coalesce(customer::text, odd[6], '')"

// stripSums takes the calls whose tenant meets a condition, of which tenants is the
// parameter, out of this guard's sums of a day.
func (p *postgres) stripSums(ctx context.Context, day int32, cond string, tenants []string) error {
	stored, err := p.storedSums(ctx, day, nil)
	if err != nil {
		return err
	}
	rows, err := p.conn.Query(ctx, "SELECT dim FROM dims WHERE dim = ANY($1) AND tid "+cond, dimsOf(stored), tenants)
	if err != nil {
		return err
	}
	list, err := pgx.CollectRows(rows, pgx.RowTo[int64])
	if err != nil || len(list) == 0 {
		return err
	}
	slices.Sort(list)
	var rest pgx.Batch
	rest.Queue("BEGIN")
	for _, by := range [...]int{byRoute, byCustomer} {
		for hour, sums := range stored[by] {
			kept := slices.DeleteFunc(slices.Clone(sums), func(e sumEntry) bool {
				_, gone := slices.BinarySearch(list, e.dim)
				return gone
			})
			if len(kept) < len(sums) {
				p.queueSums(&rest, day, by+ofHour, hour, kept)
			}
			stored[by][hour] = kept
		}
		if day < dayOfHour(p.lastHour) {
			p.queueSums(&rest, day, by+ofDay, int64(day), allSums(stored[by]))
		}
	}
	rest.Queue("COMMIT")
	delete(p.admitted, day)
	return p.finish(ctx, &rest)
}

// dimsOf are the dims of sums by kind and hour.
func dimsOf(stored map[int]map[int64][]sumEntry) []int64 {
	dims := map[int64]bool{}
	for _, hours := range stored {
		for _, sums := range hours {
			for _, e := range sums {
				dims[e.dim] = true
			}
		}
	}
	return slices.Collect(maps.Keys(dims))
}

// admittedOn returns what is admitted on day.
func (p *postgres) admittedOn(ctx context.Context, day int32) (*pgAdmitted, error) {
	if a := p.admitted[day]; a != nil {
		return a, nil
	}
	stored, err := p.storedSums(ctx, day, nil)
	if err != nil {
		return nil, err
	}
	for by, sums := range p.pending.tally {
		for hour, of := range sums {
			if dayOfHour(hour) == day {
				stored[by][hour] = append(stored[by][hour], sortedSums(of)...)
			}
		}
	}
	rows, err := p.conn.Query(ctx, "SELECT dim, hash FROM dims WHERE dim = ANY($1)", dimsOf(stored))
	if err != nil {
		return nil, err
	}
	hashes := map[int64]uuid.UUID{}
	var dim int64
	var hash [16]byte
	if _, err := pgx.ForEachRow(rows, []any{&dim, &hash}, func() error {
		hashes[dim] = hash
		return nil
	}); err != nil {
		return nil, err
	}
	a := &pgAdmitted{map[uuid.UUID]bool{}, map[pgCustomer]string{}}
	for by, hours := range stored {
		for _, sums := range hours {
			for _, e := range sums {
				if by == byRoute {
					a.dims[hashes[e.dim]] = true
				} else {
					a.customers[pgCustomer{e.customer, hashes[e.dim]}] = e.customer
				}
			}
		}
	}
	p.admitted[day] = a
	return a, nil
}

// underCustomer sets what r, which counts as counted, counts under by customer.
func (p *postgres) underCustomer(a *pgAdmitted, r *pgRow, counted *Call) {
	if r.dim.noRoute == nil {
		without := *counted
		without.Route = ""
		r.dim.noRoute = p.entry(&without)
	}
	r.customerDim = r.dim.noRoute
	key := pgCustomer{pgText(r.Customer), r.customerDim.hash}
	known, ok := a.customers[key]
	if !ok {
		if r.Customer != "" && len(a.customers) >= p.maxCustomers || len(r.Customer) > maxFolded {
			key.customer = Other
		}
		known = strings.Clone(key.customer) // and not the whole line that it is a part of
		a.customers[pgCustomer{known, key.dim}] = known
	}
	r.customer = known
}

// dimDays are dims, each with the last day on which it is needed.
type dimDays map[*pgDim]int32

// add adds those of a call.
func (need dimDays) add(r *pgRow) {
	day := dayOf(r.Time)
	for _, e := range [...]*pgDim{r.dim, r.customerDim} {
		if e.id == 0 || e.day < day {
			if was, ok := need[e]; !ok || was < day {
				need[e] = day
			}
		}
	}
}

// foldSums makes tallies of the sums as versions 1 and 2 had them: a row for each, which
// took as much room as the calls.
func foldSums(ctx context.Context, tx pgx.Tx) error {
	rows, err := tx.Query(ctx, "SELECT right(relname::text, 8) FROM pg_inherits JOIN pg_class ON oid = inhrelid WHERE inhparent = 'sums'::regclass")
	if err != nil {
		return err
	}
	days, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return err
	}
	type place struct {
		ledger int32
		hour   int64
	}
	for _, name := range days {
		at, err := time.Parse(dayLayout, name)
		if err != nil {
			return err
		}
		if _, err := tx.Exec(ctx, fmt.Sprintf("CREATE TABLE tallies_%s PARTITION OF tallies FOR VALUES FROM ('%s') TO ('%s')",
			name, at.Format(time.DateOnly), at.AddDate(0, 0, 1).Format(time.DateOnly))); err != nil {
			return err
		}
		for by, from := range map[int]string{byRoute: "'', calls, first, last FROM sums_" + name, byCustomer: "customer, calls, first, last FROM customer_sums_" + name} {
			found := map[place]map[sumKey]sumValue{}
			rows, err := tx.Query(ctx, "SELECT ledger, hour, dim, "+from)
			if err != nil {
				return err
			}
			var in place
			var key sumKey
			var calls int64
			var first, last time.Time
			if _, err := pgx.ForEachRow(rows, []any{&in.ledger, &in.hour, &key.dim, &key.customer, &calls, &first, &last}, func() error {
				if found[in] == nil {
					found[in] = map[sumKey]sumValue{}
				}
				found[in][key] = sumValue{calls, first.UnixMicro(), last.UnixMicro()}
				return nil
			}); err != nil {
				return err
			}
			var batch pgx.Batch
			for in, sums := range found {
				batch.Queue(insertSums, in.ledger, by+ofHour, in.hour, at, appendSums(nil, sortedSums(sums), startMicros(by+ofHour, in.hour)))
			}
			if err := tx.SendBatch(ctx, &batch).Close(); err != nil {
				return err
			}
		}
	}
	_, err = tx.Exec(ctx, "DROP TABLE sums, customer_sums")
	return err
}
