// Package report says what the records mean: which integrations are ready for
// Microsoft's enforcement of MFA, which are not, whose they are, why, and what to
// do. It reads the store's sums, and writes tables, JSON and CSV.
package report

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/partnerguard/partnerguard/policy"
	"github.com/partnerguard/partnerguard/telemetry/store"
)

// Report is the readiness of an estate. Its JSON names are a contract.
type Report struct {
	Since      time.Time `json:"since"` // the beginning of an hour: sums are by the hour
	Until      time.Time `json:"until"`
	Verdict    Verdict   `json:"verdict"` // of the worst integration, whatever By says
	LagSeconds float64   `json:"lag_seconds"`

	// By is the dimension of Groups; empty in a report by integration.
	By Dimension `json:"by,omitzero"`
	// Integrations are the groups of a report by integration, Groups those of
	// another. The other is nil. The worst come first.
	Integrations []Group `json:"integrations,omitzero"`
	Groups       []Group `json:"groups,omitzero"`

	// Microsoft is the estate as Microsoft sees it; nil when nobody asked yet.
	Microsoft *Microsoft `json:"microsoft,omitempty"`

	Gaps  *Gaps    `json:"gaps,omitempty"`  // nil when every call is accounted for
	Notes []string `json:"notes,omitempty"` // what the numbers cannot say
	Calls int64    `json:"calls"`
	Open  int64    `json:"open"` // begun, and not ended yet; in no other number
}

// Gaps are the calls that the report cannot tell of.
type Gaps struct {
	Calls          int64 `json:"calls"`          // that the ledger could not take
	Outcomes       int64 `json:"outcomes"`       // that the ledger could not take
	Unattributable int64 `json:"unattributable"` // outcomes without a decision
}

// Group is what the calls of one integration, user, app, customer or route say.
type Group struct {
	Name    string  `json:"name"`
	Owner   string  `json:"owner,omitempty"`
	Verdict Verdict `json:"verdict"`
	// Claimed says that Name stands in tokens only that nobody could verify.
	Claimed bool `json:"claimed,omitempty"`

	Calls        int64            `json:"calls"`
	MFAPresent   int64            `json:"mfa_present"`
	MFAMissing   int64            `json:"mfa_missing"`
	MFAUnknown   int64            `json:"mfa_unknown"`
	AppOnly      int64            `json:"app_only"`
	Unverifiable int64            `json:"unverifiable"`
	WouldReject  int64            `json:"would_reject"` // that enforce would have refused
	Rejected     int64            `json:"rejected"`     // that the guard refused
	Open         int64            `json:"open"`         // begun, and not ended yet; in no other number
	Reasons      map[string]int64 `json:"reasons"`      // calls by the guard's reason
	Refusals     map[string]int64 `json:"refusals"`     // Microsoft's, by code; by kind where it gave none
	MFACompliant Compliance       `json:"mfa_compliant"`
	AMR          []string         `json:"amr"`
	Routes       []Route          `json:"routes"` // the most used, at most 10; none by customer
	Users        []string         `json:"users"`  // names, at most 10
	Apps         []string         `json:"apps"`   // application ids, at most 10
	FirstSeen    time.Time        `json:"first_seen,omitzero"`
	LastSeen     time.Time        `json:"last_seen,omitzero"`
	Causes       []Cause          `json:"causes"` // of the worst evidence, the best explanation first

	// Microsoft is what Microsoft sees of an integration; nil when that is nothing.
	Microsoft *Seen `json:"microsoft,omitempty"`
}

// Compliance counts Microsoft's own verdicts on calls, where it gave one.
type Compliance struct {
	True  int64 `json:"true"`
	False int64 `json:"false"`
}

// Route is a documented route and how often it was called.
type Route struct {
	Route string `json:"route"`
	Calls int64  `json:"calls"`
}

// Cause explains, with the way out.
type Cause struct {
	Cause      string `json:"cause"` // a stable code
	Text       string `json:"text"`
	Confidence string `json:"confidence"` // certain, likely or possible
	Fix        string `json:"fix"`

	// Where a sign-in shows the cause: what it says, the request id of the latest one,
	// and when that was.
	Evidence []Evidence `json:"evidence,omitempty"`
	SignIn   string     `json:"sign_in,omitempty"`
	At       time.Time  `json:"at,omitzero"`
}

