package report

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/partnerguard/partnerguard/policy"
)

// Microsoft is the estate as Microsoft sees it: its own records of the partner's calls
// (reconcile), and Entra's sign-in logs (signins). Reconcile fills it; Build says what
// is stale and hands the views of integrations to these.
type Microsoft struct {
	Records *Records `json:"records,omitempty"`  // nil: nobody asked yet
	SignIns *SignIns `json:"sign_ins,omitempty"` // nil: none were read yet

	// GoingDirect are the apps and users of no integration here that go to Microsoft
	// without passing the guard, those without MFA first.
	GoingDirect []Direct `json:"going_direct"`
	// Principals are the users that Microsoft calls non-compliant.
	Principals []Finding `json:"non_compliant_principals"`
	// Problems say why a result that was kept is not shown.
	Problems []string `json:"problems,omitempty"`

	// Integrations are the views of single ones, by name.
	Integrations map[string]*Seen `json:"-"`
}

// Records are Microsoft's records of calls, held against the guard's.
type Records struct {
	Taken time.Time `json:"taken"`
	Since time.Time `json:"since,omitzero"` // of the requests that were judged one by one
	Until time.Time `json:"until,omitzero"`
	// Stale says that they were taken before Report.Since, or more than 24 h ago.
	Stale bool `json:"stale"`
	// Complete says that nothing is missing. Otherwise a caller that does not show here
	// may be there all the same; Incomplete says why.
	Complete   bool     `json:"complete"`
	Incomplete []string `json:"incomplete,omitempty"`

	Requests     int `json:"requests"`      // that Microsoft lists one by one, and that were judged
	Compliant    int `json:"compliant"`     // of Requests, with MFA by Microsoft's word
	NonCompliant int `json:"non_compliant"` // of Requests, without
	Here         int `json:"here"`          // of Requests, those that passed the guard
	HerePresent  int `json:"here_mfa_present"`
	HereMissing  int `json:"here_mfa_missing"`
	Direct       int `json:"direct"`   // of Requests, those that did not pass it
	Unlisted     int `json:"unlisted"` // calls here that Microsoft should list and does not

	// Daily are Microsoft's counts (applicationmfaadoptionstatus), which no window of
	// rows cuts off; nil when Microsoft gave none.
	Daily *Daily `json:"daily,omitempty"`
	// Findings counts what reconcile found, by its codes.
	Findings map[string]int `json:"findings"`
}

// Daily are Microsoft's counts by day and application.
type Daily struct {
	Applications int   `json:"applications"`
	Requests     int64 `json:"requests"`
	Compliant    int64 `json:"compliant"` // of Requests, with MFA
	// Compared counts the requests of the whole days that the guard recorded, Here
	// those of them that passed it.
	Compared int64 `json:"compared"`
	Here     int64 `json:"here"`
}

// SignIns are Entra's sign-ins that were held against the calls without MFA.
type SignIns struct {
	Since      time.Time `json:"since,omitzero"`
	Until      time.Time `json:"until,omitzero"`
	Stale      bool      `json:"stale"`      // the export ends before Report.Since, or more than 24 h ago
	Incomplete bool      `json:"incomplete"` // the export lacks a part
	Kept       int64     `json:"sign_ins"`   // to Partner Center, or of tokens seen here
	Strangers  int64     `json:"strangers"`  // apps and users without MFA that never passed the guard
}

// Seen is an integration as Microsoft sees it.
type Seen struct {
	Compliant          int `json:"compliant"`     // of its requests that passed the guard, by Microsoft's word
	NonCompliant       int `json:"non_compliant"` // the same, without MFA
	Unlisted           int `json:"unlisted"`
	Direct             int `json:"direct"` // requests of its apps that did not pass the guard
	DirectNonCompliant int `json:"direct_non_compliant"`
	// DirectCallers are those requests by app, user and address, those without MFA
	// first. Shared ones are counted for each integration that has the app.
	DirectCallers []Direct `json:"direct_callers"`
	// Findings are what else reconcile found: non_compliant_principal, verdict_differs,
	// application_partly_seen, application_not_seen, unlisted_calls.
	Findings []Finding `json:"findings"`
	// Tokens are those of the calls without MFA in the sign-in logs; nil when these say
	// nothing of the integration.
	Tokens   *Tokens   `json:"tokens,omitempty"`
	Failures []Failure `json:"sign_in_failures,omitempty"` // sign-ins that fail, without success since

	// Causes are what sign-ins show. Build puts them among those of the group.
	Causes []Cause `json:"-"`
}

