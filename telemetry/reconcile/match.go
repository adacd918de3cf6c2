package reconcile

import (
	"cmp"
	"context"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/partnerguard/partnerguard/policy"
	"github.com/partnerguard/partnerguard/telemetry/store"
)

// listed is a request as Microsoft lists it.
type listed struct {
	id                       string // lower case; may be empty, and is not unique
	method, route            string // route is the documented template, empty if there is none
	segments                 []string
	operation                string
	at                       time.Time // by our clock, as far as the difference is known
	source                   string
	app, object, tenant, upn string // object is a user_ref where users are pseudonymous
	compliant                apiFlag

	call         *ourCall // the call that it is, if we have it
	byAttributes bool     // found by what it is, not by its id
	undecided    bool     // there were too many calls to look at
}

func newListed(r *apiRow) *listed {
	l := &listed{
		id: strings.ToLower(string(r.RequestID)), operation: string(r.Operation), at: r.RequestTime.Time,
		source: string(cmp.Or(r.SourceAddress, r.Address)), app: strings.ToLower(string(r.AppID)),
		object: string(r.ObjectID), tenant: strings.ToLower(string(r.TenantID)), upn: string(r.UPN), compliant: r.Compliant,
	}
	// Get /v{version}/customers/{customer_id}/subscriptions?order_id={order_id_value}
	method, target, _ := strings.Cut(l.operation, " ")
	l.method = strings.ToUpper(method)
	path, _, _ := strings.Cut(strings.TrimSpace(target), "?")
	l.segments = segmentsOf(path)
	if len(l.segments) > 0 && strings.EqualFold(l.segments[0], "v{version}") {
		l.segments[0] = "v1"
	}
	route, _ := policy.FindRoute(l.method, strings.Join(l.segments, "/"))
	l.route = route.Template
	return l
}

func segmentsOf(path string) []string {
	return slices.DeleteFunc(strings.Split(path, "/"), func(s string) bool { return s == "" })
}

// ourCall is what is kept of a call of ours that may be one that Microsoft lists.
type ourCall struct {
	begin, end time.Time
	uses       int // how many requests it may still be: more than 1 when net/http repeated it

	id, integration, app, ref string
	method, route, path       string
	verified                  bool
	mfa                       string
	amr                       string
	due                       bool // Microsoft should list it
	matched                   bool
}

// missedGroup counts calls that Microsoft should list and does not.
type missedGroup struct {
	missedKey
	calls       int64
	first, last time.Time
	example     string
}

type missedKey struct{ integration, app, ref string }

const (
	// maxCandidates bounds the calls of ours that are kept at a time.
	maxCandidates = 200_000
	// maxMissedGroups bounds the groups of calls that Microsoft does not list.
	maxMissedGroups = 10_000
	// settled is how long a call may have begun before Microsoft's time of it: uploads
	// take minutes, and what that time is of is not documented.
	settled = 15 * time.Minute
)

// matcher finds our calls among Microsoft's requests.
type matcher struct {
	cfg      *Config
	objectOf func(ref string) string // the object id of a call's user, empty when that is not known
	requests []*listed               // by time
	// missFrom and missUntil are the time in which Microsoft should list our calls;
	// tenants, if any, are whose.
	missFrom, missUntil time.Time
	tenants             map[string]bool
	own                 map[string]bool // ids of reconcile's own requests, which a hosts file may have led by way of the guard

	offset   time.Duration // Microsoft's times less ours, where it is larger than Config.Skew
	byID     map[string][]*listed
	found    map[string][]*ourCall // by id, of requests
	kept     int
	missed   map[missedKey]*missedGroup
	egress   map[string]bool // the addresses that our calls come from, as Microsoft sees them
	interned map[string]string
}

// match pairs requests with calls: by id, and those that have no usable id by app,
// user, operation and time.
func (m *matcher) match(ctx context.Context) error {
	if err := m.scan(ctx); err != nil {
		return err
	}
	m.pairByID()
	offset, err := m.probe(ctx)
	if err != nil {
		return err
	}
	if offset != 0 {
		m.offset = offset
		m.missUntil = time.Time{} // where Microsoft's records begin and end is not clear
		for _, r := range m.requests {
			r.at, r.call = r.at.Add(-offset), nil
		}
		if err := m.scan(ctx); err != nil {
			return err
		}
		m.pairByID()
	}
	for _, calls := range m.found {
		for _, c := range calls {
			if c.due && !c.matched {
				c.due = false // it may be known by two ids
				m.miss(c)
			}
		}
	}
	return m.pairByAttributes(ctx)
}

