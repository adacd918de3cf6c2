package store

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
)

// errOvertaken says that the database is further than this writer knows: the answer to
// a commit was lost, or the server is another one.
var errOvertaken = errors.New("the position in the database is not the one that was written last")

// commit writes the batch in one transaction. Its rows wait in a temporary table, so
// that the lock on fleet is held for as long as the server needs to move them, and not
// for as long as this guard needs to send them.
func (p *postgres) commit(ctx context.Context, b *batch) error {
	ctx, cancel := p.at.limit(ctx)
	defer cancel()
	return p.at.fail("write store", p.write(ctx, b))
}

func (p *postgres) write(ctx context.Context, b *batch) error {
	// What a call needs first, in transactions of their own: they are of no harm
	// without it, and no other guard waits for these locks.
	for _, o := range b.calls {
		if err := p.makeDays(ctx, dayOf(o.call.Time)); err != nil {
			return err
		}
	}
	ended, err := p.findDims(ctx, b.calls)
	if err != nil {
		return err
	}
	if err := p.start(ctx); err != nil {
		return err
	}
	if len(ended) > 0 {
		if err := p.stage(ctx, ended); err != nil {
			return err
		}
	}
	var rest pgx.Batch
	if len(b.gone) > 0 {
		gone := make([]string, len(b.gone))
		for i, call := range b.gone {
			gone[i] = pgText(call)
		}
		rest.Queue("DELETE FROM open WHERE ledger = $1 AND call = ANY($2)", p.ledger, gone)
	}
	p.queueOpen(&rest, b)
	for _, g := range b.gaps {
		rest.Queue("INSERT INTO gaps (ledger, seq, calls, outcomes, since, until, cause) VALUES ($1, $2, $3, $4, $5, $6, $7)",
			p.ledger, int64(g.seq), g.Calls, g.Outcomes, g.Since, g.Until, pgText(g.Cause))
	}
	for _, c := range b.checkpoints {
		rest.Queue(`INSERT INTO checkpoints (ledger, seq, "time", "commit", hash, key, signature) VALUES ($1, $2, $3, $4, $5, $6, $7) ON CONFLICT DO NOTHING`,
			p.ledger, int64(c.seq), c.Time, int64(c.Commit), c.Hash[:], pgText(c.Key), c.Signature)
	}
	var newest *time.Time
	if at := b.in.newest; !at.IsZero() {
		newest = &at
	}
	rest.Queue(`UPDATE ledgers SET segment = $2, "offset" = $3, seq = $4, newest = $5, caught_up = $6, heard = clock_timestamp() WHERE ledger = $1`,
		p.ledger, int64(b.position.Segment), b.position.Offset, int64(b.seq), newest, b.caughtUp)
	for i := range ended {
		p.count(&ended[i])
	}
	if p.pending.behind || p.pending.calls >= p.foldAt {
		if err := p.fold(ctx, &rest); err != nil {
			return err
		}
	}
	if len(ended) > 0 {
		rest.Queue(addCalls, p.ledger, int64(len(ended)))
	}
	rest.Queue("COMMIT")
	b.in.pace()
	if err := p.finish(ctx, &rest); err != nil {
		return err
	}
	for _, o := range b.started {
		o.stored, o.line = true, ""
	}
	p.heard = time.Now()
	return p.followPeople(ctx)
}

// start begins the transaction, which holds the ledger's row: nobody else moves the
// position, and it is where this writer believes it to be.
func (p *postgres) start(ctx context.Context) error {
	var begin pgx.Batch
	var seq int64
	var version, needed int
	begin.Queue("BEGIN")
	begin.Queue("SELECT seq FROM ledgers WHERE ledger = $1 FOR UPDATE", p.ledger).QueryRow(func(row pgx.Row) error { return row.Scan(&seq) })
	begin.Queue(compatibility).QueryRow(func(row pgx.Row) error { return row.Scan(&version, &needed) })
	if err := p.conn.SendBatch(ctx, &begin).Close(); err != nil {
		return err
	}
	if uint64(seq) != p.joiner.seq {
		return errOvertaken
	}
	return p.at.compatible(version, needed, len(migrations))
}

// addCalls comes last: until the transaction ends, no other guard's calls come in.
const addCalls = `
	WITH number AS (UPDATE fleet SET finish = finish + $2 RETURNING finish - $2 AS base),
	span AS (
		INSERT INTO hours (hour, ledger, low, high)
		SELECT hour, $1, base + min(ord), base + max(ord) FROM staging, number GROUP BY hour, base
		ON CONFLICT (hour, ledger) DO UPDATE SET low = least(hours.low, excluded.low), high = greatest(hours.high, excluded.high)
	)
	INSERT INTO calls (finish, ledger, ` + callsColumns + `) SELECT base + ord, $1, ` + callsColumns + `
	FROM staging, number ORDER BY ord`

