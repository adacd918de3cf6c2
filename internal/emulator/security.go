package emulator

import (
	"cmp"
	"encoding/base64"
	"fmt"
	"hash/fnv"
	"maps"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"
)

// Security is how the three Security APIs (partnerRequests,
// applicationmfaadoptionstatus, nonMfaCompliantPartnerPrincipals) tell of the traffic
// that reached Partner Center. The zero value tells of it as Microsoft documents it;
// the fields add what has been met or must be reckoned with.
type Security struct {
	Bare          bool // the two collections are bare arrays
	Wrapped       bool // the adoption status is the collection that the swagger declares
	BOM           bool // a byte order mark in front
	Alternate     bool // IpAddress and LastNonMfaCompliantLoginDateTime, as the property tables have it
	NoCorrelation bool // correlationId is empty
	NoRequestID   bool // requestId is empty
	NoTotal       bool // totalCount is left out

	// TimeLayout is that of times of day. Empty is the original's, without a zone.
	TimeLayout string
	// Skew is added to every time.
	Skew time.Duration
	// Delay is how long it takes until a call is listed.
	Delay time.Duration

	// PageSize is how many rows an answer has, further ones being linked. Zero means
	// all of them, without links.
	PageSize int
	// Links is how links.next is written.
	Links LinkStyle

	Duplicates bool // every second row stands there twice
	Shuffle    bool // rows stand in no order
	Broken     bool // rows that nobody can read stand among the others

	// Unauthorized and Throttled are how many of the next requests get 401, and after
	// them 429 with RetryAfter ("1" when it is empty).
	Unauthorized int
	Throttled    int
	RetryAfter   string
	// Status is what one of the APIs, by the last segment of its path, answers
	// instead.
	Status map[string]int
}

// LinkStyle is how the URI of a link to the next page is written. All of these stand
// in documented samples of other collections.
type LinkStyle int

// The styles of a link.
const (
	LinkRelative LinkStyle = iota // /partnerRequests?…, without the version
	LinkVersion                   // /v1/partnerRequests?…
	LinkNoSlash                   // partnerRequests?…
	LinkAbsolute                  // the listener's own base URL in front
	LinkForeign                   // another host: nobody may take a token there
)

// SecurityCall is Partner Center's own note on one call of a user.
type SecurityCall struct {
	Time                     time.Time
	RequestID, CorrelationID string
	Operation                string // Get /v{version}/customers/{customer_id}
	Source                   string // IP address
	ObjectID, Tenant, UPN    string
	AppID                    string
	Compliant                bool
}

// maxSecurityRows is how many rows the Security APIs return.
const maxSecurityRows = 10_000

// securityWindow is how far back the Security APIs look.
const securityWindow = 7 * 24 * time.Hour

// security is what the Security APIs know.
type security struct {
	mu       sync.Mutex
	how      Security
	calls    []SecurityCall // by time; the newest maxSecurityRows
	adoption map[adoptionKey]*adoptionCount
	weak     map[string]SecurityCall // the latest call without MFA, by object id
	pages    map[string][]object     // what was begun to be handed out in pages
}

type adoptionKey struct{ day, app string }

type adoptionCount struct{ compliant, total int }

func newSecurity() *security {
	return &security{adoption: map[adoptionKey]*adoptionCount{}, weak: map[string]SecurityCall{}, pages: map[string][]object{}}
}

// SetSecurity changes how the Security APIs answer from now on.
func (e *Emulator) SetSecurity(how Security) {
	s := e.partner.security
	s.mu.Lock()
	defer s.mu.Unlock()
	how.Status = maps.Clone(how.Status)
	s.how = how
}

// AddSecurityCalls makes the Security APIs tell of calls that never came to this
// emulator: from elsewhere, or long ago.
func (e *Emulator) AddSecurityCalls(calls ...SecurityCall) {
	for _, c := range calls {
		e.partner.security.add(c)
	}
}

// note keeps what the Security APIs will say about a user's call.
func (p *partner) note(c *call) {
	if appOnly(c.claims) {
		return
	}
	upn := claim(c.claims, "upn")
	if upn == "" {
		upn = claim(c.claims, "unique_name")
	}
	source, _, _ := net.SplitHostPort(c.r.RemoteAddr)
	v := SecurityCall{
		Time:          time.Now(),
		RequestID:     c.r.Header.Get("MS-RequestId"),
		CorrelationID: c.r.Header.Get("MS-CorrelationId"),
		Operation:     operationName(c.r),
		ObjectID:      claim(c.claims, "oid"),
		Tenant:        claim(c.claims, "tid"),
		UPN:           upn,
		AppID:         clientID(c.claims),
		Compliant:     mfaCompliant(c.claims),
		Source:        source,
	}
	if v.RequestID == "" {
		// The answer carries the same one.
		v.RequestID = uuid.NewString()
		c.r.Header.Set("MS-RequestId", v.RequestID)
	}
	p.security.add(v)
}

