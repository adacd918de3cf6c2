package store

import (
	"context"
	"crypto/sha256"
	"database/sql"
	"encoding/binary"
	"encoding/json"
	"errors"
	"maps"
	"slices"
	"strconv"
	"strings"
)

// dictionary knows the numbers of the rows of dims, details or tokens by what they
// hold, as far as they were needed lately.
type dictionary struct {
	known map[string]*entry // by key
	key   []byte            // scratch
}

// entry is a row of dims, details or tokens.
type entry struct {
	id  int64
	day int64 // the greatest in dims.day
	// noRoute is the dim that differs in having no route only; nil until it is needed.
	noRoute *entry
}

// maxKnown bounds a dictionary: one of more is begun anew. With half a KiB each that
// is 10 MiB of what callers can cause (a path, a user agent) and no more.
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

// maxDims bounds the sums of a day, whatever the callers send. A call that would make
// one dim more counts under a coarser one: that is what widen does. Beyond twice as
// many, under one of what only this program and its configuration say. Tokens that are
// not verified, which cost their sender nothing and name nobody, get a 32nd of them.
const maxDims = 16_384

// maxCustomers bounds the sums by customer of a day. Beyond, calls count as those of
// the customer Other.
const maxCustomers = 8192

// widest is the last level of widen.
const widest = 2

// widen returns c with Other for what makes dims many: at level 1 for the route and
// what an unverified token claims, at level 2 for all that comes from outside. Level 0
// is c itself. What is empty stays so.
func widen(c *Call, level int) *Call {
	if level == 0 {
		return c
	}
	w := *c
	replace := func(fields ...*string) {
		for _, f := range fields {
			if *f != "" {
				*f = Other
			}
		}
	}
	replace(&w.Route)
	if !c.Verified || level == widest {
		replace(&w.TenantID, &w.AppID, &w.UserRef)
		if len(w.AMR) > 0 {
			w.AMR = []string{Other}
		}
	}
	if level == widest {
		replace(&w.Owner, &w.Code)
	}
	return &w
}

// rest is what a widened call was before.
type rest struct {
	Owner    string   `json:"owner,omitempty"`
	TenantID string   `json:"tid,omitempty"`
	AppID    string   `json:"app_id,omitempty"`
	UserRef  string   `json:"user_ref,omitempty"`
	Route    string   `json:"route,omitempty"`
	Code     string   `json:"code,omitempty"`
	AMR      []string `json:"amr,omitempty"`
}

// restOf is what counted, which is c widened, does not say; empty when it says all.
func restOf(c, counted *Call) (string, error) {
	if c == counted {
		return "", nil
	}
	var r rest
	for _, f := range [...]struct {
		to        *string
		was, wide string
	}{
		{&r.Owner, c.Owner, counted.Owner}, {&r.TenantID, c.TenantID, counted.TenantID}, {&r.AppID, c.AppID, counted.AppID},
		{&r.UserRef, c.UserRef, counted.UserRef}, {&r.Route, c.Route, counted.Route}, {&r.Code, c.Code, counted.Code},
	} {
		if f.was != f.wide {
			*f.to = f.was
		}
	}
	if !slices.Equal(c.AMR, counted.AMR) {
		r.AMR = c.AMR
	}
	b, err := json.Marshal(r)
	return string(b), err
}

func (r *rest) into(c *Call) {
	for _, f := range [...]struct {
		to *string
		is string
	}{{&c.Owner, r.Owner}, {&c.TenantID, r.TenantID}, {&c.AppID, r.AppID}, {&c.UserRef, r.UserRef}, {&c.Route, r.Route}, {&c.Code, r.Code}} {
		if f.is != "" {
			*f.to = f.is
		}
	}
	if r.AMR != nil {
		c.AMR = r.AMR
	}
}

// admitted is what the calls of a day count under so far.
type admitted struct {
	dims      map[int64]bool
	claimed   int               // of dims, those with a token that is not verified
	customers map[sumKey]string // the customer again, as a string that may be kept
}

// maxDays bounds how many days the writer knows that of. Calls end in the order in
// which they began, but for hours.
const maxDays = 4