// callsColumns are those that staging has as calls has them.
const callsColumns = `"time", seq, dim, detail, token, day, bytes_in, bytes_out, duration_us, upstream_us,
	call, request_id, correlation_id, upstream_request_id, upstream_correlation_id, customer, same, path, path_values, rest, odd, odd_folded`

// queueOpen stores the decisions that no outcome followed so far.
func (p *postgres) queueOpen(rest *pgx.Batch, b *batch) {
	var calls []string
	var seqs []int64
	var times []time.Time
	var lines [][]byte
	for _, o := range b.started {
		if b.in.open[o.call.ID] != o { // it ended, or was decided again
			continue
		}
		calls, seqs, times, lines = append(calls, pgText(o.call.ID)), append(seqs, int64(o.seq)), append(times, o.call.Time), append(lines, []byte(o.line))
	}
	if len(calls) == 0 {
		return
	}
	rest.Queue(`INSERT INTO open (ledger, call, seq, "time", line)
		SELECT $1, * FROM unnest($2::text[], $3::bigint[], $4::timestamptz[], $5::bytea[])
		ON CONFLICT (ledger, call) DO UPDATE SET seq = excluded.seq, "time" = excluded."time", line = excluded.line`,
		p.ledger, calls, seqs, times, lines)
}

// pgDim is a row of dims, as far as it was needed lately.
type pgDim struct {
	hash    uuid.UUID
	dim     Dim
	id      int64 // 0: not known yet
	day     int32 // its last one in the database, or an earlier one
	noRoute *pgDim
}

// pgRow is a call that ended, with what it says by reference.
type pgRow struct {
	*Call
	dim, customerDim *pgDim
	customer         string // as it counts
	rest             string
	detail, token    int64
}

// pgAdmitted is what the calls of a day count under so far: those of this ledger.
type pgAdmitted struct {
	dims      map[uuid.UUID]bool
	customers map[pgCustomer]string // the customer again, as a string that may be kept
}

type pgCustomer struct {
	customer string
	dim      uuid.UUID
}

// findDims returns the rows of calls, with the dims that they count under, which it has
// stored if they are new, or new on that day.
func (p *postgres) findDims(ctx context.Context, calls []*openCall) ([]pgRow, error) {
	if len(p.admitted) > maxDays { // not later: of a batch that is not written yet the database knows nothing
		clear(p.admitted)
	}
	rows := make([]pgRow, 0, len(calls))
	need := dimDays{}
	for _, o := range calls {
		p.joiner.pace()
		r := pgRow{Call: &o.call}
		a, err := p.admittedOn(ctx, dayOf(r.Time))
		if err != nil {
			return nil, err
		}
		var counted *Call
		for level := 0; ; level++ {
			counted = widen(r.Call, level)
			r.dim = p.entry(counted)
			if level == widest || len(a.dims) < (level+1)*p.maxDims || a.dims[r.dim.hash] {
				break
			}
		}
		a.dims[r.dim.hash] = true
		if r.rest, err = restOf(r.Call, counted); err != nil {
			return nil, err
		}
		p.underCustomer(a, &r, counted)
		need.add(&r)
		rows = append(rows, r)
	}
	// Both in one order, as a finish grows with seq.
	slices.SortFunc(rows, func(a, b pgRow) int { return cmp.Compare(a.Finish, b.Finish) })
	return rows, p.storeDims(ctx, need)
}

// entry is the dim of a call as it counts.
func (p *postgres) entry(counted *Call) *pgDim {
	p.key = appendDimKey(p.key[:0], counted)
	if e := p.dims[string(p.key)]; e != nil {
		return e
	}
	if len(p.dims) >= maxKnown {
		clear(p.dims)
	}
	// 128 bits, so that the dims that callers can cause cannot be made to collide.
	sum := sha256.Sum256(p.key)
	e := &pgDim{hash: uuid.UUID(sum[:16]), dim: dimOf(counted), day: -1 << 31}
	p.dims[string(p.key)] = e
	return e
}

