package reconcile

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"strings"
	"unicode/utf8"
)

// maxRecord is how long a row of an export may be. Graph's are some KiB; the bound
// keeps a damaged file, where a row seems never to end, from filling the memory.
const maxRecord = 1 << 20

// signInField is a property of a sign-in that is looked at, whatever an export calls it.
type signInField uint8

const (
	fieldID signInField = iota
	fieldCreated
	fieldApp
	fieldAppName
	fieldResource
	fieldResourceName
	fieldResourceTenant
	fieldUser
	fieldUPN
	fieldUserType
	fieldHomeTenant
	fieldRequirement
	fieldProtocol
	fieldTransfer
	fieldIncoming
	fieldAccess // conditionalAccessStatus
	fieldInteractive
	fieldIP
	fieldUTI
	fieldIssuerType
	fieldError     // the error code by itself (CSV)
	fieldFailure   // its text (CSV)
	fieldMFAResult // CSV
	fieldStatus    // an object in JSON, a word in CSV
	fieldDetails   // from here on JSON only: authenticationDetails
	fieldNetwork   // networkLocationDetails
	fieldPolicies  // appliedConditionalAccessPolicies
	fieldCount
)

// fieldNames are the names of the fields in Graph's JSON, which the portal's JSON
// shares, and in the portal's CSV: letters and digits only, in lower case.
func fieldNames() map[string]signInField {
	return map[string]signInField{
		"id": fieldID, "requestid": fieldID,
		"createddatetime": fieldCreated, "dateutc": fieldCreated,
		"appid": fieldApp, "applicationid": fieldApp,
		"appdisplayname": fieldAppName, "application": fieldAppName,
		"resourceid":          fieldResource,
		"resourcedisplayname": fieldResourceName, "resource": fieldResourceName,
		"resourcetenantid":  fieldResourceTenant,
		"userid":            fieldUser,
		"userprincipalname": fieldUPN, "username": fieldUPN,
		"usertype":                  fieldUserType,
		"hometenantid":              fieldHomeTenant,
		"authenticationrequirement": fieldRequirement,
		"authenticationprotocol":    fieldProtocol,
		"originaltransfermethod":    fieldTransfer,
		"incomingtokentype":         fieldIncoming,
		"conditionalaccessstatus":   fieldAccess, "conditionalaccess": fieldAccess,
		"isinteractive":                    fieldInteractive,
		"ipaddress":                        fieldIP,
		"uniquetokenidentifier":            fieldUTI,
		"tokenissuertype":                  fieldIssuerType,
		"signinerrorcode":                  fieldError,
		"failurereason":                    fieldFailure,
		"multifactorauthenticationresult":  fieldMFAResult,
		"status":                           fieldStatus,
		"authenticationdetails":            fieldDetails,
		"networklocationdetails":           fieldNetwork,
		"appliedconditionalaccesspolicies": fieldPolicies,
	}
}

// exportRow is a sign-in as the export has it. It is good until the next one is read.
type exportRow struct {
	json  bool // values are JSON
	value [fieldCount][]byte
}

// exportReader reads an export row by row. next returns io.EOF after the last one, and a
// *rowError for a row that cannot be used; the next call goes on behind it.
type exportReader interface {
	next(*exportRow) error
}

// rowError says why a row is left out.
type rowError struct {
	reason string
	line   int64 // in the file, from 1
	last   bool  // nothing behind it can be read
}

func (e *rowError) Error() string { return e.reason }

// InputError says that a file is no sign-in export, or not one that this program
// can read.
type InputError struct {
	Name    string // of the file
	Problem string
	hint    string
	err     error
}

func (e *InputError) Error() string { return fmt.Sprintf("read %s: %s", e.Name, e.Problem) }
func (e *InputError) Unwrap() error { return e.err }

// Hint says what to do.
func (e *InputError) Hint() string { return e.hint }

const exportHint = "download the sign-in logs as JSON or CSV from the Entra admin center, or fetch /auditLogs/signIns from Graph"

// lookahead is the part of a stream that is looked at, without copying.
type lookahead struct {
	in       io.Reader
	buf      []byte
	pos, end int // of what is not read yet
	eof      bool
	err      error // that ended the stream, if not io.EOF
	counted  int   // up to where in buf the lines are counted
	lines    int64 // line feeds before counted
}

func newLookahead(in io.Reader) lookahead { return lookahead{in: in, buf: make([]byte, 256<<10)} }

// rest is what is not read yet, as far as it is there.
func (w *lookahead) rest() []byte { return w.buf[w.pos:w.end] }

// more adds to rest what comes. It returns false at the end of the stream, and when
// rest has maxRecord bytes already.
func (w *lookahead) more() bool {
	if w.eof {
		return false
	}
	if w.pos > 0 {
		w.line()
		w.counted -= w.pos
		copy(w.buf, w.buf[w.pos:w.end])
		w.pos, w.end = 0, w.end-w.pos
	}
	if w.end == len(w.buf) {
		if len(w.buf) >= maxRecord {
			return false
		}
		w.buf = append(w.buf, make([]byte, len(w.buf))...)
	}
	for range 100 { // as bufio.Reader has it
		n, err := w.in.Read(w.buf[w.end:])
		w.end += n
		if err != nil {
			w.eof = true
			if !errors.Is(err, io.EOF) {
				w.err = err
			}
		}
		if n > 0 || w.eof {
			return n > 0
		}
	}
	w.eof, w.err = true, io.ErrNoProgress
	return false
}

