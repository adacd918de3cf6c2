package reconcile

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/partnerguard/partnerguard/policy"
)

// result sums up.
func (j *signInJoin) result() *SignIns {
	j.settle()
	j.integrations()
	j.name()
	j.addStrangers()
	j.addNotes()
	return &j.out
}

// settle says of each token how it was found.
func (j *signInJoin) settle() {
	begin, end := j.out.Since.Add(-signInAfter).Unix(), j.out.Until.Add(signInBefore).Unix()
	for i := range j.tokens[1:] {
		t := &j.tokens[i+1]
		g := j.groups[t.group]
		if t.how != byUTI {
			switch {
			case t.near != nil:
				t.how = byTime
				g.count(t.near.proofs, true, t.id, time.Unix(t.at, 0).UTC())
			case t.iat != 0 && (t.iat < begin || t.iat > end):
				t.how = outside
			default:
				t.how = notFound
			}
		}
		g.tokens[t.how]++
	}
}

func (j *signInJoin) integrations() {
	j.out.Integrations = []SignInIntegration{}
	byName := map[string]*SignInIntegration{}
	of := map[string][]*tokenGroup{}
	owners := map[string]time.Time{}
	get := func(name, owner string, at time.Time) *SignInIntegration {
		in := byName[name]
		if in == nil {
			in = &SignInIntegration{Name: name, Causes: []SignInCause{}, Failures: []SignInFailure{}}
			byName[name] = in
		}
		if !at.Before(owners[name]) {
			in.Owner, owners[name] = owner, at
		}
		return in
	}
	for _, g := range j.groups {
		in := get(g.integration, g.owner, g.latest.time)
		in.Calls += g.calls
		in.Outside += g.tokens[outside]
		in.NotFound += g.tokens[notFound]
		in.ByTime += g.tokens[byTime]
		in.ByUTI += g.tokens[byUTI]
		in.Tokens = in.Outside + in.NotFound + in.ByTime + in.ByUTI
		of[g.integration] = append(of[g.integration], g)
	}
	for _, p := range slices.SortedFunc(maps.Keys(j.callers), signer.compare) {
		c := j.callers[p]
		for _, f := range c.failures {
			if f.Last.After(c.succeeded) {
				in := get(c.integration, c.owner, c.seen)
				f.Text = j.hide(f.Text)
				in.Failures = addFailure(in.Failures, f, j.shown(p))
			}
		}
	}
	for _, name := range slices.Sorted(maps.Keys(byName)) {
		in := byName[name]
		if in.Tokens == in.Outside && len(in.Failures) == 0 {
			j.untold++
			continue
		}
		in.Causes = j.explain(of[name])
		slices.SortFunc(in.Failures, func(a, b SignInFailure) int {
			return cmp.Or(-cmp.Compare(a.Count, b.Count), cmp.Compare(a.Code, b.Code))
		})
		j.out.Integrations = append(j.out.Integrations, *in)
	}
	slices.SortStableFunc(j.out.Integrations, func(a, b SignInIntegration) int { return -cmp.Compare(a.Calls, b.Calls) })
}

func addFailure(to []SignInFailure, f SignInFailure, p Principal) []SignInFailure {
	i := slices.IndexFunc(to, func(have SignInFailure) bool { return have.Code == f.Code })
	if i < 0 {
		f.Principals = []Principal{p}
		return append(to, f)
	}
	have := &to[i]
	have.Count += f.Count
	if f.First.Before(have.First) {
		have.First = f.First
	}
	if f.Last.After(have.Last) {
		have.Last = f.Last
	}
	if len(have.Principals) < maxPrincipals {
		have.Principals = append(have.Principals, p)
	}
	return to
}

func (p signer) compare(q signer) int {
	return cmp.Or(slices.Compare(p.app[:], q.app[:]), slices.Compare(p.user[:], q.user[:]))
}

func (j *signInJoin) shown(p signer) Principal {
	return Principal{AppID: p.app.String(), UserID: j.userID(p)}
}