// Dimension is what a report groups calls by.
type Dimension string

const (
	ByIntegration Dimension = "integration"
	ByUser        Dimension = "user"
	ByApp         Dimension = "app"
	ByCustomer    Dimension = "customer"
	ByRoute       Dimension = "route"
)

// ParseDimension reads integration, user, app, customer or route.
func ParseDimension(s string) (Dimension, error) {
	for _, d := range []Dimension{ByIntegration, ByUser, ByApp, ByCustomer, ByRoute} {
		if s == string(d) {
			return d, nil
		}
	}
	return "", fmt.Errorf("dimension %q is not known; write integration, user, app, customer or route", s)
}

// Options say what to report. The zero value is all that the store holds, by
// integration.
type Options struct {
	// Since is rounded down to the hour; zero begins with the oldest call.
	Since time.Time
	// Until is rounded up to the hour, but the report names no later time than Now.
	// Zero is Now.
	Until time.Time
	By    Dimension // empty is ByIntegration
	Now   time.Time // required
	// Integrations are those of the configuration: one without calls is reported,
	// too, and the owner given here stands for the one in the records.
	Integrations []Integration
	// Microsoft is what Microsoft says, to stand beside it. Nil leaves it out.
	Microsoft *Microsoft
}

// Integration is a configured integration.
type Integration struct {
	Name, Owner string
	Apps        []string // application ids that it is known by
}

// Build reads the report from r. identities say whom user_refs stand for.
func Build(ctx context.Context, r store.Reader, identities map[string]store.Identity, o Options) (*Report, error) {
	if o.By == "" {
		o.By = ByIntegration
	}
	until := o.Until
	if until.IsZero() {
		until = o.Now
	}
	sums, err := r.Sums(ctx, o.Since, o.Until)
	if err != nil {
		return nil, err
	}
	open, err := r.OpenCalls(ctx)
	if err != nil {
		return nil, err
	}
	gapCalls, gapOutcomes, err := r.Gaps(ctx, o.Since, o.Until)
	if err != nil {
		return nil, err
	}
	lag, err := r.Lag(ctx)
	if err != nil {
		return nil, err
	}
	rep := &Report{Since: o.Since.UTC().Truncate(time.Hour), Until: until.UTC(), LagSeconds: lag.Seconds()}
	if up := rep.Until.Truncate(time.Hour); !up.Equal(rep.Until) {
		if rep.Until = up.Add(time.Hour); rep.Until.After(o.Now) {
			rep.Until = o.Now.UTC()
		}
	}
	gaps := Gaps{Calls: gapCalls, Outcomes: gapOutcomes}
	byIntegration, by := newBuilder(ByIntegration, identities, o), newBuilder(o.By, identities, o)
	opaque := map[string]bool{}
	for _, s := range sums {
		if o.Since.IsZero() && (rep.Since.IsZero() || s.First.Before(rep.Since)) {
			rep.Since = s.First.Truncate(time.Hour)
		}
		if s.Integration == "" {
			gaps.Unattributable += s.Calls
			continue
		}
		rep.Calls += s.Calls
		byIntegration.add(s)
		if o.By != ByIntegration && o.By != ByCustomer {
			by.add(s)
		}
		if strings.EqualFold(s.Route, "/generatetoken") || strings.EqualFold(s.Route, "/v3/generatetoken") {
			opaque[s.Integration] = true
		}
	}
	if o.By == ByCustomer {
		customers, err := r.CustomerSums(ctx, o.Since, o.Until)
		if err != nil {
			return nil, err
		}
		for _, s := range customers {
			if s.Integration != "" {
				by.add(s)
			}
		}
	}
	for _, c := range open {
		if !o.Since.IsZero() && c.Time.Before(rep.Since) || c.Time.After(rep.Until) {
			continue
		}
		rep.Open++
		byIntegration.addOpen(&c)
		if o.By != ByIntegration {
			by.addOpen(&c)
		}
	}
	if rep.Since.IsZero() {
		rep.Since = rep.Until // nothing is there
	}
	groups := byIntegration.groups()
	if gaps != (Gaps{}) {
		rep.Gaps = &gaps
	}
	rep.Verdict = Unknown
	if len(groups) > 0 {
		rep.Verdict = groups[0].Verdict // the worst comes first
	}
	rep.Notes = notes(rep, groups, slices.Sorted(maps.Keys(opaque)))
	if o.By == ByIntegration {
		rep.Integrations = groups
	} else {
		rep.By, rep.Groups = o.By, by.groups()
	}
	if o.Microsoft != nil {
		rep.addMicrosoft(o.Microsoft, o.Now)
	}
	return rep, nil
}

