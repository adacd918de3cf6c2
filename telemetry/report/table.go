package report

import (
	"cmp"
	"slices"
	"strings"
)

// Table lays out cells in columns, for this report and for those of other rooms.
type Table struct {
	Columns []Column
	rows    []tableRow
}

// Column is one of a Table's. It is left out where every cell is empty or "-": what
// nobody has tells nothing.
type Column struct {
	Head     string // one line or two
	Left     bool   // text; numbers stand at the right
	Flexible bool   // may be cut where the width does not do
}

type tableRow struct {
	color string // of the first cell
	cells []string
}

// minFlexible is how narrow a flexible column may become.
const minFlexible = 12

// Row adds a line, the first cell of which has that colour: a code of Style.Paint, or
// none.
func (t *Table) Row(color string, cells ...string) {
	t.rows = append(t.rows, tableRow{color, cells})
}

// Len is how many rows there are.
func (t *Table) Len() int { return len(t.rows) }

// Write writes the table, each line with indent in front. What is too wide is taken
// from the widest column that is flexible.
func (t *Table) Write(b *strings.Builder, indent string, style Style) {
	var shown []int // the columns in which there is something
	widths := make([]int, len(t.Columns))
	total, lines := len(indent), 1
	for i, c := range t.Columns {
		if !slices.ContainsFunc(t.rows, func(r tableRow) bool { return cmp.Or(r.cells[i], "-") != "-" }) {
			continue
		}
		for line := range strings.SplitSeq(c.Head, "\n") {
			widths[i] = max(widths[i], columns(line))
		}
		lines = max(lines, 1+strings.Count(c.Head, "\n"))
		for _, r := range t.rows {
			widths[i] = max(widths[i], columns(r.cells[i]))
		}
		total += widths[i]
		shown = append(shown, i)
	}
	gap := 2
	if total+gap*(len(shown)-1) > style.Columns() {
		gap = 1
	}
	for over := total + gap*(len(shown)-1) - style.Columns(); over > 0; over-- {
		widest := -1
		for _, i := range shown {
			if t.Columns[i].Flexible && widths[i] > minFlexible && (widest < 0 || widths[i] > widths[widest]) {
				widest = i
			}
		}
		if widest < 0 {
			break
		}
		widths[widest]--
	}
	line := func(cell func(column int) (text, color string)) {
		var l strings.Builder
		for n, i := range shown {
			text, color := cell(i)
			if n > 0 {
				l.WriteString(strings.Repeat(" ", gap))
			}
			if text = fit(text, widths[i]); t.Columns[i].Left {
				text = pad(text, widths[i])
			} else {
				text = pad(text, -widths[i])
			}
			if color != "" {
				text = style.Paint(color, text)
			}
			l.WriteString(text)
		}
		b.WriteString(strings.TrimRight(indent+l.String(), " ") + "\n")
	}
	for n := range lines {
		line(func(i int) (string, string) {
			head := strings.Split(t.Columns[i].Head, "\n")
			if skip := lines - len(head); n >= skip { // the last line of each stands above the rows
				return head[n-skip], Bold
			}
			return "", Bold
		})
	}
	for _, r := range t.rows {
		line(func(i int) (string, string) {
			if i == shown[0] {
				return r.cells[i], r.color
			}
			return r.cells[i], ""
		})
	}
}