func (s *security) add(v SecurityCall) {
	v.Time = v.Time.UTC()
	s.mu.Lock()
	defer s.mu.Unlock()
	i, _ := slices.BinarySearchFunc(s.calls, v.Time, func(c SecurityCall, t time.Time) int {
		return cmp.Or(c.Time.Compare(t), -1) // behind those of the same moment
	})
	s.calls = slices.Insert(s.calls, i, v)
	if len(s.calls) > maxSecurityRows {
		s.calls = s.calls[1:]
	}
	k := adoptionKey{v.Time.Format(time.DateOnly), v.AppID}
	if s.adoption[k] == nil {
		s.adoption[k] = &adoptionCount{}
	}
	s.adoption[k].total++
	if v.Compliant {
		s.adoption[k].compliant++
	} else if !v.Time.Before(s.weak[v.ObjectID].Time) {
		s.weak[v.ObjectID] = v
	}
}

// refuse is the answer that an API gives instead of rows, or nil.
func (s *security) refuse(c *call, name string) *response {
	s.mu.Lock()
	defer s.mu.Unlock()
	var res response
	switch status := s.how.Status[name]; {
	case s.how.Unauthorized > 0:
		s.how.Unauthorized--
		res = c.api.unauthorized("", "Access token is expired.")
	case s.how.Throttled > 0:
		s.how.Throttled--
		res = statusResponse(http.StatusTooManyRequests)
		res.header["Retry-After"] = []string{cmp.Or(s.how.RetryAfter, "1")}
	case status != 0:
		res = c.api.statusResponse(status)
	default:
		return nil
	}
	return &res
}

// stamp writes a time of day.
func (how *Security) stamp(t time.Time) string {
	return t.Add(how.Skew).Format(cmp.Or(how.TimeLayout, "2006-01-02T15:04:05.999"))
}

// listed reports whether the collections tell of a call of that time.
func (how *Security) listed(t time.Time) bool {
	age := time.Since(t)
	return age >= how.Delay && age <= securityWindow
}

func listPartnerRequests(c *call) response {
	return c.security.collection(c, "partnerRequests", func(how *Security, all *security) (items []object) {
		source := "sourceIpAddress"
		if how.Alternate {
			source = "IpAddress"
		}
		for _, v := range all.calls {
			if !how.listed(v.Time) {
				continue
			}
			request, correlation := v.RequestID, v.CorrelationID
			if how.NoRequestID {
				request = ""
			}
			if how.NoCorrelation {
				correlation = ""
			}
			items = append(items, object{
				{"requestId", request}, {"correlationId", correlation}, {"operationName", v.Operation},
				{"requestDateTime", how.stamp(v.Time)}, {source, v.Source},
				{"objectId", v.ObjectID}, {"tenantId", v.Tenant}, {"upn", v.UPN}, {"applicationId", v.AppID}, {"mfaCompliant", v.Compliant},
			})
		}
		return items
	})
}

func listPrincipals(c *call) response {
	return c.security.collection(c, "nonMfaCompliantPartnerPrincipals", func(how *Security, all *security) (items []object) {
		field := "lastNonMfaCompliantRequestDateTime"
		if how.Alternate {
			field = "LastNonMfaCompliantLoginDateTime"
		}
		weak := slices.SortedFunc(maps.Values(all.weak), func(a, b SecurityCall) int { return a.Time.Compare(b.Time) })
		for _, v := range weak {
			if how.listed(v.Time) {
				items = append(items, object{{"objectId", v.ObjectID}, {"tenantId", v.Tenant}, {"upn", v.UPN}, {field, how.stamp(v.Time)}})
			}
		}
		return items
	})
}

