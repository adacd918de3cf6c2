package reconcile

import (
	"cmp"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/partnerguard/partnerguard/telemetry/report"
)

// WriteJSON writes r as one JSON document.
func WriteJSON(w io.Writer, r *Result) error { return report.EncodeJSON(w, r, "  ") }

// maxDetails is how many findings a table explains; the JSON has all.
const maxDetails = 20

// WriteTable writes r for people: whether all is clear, what Microsoft's windows
// cover, a line for each finding, and for each what to do.
func WriteTable(w io.Writer, r *Result, style report.Style) error {
	width := style.Columns()
	colors := map[string]string{High: report.Red, Medium: report.Yellow, Low: report.Yellow}
	var b strings.Builder
	high, found := 0, 0
	for _, f := range r.Findings {
		if f.Severity == High {
			high++
		}
		if f.Code != WindowIncomplete {
			found++
		}
	}
	head, color := "all clear", report.Green
	switch {
	case high > 0:
		head, color = fmt.Sprintf("%s, %d high", counted(found, "finding"), high), report.Red
	case found > 0:
		head, color = counted(found, "finding"), report.Yellow
	case !r.Complete:
		head, color = "nothing found", report.Yellow
	}
	if !r.Complete {
		head += "; incomplete"
	}
	fmt.Fprintf(&b, "Microsoft's records against ours: %s\n", style.Paint(report.Bold+";"+color, head))
	fmt.Fprintf(&b, "%s, as of %s\n", r.Source, clock(r.Taken))
	q := r.Requests
	judged := "No request was judged"
	if !r.Since.IsZero() {
		judged = fmt.Sprintf("Judged from %s to %s", clock(r.Since), clock(r.Until))
	}
	judged += ": " + requests(q.Rows)
	for _, part := range []struct {
		n    int
		text string
	}{
		{q.Listed, "that the guard recorded"}, {q.Direct, "that it did not"}, {q.Own, "of reconcile's own"},
		{q.Outside, "outside that time"}, {q.Undecided, "undecided"},
	} {
		if part.n > 0 {
			judged += fmt.Sprintf(", %d %s", part.n, part.text)
		}
	}
	b.WriteString(report.Wrap(judged, "", "  ", width) + "\n")

	windows := report.Table{Columns: []report.Column{
		{Head: "MICROSOFT'S WINDOW", Left: true}, {Head: "STATE", Left: true}, {Head: "ROWS"}, {Head: "FROM (UTC)", Left: true}, {Head: "UNTIL (UTC)", Left: true},
	}}
	for _, win := range r.Windows {
		windows.Row("", win.API, win.State, strconv.Itoa(win.Rows), minute(win.From), minute(win.Until))
	}
	windows.Write(&b, "", style)

	if len(r.Integrations) > 0 {
		b.WriteByte('\n')
		t := report.Table{Columns: []report.Column{
			{Head: "VERDICT", Left: true}, {Head: "INTEGRATION", Left: true, Flexible: true}, {Head: "OWNER", Left: true, Flexible: true},
			{Head: "MS:\nWITH MFA"}, {Head: "MS:\nNO MFA"}, {Head: "DIRECT"}, {Head: "UNLISTED"},
		}}
		for _, in := range r.Integrations {
			t.Row("", in.Verdict.String(), in.Name, in.Owner, dash(in.Compliant), dash(in.NonCompliant), dash(in.Direct), dash(in.Unlisted))
		}
		t.Write(&b, "", style)
	}
	if len(r.Findings) > 0 {
		b.WriteByte('\n')
		t := report.Table{Columns: []report.Column{
			{Head: "SEVERITY", Left: true}, {Head: "FINDING", Left: true}, {Head: "WHOSE", Left: true, Flexible: true}, {Head: "USER", Left: true, Flexible: true},
			{Head: "SOURCE", Left: true, Flexible: true}, {Head: "CALLS"}, {Head: "NO\nMFA"}, {Head: "LAST (UTC)", Left: true},
		}}
		for i := range r.Findings {
			f := &r.Findings[i]
			t.Row(colors[f.Severity], f.Severity, f.Code, dashText(whose(f)), dashText(cmp.Or(f.User, f.ObjectID)), dashText(f.Source), dash(f.Calls), dash(f.NonCompliant), minute(f.Last))
		}
		t.Write(&b, "", style)
	}
	for i := range r.Findings {
		if i == maxDetails {
			fmt.Fprintf(&b, "\nThe other %d are explained by --format json.\n", len(r.Findings)-i)
			break
		}
		f := &r.Findings[i]
		fmt.Fprintf(&b, "\n%s: %s, %s\n", f.Code, style.Paint(colors[f.Severity], f.Severity), f.Confidence)
		b.WriteString(report.Wrap(f.Text, "  ", "  ", width))
		if facts := factsOf(f); facts != "" {
			b.WriteString(report.Wrap(facts, "  ", "  ", width))
		}
		b.WriteString(report.Wrap("Fix: "+f.Fix, "  ", "       ", width))
	}
	for i, note := range r.Notes {
		if i == 0 {
			b.WriteByte('\n')
		}
		b.WriteString(report.Wrap(note, "Note: ", "      ", width))
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// whose is the integrations of f, else its app.
func whose(f *Finding) string {
	if len(f.Integrations) > 0 {
		return namesOf(f.Integrations)
	}
	return cmp.Or(f.App, f.AppID)
}

func factsOf(f *Finding) string {
	var facts []string
	fact := func(name, value string) {
		if value != "" {
			facts = append(facts, name+" "+value)
		}
	}
	fact("app", strings.TrimSpace(f.AppID+" "+f.App))
	fact("user", strings.TrimSpace(f.User+" "+f.ObjectID))
	fact("from", f.Source)
	if !f.First.IsZero() {
		fact("first", clock(f.First))
	}
	fact("amr", f.AMR)
	fact("operations", strings.Join(f.Operations, ", "))
	fact("request ids", strings.Join(f.RequestID, ", "))
	fact("calls", strings.Join(f.CallIDs, ", "))
	for _, u := range f.Integrations {
		if u.Owner != "" {
			fact("owner of "+u.Name, u.Owner)
		}
	}
	return strings.Join(append(facts, f.Reasons...), "; ")
}

func dash(n int) string {
	if n == 0 {
		return "-"
	}
	return strconv.Itoa(n)
}

func dashText(s string) string { return cmp.Or(s, "-") }

func minute(t time.Time) string {
	if t.IsZero() {
		return "-"
	}
	return t.UTC().Format("2006-01-02 15:04")
}
