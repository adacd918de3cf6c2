// Package reconcile holds our records against Microsoft's own: what its Security APIs
// list (Run), and what Entra's sign-in logs say (ReadSignIns). So it finds the traffic
// that never passes the guard, and the calls on which Microsoft judges otherwise.
package reconcile

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/partnerguard/partnerguard/telemetry/report"
	"github.com/partnerguard/partnerguard/telemetry/store"
)

// Result is Microsoft's account of a partner's traffic held against ours. Its JSON
// names are a contract. Texts of Microsoft's are at most 256 bytes, and what a terminal
// would act on is escaped.
type Result struct {
	Taken  time.Time `json:"taken"`  // when Microsoft was asked; of files, the latest time of one
	Source string    `json:"source"` // the base URL, or the file or directory
	// Clear says that all was looked at and nothing found.
	Clear bool `json:"clear"`
	// Pseudonymous says that each ObjectID is a user_ref, and "upn:" with a hash where
	// Microsoft does not say the id; what is kept has no User then.
	Pseudonymous bool `json:"pseudonymous,omitempty"`
	// Complete says that no window lacks a part. Otherwise what is not found here may
	// be there all the same.
	Complete bool `json:"complete"`
	// Since and Until are the time of the calls that were judged one by one: what
	// Microsoft lists, we recorded and was asked for. Both are zero when there is none.
	Since time.Time `json:"since,omitzero"`
	Until time.Time `json:"until,omitzero"`

	Windows      []Window      `json:"windows"` // of the three APIs
	Requests     Requests      `json:"requests"`
	Findings     []Finding     `json:"findings"`     // the most severe first
	Integrations []Integration `json:"integrations"` // that Microsoft lists requests of
	Applications []Application `json:"applications"` // that Microsoft counts requests of; at most 1,000
	Adoption     Adoption      `json:"adoption"`     // of all applications
	Notes        []string      `json:"notes,omitempty"`
}

// Window is the part of an API's records that was read.
type Window struct {
	API   string    `json:"api"` // the last segment of its path
	State string    `json:"state"`
	Rows  int       `json:"rows"`           // without what stood there twice
	From  time.Time `json:"from,omitzero"`  // nothing is known of what was before
	Until time.Time `json:"until,omitzero"` // nor of what was after
	// Reasons say why it is not complete.
	Reasons []string `json:"reasons,omitempty"`
}

// The values of Window.State.
const (
	Complete   = "complete"
	Incomplete = "incomplete" // a part is missing
	Absent     = "absent"     // all is missing
)

// Requests counts what became of Microsoft's rows of single requests. Those from Listed
// down to Undecided add up to Rows.
type Requests struct {
	Rows   int `json:"rows"`
	Listed int `json:"listed"` // that we recorded, too
	Direct int `json:"direct"` // that we did not record
	Own    int `json:"own"`    // that reconcile itself made
	// Outside are those before our first record, before --since, or after our last
	// record.
	Outside   int `json:"outside"`
	Undecided int `json:"undecided"` // too many calls of ours have their id

	Compliant    int `json:"compliant"`     // of Listed and Direct, with MFA by Microsoft's word
	NonCompliant int `json:"non_compliant"` // of Listed and Direct, without
	MFAPresent   int `json:"mfa_present"`   // of Listed, with MFA by the guard's word
	MFAMissing   int `json:"mfa_missing"`   // of Listed, without

	ByAttributes int `json:"by_attributes"` // of Listed, those found by app, user, operation and time
	Unlisted     int `json:"unlisted"`      // calls of ours that Microsoft should list and does not
	// OffsetSeconds is how far Microsoft's times are ahead of ours; 0 unless it is more
	// than clocks may differ.
	OffsetSeconds float64 `json:"offset_seconds,omitempty"`
}