// Tokens says how many tokens without MFA the sign-in logs explain.
type Tokens struct {
	Tokens   int64 `json:"tokens"`
	ByUTI    int64 `json:"by_uti"`    // proved: the log has the sign-in that gave the token
	ByTime   int64 `json:"by_time"`   // likely: one of the same app and user about then
	NotFound int64 `json:"not_found"` // issued in the time of the log, which has no sign-in for them
	Outside  int64 `json:"outside"`   // issued before the log begins or after it ends
}

// Failure is an error that sign-ins end with.
type Failure struct {
	Code  int       `json:"code"` // of AADSTS; -1 when the log does not say
	Text  string    `json:"text"`
	Fix   string    `json:"fix,omitempty"`
	Count int64     `json:"count"`
	Last  time.Time `json:"last"`
}

// Finding is something that Microsoft's records show.
type Finding struct {
	Code         string    `json:"code"`       // reconcile's
	Severity     string    `json:"severity"`   // high, medium or low
	Confidence   string    `json:"confidence"` // certain, likely or possible
	Text         string    `json:"text"`
	Fix          string    `json:"fix"`
	AppID        string    `json:"app_id,omitempty"`
	ObjectID     string    `json:"object_id,omitempty"`
	User         string    `json:"user,omitempty"`
	Calls        int       `json:"calls,omitempty"`
	NonCompliant int       `json:"non_compliant,omitempty"`
	Last         time.Time `json:"last,omitzero"`
	Integrations []string  `json:"integrations,omitempty"`
}

// Direct is an app and user that goes to Microsoft without passing the guard.
type Direct struct {
	AppID    string `json:"app_id,omitempty"`
	App      string `json:"app,omitempty"` // its name, as far as Microsoft says
	ObjectID string `json:"object_id,omitempty"`
	User     string `json:"user,omitempty"`
	Source   string `json:"source,omitempty"` // IP address, as Microsoft sees it

	Calls        int       `json:"calls"`         // that Microsoft lists or counts
	NonCompliant int       `json:"non_compliant"` // of Calls, without MFA
	SignIns      int64     `json:"sign_ins"`      // to Partner Center without MFA
	First        time.Time `json:"first,omitzero"`
	Last         time.Time `json:"last,omitzero"`
	Confidence   string    `json:"confidence"` // that it did not pass the guard: certain, likely or possible
	// SeenIn names what shows it: requests (single ones), daily (counts by day, which
	// know neither user nor address) or sign_ins.
	SeenIn []string `json:"seen_in"`
	Text   string   `json:"text"`
	Fix    string   `json:"fix"`
	Causes []Cause  `json:"causes,omitempty"` // why its sign-ins lack MFA

	Integrations []string `json:"integrations,omitempty"` // that have the app
}

// Evidence is a field of a sign-in record, by Graph's name, and its value there.
type Evidence struct {
	Field string `json:"field"`
	Value string `json:"value"`
}

const (
	// staleAfter is the age from which on Microsoft's word may no longer hold.
	staleAfter = 24 * time.Hour
	// tokenLife is how long a token may live: one for clients that know continuous
	// access evaluation 28 h. What a sign-in before that shows is of no token in use.
	tokenLife = 28 * time.Hour
)

