package reconcile

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/partnerguard/partnerguard/telemetry/report"
)

// WriteJSON writes r as one JSON document.
func WriteJSON(w io.Writer, r *Result) error {
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	return enc.Encode(r)
}

// maxDetails is how many findings a table explains; the JSON has all.
const maxDetails = 20

// WriteTable writes r for people: whether all is clear, what Microsoft's windows
// cover, a line for each finding, and for each what to do.
func WriteTable(w io.Writer, r *Result, style report.Style) error {
	width := max(cmp.Or(style.Width, 120), 80)
	paint := func(code, text string) string {
		if !style.Color {
			return text
		}
		return "\x1b[" + code + "m" + text + "\x1b[0m"
	}
	colors := map[string]string{High: "31", Medium: "33", Low: "33"}
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
	head, color := "all clear", "32"
	switch {
	case high > 0:
		head, color = fmt.Sprintf("%s, %d high", counted(found, "finding"), high), "31"
	case found > 0:
		head, color = counted(found, "finding"), "33"
	case !r.Complete:
		head, color = "nothing found", "33"
	}
	if !r.Complete {
		head += "; incomplete"
	}
	fmt.Fprintf(&b, "Microsoft's records against ours: %s\n", paint("1;"+color, head))
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
	b.WriteString(fill(judged, "", "  ", width) + "\n")

	windows := textTable{head: []string{"MICROSOFT'S WINDOW", "STATE", "ROWS", "FROM (UTC)", "UNTIL (UTC)"}, right: 1 << 2}
	for _, win := range r.Windows {
		windows.row(win.API, win.State, strconv.Itoa(win.Rows), minute(win.From), minute(win.Until))
	}
	windows.write(&b, width, nil)

	if len(r.Integrations) > 0 {
		b.WriteByte('\n')
		t := textTable{head: []string{"VERDICT", "INTEGRATION", "OWNER", "MS: WITH MFA", "MS: NO MFA", "DIRECT", "UNLISTED"}, right: 0b1111000, flexible: 0b110}
		for _, in := range r.Integrations {
			t.row(in.Verdict.String(), in.Name, cmp.Or(in.Owner, "-"), dash(in.Compliant), dash(in.NonCompliant), dash(in.Direct), dash(in.Unlisted))
		}
		t.write(&b, width, nil)
	}
	if len(r.Findings) > 0 {
		b.WriteByte('\n')
		t := textTable{head: []string{"SEVERITY", "FINDING", "WHOSE", "USER", "SOURCE", "CALLS", "NO MFA", "LAST (UTC)"}, right: 0b1100000, flexible: 0b11100}
		for i := range r.Findings {
			f := &r.Findings[i]
			t.row(f.Severity, f.Code, dashText(whose(f)), dashText(cmp.Or(f.User, f.ObjectID)), dashText(f.Source), dash(f.Calls), dash(f.NonCompliant), minute(f.Last))
		}
		t.write(&b, width, func(line string) string {
			cell, rest, _ := strings.Cut(line, " ")
			return paint(colors[cell], cell) + " " + rest
		})
	}
	for i := range r.Findings {
		if i == maxDetails {
			fmt.Fprintf(&b, "\nThe other %d are explained by --format json.\n", len(r.Findings)-i)
			break
		}
		f := &r.Findings[i]
		fmt.Fprintf(&b, "\n%s: %s, %s\n", f.Code, paint(colors[f.Severity], f.Severity), f.Confidence)
		b.WriteString(fill(f.Text, "  ", "  ", width))
		if facts := factsOf(f); facts != "" {
			b.WriteString(fill(facts, "  ", "  ", width))
		}
		b.WriteString(fill("Fix: "+f.Fix, "  ", "       ", width))
	}
	for i, note := range r.Notes {
		if i == 0 {
			b.WriteByte('\n')
		}
		b.WriteString(fill(note, "Note: ", "      ", width))
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

// textTable lays out cells in columns. right and flexible are sets of columns, a bit
// each: those of numbers, and those that may be cut where the width does not do.
type textTable struct {
	head            []string
	right, flexible uint
	rows            [][]string
}

func (t *textTable) row(cells ...string) { t.rows = append(t.rows, cells) }

// write writes the table; paint, if any, may colour a line.
func (t *textTable) write(b *strings.Builder, width int, paint func(line string) string) {
	const gap = 2
	widths := make([]int, len(t.head))
	total := gap * (len(t.head) - 1)
	for i, h := range t.head {
		widths[i] = utf8.RuneCountInString(h)
		for _, r := range t.rows {
			widths[i] = max(widths[i], utf8.RuneCountInString(r[i]))
		}
		total += widths[i]
	}
	for ; total > width; total-- {
		widest := -1
		for i, n := range widths {
			if t.flexible&(1<<i) != 0 && n > 10 && (widest < 0 || n > widths[widest]) {
				widest = i
			}
		}
		if widest < 0 {
			break
		}
		widths[widest]--
	}
	line := func(cells []string) string {
		var l strings.Builder
		for i, text := range cells {
			if r := []rune(text); len(r) > widths[i] {
				text = string(r[:widths[i]-1]) + "…"
			}
			space := strings.Repeat(" ", widths[i]-utf8.RuneCountInString(text))
			if i > 0 {
				l.WriteString(strings.Repeat(" ", gap))
			}
			if t.right&(1<<i) != 0 {
				l.WriteString(space + text)
			} else {
				l.WriteString(text + space)
			}
		}
		return strings.TrimRight(l.String(), " ")
	}
	b.WriteString(line(t.head) + "\n")
	for _, r := range t.rows {
		text := line(r)
		if paint != nil {
			text = paint(text)
		}
		b.WriteString(text + "\n")
	}
}

// fill breaks text into lines of at most width columns, the first behind first, the
// others behind rest. Words are not cut.
func fill(text, first, rest string, width int) string {
	var b strings.Builder
	b.WriteString(first)
	at, begun := utf8.RuneCountInString(first), false
	for word := range strings.FieldsSeq(text) {
		n := utf8.RuneCountInString(word)
		switch {
		case !begun:
		case at+1+n > width:
			b.WriteString("\n" + rest)
			at = utf8.RuneCountInString(rest)
		default:
			b.WriteByte(' ')
			at++
		}
		b.WriteString(word)
		at, begun = at+n, true
	}
	b.WriteByte('\n')
	return b.String()
}