// Finding is something to act on.
type Finding struct {
	Code       string `json:"code"`       // stable
	Severity   string `json:"severity"`   // high, medium or low
	Confidence string `json:"confidence"` // certain, likely or possible
	Text       string `json:"text"`
	Fix        string `json:"fix"`

	AppID    string `json:"app_id,omitempty"`
	App      string `json:"app,omitempty"` // its name, as far as Microsoft says
	ObjectID string `json:"object_id,omitempty"`
	User     string `json:"user,omitempty"`
	Source   string `json:"source,omitempty"` // IP address, as Microsoft sees it

	Integrations []Use `json:"integrations,omitempty"` // of ours with the same app or user; at most 20

	Calls        int       `json:"calls,omitempty"`
	NonCompliant int       `json:"non_compliant,omitempty"` // of Calls, without MFA by Microsoft's word
	First        time.Time `json:"first,omitzero"`
	Last         time.Time `json:"last,omitzero"`
	Operations   []string  `json:"operations,omitempty"` // the most frequent; at most 5

	Microsoft string   `json:"microsoft,omitempty"`   // its verdict: compliant, non_compliant
	Guard     string   `json:"guard,omitempty"`       // ours: present, absent, unknown
	AMR       string   `json:"amr,omitempty"`         // of the token, as ours is read from it
	RequestID []string `json:"request_ids,omitempty"` // of some, as evidence; at most 3
	CallIDs   []string `json:"call_ids,omitempty"`    // of some, as evidence; at most 3
	Reasons   []string `json:"reasons,omitempty"`
}

// The codes of findings.
const (
	// DirectCalls are requests that Microsoft lists and we did not record, by app,
	// user and source: an integration that goes to Microsoft directly.
	DirectCalls = "direct_calls"
	// ApplicationNotSeen is an app that Microsoft counts requests of and that never
	// passed the guard; ApplicationPartlySeen one of which we have much less.
	ApplicationNotSeen    = "application_not_seen"
	ApplicationPartlySeen = "application_partly_seen"
	// VerdictDiffers are calls on whose MFA Microsoft and the guard do not agree.
	VerdictDiffers = "verdict_differs"
	// NonCompliantPrincipal is a user that Microsoft calls non-compliant and whose
	// calls pass the guard; NonCompliantPrincipalNotSeen one whose calls do not.
	NonCompliantPrincipal        = "non_compliant_principal"
	NonCompliantPrincipalNotSeen = "non_compliant_principal_not_seen"
	// UnlistedCalls are calls that we recorded and Microsoft does not list.
	UnlistedCalls = "unlisted_calls"
	// WindowIncomplete says that there may be more than was found.
	WindowIncomplete = "window_incomplete"
)

// Codes are the codes of findings, all there are.
func Codes() []string {
	return []string{
		DirectCalls, ApplicationNotSeen, ApplicationPartlySeen, VerdictDiffers, NonCompliantPrincipal, NonCompliantPrincipalNotSeen, UnlistedCalls, WindowIncomplete,
	}
}

// The severities of findings.
const (
	High   = "high"   // it will break, or goes round the guard without MFA
	Medium = "medium" // it is not as it should be
	Low    = "low"    // worth a look
)

// Use is an integration of ours that has to do with a finding.
type Use struct {
	Name     string         `json:"name"`
	Owner    string         `json:"owner,omitempty"`
	Verdict  report.Verdict `json:"verdict"` // of report, over the same time
	Calls    int64          `json:"calls"`   // as far back as the records go
	LastSeen time.Time      `json:"last_seen,omitzero"`
}

// Integration is one of ours as Microsoft sees it.
type Integration struct {
	Name         string         `json:"name"`
	Owner        string         `json:"owner,omitempty"`
	Verdict      report.Verdict `json:"verdict"`       // ours
	Compliant    int            `json:"compliant"`     // requests with MFA by Microsoft's word
	NonCompliant int            `json:"non_compliant"` // without
	Direct       int            `json:"direct"`        // requests of its app that did not pass the guard; 0 if the app is not its alone
	Unlisted     int            `json:"unlisted"`      // calls that Microsoft should list and does not
}

// Application is an app as Microsoft counts its requests, day by day.
type Application struct {
	AppID     string `json:"app_id"`
	Name      string `json:"name,omitempty"`
	Days      int    `json:"days"`
	Requests  int64  `json:"requests"`
	Compliant int64  `json:"compliant"` // of Requests, with MFA
	// ComparedDays are the whole days that we recorded; Microsoft and Here count the
	// requests of these.
	ComparedDays int   `json:"compared_days"`
	Microsoft    int64 `json:"microsoft"`
	Here         int64 `json:"here"`
}

// Adoption sums up Microsoft's counts of requests. The first three are those of
// Application.
type Adoption struct {
	Requests  int64 `json:"requests"`
	Compliant int64 `json:"compliant"`
	Microsoft int64 `json:"microsoft"`
	// Here counts our calls on the days that Microsoft counts: those of no known app
	// are in it once for each of these days.
	Here         int64 `json:"here"`
	Applications int   `json:"applications"`
}