// addMicrosoft says what Microsoft sees beside what r sees.
func (r *Report) addMicrosoft(m *Microsoft, now time.Time) {
	stale := func(t time.Time) bool { return t.Before(r.Since) || now.Sub(t) > staleAfter }
	shown := *m
	if m.Records != nil {
		records := *m.Records
		records.Stale = stale(records.Taken)
		shown.Records = &records
	}
	if m.SignIns != nil {
		signIns := *m.SignIns
		signIns.Stale = stale(signIns.Until)
		shown.SignIns = &signIns
	}
	if shown.GoingDirect == nil {
		shown.GoingDirect = []Direct{}
	}
	if shown.Principals == nil {
		shown.Principals = []Finding{}
	}
	if shown.Records != nil || shown.SignIns != nil || len(shown.Problems) > 0 {
		r.Microsoft = &shown
	}
	for i := range r.Integrations {
		g := &r.Integrations[i]
		seen := m.Integrations[g.Name]
		if seen == nil {
			continue
		}
		g.Microsoft = seen
		if g.Verdict != Ready {
			g.Causes = proved(g.Causes, seen, r.Since.Add(-tokenLife))
		}
	}
	const (
		askRecords = "partnerguard reconcile --token-command … holds Microsoft's own record of the calls against these, and finds who goes round the guard"
		askSignIns = "partnerguard signins FILE… proves causes by Entra's sign-in logs"
	)
	switch {
	case m.Records == nil && m.SignIns == nil && len(m.Problems) == 0:
		r.Notes = append(r.Notes, "Microsoft was not asked yet: "+askRecords+"; "+askSignIns+".")
	case m.Records == nil && len(m.Problems) == 0:
		r.Notes = append(r.Notes, "Microsoft's own record of the calls was not read yet: "+askRecords+".")
	case m.SignIns == nil && len(m.Problems) == 0:
		r.Notes = append(r.Notes, "Entra's sign-in logs were not read yet: "+askSignIns+".")
	}
	r.Notes = append(r.Notes, m.Problems...)
}

// proved puts what sign-ins since then show among the causes that the calls suggest:
// in place of the same cause, or before the others. Where they explain every token,
// what was only suggested goes.
func proved(suggested []Cause, seen *Seen, since time.Time) []Cause {
	var shown []Cause
	for _, c := range seen.Causes {
		if len(c.Evidence) > 0 && !c.At.Before(since) {
			shown = append(shown, c)
		}
	}
	if len(shown) == 0 {
		return suggested
	}
	certain := policy.Certain.String()
	all := seen.Tokens != nil && seen.Tokens.Tokens > 0 && seen.Tokens.ByUTI == seen.Tokens.Tokens
	for _, c := range suggested {
		i := slices.IndexFunc(shown, func(s Cause) bool { return s.Cause == c.Cause })
		switch {
		case i < 0 && (c.Confidence == certain || !all):
			shown = append(shown, c)
		case i >= 0 && c.Confidence == certain:
			shown[i].Confidence = certain
		}
	}
	rank := []string{certain, policy.Likely.String(), policy.Possible.String()}
	slices.SortStableFunc(shown, func(a, b Cause) int {
		return cmp.Compare(slices.Index(rank, a.Confidence), slices.Index(rank, b.Confidence))
	})
	return shown
}

// name is what to call the caller's application.
func (d *Direct) name() string {
	switch {
	case d.App == "":
		return clean(d.AppID)
	case d.AppID == "":
		return clean(d.App)
	}
	return clean(d.App) + " (" + clean(d.AppID) + ")"
}

// microsoft writes the estate as Microsoft sees it.
func (m *Microsoft) write(b *strings.Builder, style Style) {
	if m.Records == nil && m.SignIns == nil {
		return // the notes say why
	}
	width := style.Columns()
	b.WriteString("\n" + style.Paint(Bold, "Microsoft's view") + "\n")
	if rec := m.Records; rec != nil {
		rec.write(b, style)
	}
	if s := m.SignIns; s != nil {
		text := fmt.Sprintf("Sign-in logs: %s of interest", count(s.Kept, "sign-in"))
		if !s.Since.IsZero() {
			text += fmt.Sprintf(", %s to %s UTC", moment(s.Since), moment(s.Until))
		}
		b.WriteString(Wrap(text+".", "  ", "  ", width))
		if s.Incomplete {
			b.WriteString(Wrap("The export is incomplete: what it does not show may be there all the same.", "  "+style.Paint(Yellow, "Incomplete")+": ", "    ", width))
		}
		if s.Stale {
			b.WriteString(Wrap("The export is older than the time of this report, or than a day: partnerguard signins reads a new one.", "  "+style.Paint(Yellow, "Stale")+": ", "    ", width))
		}
	}
	var elsewhere []string
	for _, p := range m.Principals {
		if len(p.Integrations) == 0 && p.NonCompliant == 0 { // whose calls are listed goes direct
			elsewhere = append(elsewhere, clean(cmp.Or(p.User, p.ObjectID)))
		}
	}
	if n := len(elsewhere); n > 0 {
		more := ""
		if n > shown {
			elsewhere, more = elsewhere[:shown], fmt.Sprintf(" and %d more", n-shown)
		}
		b.WriteString(Wrap("Users that Microsoft calls non-compliant, and that made no call here: "+strings.Join(elsewhere, ", ")+more+". They used the portal, or go to Microsoft directly.", "  ", "  ", width))
	}
	if len(m.GoingDirect) > 0 {
		b.WriteString("\n" + style.Paint(Bold, "Going direct") + ": apps and users that never passed the guard\n")
		writeDirect(b, m.GoingDirect, style)
	}
}