// period is the time in which calls of ours may be requests.
func (m *matcher) period() (since, until time.Time) {
	since, until = m.missFrom, m.missUntil
	if n := len(m.requests); n > 0 {
		slack := m.cfg.Skew + settled
		if first := m.requests[0].at.Add(-slack); since.IsZero() || first.Before(since) {
			since = first
		}
		if last := m.requests[n-1].at.Add(m.cfg.Skew); last.After(until) {
			until = last
		}
	}
	return since, until
}

// eachCall visits our calls that may have come to Microsoft's notice, in period.
func (m *matcher) eachCall(ctx context.Context, visit func(*store.Call)) error {
	since, until := m.period()
	if !until.After(since) {
		return nil
	}
	return m.cfg.Store.Calls(ctx, store.Filter{Since: since, Until: until}, func(c store.Call) error {
		if sent(&c) && !(c.Verified && c.Kind == policy.KindAppOnly.String()) && !m.own[strings.ToLower(c.RequestID)] {
			visit(&c)
		}
		return nil
	})
}

// sent reports whether c went to Partner Center, or may have.
func sent(c *store.Call) bool {
	switch {
	case c.Effect == policy.Reject.String() || c.Upstream != "" && c.Upstream != "partner-center":
		return false
	case c.Open() || c.Error != "":
		return true
	}
	return c.UpstreamMS > 0 || c.UpstreamRequestID != "" // else the breaker was open
}

// scan reads our calls and keeps those that share an id with a request at about the
// same time.
func (m *matcher) scan(ctx context.Context) error {
	m.byID, m.found, m.kept = map[string][]*listed{}, map[string][]*ourCall{}, 0
	m.missed, m.interned = map[missedKey]*missedGroup{}, map[string]string{}
	for _, r := range m.requests {
		if r.undecided = false; r.id != "" {
			m.byID[r.id] = append(m.byID[r.id], r)
		}
	}
	return m.eachCall(ctx, func(c *store.Call) {
		var one *ourCall
		for _, id := range idsOf(c) {
			if !m.near(m.byID[id], c, m.cfg.Skew) {
				continue
			}
			if one == nil {
				if m.kept == maxCandidates {
					undecide(m.byID[id])
					return
				}
				m.kept++
				one = m.keep(c)
			}
			m.found[id] = append(m.found[id], one)
		}
		if one == nil && m.due(c) {
			m.miss(m.keep(c))
		}
	})
}

// undecide gives requests up: there are too many calls that they could be.
func undecide(requests []*listed) {
	for _, r := range requests {
		r.undecided = true
	}
}

// idsOf are the ids that Microsoft may list c under.
func idsOf(c *store.Call) []string {
	ids := []string{strings.ToLower(c.RequestID), strings.ToLower(c.UpstreamRequestID)}
	if ids[0] == ids[1] {
		ids = ids[:1]
	}
	return slices.DeleteFunc(ids, func(id string) bool { return id == "" })
}

// near reports whether one of requests, which are in order, was at the time of c.
func (m *matcher) near(requests []*listed, c *store.Call, within time.Duration) bool {
	begin, end := span(c)
	i, _ := slices.BinarySearchFunc(requests, begin.Add(-within), func(r *listed, t time.Time) int { return r.at.Compare(t) })
	return i < len(requests) && !requests[i].at.After(end.Add(within))
}

// span is the time that c took.
func span(c *store.Call) (begin, end time.Time) {
	return c.Time, c.Time.Add(time.Duration(c.DurationMS * float64(time.Millisecond)))
}

func (m *matcher) keep(c *store.Call) *ourCall {
	k := &ourCall{
		uses: 1 + int(c.Replays), id: c.ID, integration: m.intern(c.Integration), app: m.intern(strings.ToLower(c.AppID)), ref: m.intern(c.UserRef),
		method: m.intern(c.Method), route: m.intern(c.Route), verified: c.Verified, mfa: m.intern(c.MFA), amr: m.intern(strings.Join(c.AMR, ", ")),
		due: m.due(c),
	}
	k.begin, k.end = span(c)
	if c.Path != c.Route {
		k.path = c.Path
	}
	return k
}

// intern returns one copy of what repeats.
func (m *matcher) intern(s string) string {
	if one, ok := m.interned[s]; ok {
		return one
	}
	if len(m.interned) < 10_000 {
		m.interned[s] = s
	}
	return s
}

