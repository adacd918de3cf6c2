package ledger

import (
	"bufio"
	"io"
	"reflect"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/partnerguard/partnerguard/telemetry"
)

// exportColumns are the names of exportRow's columns, in order.
func exportColumns() []string {
	t := reflect.TypeFor[exportRow]()
	names := make([]string, t.NumField())
	for i := range names {
		names[i], _, _ = strings.Cut(t.Field(i).Tag.Get("parquet"), ",")
	}
	return names
}

// csvRows writes RFC 4180: a header, commas, CRLF. Lists stand in one cell, separated
// by "; ". A cell that a spreadsheet would take for a formula begins with an
// apostrophe; characters that drive a terminal stand as \u001b.
type csvRows struct {
	out *bufio.Writer
	buf []byte
}

func newCSVRows(w io.Writer) (*csvRows, error) {
	c := &csvRows{out: bufio.NewWriterSize(w, 256<<10)}
	_, err := c.out.WriteString(strings.Join(exportColumns(), ",") + "\r\n")
	return c, err
}

func (c *csvRows) write(r *exportRow) error {
	c.buf = c.buf[:0]
	c.int(r.N)
	c.int(r.OutcomeN)
	c.text(r.Call)
	c.time(r.Time)
	c.text(r.Instance)
	c.int(r.Generation)
	c.text(r.Listener)
	c.text(r.Peer)
	c.text(r.Method)
	c.text(r.Route)
	c.text(r.Path)
	c.text(strings.Join(r.QueryNames, "; "))
	c.text(r.Upstream)
	c.text(r.Integration)
	c.text(r.Evidence)
	c.text(r.Owner)
	c.text(r.Customer)
	c.text(r.Kind)
	c.bool(r.Verified)
	c.text(r.TenantID)
	c.text(r.AppID)
	c.text(r.UserRef)
	c.text(r.UTI)
	c.time(r.IssuedAt)
	c.time(r.ExpiresAt)
	c.text(strings.Join(r.AMR, "; "))
	c.text(r.MFA)
	c.text(r.Mode)
	c.text(r.Rule)
	c.text(r.Effect)
	c.text(r.Reason)
	c.bool(r.WouldReject)
	c.text(r.RequestID)
	c.text(r.CorrelationID)
	c.text(r.Application)
	c.text(r.UserAgent)
	c.int(r.Status)
	c.text(r.Rejection)
	c.text(r.Code)
	c.text(r.UpstreamStatus)
	c.bool(r.MFACompliant)
	c.text(r.UpstreamRequestID)
	c.text(r.UpstreamCorrelationID)
	c.int(r.BytesIn)
	c.int(r.BytesOut)
	c.float(r.DurationMS)
	c.float(r.UpstreamMS)
	c.int(r.Replays)
	c.text(r.Error)
	c.buf = append(c.buf[:len(c.buf)-1], "\r\n"...)
	_, err := c.out.Write(c.buf)
	return err
}

func (c *csvRows) close() error { return c.out.Flush() }

// text writes a cell. telemetry.AppendString escapes what could do harm on a screen;
// its quotes and its escapes of quotes and backslashes go again.
func (c *csvRows) text(s string) {
	if s == "" {
		c.buf = append(c.buf, ',')
		return
	}
	if needsEscape(s) {
		q := telemetry.AppendString(nil, s)
		s = unquote.Replace(string(q[1 : len(q)-1]))
	}
	formula := isFormula(s)
	if !formula && strings.IndexByte(s, ',') < 0 && strings.IndexByte(s, '"') < 0 && s[0] != ' ' {
		c.buf = append(append(c.buf, s...), ',')
		return
	}
	c.buf = append(c.buf, '"')
	if formula {
		c.buf = append(c.buf, '\'')
	}
	for i := range len(s) {
		if s[i] == '"' {
			c.buf = append(c.buf, '"')
		}
		c.buf = append(c.buf, s[i])
	}
	c.buf = append(c.buf, `",`...)
}

var unquote = strings.NewReplacer(`\"`, `"`, `\\`, `\`)

// isFormula reports whether a spreadsheet could take a cell for one. See OWASP, CSV
// Injection; the last four are the wide forms.
func isFormula(s string) bool {
	s = strings.TrimLeft(s, " ")
	r, _ := utf8.DecodeRuneInString(s)
	return s != "" && strings.ContainsRune("=+-@|%＝＋－＠", r)
}

// needsEscape reports whether s has anything but printable ASCII.
func needsEscape(s string) bool {
	for i := range len(s) {
		if s[i] < ' ' || s[i] > '~' {
			return true
		}
	}
	return false
}

func (c *csvRows) int(n int64) {
	if n != 0 {
		c.buf = strconv.AppendInt(c.buf, n, 10)
	}
	c.buf = append(c.buf, ',')
}

func (c *csvRows) float(f float64) {
	if f != 0 {
		c.buf = strconv.AppendFloat(c.buf, f, 'f', -1, 64)
	}
	c.buf = append(c.buf, ',')
}

func (c *csvRows) bool(b *bool) {
	if b != nil {
		c.buf = strconv.AppendBool(c.buf, *b)
	}
	c.buf = append(c.buf, ',')
}

func (c *csvRows) time(t time.Time) {
	switch {
	case t.IsZero():
	case t.Nanosecond() == 0:
		c.buf = t.AppendFormat(c.buf, time.RFC3339)
	default:
		c.buf = t.AppendFormat(c.buf, telemetry.TimeLayout)
	}
	c.buf = append(c.buf, ',')
}
