package reconcile

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf16"
	"unicode/utf8"
)

// api is one of the Security APIs.
type api int

const (
	unknownAPI api = iota - 1
	requestsAPI
	principalsAPI
	adoptionAPI
	apis // how many there are
)

// The APIs by the last segment of their path. See
// https://learn.microsoft.com/partner-center/developer/, "Security".
var apiNames = [apis]string{"partnerRequests", "nonMfaCompliantPartnerPrincipals", "applicationmfaadoptionstatus"}

func (a api) String() string { return apiNames[a] }

// apiRow is a row of any of the APIs: which fields it has tells which API. Names are
// matched without case, and where documentation and wire differ both are read.
type apiRow struct {
	RequestID     apiText `json:"requestId"`
	CorrelationID apiText `json:"correlationId"`
	Operation     apiText `json:"operationName"`
	RequestTime   apiTime `json:"requestDateTime"`
	SourceAddress apiText `json:"sourceIpAddress"`
	Address       apiText `json:"ipAddress"`
	ObjectID      apiText `json:"objectId"`
	TenantID      apiText `json:"tenantId"`
	UPN           apiText `json:"upn"`
	AppID         apiText `json:"applicationId"`
	Compliant     apiFlag `json:"mfaCompliant"`

	LastRequest apiTime `json:"lastNonMfaCompliantRequestDateTime"`
	LastLogin   apiTime `json:"lastNonMfaCompliantLoginDateTime"`

	Day            apiTime  `json:"loginDate"`
	CompliantCount apiCount `json:"mfaCompliantRequestCount"`
	TotalCount     apiCount `json:"totalRequestCount"`
	AppName        apiText  `json:"applicationName"`
}

// api is the API that r comes from, as far as r tells.
func (r *apiRow) api() api {
	switch {
	case !r.Day.IsZero():
		return adoptionAPI
	case !r.RequestTime.IsZero():
		return requestsAPI
	case !r.LastRequest.IsZero() || !r.LastLogin.IsZero():
		return principalsAPI
	}
	return unknownAPI
}

// apiPage is one answer of an API. It may be the part of one that could be read.
type apiPage struct {
	rows    []apiRow
	total   int64    // totalCount; -1 where it is not said
	next    *apiLink // to the next page
	skipped int      // rows that tell nothing
	reasons []string
	cut     error // why the rows after these are missing
}

// apiLink leads to a further page.
type apiLink struct {
	URI     apiText `json:"uri"`
	Headers []struct {
		Key   apiText `json:"key"`
		Value apiText `json:"value"`
	} `json:"headers"`
}

const (
	// maxAnswer is more than 10,000 rows ever take.
	maxAnswer = 64 << 20
	// maxAPIRows bounds what is kept of one API, all pages together.
	maxAPIRows = 200_000
	// maxSkipReasons is how many skipped rows are named.
	maxSkipReasons = 5
	// maxCleanText bounds a text of Microsoft's, in bytes.
	maxCleanText = 256
)

// parseAnswer reads an answer: a bare array, a collection, or one row by itself, as
// PowerShell writes an array of one. A byte order mark in front is passed over, and
// UTF-16, as PowerShell saves it, is understood. Rows that cannot be read are
// skipped and named; of an answer that breaks off, the rows before that are returned.
// Either the page or the error is nil.
func parseAnswer(data []byte) (*apiPage, error) {
	data = decodeUTF(data)
	p := &apiPage{total: -1}
	dec := json.NewDecoder(bytes.NewReader(data))
	first, err := dec.Token()
	if err != nil {
		return nil, whyNotJSON(data)
	}
	switch first {
	case json.Delim('['):
		p.array(dec)
	case json.Delim('{'):
		if err := p.object(dec, data); err != nil {
			return nil, err
		}
	default:
		return nil, errors.New("it is neither a list nor a collection of rows")
	}
	if p.cut == nil && len(bytes.TrimSpace(data[dec.InputOffset():])) > 0 {
		p.cut = errors.New("there is more behind the end of the rows")
	}
	return p, nil
}

// whyNotJSON says what it is instead.
func whyNotJSON(data []byte) error {
	switch text := bytes.TrimSpace(data); {
	case len(text) == 0:
		return errors.New("it is empty")
	case text[0] == '<':
		return errors.New("it is HTML or XML, no JSON: a page to sign in, or of a proxy?")
	}
	return errors.New("it is no JSON")
}