// Config says what to hold against what. Dir, Store and either From or URL and Token
// are required.
type Config struct {
	// Dir is the data directory. The result is kept there, for report and for the next
	// run.
	Dir string
	// Store are our records.
	Store store.Reader

	// From is a file with a saved answer, or a directory of them. It stands for asking.
	From string
	// URL is the base URL of Partner Center, which is asked directly, not by way of the
	// guard: what is checked must not depend on the checker, nor stand among its
	// records.
	URL string
	// Transport is how to get there. Nil is http.DefaultTransport.
	Transport http.RoundTripper
	// Token returns an app+user token with MFA for Partner Center. After a 401 it is
	// asked once more. It never shows in a result or an error.
	Token func(context.Context) (string, error)
	// Waiting is told of every pause before a request is repeated. Nil is allowed.
	Waiting func(pause time.Duration, why string)

	// Since leaves out what was before. Zero is all that Microsoft still lists, and a
	// run that does not reach back to where the last one ended is incomplete.
	Since time.Time
	// Delay is how long Microsoft may take to list a call, which is not documented.
	// Zero is 1 h; less than 0 is none.
	Delay time.Duration
	// Skew is how far Microsoft's time of a call may be from ours. Zero is 5 min, which
	// Entra allows, too.
	Skew time.Duration
	// Integrations are those of the configuration; the owner given there counts, and an
	// app whose calls never came by is theirs when they name it.
	Integrations []report.Integration
	// UserRef, if not nil, is the user_ref of a user. By that users are known then, and
	// nothing else about them is kept, or stands in an error of Microsoft's.
	UserRef func(tenantID, objectID string) string
	// Now is the clock. Nil is time.Now.
	Now func() time.Time
}

const (
	// keptByMicrosoft is how far back the Security APIs look, and listedByMicrosoft how
	// many of the newest rows they have, as their documentation says.
	keptByMicrosoft   = 7 * 24 * time.Hour
	listedByMicrosoft = 10_000
)

// Run reads Microsoft's records, compares them with ours and keeps the result in the
// data directory. With the result may come an error: then it is good but could not be
// kept. It may run beside a guard that writes the store, but not twice at a time in one
// data directory.
func Run(ctx context.Context, cfg Config) (*Result, error) {
	if err := cfg.complete(); err != nil {
		return nil, err
	}
	last, err := readKept(cfg.Dir)
	if errors.Is(err, ErrNoResult) {
		last, err = &kept{}, nil
	}
	if err != nil {
		return nil, err
	}
	var ms *microsoft
	if cfg.From != "" {
		ms, err = readFiles(cfg.From, cfg.Now())
	} else {
		ms, err = fetch(ctx, &cfg)
	}
	if err != nil && cfg.UserRef != nil {
		err = hiddenError{err}
	}
	if err != nil {
		return nil, err
	}
	// Ours after Microsoft's: what it lists, we have by then.
	ours, err := readOurs(ctx, &cfg)
	if err != nil {
		return nil, err
	}
	if cfg.UserRef != nil {
		ours.identities = ms.refer(ours.refs)
	}
	j := &judge{cfg: &cfg, ms: ms, ours: ours, last: last}
	if err := j.run(ctx); err != nil {
		return nil, err
	}
	return j.result, j.keep()
}

