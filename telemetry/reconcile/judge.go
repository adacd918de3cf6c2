package reconcile

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/partnerguard/partnerguard/policy"
)

// judge makes a Result of what Microsoft says and what we have.
type judge struct {
	cfg    *Config
	ms     *microsoft
	ours   *ours
	last   *kept
	result *Result

	requests []*listed // by time, without what stands there twice
	own      map[string]bool
	match    *matcher
	direct   map[directKey]*directGroup
}

func (j *judge) run(ctx context.Context) error {
	j.result = &Result{
		Taken: j.ms.taken, Source: cleanText(j.ms.source), Pseudonymous: j.ours.refs != nil,
		Findings: []Finding{}, Integrations: []Integration{}, Applications: []Application{},
	}
	for a := range j.ms.apis {
		d := &j.ms.apis[a]
		raw := len(d.rows) + d.skipped
		d.rows = dedupe(d.rows)
		j.result.Windows = append(j.result.Windows, j.window(api(a), raw))
	}
	j.readRequests()
	if err := j.findCalls(ctx); err != nil {
		return err
	}
	j.cover()
	if err := j.judgeRequests(ctx); err != nil {
		return err
	}
	j.compareVerdicts()
	j.missedCalls()
	j.principals()
	if err := j.adoption(ctx); err != nil {
		return err
	}
	j.integrations()
	j.finish()
	return nil
}

// window says how much an answer of raw rows covers, but for what the comparison of
// single requests brings up; see cover.
func (j *judge) window(a api, raw int) Window {
	d := &j.ms.apis[a]
	w := Window{API: a.String(), State: Complete, Rows: len(d.rows), Reasons: slices.Clone(d.defects)}
	if d.absent != "" {
		w.State, w.Reasons = Absent, []string{d.absent}
		return w
	}
	w.From, w.Until = j.ms.taken.Add(-keptByMicrosoft), j.ms.taken
	if raw >= listedByMicrosoft && a == principalsAPI {
		w.Reasons = append(w.Reasons, fmt.Sprintf("Microsoft lists no more than %d rows, and there are as many", listedByMicrosoft))
	}
	return w
}

// readRequests makes the rows of partnerRequests into requests.
func (j *judge) readRequests() {
	for i := range j.ms.apis[requestsAPI].rows {
		r := newListed(&j.ms.apis[requestsAPI].rows[i])
		if j.ours.refs == nil {
			r.object = strings.ToLower(r.object) // it is no user_ref
		}
		j.requests = append(j.requests, r)
	}
	slices.SortStableFunc(j.requests, func(a, b *listed) int { return a.at.Compare(b.at) })
	j.own = map[string]bool{}
	for _, own := range slices.Concat(j.last.Own, j.ms.own) {
		j.own[strings.ToLower(own.ID)] = true
	}
}

// findCalls finds our calls among the requests.
func (j *judge) findCalls(ctx context.Context) error {
	j.match = &matcher{cfg: j.cfg, objectOf: j.ours.objectOf, tenants: map[string]bool{}, own: j.own}
	if j.ours.fleet {
		j.match.objectOf = func(string) string { return "" } // it may be another guard's reference
	}
	for _, r := range j.requests {
		if r.tenant != "" {
			j.match.tenants[r.tenant] = true
		}
		if !j.own[r.id] {
			j.match.requests = append(j.match.requests, r)
		}
	}
	for _, p := range j.ms.apis[principalsAPI].rows {
		if p.TenantID != "" {
			j.match.tenants[strings.ToLower(string(p.TenantID))] = true
		}
	}
	w := &j.result.Windows[requestsAPI]
	if w.State != Absent && len(w.Reasons) == 0 {
		// What has no end that is known, as a file without rows, should list nothing.
		from, until := j.covered()
		j.match.missFrom = later(from.Add(j.cfg.Skew), j.cfg.Since)
		j.match.missUntil = until.Add(-max(j.cfg.Delay, j.cfg.Skew))
		if j.ms.live && j.cfg.Delay == 0 {
			j.match.missUntil = until
		}
	}
	if err := j.match.match(ctx); err != nil {
		return err
	}
	for _, r := range j.requests {
		if j.own[r.id] {
			r.at = r.at.Add(-j.match.offset)
		}
	}
	return nil
}

// lagTold is the lag of the store from which on the latest requests count as missing.
const lagTold = 5 * time.Second