// name adds the names of the users.
func (j *signInJoin) name() {
	of := map[string][]*Principal{}
	want := func(ps []Principal) {
		for i := range ps {
			if id := ps[i].UserID; id != "" {
				of[id] = append(of[id], &ps[i])
			}
		}
	}
	for _, in := range j.out.Integrations {
		for _, c := range in.Causes {
			want(c.Principals)
		}
		for _, f := range in.Failures {
			want(f.Principals)
		}
	}
	for _, id := range j.identities {
		for _, p := range of[strings.ToLower(id.ObjectID)] {
			p.User = id.UPN
		}
	}
}

// explain returns the causes of an integration's groups: those that the log shows,
// else the candidates that the calls alone suggest.
func (j *signInJoin) explain(groups []*tokenGroup) []SignInCause {
	var all []tally
	who := map[string][]Principal{}
	var latest *lackingCall
	for _, g := range groups {
		if latest == nil || g.latest.time.After(latest.time) {
			latest = &g.latest
		}
		for _, t := range g.shown {
			all = addProof(all, proof{t.code, t.confidence, t.evidence}, t.tokens, t.id, t.at)
			all[slices.IndexFunc(all, func(a tally) bool { return a.code == t.code })].calls += g.calls
			if g.principal.app != uuid.Nil && len(who[t.code]) < maxPrincipals {
				who[t.code] = append(who[t.code], j.shown(g.principal))
			}
		}
	}
	if len(all) == 0 && latest != nil {
		out := []SignInCause{}
		for i, c := range policy.Diagnose(latest.token, latest.reason, latest.rejection, latest.code) {
			if i == 0 || c.Confidence > policy.Possible {
				out = append(out, SignInCause{Cause: c.Code, Text: c.Text, Confidence: c.Confidence.String(), Fix: c.Fix, Evidence: []Evidence{}})
			}
		}
		return out
	}
	out := j.said(all)
	for i := range out {
		out[i].Principals = who[out[i].Cause]
	}
	return out
}

// said puts tallies into words. What is certain comes first, then what more tokens
// show; else the order of proofs, how the token was got before why nobody asked,
// stays.
func (j *signInJoin) said(all []tally) []SignInCause {
	slices.SortStableFunc(all, func(a, b tally) int {
		return cmp.Or(-cmp.Compare(a.confidence, b.confidence), -cmp.Compare(a.tokens, b.tokens))
	})
	out := make([]SignInCause, 0, len(all))
	for _, t := range all {
		c := j.causes[t.code]
		said := SignInCause{
			Cause: t.code, Text: c.Text, Confidence: t.confidence.String(), Fix: c.Fix,
			Tokens: t.tokens, Calls: t.calls, Evidence: t.evidence, At: t.at,
		}
		if said.Evidence == nil {
			said.Evidence = []Evidence{}
		}
		if t.id != uuid.Nil {
			said.SignIn = t.id.String()
		}
		out = append(out, said)
	}
	return out
}

func (j *signInJoin) addStrangers() {
	j.out.Strangers = []Stranger{}
	for _, p := range slices.SortedFunc(maps.Keys(j.strangers), signer.compare) {
		w := j.strangers[p]
		if w.single == 0 {
			continue
		}
		s := Stranger{
			AppID: p.app.String(), App: w.app, UserID: j.userID(p), User: w.user, FirstParty: policy.FirstParty(p.app.String()),
			SignIns: w.signIns, SingleFactor: w.single, First: w.first, Last: w.last, Addresses: w.addresses, Causes: j.said(w.shown),
		}
		for i := range s.Causes {
			s.Causes[i].SignIns, s.Causes[i].Tokens = s.Causes[i].Tokens, 0
		}
		switch app, user := j.apps[p.app], j.users[p.user]; {
		case app && user:
			s.Seen = "app+user"
		case app:
			s.Seen = "app"
		case user:
			s.Seen = "user"
		}
		j.out.Strangers = append(j.out.Strangers, s)
	}
	slices.SortStableFunc(j.out.Strangers, func(a, b Stranger) int { return -cmp.Compare(a.SingleFactor, b.SingleFactor) })
	if n := len(j.out.Strangers); n > maxKept {
		j.out.Strangers, j.out.MoreStrangers = j.out.Strangers[:maxKept:maxKept], int64(n-maxKept)
	}
}