func (rec *Records) write(b *strings.Builder, style Style) {
	width := style.Columns()
	line := "Microsoft's records, as of " + moment(rec.Taken) + " UTC"
	if rec.Since.IsZero() {
		line += ": no request could be judged"
	} else {
		line += fmt.Sprintf(": requests from %s to %s UTC", moment(rec.Since), moment(rec.Until))
	}
	b.WriteString(Wrap(line, "  ", "  ", width))
	t := Table{Columns: []Column{{Head: "", Left: true}, {Head: "MICROSOFT"}, {Head: "THE GUARD"}}}
	t.Row("", "requests, one by one", number(int64(rec.Requests)), number(int64(rec.Here)))
	t.Row("", "  with MFA", number(int64(rec.Compliant)), number(int64(rec.HerePresent)))
	t.Row("", "  without MFA", number(int64(rec.NonCompliant)), number(int64(rec.HereMissing)))
	if d := rec.Daily; d != nil {
		t.Row("", fmt.Sprintf("requests by day, %s", count(int64(d.Applications), "app")), number(d.Requests), "")
		t.Row("", "  with MFA", number(d.Compliant), "")
		if d.Compared > 0 {
			t.Row("", "  on whole days on record here", number(d.Compared), number(d.Here))
		}
	}
	if rec.Requests > 0 || rec.Daily != nil {
		t.Write(b, "  ", style)
	}
	if !rec.Complete {
		b.WriteString(Wrap(cmp.Or(clean(strings.Join(rec.Incomplete, "; ")), "a part is missing")+". Who does not show here may go direct all the same.",
			"  "+style.Paint(Yellow, "Incomplete")+": ", "    ", width))
	}
	if rec.Stale {
		b.WriteString(Wrap("these records are older than the time of this report, or than a day: partnerguard reconcile asks again.", "  "+style.Paint(Yellow, "Stale")+": ", "    ", width))
	}
	if rec.Complete && !rec.Stale && len(rec.Findings) == 0 {
		b.WriteString("  " + style.Paint(Green, "Nothing went round the guard, and no verdict differs.") + "\n")
	}
}

// directShown is how many callers a table lists.
const directShown = 50

// writeDirect lists callers, and for those of which sign-ins are known why they lack MFA.
func writeDirect(b *strings.Builder, all []Direct, style Style) {
	t := Table{Columns: []Column{
		{Head: "USER", Left: true, Flexible: true}, {Head: "APP", Left: true, Flexible: true}, {Head: "FROM", Left: true, Flexible: true},
		{Head: "CALLS"}, {Head: "NO\nMFA"}, {Head: "SIGN-INS\nNO MFA"}, {Head: "LAST\nSEEN", Left: true},
	}}
	listed := all[:min(len(all), directShown)]
	for i := range listed {
		d := &listed[i]
		color := Yellow
		if d.NonCompliant > 0 {
			color = Red
		}
		t.Row(color, clean(cmp.Or(d.User, d.ObjectID, "-")), cmp.Or(d.name(), "-"), clean(cmp.Or(d.Source, "-")),
			number(int64(d.Calls)), number(int64(d.NonCompliant)), number(d.SignIns), shortMoment(d.Last))
	}
	t.Write(b, "  ", style)
	if more := len(all) - len(listed); more > 0 {
		fmt.Fprintf(b, "  and %d more; --format json lists all\n", more)
	}
	var fixes []string
	for i := range listed {
		d := &listed[i]
		for _, c := range d.Causes[:min(len(d.Causes), 1)] {
			b.WriteString(Wrap(fmt.Sprintf("%s: %s (%s%s)", clean(cmp.Or(d.User, d.ObjectID)), clean(c.Text), c.Confidence, evidence(c.Evidence)), "  ", "    ", style.Columns()))
		}
		if d.Fix != "" && !slices.Contains(fixes, d.Fix) && len(fixes) < 3 {
			fixes = append(fixes, d.Fix)
		}
	}
	for _, fix := range fixes {
		b.WriteString(Wrap("Fix: "+clean(fix), "  ", "       ", style.Columns()))
	}
}