// admittedOn returns what is admitted on the day of at.
func (w *writer) admittedOn(ctx context.Context, day int64) (*admitted, error) {
	if a := w.days[day]; a != nil {
		return a, nil
	}
	a := &admitted{dims: map[int64]bool{}, customers: map[sumKey]string{}}
	for _, by := range [...]int{byRoute, byCustomer} {
		add := func(e sumEntry) {
			if by == byRoute {
				a.dims[e.dim] = true
			} else {
				a.customers[e.sumKey] = e.customer
			}
		}
		rows, err := w.conn.QueryContext(ctx, "SELECT start, entries FROM sums WHERE kind = ? AND start BETWEEN ? AND ?", by+ofHour, day*24, day*24+23)
		if err != nil {
			return nil, err
		}
		if err := eachSum(rows, by+ofHour, add); err != nil {
			return nil, err
		}
		for hour, sums := range w.pending.sums[by] {
			if hour/24 == day {
				for key, v := range sums {
					add(sumEntry{key, v})
				}
			}
		}
	}
	claimed := w.conn.QueryRowContext(ctx, "SELECT count(*) FROM dims WHERE NOT verified AND dim IN (SELECT value FROM json_each(?))",
		jsonNumbers(slices.Collect(maps.Keys(a.dims))))
	if err := claimed.Scan(&a.claimed); err != nil {
		return nil, err
	}
	if len(w.days) >= maxDays {
		clear(w.days)
	}
	w.days[day] = a
	return a, nil
}

// dim returns the dim that c counts under, and c as it counts.
func (w *writer) dim(ctx context.Context, c *Call) (*entry, *Call, error) {
	day, err := w.admittedOn(ctx, dayNumber(c.Time))
	if err != nil {
		return nil, nil, err
	}
	for level := 0; ; level++ {
		counted := widen(c, level)
		free := level == widest || len(day.dims) < (level+1)*w.maxDims && (c.Verified || level > 0 || day.claimed < w.maxDims/32)
		e, err := w.findDim(ctx, counted, free)
		if err != nil {
			return nil, nil, err
		}
		if e != nil && (free || day.dims[e.id]) {
			day.admit(e, c)
			return e, counted, nil
		}
	}
}

// admit counts e, the dim of c.
func (a *admitted) admit(e *entry, c *Call) {
	if a.dims[e.id] {
		return
	}
	a.dims[e.id] = true
	if !c.Verified {
		a.claimed++
	}
}

// customer returns what c, which counts under e, counts under by customer.
func (w *writer) customer(ctx context.Context, c, counted *Call, e *entry) (sumKey, *entry, error) {
	if e.noRoute == nil {
		without := *counted
		without.Route = ""
		var err error
		if e.noRoute, err = w.findDim(ctx, &without, true); err != nil {
			return sumKey{}, nil, err
		}
	}
	day, err := w.admittedOn(ctx, dayNumber(c.Time))
	if err != nil {
		return sumKey{}, nil, err
	}
	key := sumKey{c.Customer, e.noRoute.id}
	if customer, ok := day.customers[key]; ok {
		key.customer = customer
		return key, e.noRoute, nil
	}
	if key.customer = strings.Clone(c.Customer); c.Customer != "" && len(day.customers) >= w.maxCustomers {
		key.customer = Other
	}
	day.customers[key] = key.customer
	return key, e.noRoute, nil
}

// findDim returns the entry of what c has in common with others. One that is not
// stored is made, or is nil.
func (w *writer) findDim(ctx context.Context, c *Call, create bool) (*entry, error) {
	d := &w.dims
	d.appendDim(c)
	if e := d.get(); e != nil {
		return e, nil
	}
	// 128 bits, so that the dims that callers can cause cannot be made to collide.
	sum := sha256.Sum256(d.key)
	e := &entry{}
	err := w.selectDim.QueryRowContext(ctx, sum[:16]).Scan(&e.id, &e.day)
	if errors.Is(err, sql.ErrNoRows) {
		if !create {
			return nil, nil
		}
		e.day = dayNumber(c.Time)
		var res sql.Result
		if res, err = w.insertDim.ExecContext(ctx, sum[:16], e.day, d.key, c.Integration, c.AppID, c.UserRef, c.Verified, c.Reason, c.Status); err == nil {
			e.id, err = res.LastInsertId()
		}
	}
	if err != nil {
		return nil, err
	}
	d.put(e)
	return e, nil
}

// appendDim makes what c has in common with others the key: its texts, each behind its
// length, a byte of what is true or false, the status, and the methods.
func (d *dictionary) appendDim(c *Call) {
	d.key = d.key[:0]
	for _, s := range [...]string{c.Integration, c.Owner, c.TenantID, c.AppID, c.UserRef, c.Kind, c.Route, c.Mode,
		c.Effect, c.Reason, c.Rejection, c.Code, c.MFA} {
		d.text(s)
	}
	var flags byte
	if c.Verified {
		flags |= dimVerified
	}
	if c.WouldReject {
		flags |= dimWouldReject
	}
	if c.MFACompliant != nil {
		flags |= dimJudged
		if *c.MFACompliant {
			flags |= dimCompliant
		}
	}
	d.key = append(d.key, flags)
	d.int(c.Status)
	d.texts(c.AMR)
}