func (cfg *Config) complete() error {
	switch {
	case cfg.Dir == "":
		return errors.New("reconcile: Config.Dir is required")
	case cfg.Store == nil:
		return errors.New("reconcile: Config.Store is required")
	case cfg.From == "" && (cfg.URL == "" || cfg.Token == nil):
		return errors.New("reconcile: Config.URL and Token, or From are required")
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Waiting == nil {
		cfg.Waiting = func(time.Duration, string) {}
	}
	if cfg.Delay = cmp.Or(cfg.Delay, time.Hour); cfg.Delay < 0 {
		cfg.Delay = 0
	}
	cfg.Skew = cmp.Or(cfg.Skew, 5*time.Minute)
	return nil
}

// ours is what our records say as a whole.
type ours struct {
	identities map[string]store.Identity
	objectOf   func(ref string) string // what Microsoft's rows have as object id of a user
	refs       *pseudonyms             // nil where users have names
	fleet      bool                    // other guards' user_refs are among them
	// first is the time of the first call on record, zero when there is none; until is
	// up to when every call is in the store.
	first, until time.Time
	lag          time.Duration
	sums         []store.Sum
	apps         map[string][]*store.Sum // by app, in lower case
	users        map[string][]*store.Sum // by objectOf, in lower case
	verdicts     map[string]report.Group // by integration
	configured   map[string][]string     // integrations by app, in lower case
}

func readOurs(ctx context.Context, cfg *Config) (*ours, error) {
	now := cfg.Now().UTC()
	lag, err := cfg.Store.Lag(ctx)
	if err != nil {
		return nil, err
	}
	o := &ours{until: now.Add(-lag), lag: lag, apps: map[string][]*store.Sum{}, users: map[string][]*store.Sum{}, verdicts: map[string]report.Group{}, configured: map[string][]string{}}
	for _, in := range cfg.Integrations {
		for _, app := range in.Apps {
			o.configured[strings.ToLower(app)] = append(o.configured[strings.ToLower(app)], in.Name)
		}
	}
	if o.identities, err = cfg.Store.Identities(ctx); err != nil {
		return nil, err
	}
	o.objectOf = func(ref string) string { return o.identities[ref].ObjectID }
	if cfg.UserRef != nil {
		guards, err := cfg.Store.Instances(ctx)
		if err != nil {
			return nil, err
		}
		o.refs, o.fleet = newPseudonyms(cfg.UserRef), len(guards) > 1
		o.objectOf = func(ref string) string { return ref }
	}
	if o.sums, err = cfg.Store.Sums(ctx, time.Time{}, time.Time{}); err != nil {
		return nil, err
	}
	open, err := cfg.Store.OpenCalls(ctx)
	if err != nil {
		return nil, err
	}
	first := func(t time.Time) {
		if o.first.IsZero() || t.Before(o.first) {
			o.first = t
		}
	}
	for i := range o.sums {
		s := &o.sums[i]
		first(s.First)
		if s.Integration == "" {
			continue
		}
		if s.AppID != "" {
			o.apps[strings.ToLower(s.AppID)] = append(o.apps[strings.ToLower(s.AppID)], s)
		}
		if o.refs != nil {
			o.refs.add(s.Dim)
		}
		if object := strings.ToLower(o.objectOf(s.UserRef)); object != "" {
			o.users[object] = append(o.users[object], s)
		}
	}
	for _, c := range open {
		first(c.Time)
	}
	rep, err := report.Build(ctx, cfg.Store, o.identities, report.Options{Since: now.Add(-keptByMicrosoft), Now: now, Integrations: cfg.Integrations})
	if err != nil {
		return nil, err
	}
	for _, g := range rep.Integrations {
		o.verdicts[g.Name] = g
	}
	return o, nil
}

// use is one of our integrations as findings show it.
func (o *ours) use(name string) Use {
	g := o.verdicts[name]
	return Use{Name: cleanText(name), Owner: cleanText(g.Owner), Verdict: cmp.Or(g.Verdict, report.Unknown)}
}

// maxUses is how many integrations a finding names.
const maxUses = 20

// uses are the integrations of sums, the most used first.
func (o *ours) uses(sums []*store.Sum) []Use {
	found := map[string]*Use{}
	for _, s := range sums {
		u := found[s.Integration]
		if u == nil {
			one := o.use(s.Integration)
			u = &one
			if u.Owner == "" {
				u.Owner = cleanText(s.Owner)
			}
			found[s.Integration] = u
		}
		u.Calls += s.Calls
		if s.Last.After(u.LastSeen) {
			u.LastSeen = s.Last
		}
	}
	uses := make([]Use, 0, len(found))
	for _, u := range found {
		uses = append(uses, *u)
	}
	slices.SortFunc(uses, func(a, b Use) int {
		return cmp.Or(-cmp.Compare(a.Calls, b.Calls), strings.Compare(a.Name, b.Name))
	})
	return uses[:min(len(uses), maxUses)]
}

// usesOf are the integrations that have app: those whose calls came by, else those that
// the configuration knows by it.
func (o *ours) usesOf(app string) []Use {
	uses := o.uses(o.apps[app])
	if len(uses) == 0 && app != "" {
		for _, name := range o.configured[app] {
			uses = append(uses, o.use(name))
		}
	}
	return uses[:min(len(uses), maxUses)]
}

// namesOf lists the names of uses for a sentence.
func namesOf(uses []Use) string {
	names := make([]string, 0, len(uses))
	for _, u := range uses {
		names = append(names, u.Name)
	}
	const shown = 3
	if more := len(names) - shown; more > 0 {
		names = append(names[:shown], fmt.Sprintf("%d more", more))
	}
	return strings.Join(names, ", ")
}