// evidence lists what a cause rests on, behind a comma.
func evidence(all []Evidence) string {
	var b strings.Builder
	for _, e := range all {
		b.WriteString(", " + clean(e.Field) + "=" + clean(e.Value))
	}
	return b.String()
}

// write says of an integration what Microsoft sees.
func (s *Seen) write(b *strings.Builder, indent string, style Style) {
	width := style.Columns()
	if s.Compliant+s.NonCompliant > 0 {
		b.WriteString(Wrap(fmt.Sprintf("Microsoft lists %s of it that passed the guard: %d with MFA, %d without.",
			count(int64(s.Compliant+s.NonCompliant), "request"), s.Compliant, s.NonCompliant), indent, indent, width))
	}
	if s.Direct > 0 {
		text := fmt.Sprintf("%s of its apps went round the guard", count(int64(s.Direct), "request"))
		if s.DirectNonCompliant > 0 {
			text += fmt.Sprintf(", %d without MFA", s.DirectNonCompliant)
		}
		b.WriteString(Wrap(text+":", indent+style.Paint(Red, "direct")+"    ", strings.Repeat(" ", 12), width))
		for i, d := range s.DirectCallers {
			if i == 3 {
				fmt.Fprintf(b, "%sand %d more callers; --format json lists all\n", strings.Repeat(" ", 12), len(s.DirectCallers)-i)
				break
			}
			who := fmt.Sprintf("%s from %s ×%d", clean(cmp.Or(d.User, d.ObjectID, "an unknown user")), clean(cmp.Or(d.Source, "an unknown address")), d.Calls)
			if d.NonCompliant > 0 {
				who += fmt.Sprintf(", %d without MFA", d.NonCompliant)
			}
			b.WriteString(Wrap(who+", last "+moment(d.Last)+" UTC, app "+d.name(), strings.Repeat(" ", 12), strings.Repeat(" ", 14), width))
		}
		if len(s.DirectCallers) > 0 {
			b.WriteString(Wrap("Fix: "+clean(s.DirectCallers[0].Fix), strings.Repeat(" ", 12), strings.Repeat(" ", 17), width))
		}
	}
	for _, f := range s.Findings {
		if f.Severity == "low" {
			continue
		}
		b.WriteString(Wrap(clean(f.Text), indent+pad(f.Severity, len("possible"))+"  ", strings.Repeat(" ", 12), width))
		b.WriteString(Wrap("Fix: "+clean(f.Fix), strings.Repeat(" ", 12), strings.Repeat(" ", 17), width))
	}
	for _, f := range s.Failures {
		label := fmt.Sprintf("AADSTS%d", f.Code)
		if f.Code < 0 {
			label = "an error that the log does not name"
		}
		b.WriteString(Wrap(fmt.Sprintf("sign-ins end with %s ×%d, last %s UTC, and no success since: %s", label, f.Count, moment(f.Last), clean(f.Text)),
			indent+style.Paint(Red, "failing")+"   ", strings.Repeat(" ", 12), width))
		if f.Fix != "" {
			b.WriteString(Wrap("Fix: "+clean(f.Fix), strings.Repeat(" ", 12), strings.Repeat(" ", 17), width))
		}
	}
}

// tells reports whether there is anything to act on.
func (s *Seen) tells() bool {
	return s != nil && (s.Direct > 0 || len(s.Failures) > 0 || slices.ContainsFunc(s.Findings, func(f Finding) bool { return f.Severity != "low" }))
}