// storeDims stores dims, each as needed on a day. They are the fleet's: their rows are
// locked in the order of their hash.
func (p *postgres) storeDims(ctx context.Context, missing dimDays) error {
	if len(missing) == 0 {
		return nil
	}
	p.rows.begin()
	byHash := make(map[uuid.UUID]*pgDim, len(missing))
	for e, day := range missing {
		p.joiner.pace()
		if byHash[e.hash] != nil { // the dictionary was begun anew meanwhile
			missing[byHash[e.hash]] = max(missing[byHash[e.hash]], day)
			continue
		}
		byHash[e.hash] = e
	}
	for hash, e := range byHash {
		d := &e.dim
		p.rows.row(2 + columns(narrowColumns))
		p.rows.bytes(hash[:])
		p.rows.date(missing[e])
		for _, v := range d.narrow() {
			switch v := v.(type) {
			case string:
				p.rows.text(v)
			case bool:
				p.rows.bool(v)
			case int64:
				p.rows.int8(v)
			}
		}
	}
	stored := make(map[uuid.UUID]int64, len(byHash))
	err := pgx.BeginFunc(ctx, p.conn, func(tx pgx.Tx) error {
		if err := p.rows.copy(ctx, p.conn, "new_dims"); err != nil {
			return err
		}
		rows, err := tx.Query(ctx, "INSERT INTO dims (hash, day, "+narrowColumns+") SELECT hash, day, "+narrowColumns+` FROM new_dims ORDER BY hash
			ON CONFLICT (hash) DO UPDATE SET day = greatest(dims.day, excluded.day) RETURNING hash, dim`)
		if err != nil {
			return err
		}
		var hash [16]byte
		var id int64
		_, err = pgx.ForEachRow(rows, []any{&hash, &id}, func() error {
			stored[hash] = id
			return nil
		})
		return err
	})
	for e, day := range missing {
		e.id, e.day = stored[e.hash], max(e.day, day)
	}
	return err
}

// appendDimKey appends what tells the dim of a call, as it counts, from any other.
func appendDimKey(key []byte, c *Call) []byte {
	for _, s := range [...]string{c.Integration, c.Owner, c.TenantID, c.AppID, c.UserRef, c.Kind, c.Route, c.Mode,
		c.Effect, c.Reason, c.Rejection, c.Code, c.MFA} {
		key = appendKeyText(key, s)
	}
	key = binary.AppendVarint(key, c.Status)
	key = strconv.AppendBool(key, c.Verified)
	key = strconv.AppendBool(key, c.WouldReject)
	key = appendKeyTexts(key, c.AMR)
	if c.MFACompliant != nil {
		key = strconv.AppendBool(key, *c.MFACompliant)
	}
	return key
}

func appendKeyText(key []byte, s string) []byte {
	return append(binary.AppendUvarint(key, uint64(len(s))), s...)
}

func appendKeyTexts(key []byte, list []string) []byte {
	key = binary.AppendUvarint(key, uint64(len(list)))
	for _, s := range list {
		key = appendKeyText(key, s)
	}
	return key
}

// Bits of calls.same.
const (
	sameRequest     = 1 // Microsoft's request id is the client's
	sameCorrelation = 2
	ownRequest      = 4 // the client's request id is the call's own
	ownCorrelation  = 8
)

// stage sends the calls to the staging table, and what is new of details and tokens.
func (p *postgres) stage(ctx context.Context, rows []pgRow) error {
	p.rows.begin()
	p.newDetails.begin()
	p.newTokens.begin()
	details, tokens := 0, 0
	for i := range rows {
		p.joiner.pace()
		r := &rows[i]
		var known bool
		if r.detail, known = p.reference(p.details, appendDetailKey(p.key[:0], r.Call), r.Finish); !known {
			p.newDetails.detail(p.ledger, r)
			details++
		}
		if r.UTI != "" || r.IssuedAt != 0 || r.ExpiresAt != 0 {
			if r.token, known = p.reference(p.tokens, appendTokenKey(p.key[:0], r), r.Finish); !known {
				p.newTokens.token(p.ledger, r)
				tokens++
			}
		}
		p.rows.call(int32(i+1), r)
	}
	if details > 0 {
		if err := p.newDetails.copy(ctx, p.conn, "details (day, ledger, detail, generation, replays, instance, listener, peer, method, query_names, "+
			"upstream, evidence, rule, application, user_agent, upstream_status, error)"); err != nil {
			return err
		}
	}
	if tokens > 0 {
		if err := p.newTokens.copy(ctx, p.conn, "tokens (day, ledger, token, hour, caller, uti, iat, exp)"); err != nil {
			return err
		}
	}
	return p.rows.copy(ctx, p.conn, "staging")
}

