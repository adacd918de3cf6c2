package reconcile

import (
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strings"

	"github.com/partnerguard/partnerguard/telemetry/report"
)

// WriteSignInsJSON writes s as one JSON document.
func WriteSignInsJSON(w io.Writer, s *SignIns) error { return report.EncodeJSON(w, s, "  ") }

// strangersShown is how many strangers a table lists.
const strangersShown = 50

// WriteSignIns writes s for people: for each integration the causes with their
// evidence and the fix, then who never passed the guard.
func WriteSignIns(w io.Writer, s *SignIns, style report.Style) error {
	t := signInTable{style: style}
	strangers := int64(len(s.Strangers)) + s.MoreStrangers
	if s.Findings() {
		t.line(t.style.Paint(report.Bold, fmt.Sprintf("Sign-ins: %s, %s", countOf(int64(len(s.Integrations)), "integration to mend", "integrations to mend"),
			countOf(strangers, "caller that never passed the guard", "callers that never passed the guard"))))
	} else {
		t.line(t.style.Paint(report.Bold, "Sign-ins: nothing to mend"))
	}
	rows := fmt.Sprintf("%s of %s", countOf(s.Rows.Read, "row"), countOf(int64(len(s.Files)), "file"))
	if !s.Since.IsZero() {
		rows += fmt.Sprintf(", %s to %s UTC", minuteOf(s.Since), minuteOf(s.Until))
	}
	t.line(fmt.Sprintf("%s: %d kept, %d of other APIs, %d not understood", rows, s.Rows.Kept, s.Rows.Dropped, s.Rows.Skipped))
	if s.Incomplete {
		t.wrap("", "", t.style.Paint(report.Yellow, "The export is incomplete:")+" what is missing here may stand in the rest of it.")
	}
	for _, in := range s.Integrations {
		t.integration(&in)
	}
	if len(s.Strangers) > 0 {
		t.line("")
		t.line(t.style.Paint(report.Bold, "Never passed the guard: signs in to Partner Center without MFA, by another way or not seen yet"))
		for _, st := range s.Strangers[:min(strangersShown, len(s.Strangers))] {
			t.stranger(&st)
		}
		if more := strangers - strangersShown; more > 0 {
			t.line(fmt.Sprintf("  and %d more; --format json lists %d", more, len(s.Strangers)))
		}
	}
	if len(s.Skipped) > 0 {
		t.line("")
		t.line("Rows left out:")
		for _, r := range s.Skipped {
			t.wrap("  ", "    ", fmt.Sprintf("%s, row %d (line %d): %s", filepath.Base(signInText([]byte(r.File))), r.Row, r.Line, r.Reason))
		}
		if more := s.Rows.Skipped - int64(len(s.Skipped)); more > 0 {
			t.line(fmt.Sprintf("  and %d more", more))
		}
	}
	for i, note := range s.Notes {
		if i == 0 {
			t.line("")
		}
		t.wrap("Note: ", "      ", note)
	}
	_, err := io.WriteString(w, t.String())
	return err
}

// signInTable is the text so far.
type signInTable struct {
	strings.Builder
	style report.Style
}

func (t *signInTable) integration(in *SignInIntegration) {
	head := signInText([]byte(in.Name))
	if in.Owner != "" {
		head += ", owner " + signInText([]byte(in.Owner))
	}
	t.line("")
	t.line(t.style.Paint(report.Bold, head))
	if in.Calls > 0 {
		parts := []string{}
		for _, p := range []struct {
			n    int64
			what string
		}{
			{in.ByUTI, "in the log"}, {in.ByTime, "by app, user and time"}, {in.NotFound, "not in the log"}, {in.Outside, "outside its time"},
		} {
			if p.n > 0 {
				parts = append(parts, fmt.Sprintf("%d %s", p.n, p.what))
			}
		}
		facts := fmt.Sprintf("%s without accepted MFA, %s", countOf(in.Calls, "call"), countOf(in.Tokens, "token"))
		if parts != nil && in.Tokens > 0 {
			facts += ": " + strings.Join(parts, ", ")
		}
		t.wrap("  ", "  ", facts)
	}
	for _, c := range in.Causes {
		if c.Confidence == "possible" {
			continue
		}
		t.cause(&c)
	}
	for _, f := range in.Failures {
		label := fmt.Sprintf("AADSTS%d", f.Code)
		if f.Code < 0 {
			label = "an error that the export does not name"
		}
		t.wrap("  "+t.style.Paint(report.Red, "failing")+"   ", hang, fmt.Sprintf("%s ×%d, last %s, and no success since: %s", label, f.Count, minuteOf(f.Last), f.Text))
		t.wrap(hang, hang, "By "+named(f.Principals))
		if f.Fix != "" {
			t.wrap(hang+"Fix: ", hang+"     ", f.Fix)
		}
	}
}