// covered is the time of which Microsoft lists every request, by our clock.
func (j *judge) covered() (from, until time.Time) {
	d := &j.ms.apis[requestsAPI]
	from, until = j.ms.taken.Add(-keptByMicrosoft), j.ms.taken
	n := len(j.requests)
	if !j.ms.live { // the file may be older than its time
		until = from
		if n > 0 {
			until = j.requests[n-1].at
		}
	}
	switch {
	case n == 0:
	case len(d.rows)+d.skipped >= listedByMicrosoft:
		from = j.requests[0].at
	default:
		from = earlier(from, j.requests[0].at)
	}
	return from, until
}

// cover says whether the requests reach back to where they must.
func (j *judge) cover() {
	w := &j.result.Windows[requestsAPI]
	if w.State == Absent {
		return
	}
	from, until := j.covered()
	w.From, w.Until = from, until
	need, why := j.ms.taken.Add(-keptByMicrosoft), "Microsoft keeps 7 days"
	switch {
	case !j.cfg.Since.IsZero():
		need, why = j.cfg.Since, "--since asks for more"
	case !j.last.Ended.IsZero():
		need, why = j.last.Ended, "the last run ended before"
	case !j.ms.live:
		need = from
	}
	rolled := len(j.ms.apis[requestsAPI].rows)+j.ms.apis[requestsAPI].skipped >= listedByMicrosoft
	need = later(need, j.ours.first)
	if need.Before(from) {
		what := "7 days"
		if rolled {
			what = fmt.Sprintf("the newest %d rows", listedByMicrosoft)
		}
		w.Reasons = append(w.Reasons, fmt.Sprintf("Microsoft lists %s only: of the time from %s to %s nothing is known (%s)", what, clock(need), clock(from), why))
	} else if rolled && !j.ms.live && j.last.Ended.IsZero() && j.cfg.Since.IsZero() {
		w.Reasons = append(w.Reasons, fmt.Sprintf("Microsoft lists the newest %d rows only: of the time before %s nothing is known", listedByMicrosoft, clock(from)))
	}
	if !until.After(from) {
		w.Reasons = append(w.Reasons, "without rows a file does not say which time it is of")
	}
	if lag := j.ours.lag; lag > lagTold {
		w.Reasons = append(w.Reasons, fmt.Sprintf("the store is %s behind the ledger: requests after %s could not be judged; is the guard running?", lag.Round(time.Second), clock(j.ours.until)))
	}
	if j.ours.first.IsZero() {
		w.Reasons = append(w.Reasons, "the guard has recorded no call yet: there is nothing to hold Microsoft's records against")
		return
	}
	since, end := later(later(from, j.cfg.Since), j.ours.first), earlier(until, j.ours.until)
	if end.After(since) {
		j.result.Since, j.result.Until = since.UTC(), end.UTC()
	}
}

// appName is an app's name as far as Microsoft says it.
func (j *judge) appName(app string) string {
	for i := range j.ms.apis[adoptionAPI].rows {
		if r := &j.ms.apis[adoptionAPI].rows[i]; r.AppName != "" && strings.EqualFold(string(r.AppID), app) {
			return string(r.AppName)
		}
	}
	return ""
}

// integrations are ours as Microsoft sees them.
func (j *judge) integrations() {
	found := map[string]*Integration{}
	of := func(name string) *Integration {
		in := found[name]
		if in == nil {
			u := j.ours.use(name)
			in = &Integration{Name: u.Name, Owner: u.Owner, Verdict: u.Verdict}
			found[name] = in
		}
		return in
	}
	for _, r := range j.requests {
		if r.call == nil || r.at.Before(j.cfg.Since) {
			continue
		}
		switch in := of(r.call.integration); r.compliant {
		case saidTrue:
			in.Compliant++
		case saidFalse:
			in.NonCompliant++
		}
	}
	for _, g := range j.direct {
		if uses := j.ours.usesOf(g.app); len(uses) == 1 {
			of(uses[0].Name).Direct += g.calls
		}
	}
	for _, g := range j.match.missed {
		if g.calls > 0 {
			of(g.integration).Unlisted += int(g.calls)
		}
	}
	for _, in := range found {
		j.result.Integrations = append(j.result.Integrations, *in)
	}
	slices.SortFunc(j.result.Integrations, func(a, b Integration) int {
		return cmp.Or(cmp.Compare(a.Verdict, b.Verdict), -cmp.Compare(a.NonCompliant, b.NonCompliant), strings.Compare(a.Name, b.Name))
	})
}

