package reconcile

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"

	"github.com/partnerguard/partnerguard/telemetry/report"
)

// View is what the results that are kept in the data directory dir say, for
// report.Options. A result that cannot be read is among its Problems.
func View(dir string) *report.Microsoft {
	m := &report.Microsoft{Integrations: map[string]*report.Seen{}}
	r, err := LoadResult(dir)
	switch {
	case err == nil:
		addRecords(m, r)
	case !errors.Is(err, ErrNoResult):
		m.Problems = append(m.Problems, problemOf("Microsoft's records are not shown", err))
	}
	s, err := LoadSignIns(dir)
	switch {
	case err == nil:
		addSignIns(m, s)
	case !errors.Is(err, fs.ErrNotExist):
		m.Problems = append(m.Problems, problemOf("what the sign-in logs showed is not shown", err))
	}
	slices.SortStableFunc(m.GoingDirect, worstDirect)
	for _, seen := range m.Integrations {
		slices.SortStableFunc(seen.DirectCallers, worstDirect)
	}
	return m
}

// problemOf is err with its way out, in a sentence.
func problemOf(what string, err error) string {
	text := fmt.Sprintf("%s: %v", upper(what), err)
	var h interface{ Hint() string }
	if errors.As(err, &h) {
		text += "; " + h.Hint()
	}
	return text + "."
}

// worstDirect sorts callers, those with the most calls without MFA first.
func worstDirect(a, b report.Direct) int {
	return cmp.Or(-cmp.Compare(a.NonCompliant, b.NonCompliant), -cmp.Compare(a.Calls, b.Calls), -cmp.Compare(a.SignIns, b.SignIns))
}

// seenOf is the view of the integration name.
func seenOf(m *report.Microsoft, name string) *report.Seen {
	s := m.Integrations[name]
	if s == nil {
		s = &report.Seen{DirectCallers: []report.Direct{}, Findings: []report.Finding{}}
		m.Integrations[name] = s
	}
	return s
}

func addRecords(m *report.Microsoft, r *Result) {
	q := r.Requests
	rec := &report.Records{
		Taken: r.Taken, Since: r.Since, Until: r.Until, Complete: r.Complete,
		Requests: q.Listed + q.Direct, Compliant: q.Compliant, NonCompliant: q.NonCompliant,
		Here: q.Listed, HerePresent: q.MFAPresent, HereMissing: q.MFAMissing, Direct: q.Direct, Unlisted: q.Unlisted,
		Findings: map[string]int{},
	}
	m.Records = rec
	for _, w := range r.Windows {
		if w.State != Complete {
			rec.Incomplete = append(rec.Incomplete, w.API+": "+cmp.Or(strings.Join(w.Reasons, ", "), w.State))
		}
		if w.API == adoptionAPI.String() && w.State != Absent {
			a := r.Adoption
			rec.Daily = &report.Daily{Applications: a.Applications, Requests: a.Requests, Compliant: a.Compliant, Compared: a.Microsoft, Here: a.Here}
		}
	}
	for _, in := range r.Integrations {
		s := seenOf(m, in.Name)
		s.Compliant, s.NonCompliant, s.Unlisted = in.Compliant, in.NonCompliant, in.Unlisted
	}
	for i := range r.Findings {
		f := &r.Findings[i]
		rec.Findings[f.Code]++
		switch f.Code {
		case DirectCalls:
			addDirectCalls(m, directOf(f, "requests"))
		case ApplicationNotSeen:
			addDirectCalls(m, directOf(f, "daily"))
		case WindowIncomplete: // in Incomplete
		default:
			one := findingOf(f)
			if f.Code == NonCompliantPrincipal || f.Code == NonCompliantPrincipalNotSeen {
				m.Principals = append(m.Principals, one)
			}
			for _, u := range f.Integrations {
				s := seenOf(m, u.Name)
				s.Findings = append(s.Findings, one)
			}
		}
	}
}

// addDirectCalls puts d where it belongs: to the integrations that have the app, or to
// nobody's. Daily counts of an app are not calls besides those listed one by one: only
// an app of which none is listed has a finding.
func addDirectCalls(m *report.Microsoft, d report.Direct) {
	if len(d.Integrations) == 0 {
		m.GoingDirect = append(m.GoingDirect, d)
		return
	}
	for _, name := range d.Integrations {
		s := seenOf(m, name)
		s.Direct += d.Calls
		s.DirectNonCompliant += d.NonCompliant
		s.DirectCallers = append(s.DirectCallers, d)
	}
}