const hang = "            "

func (t *signInTable) cause(c *SignInCause) {
	label := c.Confidence + strings.Repeat(" ", max(0, len("possible")-len(c.Confidence)))
	t.wrap("  "+label+"  ", hang, c.Text)
	if len(c.Evidence) > 0 {
		t.wrap(hang+"Evidence: ", hang+"          ", evidence(c.Evidence))
	}
	var facts []string
	if c.Tokens > 0 {
		facts = append(facts, countOf(c.Tokens, "token"))
	}
	switch {
	case len(c.Principals) > 0 && c.Calls > 0:
		facts = append(facts, countOf(c.Calls, "call")+" without MFA by "+named(c.Principals))
	case len(c.Principals) > 0:
		facts = append(facts, named(c.Principals))
	}
	if c.SignIn != "" {
		facts = append(facts, fmt.Sprintf("latest sign-in %s of %s", c.SignIn, minuteOf(c.At)))
	}
	if facts != nil {
		t.wrap(hang, hang, strings.Join(facts, "; "))
	}
	t.wrap(hang+"Fix: ", hang+"     ", c.Fix)
}

func (t *signInTable) stranger(s *Stranger) {
	app := s.AppID
	if s.App != "" {
		app = s.App + " (" + app + ")"
	}
	if s.FirstParty {
		app += ", Microsoft's own client"
	}
	user := s.UserID
	if s.User != "" {
		user = s.User
	}
	t.line("  " + t.style.Paint(report.Bold, user) + "  " + app)
	facts := fmt.Sprintf("%d of %s without MFA, last %s", s.SingleFactor, countOf(s.SignIns, "sign-in"), minuteOf(s.Last))
	if len(s.Addresses) > 0 {
		facts += "; from " + strings.Join(s.Addresses, ", ")
	}
	switch s.Seen {
	case "app":
		facts += "; other users of the application pass the guard"
	case "user":
		facts += "; the user passes the guard with other applications"
	case "app+user":
		facts += "; application and user pass the guard, but not together"
	}
	t.wrap("    ", "    ", facts)
	for i, c := range s.Causes {
		if i == 2 {
			break
		}
		t.wrap("    ", "    ", fmt.Sprintf("%s: %s (%s)", c.Confidence, c.Text, evidence(c.Evidence)))
		if i == 0 {
			t.wrap("    Fix: ", "         ", c.Fix)
		}
	}
}

// evidence lists the values of each field together.
func evidence(all []Evidence) string {
	var fields []string
	values := map[string][]string{}
	for _, e := range all {
		if !slices.Contains(fields, e.Field) {
			fields = append(fields, e.Field)
		}
		values[e.Field] = append(values[e.Field], e.Value)
	}
	for i, f := range fields {
		fields[i] = f + "=" + strings.Join(values[f], "|")
	}
	return strings.Join(fields, ", ")
}

// named lists who signs in.
func named(ps []Principal) string {
	var names []string
	for _, p := range ps {
		name := "app " + p.AppID
		if user := signInText([]byte(p.User)); user != "" {
			name = user + " with " + name
		} else if p.UserID != "" {
			name = "user " + p.UserID + " with " + name
		}
		names = append(names, name)
	}
	return strings.Join(names, ", ")
}

func (t *signInTable) line(s string) { t.WriteString(s + "\n") }

func (t *signInTable) wrap(first, rest, text string) {
	t.WriteString(report.Wrap(text, first, rest, t.style.Columns()))
}