// reference returns the number under key, which is that of the first call that had it.
func (p *postgres) reference(known map[string]uint64, key []byte, seq uint64) (int64, bool) {
	p.key = key
	if n, ok := known[string(key)]; ok {
		return int64(n), true
	}
	if len(known) >= maxKnown {
		clear(known)
	}
	known[string(key)] = seq
	return int64(seq), false
}

func appendDetailKey(key []byte, c *Call) []byte {
	key = binary.AppendVarint(key, int64(dayOf(c.Time)))
	for _, s := range [...]string{c.Instance, c.Listener, c.Peer, c.Method, c.Upstream, c.Evidence, c.Rule, c.Application, c.UserAgent, c.UpstreamStatus, c.Error} {
		key = appendKeyText(key, s)
	}
	key = binary.AppendVarint(key, c.Generation)
	key = binary.AppendVarint(key, c.Replays)
	return appendKeyTexts(key, c.QueryNames)
}

// appendTokenKey is by the hour, so that a list of the tokens of some time reads no
// calls.
func appendTokenKey(key []byte, r *pgRow) []byte {
	key = binary.AppendVarint(key, hourOf(r.Time))
	d := &r.dim.dim
	for _, s := range [...]string{r.UTI, d.Integration, d.AppID, d.UserRef, d.MFA} {
		key = appendKeyText(key, s)
	}
	key = binary.AppendVarint(key, r.IssuedAt)
	key = binary.AppendVarint(key, r.ExpiresAt)
	return strconv.AppendBool(key, r.Verified)
}

// copyBuffer is rows in PostgreSQL's binary format of COPY. pgx writes it, too, but by
// way of interfaces and reflection, for several times the processor time.
type copyBuffer struct{ b []byte }

func (c *copyBuffer) begin() {
	const maxKept = 4 << 20
	if cap(c.b) > maxKept {
		c.b = nil
	}
	c.b = append(c.b[:0], "PGCOPY\n\xff\r\n\x00"...)
	c.b = append(c.b, 0, 0, 0, 0, 0, 0, 0, 0) // flags, length of an extension
}

// copy ends the rows and sends them to a table.
func (c *copyBuffer) copy(ctx context.Context, conn *pgx.Conn, into string) error {
	c.b = append(c.b, 0xff, 0xff)
	_, err := conn.PgConn().CopyFrom(ctx, bytes.NewReader(c.b), "COPY "+into+" FROM STDIN (FORMAT binary)")
	return err
}

func (c *copyBuffer) row(columns int) { c.b = binary.BigEndian.AppendUint16(c.b, uint16(columns)) }

func (c *copyBuffer) size(n int) { c.b = binary.BigEndian.AppendUint32(c.b, uint32(n)) }

func (c *copyBuffer) null() { c.size(-1) }

func (c *copyBuffer) bytes(b []byte) { c.size(len(b)); c.b = append(c.b, b...) }

func (c *copyBuffer) text(s string) {
	s = pgText(s)
	c.size(len(s))
	c.b = append(c.b, s...)
}

func (c *copyBuffer) nullText(s string) {
	if s == "" {
		c.null()
		return
	}
	c.text(s)
}

func (c *copyBuffer) bool(v bool) {
	c.size(1)
	if v {
		c.b = append(c.b, 1)
	} else {
		c.b = append(c.b, 0)
	}
}

func (c *copyBuffer) int2(n int16) { c.size(2); c.b = binary.BigEndian.AppendUint16(c.b, uint16(n)) }
func (c *copyBuffer) int4(n int32) { c.size(4); c.b = binary.BigEndian.AppendUint32(c.b, uint32(n)) }
func (c *copyBuffer) int8(n int64) { c.size(8); c.b = binary.BigEndian.AppendUint64(c.b, uint64(n)) }

func (c *copyBuffer) nullInt8(n int64) {
	if n == 0 {
		c.null()
		return
	}
	c.int8(n)
}

// epoch is PostgreSQL's, 2000-01-01, in seconds since 1970.
const epoch = 946684800

func (c *copyBuffer) date(day int32) { c.int4(day - epoch/86400) }

func (c *copyBuffer) time(t time.Time) { c.int8(t.UnixMicro() - epoch*1e6) }

// texts is a text[] of one dimension.
func (c *copyBuffer) texts(list []string) {
	at := len(c.b)
	c.size(0)
	const text = 25 // the type's OID
	for _, n := range [...]int{1, 0, text, len(list), 1} {
		c.size(n)
	}
	for _, s := range list {
		c.text(s)
	}
	binary.BigEndian.PutUint32(c.b[at:], uint32(len(c.b)-at-4))
}