const (
	dimVerified = 1 << iota
	dimWouldReject
	dimJudged
	dimCompliant
)

var errDim = errors.New("a row of dims is damaged")

// decodeDim reads what appendDim wrote.
func decodeDim(what []byte) (Dim, error) {
	var d Dim
	all, at, bad := string(what), 0, false // the texts are parts of all
	advance := func(size int) bool {
		bad = bad || size <= 0 || size > len(what)-at
		if !bad {
			at += size
		}
		return !bad
	}
	text := func() string {
		n, size := binary.Uvarint(what[at:])
		begin := at + size
		if n == 0 {
			advance(size)
			return ""
		}
		if n > uint64(len(what)) || !advance(size) || !advance(int(n)) {
			bad = true
			return ""
		}
		return all[begin:at]
	}
	number := func() int64 {
		n, size := binary.Varint(what[at:])
		advance(size)
		return n
	}
	for _, s := range [...]*string{&d.Integration, &d.Owner, &d.TenantID, &d.AppID, &d.UserRef, &d.Kind, &d.Route, &d.Mode,
		&d.Effect, &d.Reason, &d.Rejection, &d.Code, &d.MFA} {
		*s = text()
	}
	if at == len(what) {
		return Dim{}, errDim
	}
	flags := what[at]
	at++
	d.Verified, d.WouldReject = flags&dimVerified != 0, flags&dimWouldReject != 0
	if flags&dimJudged != 0 {
		d.MFACompliant = strconv.FormatBool(flags&dimCompliant != 0)
	}
	d.Status = number()
	var methods []string
	for n := number(); n > 0 && !bad; n-- {
		methods = append(methods, text())
	}
	if bad || at != len(what) {
		return Dim{}, errDim
	}
	d.AMR = listText(methods)
	return d, nil
}

// detail returns the number of what else repeats, and has it stored if it is new on
// the day of c. By the day, because then no index is needed to find what no call needs
// any more.
func (w *writer) detail(ctx context.Context, c *Call) (int64, error) {
	d, day := &w.details, dayNumber(c.Time)
	d.key = d.key[:0]
	d.int(day)
	for _, s := range [...]string{c.Instance, c.Listener, c.Peer, c.Method, c.Upstream, c.Evidence, c.Rule, c.Application, c.UserAgent, c.UpstreamStatus, c.Error} {
		d.text(s)
	}
	d.int(c.Generation)
	d.int(c.Replays)
	d.texts(c.QueryNames)
	if e := d.get(); e != nil {
		return e.id, nil
	}
	return d.insert(ctx, w.insertDetail, slices.Concat([]any{firstDetail(day)}, detailOf(c), []any{firstDetail(day), firstDetail(day + 1)}))
}

// token returns the number of the token of a call that counts under e, and has it
// stored if it is new in its hour. By the hour, because then a list of the tokens of
// some time reads no calls. It is 0 when nothing is known of the token.
func (w *writer) token(ctx context.Context, counted *Call, e *entry) (int64, error) {
	if counted.UTI == "" && counted.IssuedAt == 0 && counted.ExpiresAt == 0 {
		return 0, nil
	}
	d, hour := &w.tokens, hourOf(counted.Time)
	d.key = d.key[:0]
	d.int(hour)
	for _, s := range [...]string{counted.UTI, counted.Integration, counted.AppID, counted.UserRef, counted.MFA} {
		d.text(s)
	}
	d.int(counted.IssuedAt)
	d.int(counted.ExpiresAt)
	d.bool(counted.Verified)
	if e := d.get(); e != nil {
		return e.id, nil
	}
	return d.insert(ctx, w.insertToken, []any{firstToken(hour), e.id, packUTI(counted.UTI), nullInt(counted.IssuedAt), nullInt(counted.ExpiresAt), firstToken(hour), firstToken(hour + 1)})
}

// insert stores a row and puts its number under the key.
func (d *dictionary) insert(ctx context.Context, stmt *sql.Stmt, args []any) (int64, error) {
	res, err := stmt.ExecContext(ctx, args...)
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

// firstDetail is the least number of a detail of day.
func firstDetail(day int64) int64 { return day << 32 }

// firstToken is the least number of a token of hour. SQLite stores it in 6 bytes,
// until the year 2209, and no guard serves 2^26 calls in an hour.
func firstToken(hour int64) int64 { return hour << 26 }