// line is the number of the line at pos, from 1.
func (w *lookahead) line() int64 {
	if w.counted < w.pos {
		w.lines += int64(bytes.Count(w.buf[w.counted:w.pos], []byte{'\n'}))
		w.counted = w.pos
	}
	return w.lines + 1
}

// nextLine goes to the beginning of the next line. It returns false at the end.
func (w *lookahead) nextLine() bool {
	for {
		if i := bytes.IndexByte(w.rest(), '\n'); i >= 0 {
			w.pos += i + 1
			return w.pos < w.end || w.more()
		}
		if w.pos = w.end; !w.more() {
			return false
		}
	}
}

// cut returns the error that stands for the end of a stream inside a row.
func (w *lookahead) cut(line int64) error {
	if w.err != nil && !errors.Is(w.err, io.ErrUnexpectedEOF) {
		return w.err
	}
	return &rowError{reason: "the file ends inside this row", line: line, last: true}
}

// openRows finds out what in is and returns a reader of its rows. stop ends what it
// started and returns once that has ended.
func openRows(name string, in io.Reader) (_ exportReader, format string, stop func(), err error) {
	stop = func() {}
	bad := func(problem, hint string, err error) (exportReader, string, func(), error) {
		stop()
		return nil, "", nil, &InputError{name, problem, hint, err}
	}
	buffered := bufio.NewReaderSize(in, 64<<10)
	if magic, _ := buffered.Peek(2); string(magic) == "\x1f\x8b" {
		gz, err := gzip.NewReader(buffered)
		if err != nil {
			return bad("it is no whole gzip file: "+err.Error(), "fetch it again", err)
		}
		// Decompression takes about as long as reading: let both run.
		from, to := io.Pipe()
		done := make(chan struct{})
		go func() {
			defer close(done)
			_, err := io.CopyBuffer(to, struct{ io.Reader }{gz}, make([]byte, 256<<10))
			to.CloseWithError(err)
		}()
		stop = func() { from.Close(); <-done }
		format, buffered = "gzip ", bufio.NewReaderSize(from, 64<<10)
	}
	head, err := buffered.Peek(4 << 10)
	if len(head) == 0 {
		switch {
		case errors.Is(err, io.EOF):
			return bad("it is empty", exportHint, nil)
		case errors.Is(err, io.ErrUnexpectedEOF):
			return bad("the gzip file ends before its first row", "fetch it again", err)
		}
		return bad(err.Error(), "see whether the file can be read, and fetch it again if it is damaged", err)
	}
	if rest, ok := bytes.CutPrefix(head, []byte("\ufeff")); ok {
		buffered.Discard(len(head) - len(rest))
		head = rest
	}
	text := bytes.TrimLeft(head, " \t\r\n\x1e")
	begins := func(s string) bool { return bytes.HasPrefix(head, []byte(s)) }
	switch {
	case begins("\xff\xfe") || begins("\xfe\xff"):
		return bad("it is in UTF-16", "save it as UTF-8: PowerShell's Out-File and Set-Content do so with -Encoding utf8", nil)
	case begins("PK\x03\x04"):
		return bad("it is a zip archive, or a workbook of Excel", "unpack it, or save the sheet as CSV", nil)
	case begins("\x1f\x8b"):
		return bad("it is compressed twice", "unpack it once: gunzip", nil)
	case bytes.IndexByte(head, 0) >= 0 || !validText(head):
		return bad("it is no text", exportHint, nil)
	case bytes.HasPrefix(text, []byte("<")):
		return bad("it is a web page or XML, perhaps the page of a sign-in that was asked for", exportHint, nil)
	case len(text) == 0 && len(head) < 4<<10:
		return bad("it is empty", exportHint, nil)
	case bytes.HasPrefix(text, []byte("{")) || bytes.HasPrefix(text, []byte("[")):
		return newJSONRows(buffered), format + "JSON", stop, nil
	}
	c, err := newCSVRows(buffered)
	if err != nil {
		return bad(err.Error(), "set the language of the Entra admin center to English before the download, or download JSON, whose names are the same in every language", err)
	}
	return c, format + "CSV", stop, nil
}

// validText reports whether head, which may end inside a character, is UTF-8.
func validText(head []byte) bool {
	for range utf8.UTFMax {
		if utf8.Valid(head) {
			return true
		}
		head = head[:len(head)-1]
	}
	return false
}

// plainName is a name as fieldNames has it.
func plainName(name string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case 'A' <= r && r <= 'Z':
			return r + 'a' - 'A'
		case 'a' <= r && r <= 'z' || '0' <= r && r <= '9' || r >= utf8.RuneSelf:
			return r
		}
		return -1
	}, name)
}