// id is an id of a call: a GUID as this program writes them, else NULL.
func (c *copyBuffer) id(id string) (odd bool) {
	if guid, ok := parseGUID(id); ok {
		c.bytes(guid[:])
		return false
	}
	c.null()
	return id != ""
}

// call appends a row of staging.
func (c *copyBuffer) call(ord int32, call *pgRow) {
	upstreamRequest, upstreamCorrelation, same := call.UpstreamRequestID, call.UpstreamCorrelationID, int16(0)
	if upstreamRequest != "" && upstreamRequest == call.RequestID {
		upstreamRequest, same = "", same|sameRequest
	}
	if upstreamCorrelation != "" && upstreamCorrelation == call.CorrelationID {
		upstreamCorrelation, same = "", same|sameCorrelation
	}
	request, correlation := call.RequestID, call.CorrelationID
	if request != "" && request == call.ID && mayBeOwn(request) {
		request, same = "", same|ownRequest
	}
	if correlation != "" && correlation == call.ID && mayBeOwn(correlation) {
		correlation, same = "", same|ownCorrelation
	}
	c.row(24)
	c.int4(ord)
	c.int4(int32(hourOf(call.Time)))
	c.time(call.Time)
	for _, n := range [...]int64{int64(call.Finish), call.dim.id, call.detail} {
		c.int8(n)
	}
	c.nullInt8(call.token)
	c.date(dayOf(call.Time))
	for _, n := range [...]int64{call.BytesIn, call.BytesOut, micros(call.DurationMS), micros(call.UpstreamMS)} {
		c.nullInt8(n)
	}
	ids := [...]string{call.ID, request, correlation, upstreamRequest, upstreamCorrelation, call.Customer}
	odd := false
	for i, id := range ids {
		if c.id(id) {
			odd = true
		} else {
			ids[i] = ""
		}
	}
	c.int2(same)
	switch packed := packPath(call.Path, call.Route, call.Customer).(type) {
	case string:
		c.text(packed)
		c.null()
	case []byte:
		c.null()
		c.bytes(packed)
	default:
		c.null()
		c.null()
	}
	c.nullText(call.rest)
	if !odd {
		c.null()
		c.null()
		return
	}
	c.texts(ids[:])
	var folded []string
	for _, id := range ids {
		if id != "" {
			folded = append(folded, foldOdd(id))
		}
	}
	c.texts(folded)
}

// foldOdd is an id as odd_folded has it: an index takes no more than so much.
func foldOdd(id string) string {
	id = lowerASCII(pgText(id))
	if len(id) > maxFolded {
		id = strings.ToValidUTF8(id[:maxFolded], "")
	}
	return id
}

// maxFolded is how many bytes of a text an index takes in here.
const maxFolded = 200

// mayBeOwn reports whether an id can be stored as that of the call. Most GUIDs that
// clients send are no UUIDv7, as the guard's are: no search for them looks there.
func mayBeOwn(id string) bool {
	guid, ok := parseGUID(id)
	return !ok || guid.Version() == 7
}

// detail appends a row of details.
func (c *copyBuffer) detail(ledger int32, call *pgRow) {
	c.row(17)
	c.date(dayOf(call.Time))
	c.int4(ledger)
	c.int8(call.detail)
	c.int8(call.Generation)
	c.int8(call.Replays)
	for _, s := range [...]string{call.Instance, call.Listener, call.Peer, call.Method, listText(call.QueryNames), call.Upstream, call.Evidence,
		call.Rule, call.Application, call.UserAgent, call.UpstreamStatus, call.Error} {
		c.text(s)
	}
}

// token appends a row of tokens.
func (c *copyBuffer) token(ledger int32, call *pgRow) {
	c.row(8)
	c.date(dayOf(call.Time))
	c.int4(ledger)
	c.int8(call.token)
	c.int4(int32(hourOf(call.Time)))
	c.int8(call.dim.id)
	c.text(call.UTI)
	c.int8(call.IssuedAt)
	c.int8(call.ExpiresAt)
}

// pgText is s as PostgreSQL can hold it: neither NUL nor what is no UTF-8.
func pgText(s string) string {
	if strings.IndexByte(s, 0) < 0 && utf8.ValidString(s) {
		return s
	}
	return strings.ReplaceAll(strings.ToValidUTF8(s, "\ufffd"), "\x00", "\ufffd")
}
