package report

import (
	"cmp"
	"encoding/csv"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/partnerguard/partnerguard/policy"
)

// WriteJSON writes r as one JSON document.
func WriteJSON(w io.Writer, r *Report) error { return EncodeJSON(w, r, "  ") }

// lagShown is the lag from which on a table says that numbers are missing.
const lagShown = 5 * time.Second

// WriteTable writes r for people: the estate's verdict, a line for each group, and
// for each that is not ready why and what to do.
func WriteTable(w io.Writer, r *Report, style Style) error {
	var b strings.Builder
	groups, width := r.All(), style.Columns()
	fmt.Fprintf(&b, "Estate: %s\n", style.Paint(Bold+";"+r.Verdict.color(), r.Verdict.String()))
	line := fmt.Sprintf("%s, %s to %s UTC", count(r.Calls, "call"), moment(r.Since), moment(r.Until))
	if r.Open > 0 {
		line += fmt.Sprintf(", %d not ended yet", r.Open)
	}
	b.WriteString(line + "\n")
	if lag := time.Duration(r.LagSeconds * float64(time.Second)); lag > lagShown {
		fmt.Fprintf(&b, "The store is %s behind the ledger: the latest calls are missing here.\n", lag.Round(time.Second))
	}
	if r.Microsoft != nil && r.Microsoft.Records != nil && r.Microsoft.Records.Direct > 0 {
		rec := r.Microsoft.Records
		fmt.Fprintf(&b, "%s\n", style.Paint(Red, fmt.Sprintf("%d of the %s that Microsoft lists went round the guard.", rec.Direct, count(int64(rec.Requests), "request"))))
	}
	b.WriteByte('\n')
	if len(groups) == 0 {
		b.WriteString("No calls yet. Point a client at the guard, then look again.\n")
	} else {
		table(&b, r, groups, style)
	}
	for _, g := range groups {
		if g.Verdict != Ready || len(g.Causes) > 0 || g.Microsoft.tells() {
			detail(&b, &g, r.By, style)
		}
	}
	if r.Microsoft != nil {
		r.Microsoft.write(&b, style)
	}
	for i, note := range r.Notes {
		if i == 0 {
			b.WriteByte('\n')
		}
		b.WriteString(Wrap(clean(note), "Note: ", "      ", width))
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// table writes a line for each group.
func table(b *strings.Builder, r *Report, groups []Group, style Style) {
	by := cmp.Or(r.By, ByIntegration)
	t := Table{Columns: []Column{
		{Head: "VERDICT", Left: true}, {Head: strings.ToUpper(string(by)), Left: true, Flexible: true}, {Head: "OWNER", Left: true, Flexible: true},
		{Head: "CALLS"}, {Head: "WITH\nMFA"}, {Head: "NO\nMFA"}, {Head: "APP\nONLY"}, {Head: "CANNOT\nVERIFY"}, {Head: "WOULD\nREFUSE"},
		{Head: "GUARD\nREFUSED"}, {Head: "MICROSOFT\nREFUSED"}, {Head: "WENT\nROUND"}, {Head: "LAST\nSEEN", Left: true},
	}}
	for i := range groups {
		g := &groups[i]
		owner := clean(g.Owner)
		if by != ByIntegration {
			owner = "" // it is an integration's
		}
		var direct int64
		if g.Microsoft != nil {
			direct = int64(g.Microsoft.Direct)
		}
		t.Row(g.Verdict.color(), g.Verdict.String(), title(g), owner,
			number(g.Calls), number(g.MFAPresent), number(g.MFAMissing), number(g.AppOnly), number(g.Unverifiable), number(g.WouldReject),
			number(g.Rejected), number(refusalCount(g)), number(direct), shortMoment(g.LastSeen))
	}
	t.Write(b, "", style)
}

func number(n int64) string {
	if n == 0 {
		return "-"
	}
	return strconv.FormatInt(n, 10)
}

// title is the group's name as it is shown.
func title(g *Group) string {
	if g.Claimed {
		return clean(g.Name) + " (claimed)"
	}
	return clean(g.Name)
}

// refusalCount is how many calls of the group Microsoft refused.
func refusalCount(g *Group) int64 {
	var sum int64
	for _, n := range g.Refusals {
		sum += n
	}
	return sum
}

// counted lists the keys of counts with their numbers, the greatest first.
func counted(counts map[string]int64, times, sep string) string {
	keys := slices.SortedFunc(maps.Keys(counts), func(a, b string) int {
		return cmp.Or(-cmp.Compare(counts[a], counts[b]), strings.Compare(a, b))
	})
	for i, k := range keys {
		keys[i] = clean(k) + times + strconv.FormatInt(counts[k], 10)
	}
	return strings.Join(keys, sep)
}

// detail says of a group why, and what to do.
func detail(b *strings.Builder, g *Group, by Dimension, style Style) {
	width := style.Columns()
	head := title(g) + ": " + style.Paint(g.Verdict.color(), g.Verdict.String())
	if g.Owner != "" {
		head += ", owner " + clean(g.Owner)
	}
	b.WriteString("\n" + head + "\n")
	const indent = "  "
	if g.Calls == 0 {
		b.WriteString(indent + "No calls in this time.\n")
		if g.Microsoft != nil {
			g.Microsoft.write(b, indent, style)
		}
		return
	}
	facts := []string{"reasons: " + counted(g.Reasons, " ×", ", ")}
	if len(g.Refusals) > 0 {
		facts = append(facts, "Microsoft refused: "+counted(g.Refusals, " ×", ", "))
	}
	if g.MFACompliant != (Compliance{}) {
		facts = append(facts, fmt.Sprintf("Microsoft's verdict: %d compliant, %d not", g.MFACompliant.True, g.MFACompliant.False))
	}
	if len(g.AMR) > 0 {
		facts = append(facts, "amr: "+clean(strings.Join(g.AMR, ", ")))
	}
	if len(g.Users) > 0 && by != ByUser {
		facts = append(facts, "users: "+clean(strings.Join(g.Users, ", ")))
	}
	if len(g.Apps) > 0 && by != ByApp {
		facts = append(facts, "apps: "+clean(strings.Join(g.Apps, ", ")))
	}
	if len(g.Routes) > 0 && by != ByRoute {
		first := g.Routes[:min(3, len(g.Routes))]
		var names []string
		for _, r := range first {
			names = append(names, clean(r.Route))
		}
		if more := len(g.Routes) - len(first); more > 0 {
			names = append(names, fmt.Sprintf("and %d more", more))
		}
		facts = append(facts, "routes: "+strings.Join(names, ", "))
	}
	b.WriteString(Wrap(strings.Join(facts, "; "), indent, indent, width))
	// What is merely possible is named, for the reader to look up in the JSON, unless
	// there is nothing better.
	var possible []string
	for i, c := range g.Causes {
		if i > 0 && c.Confidence == policy.Possible.String() {
			possible = append(possible, clean(c.Cause))
			continue
		}
		label := pad(c.Confidence, len("possible"))
		b.WriteString(Wrap(clean(c.Text), indent+label+"  ", strings.Repeat(" ", 12), width))
		if len(c.Evidence) > 0 {
			text := "Sign-in log: " + proofOf(c)
			if c.SignIn != "" {
				text += "; sign-in " + c.SignIn + " of " + moment(c.At) + " UTC"
			}
			b.WriteString(Wrap(clean(text), strings.Repeat(" ", 12), strings.Repeat(" ", 14), width))
		}
		b.WriteString(Wrap("Fix: "+clean(c.Fix), strings.Repeat(" ", 12), strings.Repeat(" ", 17), width))
	}
	if len(possible) > 0 {
		b.WriteString(Wrap("Possible too: "+strings.Join(possible, ", ")+".", indent, indent, width))
	}
	if g.Microsoft != nil {
		g.Microsoft.write(b, indent, style)
	}
}

// csvNames are the columns of WriteCSV. Those from proof on are Microsoft's view.
var csvNames = [...]string{
	"by", "name", "claimed", "owner", "verdict", "calls", "mfa_present", "mfa_missing", "mfa_unknown", "app_only", "unverifiable",
	"would_reject", "rejected", "open", "reasons", "refusals", "mfa_compliant_true", "mfa_compliant_false", "amr", "routes", "users", "apps",
	"first_seen", "last_seen", "cause", "confidence", "fix", "other_causes",
	"proof", "microsoft_compliant", "microsoft_non_compliant", "microsoft_unlisted", "direct", "direct_non_compliant", "direct_callers",
	"microsoft_findings", "sign_in_failures", "microsoft_taken", "microsoft_complete", "microsoft_stale",
}

// WriteCSV writes a line for each group, after a line of names, as RFC 4180 has it, and
// then one for each caller that goes to Microsoft directly and is no integration's: of
// these by is "direct". Lists stand in one cell, separated by "; ". A cell that a
// spreadsheet would take for a formula begins with an apostrophe.
func WriteCSV(w io.Writer, r *Report) error {
	out := csv.NewWriter(w)
	out.UseCRLF = true
	out.Write(csvNames[:])
	taken, complete, stale := "", "", ""
	if r.Microsoft != nil && r.Microsoft.Records != nil {
		rec := r.Microsoft.Records
		taken, complete, stale = stamp(rec.Taken), strconv.FormatBool(rec.Complete), strconv.FormatBool(rec.Stale)
	}
	n := func(n int64) string { return strconv.FormatInt(n, 10) }
	for _, g := range r.All() {
		best, others := bestCause(g.Causes)
		routes := map[string]int64{}
		for _, route := range g.Routes {
			routes[route.Route] = route.Calls
		}
		line := []string{
			string(cmp.Or(r.By, ByIntegration)), cell(g.Name), strconv.FormatBool(g.Claimed), cell(g.Owner), g.Verdict.String(),
			n(g.Calls), n(g.MFAPresent), n(g.MFAMissing), n(g.MFAUnknown), n(g.AppOnly), n(g.Unverifiable), n(g.WouldReject), n(g.Rejected), n(g.Open),
			cell(counted(g.Reasons, "=", "; ")), cell(counted(g.Refusals, "=", "; ")), n(g.MFACompliant.True), n(g.MFACompliant.False),
			cell(strings.Join(g.AMR, "; ")), cell(counted(routes, "=", "; ")), cell(strings.Join(g.Users, "; ")), cell(strings.Join(g.Apps, "; ")),
			stamp(g.FirstSeen), stamp(g.LastSeen), cell(best.Cause), best.Confidence, cell(best.Fix), cell(others), cell(proofOf(best)),
		}
		if s := g.Microsoft; s != nil {
			var callers, findings, failures []string
			for i := range s.DirectCallers {
				d := &s.DirectCallers[i]
				callers = append(callers, fmt.Sprintf("%s %s %s=%d", cmp.Or(d.User, d.ObjectID), d.AppID, d.Source, d.Calls))
			}
			for _, f := range s.Findings {
				findings = append(findings, f.Code)
			}
			for _, f := range s.Failures {
				failures = append(failures, fmt.Sprintf("AADSTS%d=%d", f.Code, f.Count))
			}
			line = append(line, n(int64(s.Compliant)), n(int64(s.NonCompliant)), n(int64(s.Unlisted)), n(int64(s.Direct)), n(int64(s.DirectNonCompliant)),
				cell(strings.Join(callers, "; ")), cell(strings.Join(findings, "; ")), cell(strings.Join(failures, "; ")), taken, complete, stale)
		}
		out.Write(append(line, make([]string, len(csvNames)-len(line))...))
	}
	if r.Microsoft != nil {
		for i := range r.Microsoft.GoingDirect {
			d := &r.Microsoft.GoingDirect[i]
			best, others := bestCause(d.Causes)
			line := make([]string, len(csvNames))
			for name, value := range map[string]string{
				"by": "direct", "name": cell(cmp.Or(d.App, d.AppID, d.User)), "verdict": Unknown.String(), "calls": "0",
				"users": cell(cmp.Or(d.User, d.ObjectID)), "apps": cell(d.AppID), "first_seen": stamp(d.First), "last_seen": stamp(d.Last),
				"cause": cell(best.Cause), "confidence": best.Confidence, "fix": cell(cmp.Or(best.Fix, d.Fix)), "other_causes": cell(others), "proof": cell(proofOf(best)),
				"direct": n(int64(d.Calls)), "direct_non_compliant": n(int64(d.NonCompliant)), "direct_callers": cell(d.Source),
				"microsoft_findings": cell(strings.Join(d.SeenIn, "; ")), "microsoft_taken": taken, "microsoft_complete": complete, "microsoft_stale": stale,
			} {
				line[slices.Index(csvNames[:], name)] = value
			}
			out.Write(line)
		}
	}
	out.Flush()
	return out.Error()
}

// bestCause is the first cause, and the others in a list.
func bestCause(causes []Cause) (best Cause, others string) {
	var list []string
	for i, c := range causes {
		if i == 0 {
			best = c
			continue
		}
		list = append(list, c.Cause+" ("+c.Confidence+")")
	}
	return best, strings.Join(list, "; ")
}

// proofOf lists the evidence of a cause.
func proofOf(c Cause) string {
	var list []string
	for _, e := range c.Evidence {
		list = append(list, e.Field+"="+e.Value)
	}
	return strings.Join(list, "; ")
}

func stamp(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format(time.RFC3339)
}

// cell is text that a spreadsheet takes for text: what it could take for a formula
// begins with an apostrophe. See OWASP, CSV Injection.
func cell(s string) string {
	s = clean(s)
	if t := strings.TrimLeft(s, " "); t != "" && strings.ContainsAny(t[:1], "=+-@|%") || strings.HasPrefix(s, "＝") || strings.HasPrefix(s, "＋") || strings.HasPrefix(s, "－") || strings.HasPrefix(s, "＠") {
		return "'" + s
	}
	return s
}
