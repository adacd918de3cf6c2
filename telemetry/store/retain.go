package store

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"
)

// prune applies retention, a bounded number of calls at a time: what nobody keeps any
// longer goes by the hour, then the calls and sums of tenants that are kept shorter
// than others. Only a verified token says whose a call is.
func (s *sqliteDB) prune(ctx context.Context, cutoff time.Time) (done bool, err error) {
	oldest, groups := cutoff, map[string]time.Time{} // by tenant, "" for the rest
	for tenant, kept := range s.kept {
		at := cutoff.Add(s.retention - kept)
		if kept < 0 {
			at = time.Time{}
		}
		groups[tenant] = at
		if at.Before(oldest) {
			oldest = at
		}
	}
	if !oldest.IsZero() {
		if done, err := s.writer.prune(ctx, oldest); err != nil || !done {
			return false, err
		}
	}
	if len(groups) > 0 {
		groups[""] = cutoff
	}
	for tenant, at := range groups {
		if !at.After(oldest) {
			continue
		}
		if done, err := s.writer.strip(ctx, tenant, groups, hourOf(at)); err != nil || !done {
			return false, err
		}
	}
	return true, nil
}

// strip removes the calls and sums of tenant, of all tenants that groups does not name
// if it is empty, that began in hours that ended before hour. done says that none is
// left.
func (w *writer) strip(ctx context.Context, tenant string, groups map[string]time.Time, hour int64) (done bool, err error) {
	if w.stripped[tenant] >= hour && !w.pending.sums.before(hour) {
		return true, nil
	}
	if _, err := w.conn.ExecContext(ctx, "BEGIN IMMEDIATE"); err != nil {
		return false, fmt.Errorf("prune store: %w", err)
	}
	if done, err = w.stripBefore(ctx, tenant, groups, hour); err != nil {
		return false, fmt.Errorf("prune store: %w", errors.Join(err, w.rollback(ctx)))
	}
	if _, err := w.conn.ExecContext(ctx, "COMMIT"); err != nil {
		return false, fmt.Errorf("prune store: %w", errors.Join(err, w.rollback(ctx)))
	}
	if done {
		if w.stripped == nil {
			w.stripped = map[string]int64{}
		}
		w.stripped[tenant] = hour
	}
	return done, nil
}

func (w *writer) stripBefore(ctx context.Context, tenant string, groups map[string]time.Time, hour int64) (done bool, err error) {
	if err := w.fold(ctx); err != nil {
		return false, err
	}
	dims, err := w.dimsOf(ctx, tenant, groups)
	if err != nil {
		return false, err
	}
	list := jsonNumbers(dims)
	// What a widened call was before stands in rest.
	whose, args := "rest ->> 'tid' = ?", []any{tenant}
	if tenant == "" {
		args = args[:0]
		for name := range groups {
			args = append(args, name)
		}
		whose = "rest ->> 'tid' NOT IN (" + marks(len(args)) + ")"
	}
	from := w.stripped[tenant]
	args = append([]any{from, hour, from, hour, hour * hourMicros}, args...)
	n, err := w.exec(ctx, `DELETE FROM calls WHERE finish IN (
		SELECT finish FROM calls
		WHERE finish BETWEEN (SELECT min(low) FROM hours WHERE hour >= ? AND hour < ?) AND (SELECT max(high) FROM hours WHERE hour >= ? AND hour < ?) AND time < ?
			AND CASE WHEN rest ->> 'tid' IS NOT NULL AND (SELECT verified FROM dims WHERE dims.dim = calls.dim) THEN `+whose+`
			ELSE dim IN (SELECT value FROM json_each(?)) END
		LIMIT ?)`, append(args, list, pruneRows)...)
	if err != nil || n == pruneRows {
		return false, err
	}
	if err := w.stripSums(ctx, dims, from, hour); err != nil {
		return false, err
	}
	for query, before := range map[string]int64{
		"DELETE FROM tokens WHERE caller IN (SELECT value FROM json_each(?)) AND token < ?": firstToken(hour),
		"DELETE FROM dims WHERE dim IN (SELECT value FROM json_each(?)) AND day < ?":        hour / 24,
	} {
		if _, err := w.exec(ctx, query, list, before); err != nil {
			return false, err
		}
	}
	for _, d := range [...]*dictionary{&w.dims, &w.tokens} {
		clear(d.known)
	}
	clear(w.days)
	return true, nil
}

// dimsOf returns the dims of tenant, in order; of all that groups does not name if it
// is empty.
func (w *writer) dimsOf(ctx context.Context, tenant string, groups map[string]time.Time) ([]int64, error) {
	rows, err := w.conn.QueryContext(ctx, "SELECT dim, what FROM dims ORDER BY dim")
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var found []int64
	for rows.Next() {
		var dim int64
		var what []byte
		if err := rows.Scan(&dim, &what); err != nil {
			return nil, err
		}
		d, err := decodeDim(what)
		if err != nil {
			return nil, err
		}
		whose := ""
		if _, named := groups[d.TenantID]; named && d.Verified {
			whose = d.TenantID
		}
		if whose == tenant {
			found = append(found, dim)
		}
	}
	return found, rows.Err()
}

// stripSums takes dims, which are in order, out of the sums from one hour up to
// another, and of their days.
func (w *writer) stripSums(ctx context.Context, dims []int64, from, hour int64) error {
	rows, err := w.conn.QueryContext(ctx, "SELECT kind, start FROM sums WHERE kind IN (?, ?) AND start >= ? AND start < ?", byRoute+ofHour, byCustomer+ofHour, from, hour)
	if err != nil {
		return err
	}
	defer rows.Close()
	type place struct {
		kind  int
		start int64
	}
	var places []place
	for rows.Next() {
		var p place
		if err := rows.Scan(&p.kind, &p.start); err != nil {
			return err
		}
		places = append(places, p)
	}
	if err := rows.Err(); err != nil {
		return err
	}
	days := map[int64]bool{}
	for _, p := range places {
		w.pace()
		sums, err := w.readSums(ctx, p.kind, p.start, p.start)
		if err != nil {
			return err
		}
		kept := slices.DeleteFunc(slices.Clone(sums), func(e sumEntry) bool {
			_, gone := slices.BinarySearch(dims, e.dim)
			return gone
		})
		if len(kept) == len(sums) {
			continue
		}
		if err := w.writeSums(ctx, p.kind, p.start, kept); err != nil {
			return err
		}
		if day := p.start / 24; day < w.lastHour/24 {
			days[day] = true
		}
	}
	for day := range days {
		if err := w.sumDay(ctx, day); err != nil {
			return err
		}
	}
	return nil
}