// due reports whether Microsoft should list c. Whether it lists calls that it refused
// is not documented.
func (m *matcher) due(c *store.Call) bool {
	return !c.Open() && c.Error == "" && c.Rejection == "" && c.Status >= 200 && c.Status != 401 && c.Status != 403 &&
		c.Verified && c.Kind == policy.KindAppUser.String() &&
		!c.Time.Before(m.missFrom) && c.Time.Before(m.missUntil) && (len(m.tenants) == 0 || m.tenants[strings.ToLower(c.TenantID)])
}

// miss counts a call that Microsoft should list and does not.
func (m *matcher) miss(c *ourCall) {
	key := missedKey{c.integration, c.app, c.ref}
	g := m.missed[key]
	if g == nil {
		if len(m.missed) == maxMissedGroups {
			return
		}
		g = &missedGroup{missedKey: key}
		m.missed[key] = g
	}
	g.calls++
	if g.first.IsZero() || c.begin.Before(g.first) {
		g.first = c.begin
	}
	if !c.begin.Before(g.last) {
		g.last, g.example = c.begin, c.id
	}
}

// pairByID pairs the requests and the calls of each id. Where several share one, which
// clients make happen, the nearest in time belong together, and those of the same
// operation from our own address before others.
func (m *matcher) pairByID() {
	m.egress = map[string]bool{}
	ids := slices.Sorted(maps.Keys(m.found))
	for _, id := range ids {
		requests, calls := m.byID[id], m.found[id]
		if len(requests) == 1 && len(calls) == 1 {
			m.pair(requests, calls, m.cfg.Skew, m.fits)
			if r := requests[0]; r.call != nil && r.source != "" && sameOperation(r, r.call) {
				m.egress[r.source] = true
			}
		}
	}
	strict := func(r *listed, c *ourCall) bool {
		return m.fits(r, c) && sameOperation(r, c) && (len(m.egress) == 0 || m.egress[r.source])
	}
	for _, id := range ids {
		requests, calls := m.byID[id], m.found[id]
		if len(requests) == 1 && len(calls) == 1 {
			continue
		}
		slices.SortFunc(calls, func(a, b *ourCall) int { return a.begin.Compare(b.begin) })
		for _, fits := range []func(*listed, *ourCall) bool{strict, m.fits} {
			m.pairNearest(requests, calls, fits)
		}
	}
}

// pairNearest pairs what is near first.
func (m *matcher) pairNearest(requests []*listed, calls []*ourCall, fits func(*listed, *ourCall) bool) {
	for _, within := range []time.Duration{250 * time.Millisecond, 5 * time.Second, time.Minute, m.cfg.Skew} {
		m.pair(requests, calls, min(within, m.cfg.Skew), fits)
	}
}

// pair gives every request that has none the call that fits, was within that time of
// it and ends first: so as many as possible get one. requests are in the order of at,
// calls in that of begin.
func (m *matcher) pair(requests []*listed, calls []*ourCall, within time.Duration, fits func(*listed, *ourCall) bool) {
	var open []*ourCall // in the order of end
	next := 0
	for _, r := range requests {
		if r.call != nil {
			continue
		}
		for ; next < len(calls) && !calls[next].begin.Add(-within).After(r.at); next++ {
			if c := calls[next]; c.uses > 0 {
				i, _ := slices.BinarySearchFunc(open, c.end, func(o *ourCall, end time.Time) int { return cmp.Or(o.end.Compare(end), -1) })
				open = slices.Insert(open, i, c)
			}
		}
		for len(open) > 0 && open[0].end.Add(within).Before(r.at) {
			open = open[1:]
		}
		for i, c := range open {
			if !fits(r, c) {
				continue
			}
			r.call, c.matched = c, true
			if c.uses--; c.uses == 0 {
				open = slices.Delete(open, i, i+1)
			}
			break
		}
	}
}

// fits reports whether r can be c at all: what both know must be the same.
func (m *matcher) fits(r *listed, c *ourCall) bool {
	object := m.objectOf(c.ref)
	return (r.app == "" || c.app == "" || r.app == c.app) &&
		(r.object == "" || object == "" || strings.EqualFold(r.object, object)) &&
		(r.method == "" || r.method == c.method || r.method == "GET" && c.method == "HEAD")
}