// finish says how complete the result is.
func (j *judge) finish() {
	res := j.result
	res.Complete = true
	for i := range res.Windows {
		w := &res.Windows[i]
		if w.State == Complete && len(w.Reasons) == 0 {
			continue
		}
		if res.Complete = false; w.State == Complete {
			w.State = Incomplete
		}
		f := Finding{
			Code: WindowIncomplete, Severity: Medium, Confidence: policy.Certain.String(),
			Text: fmt.Sprintf("Of %s a part is missing: what is not found may be there all the same.", w.API),
			Fix:  "Run more often: at least every 7 days, and before 10,000 calls have come together.", Reasons: w.Reasons,
		}
		if w.State == Absent {
			f.Text = fmt.Sprintf("There is no answer of %s.", w.API)
			f.Fix = "Ask again, or save the answer and read it with --from."
		}
		j.find(f)
	}
	if o := res.Requests.OffsetSeconds; o != 0 {
		j.note(fmt.Sprintf("Microsoft's times are %s ahead of ours. That was taken into account; see whether the guard's clock is right.", j.match.offset.Round(time.Second)))
	}
	if n := res.Requests.Outside; n > 0 {
		j.note(fmt.Sprintf("%s outside the time of our records, or before --since, were not judged.", upper(requests(n))))
	}
	if j.ours.fleet {
		j.note(fleetNote)
	}
	if len(j.match.tenants) > 1 {
		j.note("Microsoft's records name several tenants: " + strings.Join(slices.Sorted(maps.Keys(j.match.tenants)), ", ") + ".")
	}
	severities := []string{High, Medium, Low}
	slices.SortStableFunc(res.Findings, func(a, b Finding) int {
		return cmp.Compare(slices.Index(severities, a.Severity), slices.Index(severities, b.Severity))
	})
	res.Clear = res.Complete && len(res.Findings) == 0
}

// keep writes what the next run and report need. A result of older answers than the
// last does not take its place.
func (j *judge) keep() error {
	if j.last.Result != nil && j.last.Result.Taken.After(j.result.Taken) {
		j.note("A later result is kept: this one, of older answers, does not take its place.")
		return nil
	}
	k := &kept{Format: resultFormat, Version: resultVersion, Ended: j.last.Ended, Result: j.result}
	if w := j.result.Windows[requestsAPI]; w.State != Absent && len(j.ms.apis[requestsAPI].defects) == 0 {
		k.Ended = later(k.Ended, w.Until.Add(-j.cfg.Delay)).UTC()
	}
	// Another run may have ended since this one began: what it asked stays known.
	last := j.last
	if now, err := readKept(j.cfg.Dir); err == nil {
		last = now
	}
	old := j.result.Taken.Add(-keptByMicrosoft - 24*time.Hour)
	for _, own := range slices.Concat(last.Own, j.ms.own) {
		if own.Time.After(old) {
			k.Own = append(k.Own, own)
		}
	}
	k.Own = k.Own[max(0, len(k.Own)-maxOwn):]
	if j.result.Pseudonymous {
		k.Result = j.result.withoutNames()
	}
	return k.write(j.cfg.Dir)
}

func (j *judge) find(f Finding)   { j.result.Findings = append(j.result.Findings, f) }
func (j *judge) note(text string) { j.result.Notes = append(j.result.Notes, text) }

// mostFrequent are the keys with the greatest counts, at most 5.
func mostFrequent(counts map[string]int) []string {
	keys := slices.SortedFunc(maps.Keys(counts), func(a, b string) int {
		return cmp.Or(-cmp.Compare(counts[a], counts[b]), strings.Compare(a, b))
	})
	return keys[:min(len(keys), 5)]
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

func earlier(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}

// clock is a time for people.
func clock(t time.Time) string { return t.UTC().Format("2006-01-02 15:04 UTC") }

func times(n int) string {
	switch n {
	case 1:
		return "once"
	case 2:
		return "twice"
	}
	return fmt.Sprintf("%d times", n)
}

func calls(n int) string    { return counted(n, "call") }
func requests(n int) string { return counted(n, "request") }

func counted(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return fmt.Sprintf("%d %ss", n, noun)
}

// upper begins a sentence with s.
func upper(s string) string {
	if s == "" {
		return s
	}
	return strings.ToUpper(s[:1]) + s[1:]
}
