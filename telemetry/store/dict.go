package store

import (
	"context"
	"crypto/sha256"
	"database/sql"
	"encoding/binary"
	"errors"
	"slices"
	"strconv"
)

// dictionary knows the numbers of the rows of dims or details by what they hold, as
// far as they were needed lately.
type dictionary struct {
	known map[string]*entry // by key
	key   []byte            // scratch
}

// entry is a row of dims or details.
type entry struct {
	id   int64
	hour int64 // the greatest in dims.hour
}

// maxKnown bounds a dictionary: one of more is begun anew. With half a KiB each that
// is 10 MiB of what callers can cause (a path, a customer, a user agent) and no more.
const maxKnown = 20_000

func (d *dictionary) get() *entry { return d.known[string(d.key)] }

func (d *dictionary) put(e *entry) {
	if len(d.known) >= maxKnown {
		clear(d.known)
	}
	d.known[string(d.key)] = e
}

func (d *dictionary) text(s string) {
	d.key = binary.AppendUvarint(d.key, uint64(len(s)))
	d.key = append(d.key, s...)
}

func (d *dictionary) texts(list []string) {
	d.int(int64(len(list)))
	for _, s := range list {
		d.text(s)
	}
}

func (d *dictionary) int(n int64) { d.key = binary.AppendVarint(d.key, n) }

func (d *dictionary) bool(b bool) { d.key = strconv.AppendBool(d.key, b) }

// dim returns the entry of what c has in common with others, and has it stored if
// it is new.
func (w *writer) dim(ctx context.Context, c *Call) (*entry, error) {
	d := &w.dims
	d.key = d.key[:0]
	for _, s := range [...]string{c.Integration, c.Owner, c.TenantID, c.AppID, c.UserRef, c.Kind, c.Customer, c.Route, c.Mode,
		c.Effect, c.Reason, c.Rejection, c.Code, c.MFA} {
		d.text(s)
	}
	d.bool(c.Verified)
	d.bool(c.WouldReject)
	d.int(c.Status)
	d.texts(c.AMR)
	if c.MFACompliant != nil {
		d.bool(*c.MFACompliant)
	}
	if e := d.get(); e != nil {
		return e, nil
	}
	// 128 bits, so that the dims that callers can cause cannot be made to collide.
	sum := sha256.Sum256(d.key)
	e := &entry{}
	err := w.selectDim.QueryRowContext(ctx, sum[:16]).Scan(&e.id, &e.hour)
	if errors.Is(err, sql.ErrNoRows) {
		e.hour = hourOf(c.Time)
		dim := dimOf(c)
		var res sql.Result
		if res, err = w.insertDim.ExecContext(ctx, append([]any{sum[:16], e.hour}, dim.columns()...)...); err == nil {
			e.id, err = res.LastInsertId()
		}
	}
	if err != nil {
		return nil, err
	}
	d.put(e)
	return e, nil
}

// detail returns the number of what else repeats, and has it stored if it is new in
// the hour of c. By the hour, because then no index is needed to find what no call
// needs any more.
func (w *writer) detail(ctx context.Context, c *Call) (int64, error) {
	d, hour := &w.details, hourOf(c.Time)
	d.key = d.key[:0]
	d.int(hour)
	for _, s := range [...]string{c.Instance, c.Listener, c.Peer, c.Method, c.Upstream, c.Evidence, c.Rule, c.Application, c.UserAgent, c.UpstreamStatus, c.Error} {
		d.text(s)
	}
	d.int(c.Generation)
	d.int(c.Replays)
	d.texts(c.QueryNames)
	if e := d.get(); e != nil {
		return e.id, nil
	}
	res, err := w.insertDetail.ExecContext(ctx, slices.Concat([]any{firstDetail(hour)}, detailOf(c), []any{firstDetail(hour), firstDetail(hour + 1)})...)
	if err != nil {
		return 0, err
	}
	id, err := res.LastInsertId()
	if err != nil {
		return 0, err
	}
	d.put(&entry{id: id})
	return id, nil
}

// firstDetail is the least number of a detail of hour.
func firstDetail(hour int64) int64 { return hour << 32 }