// array reads the rows up to the end of the list.
func (p *apiPage) array(dec *json.Decoder) {
	for dec.More() {
		var raw json.RawMessage
		if err := dec.Decode(&raw); err != nil {
			p.cut = errors.New("the JSON is broken behind row " + strconv.Itoa(len(p.rows)+p.skipped))
			return
		}
		if len(p.rows) == maxAPIRows {
			p.cut = fmt.Errorf("there are more than %d rows", maxAPIRows)
			return
		}
		p.row(raw)
	}
	if _, err := dec.Token(); err != nil {
		p.cut = errors.New("it breaks off behind row " + strconv.Itoa(len(p.rows)+p.skipped))
	}
}

func (p *apiPage) row(raw json.RawMessage) {
	var r apiRow
	err := json.Unmarshal(raw, &r)
	switch {
	case err != nil:
		var bad *json.UnmarshalTypeError
		if errors.As(err, &bad) {
			err = errors.New("it is no object")
		}
	case r.api() == unknownAPI:
		err = errors.New("it has no time")
	default:
		p.rows = append(p.rows, r)
		return
	}
	p.skipped++
	if len(p.reasons) < maxSkipReasons {
		p.reasons = append(p.reasons, fmt.Sprintf("row %d: %v", len(p.rows)+p.skipped, err))
	}
}

// object reads a collection.
func (p *apiPage) object(dec *json.Decoder, data []byte) error {
	list := false
	var failure failureBody
	for dec.More() {
		key, err := dec.Token()
		if err != nil {
			p.cut = errors.New("the JSON is broken")
			break
		}
		switch name := strings.ToLower(fmt.Sprint(key)); name {
		case "items", "value":
			open, err := dec.Token()
			if err == nil && open == nil { // null: no rows
				list = true
				continue
			}
			if err != nil || open != json.Delim('[') {
				return fmt.Errorf("its %s is no list", name)
			}
			list = true
			if p.array(dec); p.cut != nil {
				return nil
			}
		default:
			var raw json.RawMessage
			if err := dec.Decode(&raw); err != nil {
				p.cut = errors.New("the JSON is broken")
				break
			}
			p.member(name, raw, &failure)
		}
		if p.cut != nil {
			break
		}
	}
	if p.cut == nil {
		if _, err := dec.Token(); err != nil {
			p.cut = errors.New("it breaks off")
		}
	}
	if list {
		return nil
	}
	var single apiRow
	switch {
	case failure.known():
		return fmt.Errorf("it is an error of Partner Center: %s", &failure)
	case p.cut != nil:
		return p.cut
	case json.Unmarshal(data[:dec.InputOffset()], &single) == nil && single.api() != unknownAPI:
		p.rows = append(p.rows, single)
		return nil
	}
	return errors.New("it has no items")
}

// member reads what stands beside the rows. What has an unexpected form counts as
// not said.
func (p *apiPage) member(name string, raw json.RawMessage, failure *failureBody) {
	switch name {
	case "totalcount":
		var n apiCount
		if json.Unmarshal(raw, &n) == nil && string(raw) != "null" {
			p.total = int64(n)
		}
	case "links":
		var links struct{ Next *apiLink }
		if json.Unmarshal(raw, &links) == nil && links.Next != nil && links.Next.URI != "" {
			p.next = links.Next
		}
	case "nextlink", "@odata.nextlink":
		var uri apiText
		if json.Unmarshal(raw, &uri) == nil && uri != "" && p.next == nil {
			p.next = &apiLink{URI: uri}
		}
	case "code", "description", "message", "statuscode", "error":
		failure.member(name, raw)
	}
}

// failureBody is an error in one of the shapes that Partner Center and the gateway
// in front of it have.
type failureBody struct{ code, message apiText }

func (f *failureBody) member(name string, raw json.RawMessage) {
	switch name {
	case "code", "statuscode":
		_ = json.Unmarshal(raw, &f.code)
	case "description", "message":
		_ = json.Unmarshal(raw, &f.message)
	case "error":
		var inner struct{ Code, Message apiText }
		if json.Unmarshal(raw, &inner) == nil {
			f.code, f.message = inner.Code, inner.Message
		}
	}
}

// parseFailure reads the body of a refusal; what it cannot read stays empty.
func parseFailure(data []byte) failureBody {
	var f failureBody
	var members map[string]json.RawMessage
	_ = json.Unmarshal(decodeUTF(data), &members)
	for name, raw := range members {
		f.member(strings.ToLower(name), raw)
	}
	return f
}

func (f *failureBody) known() bool { return f.code != "" || f.message != "" }

