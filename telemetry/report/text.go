package report

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// Style is how a table is laid out.
type Style struct {
	Width int  // columns of the terminal; 0 means 120, less than 80 is taken as 80
	Color bool // emphasis by ANSI escapes
}

// Columns is how wide a line may be.
func (s Style) Columns() int {
	if s.Width == 0 {
		return 120
	}
	return max(s.Width, 80)
}

// The codes of Style.Paint, which may be joined by semicolons.
const (
	Red    = "31"
	Yellow = "33"
	Green  = "32"
	Bold   = "1"
)

// Paint emphasizes text where the style has colour.
func (s Style) Paint(code, text string) string {
	if !s.Color {
		return text
	}
	return "\x1b[" + code + "m" + text + "\x1b[0m"
}

func (v Verdict) color() string {
	switch v {
	case Breaking:
		return Red
	case Ready:
		return Green
	}
	return Yellow
}

// clean makes text that came from outside fit to be shown: everything that a
// terminal would act on instead of showing it is escaped as in Go's strings.
func clean(s string) string {
	if strings.IndexFunc(s, hidden) < 0 && utf8.ValidString(s) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); {
		r, size := utf8.DecodeRuneInString(s[i:])
		switch {
		case r == utf8.RuneError && size == 1:
			fmt.Fprintf(&b, `\x%02x`, s[i])
		case hidden(r):
			q := strconv.QuoteRuneToASCII(r)
			b.WriteString(q[1 : len(q)-1])
		default:
			b.WriteRune(r)
		}
		i += size
	}
	return b.String()
}

// hidden reports whether r is none that a terminal shows: controls, format
// characters such as those that turn the reading direction, unusual spaces.
func hidden(r rune) bool { return !unicode.IsPrint(r) }

// EncodeJSON writes v and a line feed. What encoding/json leaves as it is although
// a terminal acts on it (DEL, C1 controls, bidi controls) is escaped.
func EncodeJSON(w io.Writer, v any, indent string) error {
	var buf bytes.Buffer
	enc := json.NewEncoder(&buf)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", indent)
	if err := enc.Encode(v); err != nil {
		return err
	}
	out := make([]byte, 0, buf.Len())
	for b := buf.Bytes(); len(b) > 0; {
		r, size := utf8.DecodeRune(b)
		switch {
		case r < utf8.RuneSelf && r != 0x7f || !hidden(r):
			out = append(out, b[:size]...)
		case r > 0xffff:
			r -= 0x10000
			out = fmt.Appendf(out, `\u%04x\u%04x`, 0xd800+r>>10, 0xdc00+r&0x3ff)
		default:
			out = fmt.Appendf(out, `\u%04x`, r)
		}
		b = b[size:]
	}
	_, err := w.Write(out)
	return err
}

// fit cuts s to n columns and marks the cut.
func fit(s string, n int) string {
	if utf8.RuneCountInString(s) <= n {
		return s
	}
	if n < 1 {
		return ""
	}
	return string([]rune(s)[:n-1]) + "…"
}

// pad fills s with spaces to n columns; a negative n fills at the left.
func pad(s string, n int) string {
	if n < 0 {
		return strings.Repeat(" ", max(0, -n-utf8.RuneCountInString(s))) + s
	}
	return s + strings.Repeat(" ", max(0, n-utf8.RuneCountInString(s)))
}

// Wrap breaks text into lines of at most width columns, the first behind first and
// the others behind rest. Words are not cut.
func Wrap(text, first, rest string, width int) string {
	var b strings.Builder
	b.WriteString(first)
	at, begun := columns(first), false
	for word := range strings.FieldsSeq(text) {
		n := columns(word)
		switch {
		case !begun:
		case at+1+n > width:
			b.WriteString("\n" + rest)
			at = columns(rest)
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

// columns is how many columns text takes, without the escapes of Paint.
func columns(text string) int {
	n := 0
	for len(text) > 0 {
		plain, escape, found := strings.Cut(text, "\x1b[")
		n += utf8.RuneCountInString(plain)
		if text = ""; found {
			_, text, _ = strings.Cut(escape, "m")
		}
	}
	return n
}

// moment is a time for people.
func moment(t time.Time) string {
	if t.IsZero() {
		return "never"
	}
	return t.UTC().Format("2006-01-02 15:04")
}

// shortMoment is a time for people who know the year.
func shortMoment(t time.Time) string {
	if t.IsZero() {
		return "never"
	}
	return t.UTC().Format("01-02 15:04")
}

// count is n with its noun.
func count(n int64, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return fmt.Sprintf("%d %ss", n, noun)
}
