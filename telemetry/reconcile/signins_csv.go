package reconcile

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strings"
)

// csvRows reads the portal's CSV. encoding/csv would read on to the end of the file
// for a quote that is not closed; this gives such a row up.
type csvRows struct {
	lookahead
	sep     byte
	columns []int    // the field of each column, or -1
	cells   [][]byte // of the row
}

// newCSVRows reads the header: it finds out the separator, and which column is
// what. Names are compared without spaces, case and punctuation.
func newCSVRows(in io.Reader) (*csvRows, error) {
	c := &csvRows{lookahead: newLookahead(in)}
	for range 2 {
		for bytes.IndexByte(c.rest(), '\n') < 0 && c.more() {
		}
		header, _, _ := bytes.Cut(c.rest(), []byte{'\n'})
		// Excel writes the separator into a line of its own.
		if s := bytes.TrimRight(header, "\r"); len(s) == 5 && bytes.HasPrefix(s, []byte("sep=")) {
			c.pos = min(c.pos+len(header)+1, c.end)
			continue
		}
		for _, sep := range []byte{',', ';', '\t'} {
			if c.sep == 0 || bytes.Count(header, []byte{sep}) > bytes.Count(header, []byte{c.sep}) {
				c.sep = sep
			}
		}
		break
	}
	if err := c.record(); err != nil {
		return nil, errors.New("it has no header")
	}
	names, found := fieldNames(), map[signInField]bool{}
	for _, cell := range c.cells {
		f, ok := names[plainName(string(cell))]
		if !ok || f >= fieldDetails {
			c.columns = append(c.columns, -1)
			continue
		}
		c.columns = append(c.columns, int(f))
		found[f] = true
	}
	var missing []string
	for _, need := range []struct {
		is   bool
		name string
	}{
		{found[fieldCreated], "Date (UTC)"},
		{found[fieldApp], "Application ID"},
		{found[fieldResource] || found[fieldResourceName], "Resource ID"},
	} {
		if !need.is {
			missing = append(missing, need.name)
		}
	}
	switch {
	case len(found) == 0:
		return nil, fmt.Errorf("it is no sign-in export: its first line, %q, names no column of one", signInText(c.cells[0]))
	case missing != nil:
		return nil, fmt.Errorf("its header has no column %s", strings.Join(missing, ", "))
	}
	return c, nil
}

func (c *csvRows) next(r *exportRow) error {
	for {
		if c.pos == c.end && !c.more() {
			if err := c.err; err != nil {
				c.err = nil
				if !errors.Is(err, io.ErrUnexpectedEOF) {
					return err
				}
				return &rowError{reason: "the file ends before this row", line: c.line(), last: true}
			}
			return io.EOF
		}
		line := c.line()
		err := c.record()
		// A row that is wrong where the file ends without a line feed was cut off.
		atEnd := c.eof && c.pos == c.end && (c.end == 0 || c.buf[c.end-1] != '\n')
		switch {
		case errors.Is(err, errShort) || errors.Is(err, errQuote) && atEnd:
			err := c.cut(line)
			c.err = nil
			return err
		case err != nil:
			return &rowError{reason: err.Error(), line: line}
		case len(c.cells) == 1 && len(bytes.TrimSpace(c.cells[0])) == 0:
			continue
		case len(c.cells) < len(c.columns) && atEnd:
			return c.cut(line)
		case len(c.cells) != len(c.columns):
			return &rowError{reason: fmt.Sprintf("it has %d columns, the header %d", len(c.cells), len(c.columns)), line: line}
		}
		*r = exportRow{}
		for i, f := range c.columns {
			// A column may stand there twice; one of the two is empty.
			if f >= 0 && len(r.value[f]) == 0 {
				r.value[f] = bytes.TrimSpace(c.cells[i])
			}
		}
		// The portal protects what a spreadsheet would take for a formula.
		r.value[fieldUTI] = bytes.TrimPrefix(r.value[fieldUTI], []byte{'\''})
		return nil
	}
}

var (
	errQuote = errors.New("a quote in it is not closed")
	errLong  = errors.New("it has more than 1 MiB")
)

// record reads the cells of a row and goes behind it. The error is errShort when the
// stream broke inside the row.
func (c *csvRows) record() error {
	for {
		n, err := c.split(c.rest())
		switch {
		case err == nil:
			c.pos += n
			return nil
		case errors.Is(err, errShort) && (c.more() || c.eof && c.err == nil):
			continue // with more, or knowing that there is no more
		case errors.Is(err, errShort) && c.eof:
			c.pos = c.end
			return err
		case errors.Is(err, errShort):
			err = errLong
		}
		// A quote that is open at the end of the file, or for too long, was none: the
		// next line is a row again.
		c.nextLine()
		return err
	}
}

// split cuts the row at the beginning of b into c.cells and returns its length.
func (c *csvRows) split(b []byte) (int, error) {
	end := c.eof && c.err == nil // b ends where the file does
	c.cells = c.cells[:0]
	for i := 0; ; {
		var cell []byte
		if i < len(b) && b[i] == '"' {
			begin, doubled := i+1, false
			for i = begin; ; i += 2 {
				n := bytes.IndexByte(b[i:], '"')
				switch {
				case n < 0 && (end || len(b) >= maxRecord):
					return 0, errQuote
				case n < 0:
					return 0, errShort
				}
				i += n
				if i+1 == len(b) && !end {
					return 0, errShort
				}
				if i+1 == len(b) || b[i+1] != '"' {
					break
				}
				doubled = true
			}
			cell = b[begin:i]
			if i++; doubled {
				cell = bytes.ReplaceAll(cell, []byte(`""`), []byte(`"`))
			}
			for i < len(b) && b[i] != c.sep && b[i] != '\n' {
				i++
			}
		} else {
			begin := i
			for i < len(b) && b[i] != c.sep && b[i] != '\n' {
				i++
			}
			cell = b[begin:i]
		}
		if i == len(b) && !end {
			return 0, errShort
		}
		c.cells = append(c.cells, cell)
		if i == len(b) {
			return i, nil
		}
		if i++; b[i-1] == '\n' {
			return i, nil
		}
	}
}