func directOf(f *Finding, seenIn string) report.Direct {
	return report.Direct{
		AppID: f.AppID, App: f.App, ObjectID: f.ObjectID, User: f.User, Source: f.Source,
		Calls: f.Calls, NonCompliant: min(f.NonCompliant, f.Calls), First: f.First, Last: f.Last,
		Confidence: f.Confidence, SeenIn: []string{seenIn}, Text: f.Text, Fix: f.Fix, Integrations: namesIn(f.Integrations),
	}
}

func findingOf(f *Finding) report.Finding {
	return report.Finding{
		Code: f.Code, Severity: f.Severity, Confidence: f.Confidence, Text: f.Text, Fix: f.Fix,
		AppID: f.AppID, ObjectID: f.ObjectID, User: f.User, Calls: f.Calls, NonCompliant: f.NonCompliant, Last: f.Last,
		Integrations: namesIn(f.Integrations),
	}
}

func namesIn(uses []Use) []string {
	var names []string
	for _, u := range uses {
		names = append(names, u.Name)
	}
	return names
}

func addSignIns(m *report.Microsoft, s *SignIns) {
	until := s.Until
	if until.IsZero() || until.After(s.Made) {
		until = s.Made
	}
	m.SignIns = &report.SignIns{Since: s.Since, Until: until, Incomplete: s.Incomplete, Kept: s.Rows.Kept, Strangers: int64(len(s.Strangers)) + s.MoreStrangers}
	for i := range s.Integrations {
		in := &s.Integrations[i]
		seen := seenOf(m, in.Name)
		seen.Tokens = &report.Tokens{Tokens: in.Tokens, ByUTI: in.ByUTI, ByTime: in.ByTime, NotFound: in.NotFound, Outside: in.Outside}
		seen.Causes = causesOf(in.Causes)
		for _, f := range in.Failures {
			seen.Failures = append(seen.Failures, report.Failure{Code: f.Code, Text: f.Text, Fix: f.Fix, Count: f.Count, Last: f.Last})
		}
	}
	for i := range s.Strangers {
		addStranger(m, &s.Strangers[i])
	}
}

func causesOf(all []SignInCause) []report.Cause {
	var causes []report.Cause
	for _, c := range all {
		one := report.Cause{Cause: c.Cause, Text: c.Text, Confidence: c.Confidence, Fix: c.Fix, SignIn: c.SignIn, At: c.At}
		for _, e := range c.Evidence {
			one.Evidence = append(one.Evidence, report.Evidence(e))
		}
		causes = append(causes, one)
	}
	return causes
}

// addStranger adds who signs in without MFA and never passed the guard: to the calls of
// the same app and user that Microsoft lists, or as a caller of its own.
func addStranger(m *report.Microsoft, w *Stranger) {
	causes := causesOf(w.Causes)
	known := false
	join := func(d *report.Direct) {
		if !strings.EqualFold(d.AppID, w.AppID) || !strings.EqualFold(d.ObjectID, w.UserID) {
			return
		}
		known = true
		d.SignIns, d.Causes, d.App = w.SingleFactor, causes, cmp.Or(d.App, w.App)
		d.SeenIn = append(d.SeenIn, "sign_ins")
	}
	for i := range m.GoingDirect {
		join(&m.GoingDirect[i])
	}
	for _, seen := range m.Integrations {
		for i := range seen.DirectCallers {
			join(&seen.DirectCallers[i])
		}
	}
	if known {
		return
	}
	d := report.Direct{
		AppID: w.AppID, App: w.App, ObjectID: w.UserID, User: w.User, Source: strings.Join(w.Addresses, ", "),
		SignIns: w.SingleFactor, First: w.First, Last: w.Last, Confidence: "likely", SeenIn: []string{"sign_ins"}, Causes: causes,
		Text: fmt.Sprintf("It signed in to Partner Center without MFA %s, and no call of it passed the guard.", times(int(w.SingleFactor))),
	}
	if len(causes) > 0 {
		d.Fix = causes[0].Fix
	}
	m.GoingDirect = append(m.GoingDirect, d)
}