func (f *failureBody) String() string {
	switch {
	case f.code == "":
		return string(f.message)
	case f.message == "":
		return "code " + string(f.code)
	}
	return "code " + string(f.code) + ": " + string(f.message)
}

// decodeUTF is data in UTF-8 without a byte order mark.
func decodeUTF(data []byte) []byte {
	if rest, ok := bytes.CutPrefix(data, []byte("\ufeff")); ok {
		return rest
	}
	if len(data) < 2 {
		return data
	}
	var order binary.ByteOrder
	switch {
	case data[0] == 0xff && data[1] == 0xfe:
		order = binary.LittleEndian
	case data[0] == 0xfe && data[1] == 0xff:
		order = binary.BigEndian
	default:
		return data
	}
	units := make([]uint16, 0, len(data)/2)
	for rest := data[2:]; len(rest) >= 2; rest = rest[2:] {
		units = append(units, order.Uint16(rest))
	}
	return []byte(string(utf16.Decode(units)))
}

// apiText is a string, or a number as text, fit to be shown: see cleanText.
type apiText string

func (t *apiText) UnmarshalJSON(b []byte) error {
	var s string
	switch {
	case string(b) == "null":
		return nil
	case b[0] == '"':
		if err := json.Unmarshal(b, &s); err != nil {
			return err
		}
	case b[0] == '-' || b[0] >= '0' && b[0] <= '9':
		s = string(b)
	default:
		return errors.New("a text is neither text nor number")
	}
	*t = apiText(cleanText(strings.TrimSpace(s)))
	return nil
}

// cleanText makes text that came from outside fit to be shown: short, and what a
// terminal would act on escaped as in Go's strings.
func cleanText(s string) string {
	if len(s) > maxCleanText {
		s = strings.ToValidUTF8(s[:maxCleanText], "") + "…"
	}
	if utf8.ValidString(s) && strings.IndexFunc(s, func(r rune) bool { return !unicode.IsPrint(r) }) < 0 {
		return s
	}
	q := strconv.Quote(s)
	return strings.ReplaceAll(q[1:len(q)-1], `\"`, `"`)
}

// apiFlag is true, false or not said.
type apiFlag int8

const (
	unsaid apiFlag = iota
	saidTrue
	saidFalse
)

func (f *apiFlag) UnmarshalJSON(b []byte) error {
	switch strings.ToLower(strings.Trim(string(b), `"`)) {
	case "true", "1":
		*f = saidTrue
	case "false", "0":
		*f = saidFalse
	case "null", "":
	default:
		return errors.New("mfaCompliant is neither true nor false")
	}
	return nil
}

// apiCount is a whole number from 0, which may stand in quotes.
type apiCount int64

func (n *apiCount) UnmarshalJSON(b []byte) error {
	s := strings.Trim(string(b), `"`)
	if s == "null" || s == "" {
		return nil
	}
	v, err := strconv.ParseInt(s, 10, 64)
	if err != nil || v < 0 {
		return errors.New("a count is no whole number")
	}
	*n = apiCount(v)
	return nil
}

// apiTime is a time. Microsoft's have no zone and are taken for UTC, which nobody
// documents; Run measures it against our records.
type apiTime struct{ time.Time }

// The forms of a time, all with or without a fraction of a second.
var timeLayouts = []string{"2006-01-02T15:04:05", time.RFC3339, "2006-01-02 15:04:05", "2006-01-02 15:04:05Z07:00", time.DateOnly}

func (s *apiTime) UnmarshalJSON(b []byte) error {
	var text string
	if string(b) == "null" {
		return nil
	}
	if err := json.Unmarshal(b, &text); err != nil {
		return errors.New("a time is no text")
	}
	if text = strings.TrimSpace(text); text == "" {
		return nil
	}
	t, ok := parseAPITime(text)
	// Year one is .NET's DateTime.MinValue: never.
	switch {
	case ok && t.Year() == 1:
		return nil
	case !ok || t.Year() < 2000 || t.Year() > 2200:
		return fmt.Errorf("%q is no time", cleanText(text))
	}
	s.Time = t.UTC()
	return nil
}

func parseAPITime(s string) (time.Time, bool) {
	// PowerShell 5 writes /Date(1781043593051)/.
	if ms, ok := strings.CutPrefix(s, "/Date("); ok {
		n, err := strconv.ParseInt(strings.TrimSuffix(ms, ")/"), 10, 64)
		return time.UnixMilli(n), err == nil
	}
	for _, layout := range timeLayouts {
		if t, err := time.Parse(layout, s); err == nil {
			return t, true
		}
	}
	return time.Time{}, false
}