func (j *signInJoin) addNotes() {
	o := &j.out
	if j.pages > 0 && j.nexts >= j.pages {
		o.Incomplete = true
		j.note("Each page of the export names a next one (@odata.nextLink), so the last page is missing: follow the links to the end and give all pages.")
	}
	if o.Rows.Read > 0 && o.Rows.Kept == 0 {
		j.note("The export holds no sign-in to Partner Center (resource fa3d9a0c-3fb0-42cc-9193-47c7ecd2edbd): is it of the partner tenant, and of the right kind of sign-ins?")
	}
	var unexplained int64
	for _, in := range o.Integrations {
		unexplained += in.NotFound
	}
	if j.interactive > 0 && j.silent == 0 {
		j.note("The export holds interactive sign-ins only. The refreshes of stored tokens are non-interactive: export them too, from Graph with $filter=signInEventTypes/any(t: t eq 'nonInteractiveUser').")
	} else if unexplained > 0 && !o.Incomplete {
		j.note("Entra logs a sign-in some minutes to two hours late, and the portal may show several refreshes as one row: tokens may be missing for that.")
	}
	if !o.Since.IsZero() && o.Since.Before(j.cfg.Since.Add(-time.Hour)) {
		j.note(fmt.Sprintf("The export begins %s, calls were looked up from %s on: see --since.", minuteOf(o.Since), minuteOf(j.cfg.Since)))
	}
	if j.untold > 0 {
		j.note(fmt.Sprintf("%s without MFA of which the export says nothing: their tokens were issued before it begins or after it ends, or cannot be read. See partnerguard report.", countOf(j.untold, "integration makes calls", "integrations make calls")))
	}
	if j.lookedAt.After(j.cfg.Since) {
		j.note(fmt.Sprintf("More than %d tokens lack MFA: not all calls before %s were looked up.", maxTokens, minuteOf(j.lookedAt)))
	}
	if len(o.Strangers) > 0 {
		j.note("A sign-in with a single factor can still give a token with the MFA claim, when the refresh token that it used has it: whether a stranger lacks MFA is certain once its calls pass the guard.")
	}
	if j.tooMany {
		j.note(fmt.Sprintf("More than %d applications and users passed the guard: some that are listed as strangers may be among them.", maxCallers))
	}
	if n := len(j.unnamed); n > 0 && len(o.Strangers) > 0 {
		j.note(fmt.Sprintf("%s of the records have no name any more: a stranger may be one of them.", countOf(int64(n), "user")))
	}
	if j.fleet {
		j.note(fleetNote)
	}
	if j.lost > 0 {
		j.note(fmt.Sprintf("More than %d strangers: %s of others were not looked at.", maxStrangers, countOf(j.lost, "sign-in")))
	}
	if n := len(j.appOnly); n > 0 {
		j.note(fmt.Sprintf("%s in as itself (app-only) and never passed the guard; app-only calls are exempt from MFA.", countOf(int64(n), "application signs", "applications sign")))
	}
	if n := len(j.failing); n > 0 {
		j.note(fmt.Sprintf("%s passed the guard, and every sign-in in the export fails.", countOf(int64(n), "other caller never", "other callers never")))
	}
	var unknown []string
	for e, n := range j.words {
		unknown = append(unknown, fmt.Sprintf("%s=%s ×%d", e.Field, j.hide(e.Value), n))
	}
	if slices.Sort(unknown); unknown != nil {
		j.note("Values that this version does not know, and did not judge by: " + strings.Join(unknown, ", ") + ".")
	}
}

func minuteOf(t time.Time) string { return t.UTC().Format("2006-01-02 15:04") }

// countOf is n with its noun, in the plural form given, else with an s.
func countOf(n int64, one string, many ...string) string {
	switch {
	case n == 1:
		return "1 " + one
	case many != nil:
		return fmt.Sprintf("%d %s", n, many[0])
	}
	return fmt.Sprintf("%d %ss", n, one)
}