// sameOperation reports whether r can be of the same operation as c. Microsoft's
// templates name parameters in a way of their own.
func sameOperation(r *listed, c *ourCall) bool {
	if r.route != "" && r.route == c.route || len(r.segments) == 0 {
		return true
	}
	for _, path := range []string{cmp.Or(c.path, c.route), c.route} {
		if sameSegments(r.segments, segmentsOf(path)) {
			return true
		}
	}
	return false
}

func sameSegments(a, b []string) bool {
	return slices.EqualFunc(a, b, func(x, y string) bool {
		return strings.EqualFold(x, y) || strings.Contains(x, "{") || strings.Contains(y, "{")
	})
}

// Bounds of probe.
const (
	probes       = 32
	probeReach   = 26 * time.Hour // further than any time zone
	probesAgree  = 3              // as many must say the same
	probesWithin = 2 * time.Minute
)

// probe looks up some requests that have no call by their id alone. Where these are
// all off by the same time, clocks differ, or Microsoft's times without a zone are not
// in UTC. It returns that difference, 0 if there is none.
func (m *matcher) probe(ctx context.Context) (time.Duration, error) {
	var lost []*listed
	for _, r := range m.requests {
		if r.call == nil && r.id != "" && !r.undecided {
			lost = append(lost, r)
		}
	}
	if len(lost) < probesAgree || 2*len(lost) < len(m.requests) {
		return 0, nil
	}
	var off []time.Duration
	for i := range min(probes, len(lost)) {
		r := lost[i*len(lost)/min(probes, len(lost))]
		var calls []store.Call
		err := m.cfg.Store.Calls(ctx, store.Filter{
			RequestID: r.id, Since: r.at.Add(-probeReach), Until: r.at.Add(probeReach), Limit: 2,
		}, func(c store.Call) error {
			if sent(&c) {
				calls = append(calls, c)
			}
			return nil
		})
		if err != nil {
			return 0, err
		}
		if len(calls) == 1 {
			off = append(off, r.at.Sub(calls[0].Time))
		}
	}
	if len(off) < probesAgree {
		return 0, nil
	}
	slices.Sort(off)
	median, agree := off[len(off)/2], 0
	for _, d := range off {
		if (d - median).Abs() <= probesWithin {
			agree++
		}
	}
	if agree < probesAgree || 3*agree < 2*len(off) || median.Abs() <= m.cfg.Skew {
		return 0, nil
	}
	return median, nil
}

// pairByAttributes looks for the requests that have no call yet and whose id does not
// speak against it: there is none, or no id of Microsoft's is one of ours, or they come
// from the address that ours come from.
func (m *matcher) pairByAttributes(ctx context.Context) error {
	byID := slices.ContainsFunc(m.requests, func(r *listed) bool { return r.call != nil })
	byApp := map[string][]*listed{}
	for _, r := range m.requests {
		if r.call == nil && !r.undecided && r.operation != "" && (r.id == "" || !byID || m.egress[r.source]) {
			byApp[r.app] = append(byApp[r.app], r)
		}
	}
	if len(byApp) == 0 {
		return nil
	}
	used := map[string]bool{}
	for _, calls := range m.found {
		for _, c := range calls {
			if c.matched {
				used[c.id] = true
			}
		}
	}
	calls, kept := map[string][]*ourCall{}, 0
	err := m.eachCall(ctx, func(c *store.Call) {
		if used[c.ID] {
			return
		}
		var one *ourCall
		for app, requests := range byApp {
			if c.AppID != "" && app != "" && !strings.EqualFold(app, c.AppID) || !m.near(requests, c, m.cfg.Skew) {
				continue
			}
			if one == nil {
				if kept == maxCandidates {
					undecide(requests)
					return
				}
				kept++
				one = m.keep(c)
			}
			calls[app] = append(calls[app], one)
		}
	})
	if err != nil {
		return err
	}
	for _, app := range slices.Sorted(maps.Keys(byApp)) {
		requests := byApp[app]
		slices.SortFunc(calls[app], func(a, b *ourCall) int { return a.begin.Compare(b.begin) })
		m.pairNearest(requests, calls[app], func(r *listed, c *ourCall) bool { return m.fits(r, c) && sameOperation(r, c) })
		for _, r := range requests {
			if r.call == nil {
				continue
			}
			if r.byAttributes = true; r.call.due { // Microsoft lists it after all
				r.call.due = false
				if g := m.missed[missedKey{r.call.integration, r.call.app, r.call.ref}]; g != nil {
					g.calls--
				}
			}
		}
	}
	return nil
}