// notes are what a reader must know to read the numbers right.
func notes(r *Report, integrations []Group, opaque []string) []string {
	var notes []string
	if len(opaque) > 0 {
		notes = append(notes, fmt.Sprintf("Tokens were exchanged at /generatetoken by %s. Tokens from there are Partner Center's own and stay opaque to everyone: whether they carry MFA shows only in Microsoft's answers and in the token that was exchanged.",
			strings.Join(opaque, ", ")))
	}
	var unknown int64
	for _, g := range integrations {
		unknown += g.MFAUnknown
	}
	if unknown > 0 {
		notes = append(notes, fmt.Sprintf("%d calls bore verified tokens whose amr claim says neither that MFA was done nor that it was not; enforce refuses them.", unknown))
	}
	if g := r.Gaps; g != nil {
		if g.Calls > 0 || g.Outcomes > 0 {
			notes = append(notes, fmt.Sprintf("The ledger could not take the records of %d calls and %d outcomes; the guard's log has them.", g.Calls, g.Outcomes))
		}
		if g.Unattributable > 0 {
			notes = append(notes, fmt.Sprintf("%d calls ended whose beginning the ledger does not hold; they stand under no integration.", g.Unattributable))
		}
	}
	return notes
}

// builder collects groups of one dimension.
type builder struct {
	by         Dimension
	identities map[string]store.Identity
	owners     map[string]string // configured
	found      map[string]*collector
}

// collector is a group in the making.
type collector struct {
	group     Group
	ownerSeen time.Time
	verified  bool
	pairs     map[pairKey]*pair
	amr       map[string]bool
	routes    map[string]int64
	users     map[string]int64
	apps      map[string]int64
}

func newBuilder(by Dimension, identities map[string]store.Identity, o Options) *builder {
	b := &builder{by: by, identities: identities, owners: map[string]string{}, found: map[string]*collector{}}
	for _, in := range o.Integrations {
		b.owners[in.Name] = in.Owner
		if by == ByIntegration {
			b.of(in.Name)
		}
	}
	return b
}

func (b *builder) of(name string) *collector {
	c := b.found[name]
	if c == nil {
		c = &collector{
			group: Group{Name: name, Reasons: map[string]int64{}, Refusals: map[string]int64{}},
			pairs: map[pairKey]*pair{}, amr: map[string]bool{}, routes: map[string]int64{}, users: map[string]int64{}, apps: map[string]int64{},
		}
		b.found[name] = c
	}
	return c
}

// Names of groups for calls that lack what the report groups by.
const (
	noUser     = "(no user)"
	noApp      = "(no app)"
	noCustomer = "(no customer)"
	noRoute    = "(no documented route)"
)

// name is the group that a call belongs to.
func (b *builder) name(integration, user, app, customer, route string) string {
	switch b.by {
	case ByUser:
		return cmp.Or(UserName(b.identities, user), noUser)
	case ByApp:
		return cmp.Or(app, noApp)
	case ByCustomer:
		return cmp.Or(customer, noCustomer)
	case ByRoute:
		return cmp.Or(route, noRoute)
	}
	return integration
}

// UserName is what to call the user that ref stands for: the principal name, else
// the object id, else ref itself.
func UserName(identities map[string]store.Identity, ref string) string {
	id := identities[ref]
	return cmp.Or(id.UPN, id.ObjectID, ref)
}

func (b *builder) addOpen(call *store.Call) {
	c := b.of(b.name(call.Integration, call.UserRef, call.AppID, call.Customer, call.Route))
	c.group.Open++
	if c.group.Owner == "" {
		c.group.Owner = call.Owner
	}
}