// listAdoption answers a bare array, unlike its documented schema. It counts every
// call, also those that partnerRequests has no room for.
func listAdoption(c *call) response {
	const name = "applicationmfaadoptionstatus"
	s := c.security
	if res := s.refuse(c, name); res != nil {
		return *res
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	query := c.r.URL.Query()
	from, until := query.Get("startDate"), query.Get("endDate")
	items := []object{}
	keys := slices.SortedFunc(maps.Keys(s.adoption), func(a, b adoptionKey) int {
		return cmp.Or(strings.Compare(a.day, b.day), strings.Compare(a.app, b.app))
	})
	for _, k := range keys {
		if from != "" && k.day < from || until != "" && k.day > until {
			continue
		}
		n := s.adoption[k]
		items = append(items, object{
			{"loginDate", k.day}, {"mfaCompliantRequestCount", n.compliant}, {"totalRequestCount", n.total},
			{"applicationId", k.app}, {"applicationName", ""},
		})
	}
	items = s.how.disturb(items)
	if s.how.Wrapped {
		return s.how.mark(jsonResponse(http.StatusOK, collection(items)))
	}
	return s.how.mark(jsonResponse(http.StatusOK, items))
}

// collection answers with rows, or with a page of them.
func (s *security) collection(c *call, name string, rows func(*Security, *security) []object) response {
	if res := s.refuse(c, name); res != nil {
		return *res
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	how := &s.how
	var items []object
	from, id := 0, ""
	if strings.EqualFold(c.r.URL.Query().Get("seekOperation"), "Next") {
		raw, _ := base64.StdEncoding.DecodeString(c.r.Header.Get("MS-ContinuationToken"))
		_, err := fmt.Sscanf(string(raw), "%36s:%d", &id, &from)
		known := false
		if items, known = s.pages[id]; err != nil || !known || from > len(items) {
			return partnerError(http.StatusBadRequest, "400", "The continuation token is not valid.")
		}
	} else {
		items = rows(how, s)
		if over := len(items) - maxSecurityRows; over > 0 {
			items = items[over:]
		}
		items = how.disturb(items)
	}
	page := items[from:]
	body := object{}
	if how.PageSize > 0 && len(page) > how.PageSize {
		page = page[:how.PageSize]
		if id == "" {
			// The rows that come meanwhile shall not move the pages.
			if len(s.pages) >= 8 {
				clear(s.pages)
			}
			id = uuid.NewString()
			s.pages[id] = items
		}
		token := base64.StdEncoding.EncodeToString(fmt.Appendf(nil, "%s:%d", id, from+len(page)))
		uri := map[LinkStyle]string{
			LinkRelative: "/", LinkVersion: "/v1/", LinkNoSlash: "", LinkAbsolute: c.api.url + "/v1/", LinkForeign: "https://collector.example/v1/",
		}[how.Links] + name + "?seekOperation=Next"
		body = collection(page)
		body.set("totalCount", len(items))
		body.set("links", object{
			{"self", link("/"+name, "GET")},
			{"next", link(uri, "GET", object{{"key", "MS-ContinuationToken"}, {"value", token}})},
		})
	} else {
		body = collection(page)
		body.set("totalCount", len(items))
	}
	if how.NoTotal {
		body = slices.DeleteFunc(body, func(m member) bool { return m.name == "totalCount" })
	}
	if how.Bare {
		if page == nil {
			page = []object{}
		}
		return how.mark(jsonResponse(http.StatusOK, page))
	}
	return how.mark(jsonResponse(http.StatusOK, body))
}

// disturb brings disorder into rows.
func (how *Security) disturb(rows []object) []object {
	if how.Duplicates {
		var twice []object
		for i, r := range rows {
			if twice = append(twice, r); i%2 == 0 {
				twice = append(twice, r)
			}
		}
		rows = twice
	}
	if how.Shuffle {
		order := func(r object) uint64 {
			h := fnv.New64a()
			h.Write(mustJSON(r))
			return h.Sum64()
		}
		rows = slices.SortedFunc(slices.Values(rows), func(a, b object) int { return cmp.Compare(order(a), order(b)) })
	}
	if how.Broken {
		rows = append([]object{{{"requestDateTime", 17}}, {{"note", "this row tells nothing"}}}, rows...)
	}
	return rows
}

func (how *Security) mark(res response) response {
	res.bom = how.BOM
	return res
}

// operationName is the template style of partnerRequests, which differs from
// the documentation's.
func operationName(r *http.Request) string {
	segments := strings.Split(strings.Trim(r.URL.Path, "/"), "/")
	previous := ""
	for i, s := range segments {
		switch {
		case i == 0 && s == "v1":
			segments[i] = "v{version}"
		case uuid.Validate(s) == nil:
			segments[i] = "{" + strings.TrimSuffix(strings.ToLower(previous), "s") + "_id}"
		}
		previous = s
	}
	name := r.Method[:1] + strings.ToLower(r.Method[1:]) + " /" + strings.Join(segments, "/")
	var names []string
	for n := range r.URL.Query() {
		names = append(names, n+"={"+n+"_value}")
	}
	slices.Sort(names)
	if len(names) > 0 {
		name += "?" + strings.Join(names, "&")
	}
	return name
}
