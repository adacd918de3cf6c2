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
	"unicode/utf8"

	"github.com/partnerguard/partnerguard/policy"
)

// WriteJSON writes r as one JSON document.
func WriteJSON(w io.Writer, r *Report) error { return encodeJSON(w, r, "  ") }

// lagShown is the lag from which on a table says that numbers are missing.
const lagShown = 5 * time.Second

// WriteTable writes r for people: the estate's verdict, a line for each group, and
// for each that is not ready why and what to do.
func WriteTable(w io.Writer, r *Report, style Style) error {
	var b strings.Builder
	groups, width := r.All(), style.width()
	fmt.Fprintf(&b, "Estate: %s\n", style.paint(bold+";"+r.Verdict.color(), r.Verdict.String()))
	line := fmt.Sprintf("%s, %s to %s UTC", count(r.Calls, "call"), moment(r.Since), moment(r.Until))
	if r.Open > 0 {
		line += fmt.Sprintf(", %d not ended yet", r.Open)
	}
	b.WriteString(line + "\n")
	if lag := time.Duration(r.LagSeconds * float64(time.Second)); lag > lagShown {
		fmt.Fprintf(&b, "The store is %s behind the ledger: the latest calls are missing here.\n", lag.Round(time.Second))
	}
	b.WriteByte('\n')
	if len(groups) == 0 {
		b.WriteString("No calls yet. Point a client at the guard, then look again.\n")
	} else {
		table(&b, r, groups, style)
	}
	for _, g := range groups {
		if g.Verdict != Ready || len(g.Causes) > 0 {
			detail(&b, &g, r.By, style)
		}
	}
	for i, note := range r.Notes {
		if i == 0 {
			b.WriteByte('\n')
		}
		b.WriteString(wrap(clean(note), "Note: ", "      ", width))
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// column is one of a table's.
type column struct {
	head     string // one or two words, the second in a line of its own
	left     bool   // text; numbers stand at the right
	flexible bool   // may be cut
	of       func(*Group) string
	width    int
}

// minFlexible is how narrow a name may become.
const minFlexible = 12

// table writes a line for each group.
func table(b *strings.Builder, r *Report, groups []Group, style Style) {
	by := cmp.Or(r.By, ByIntegration)
	columns := []column{
		{head: "VERDICT", left: true, of: func(g *Group) string { return g.Verdict.String() }},
		{head: strings.ToUpper(string(by)), left: true, flexible: true, of: title},
		{head: "OWNER", left: true, flexible: true, of: func(g *Group) string { return clean(g.Owner) }},
		{head: "CALLS", of: func(g *Group) string { return number(g.Calls) }},
		{head: "WITH MFA", of: func(g *Group) string { return number(g.MFAPresent) }},
		{head: "NO MFA", of: func(g *Group) string { return number(g.MFAMissing) }},
		{head: "APP ONLY", of: func(g *Group) string { return number(g.AppOnly) }},
		{head: "CANNOT VERIFY", of: func(g *Group) string { return number(g.Unverifiable) }},
		{head: "WOULD REFUSE", of: func(g *Group) string { return number(g.WouldReject) }},
		{head: "GUARD REFUSED", of: func(g *Group) string { return number(g.Rejected) }},
		{head: "MICROSOFT REFUSED", of: func(g *Group) string { return number(refusalCount(g)) }},
		{head: "LAST SEEN", left: true, of: func(g *Group) string {
			if g.LastSeen.IsZero() {
				return "never"
			}
			return g.LastSeen.UTC().Format("01-02 15:04")
		}},
	}
	columns = slices.DeleteFunc(columns, func(c column) bool {
		// What nobody has tells nothing; the owner is an integration's.
		empty := !slices.ContainsFunc(groups, func(g Group) bool { return c.of(&g) != "-" })
		return empty || c.head == "OWNER" && by != ByIntegration
	})
	total := 0
	for i := range columns {
		c := &columns[i]
		for word := range strings.FieldsSeq(c.head) {
			c.width = max(c.width, utf8.RuneCountInString(word))
		}
		for _, g := range groups {
			c.width = max(c.width, utf8.RuneCountInString(c.of(&g)))
		}
		total += c.width
	}
	gap := 2
	if total+gap*(len(columns)-1) > style.width() {
		gap = 1
	}
	// What is still too wide is taken from the widest name, owner or list of codes.
	for over := total + gap*(len(columns)-1) - style.width(); over > 0; over-- {
		var widest *column
		for i := range columns {
			if c := &columns[i]; c.flexible && c.width > minFlexible && (widest == nil || c.width > widest.width) {
				widest = c
			}
		}
		if widest == nil {
			break
		}
		widest.width--
	}
	row := func(paint string, cell func(*column) string) {
		var line strings.Builder
		for i := range columns {
			c := &columns[i]
			text := fit(cell(c), c.width)
			if c.left {
				text = pad(text, c.width)
			} else {
				text = pad(text, -c.width)
			}
			if paint != "" && (paint == bold || i == 0) {
				text = style.paint(paint, text)
			}
			if i > 0 {
				line.WriteString(strings.Repeat(" ", gap))
			}
			line.WriteString(text)
		}
		b.WriteString(strings.TrimRight(line.String(), " ") + "\n")
	}
	row(bold, func(c *column) string {
		first, _, two := strings.Cut(c.head, " ")
		if !two {
			return ""
		}
		return first
	})
	row(bold, func(c *column) string { return c.head[strings.IndexByte(c.head, ' ')+1:] })
	for _, g := range groups {
		row(g.Verdict.color(), func(c *column) string { return c.of(&g) })
	}
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
	width := style.width()
	head := title(g) + ": " + style.paint(g.Verdict.color(), g.Verdict.String())
	if g.Owner != "" {
		head += ", owner " + clean(g.Owner)
	}
	b.WriteString("\n" + head + "\n")
	if g.Calls == 0 {
		b.WriteString("  No calls in this time.\n")
		return
	}
	const indent = "  "
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
	b.WriteString(wrap(strings.Join(facts, "; "), indent, indent, width))
	// What is merely possible is named, for the reader to look up in the JSON, unless
	// there is nothing better.
	var possible []string
	for i, c := range g.Causes {
		if i > 0 && c.Confidence == policy.Possible.String() {
			possible = append(possible, clean(c.Cause))
			continue
		}
		label := pad(c.Confidence, len("possible"))
		b.WriteString(wrap(clean(c.Text), indent+label+"  ", strings.Repeat(" ", 12), width))
		b.WriteString(wrap("Fix: "+clean(c.Fix), strings.Repeat(" ", 12), strings.Repeat(" ", 17), width))
	}
	if len(possible) > 0 {
		b.WriteString(wrap("Possible too: "+strings.Join(possible, ", ")+".", indent, indent, width))
	}
}

// WriteCSV writes a line for each group, after a line of names, as RFC 4180 has it.
// Lists stand in one cell, separated by "; ". A cell that a spreadsheet would take
// for a formula begins with an apostrophe.
func WriteCSV(w io.Writer, r *Report) error {
	out := csv.NewWriter(w)
	out.UseCRLF = true
	out.Write([]string{
		"by", "name", "claimed", "owner", "verdict", "calls", "mfa_present", "mfa_missing", "mfa_unknown", "app_only", "unverifiable",
		"would_reject", "rejected", "open", "reasons", "refusals", "mfa_compliant_true", "mfa_compliant_false", "amr", "routes", "users", "apps",
		"first_seen", "last_seen", "cause", "confidence", "fix", "other_causes",
	})
	for _, g := range r.All() {
		var best Cause
		var others []string
		for i, c := range g.Causes {
			if i == 0 {
				best = c
				continue
			}
			others = append(others, c.Cause+" ("+c.Confidence+")")
		}
		routes := map[string]int64{}
		for _, route := range g.Routes {
			routes[route.Route] = route.Calls
		}
		n := func(n int64) string { return strconv.FormatInt(n, 10) }
		out.Write([]string{
			string(cmp.Or(r.By, ByIntegration)), cell(g.Name), strconv.FormatBool(g.Claimed), cell(g.Owner), g.Verdict.String(),
			n(g.Calls), n(g.MFAPresent), n(g.MFAMissing), n(g.MFAUnknown), n(g.AppOnly), n(g.Unverifiable), n(g.WouldReject), n(g.Rejected), n(g.Open),
			cell(counted(g.Reasons, "=", "; ")), cell(counted(g.Refusals, "=", "; ")), n(g.MFACompliant.True), n(g.MFACompliant.False),
			cell(strings.Join(g.AMR, "; ")), cell(counted(routes, "=", "; ")), cell(strings.Join(g.Users, "; ")), cell(strings.Join(g.Apps, "; ")),
			stamp(g.FirstSeen), stamp(g.LastSeen), cell(best.Cause), best.Confidence, cell(best.Fix), cell(strings.Join(others, "; ")),
		})
	}
	out.Flush()
	return out.Error()
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