func (b *builder) add(s store.Sum) {
	c := b.of(b.name(s.Integration, s.UserRef, s.AppID, s.Customer, s.Route))
	g, n := &c.group, s.Calls
	g.Calls += n
	switch reason := policy.Reason(s.Reason); {
	case reason == policy.ReasonMFAPresent:
		g.MFAPresent += n
	case reason == policy.ReasonMFAMissing:
		g.MFAMissing += n
	case reason == policy.ReasonMFAUnknown:
		g.MFAUnknown += n
	case reason == policy.ReasonAppOnly:
		g.AppOnly += n
	case reason.Unverifiable():
		g.Unverifiable += n
	}
	g.Reasons[s.Reason] += n
	if s.WouldReject {
		g.WouldReject += n
	}
	if s.Effect == policy.Reject.String() {
		g.Rejected += n
	}
	if s.Rejection != "" {
		g.Refusals[cmp.Or(s.Code, s.Rejection)] += n
	}
	switch s.MFACompliant {
	case "true":
		g.MFACompliant.True += n
	case "false":
		g.MFACompliant.False += n
	}
	if g.FirstSeen.IsZero() || s.First.Before(g.FirstSeen) {
		g.FirstSeen = s.First
	}
	if s.Last.After(g.LastSeen) {
		g.LastSeen = s.Last
	}
	if b.by == ByIntegration && s.Owner != "" && !s.Last.Before(c.ownerSeen) {
		g.Owner, c.ownerSeen = s.Owner, s.Last
	}
	for _, m := range s.Methods() {
		c.amr[m] = true
	}
	if s.Route != "" {
		c.routes[s.Route] += n
	}
	// What an unverified token claims does not name anybody.
	if c.verified = c.verified || s.Verified; s.Verified {
		if s.UserRef != "" {
			c.users[UserName(b.identities, s.UserRef)] += n
		}
		if s.AppID != "" {
			c.apps[s.AppID] += n
		}
	}
	key := pairKey{s.AppID, s.UserRef}
	p := c.pairs[key]
	if p == nil {
		p = &pair{}
		c.pairs[key] = p
	}
	p.add(s)
}

// shown is how many routes, users and apps a group lists.
const shown = 10

// groups finishes the groups and sorts them, the worst first.
func (b *builder) groups() []Group {
	groups := make([]Group, 0, len(b.found))
	for _, c := range b.found {
		g := &c.group
		if owner, ok := b.owners[g.Name]; ok && b.by == ByIntegration && owner != "" {
			g.Owner = owner
		}
		g.Verdict = Unknown
		if len(c.pairs) > 0 {
			g.Verdict = Ready
			for _, p := range c.pairs {
				g.Verdict = min(g.Verdict, p.verdict())
			}
		}
		named := g.Name != noUser && g.Name != noApp
		g.Claimed = (b.by == ByUser || b.by == ByApp) && named && g.Calls > 0 && !c.verified
		g.Causes = causes(c.pairs, g.Verdict)
		g.AMR = nonNil(slices.Sorted(maps.Keys(c.amr)))
		g.Routes = []Route{}
		for _, route := range top(c.routes) {
			g.Routes = append(g.Routes, Route{route, c.routes[route]})
		}
		g.Users, g.Apps = nonNil(top(c.users)), nonNil(top(c.apps))
		groups = append(groups, *g)
	}
	slices.SortFunc(groups, func(a, b Group) int {
		return cmp.Or(cmp.Compare(a.Verdict, b.Verdict), -cmp.Compare(a.Calls, b.Calls), strings.Compare(a.Name, b.Name))
	})
	return groups
}

// top are the keys with the greatest counts.
func top(counts map[string]int64) []string {
	keys := slices.SortedFunc(maps.Keys(counts), func(a, b string) int {
		return cmp.Or(-cmp.Compare(counts[a], counts[b]), strings.Compare(a, b))
	})
	return keys[:min(len(keys), shown)]
}

func nonNil(s []string) []string {
	if s == nil {
		return []string{}
	}
	return s
}

// All returns the groups, whatever the dimension.
func (r *Report) All() []Group {
	if r.By == "" {
		return r.Integrations
	}
	return r.Groups
}
