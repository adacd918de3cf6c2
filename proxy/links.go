package proxy

import (
	"bytes"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
)

// linkRule says which absolute links of an answer are brought back through the
// guard, so that the next page does not go past it. It replaces scheme and authority
// of links to the upstream's own hosts and no other byte. Nil brings back none. It is
// never changed, and safe for concurrent use.
//
// Relative links stay relative (clients concatenate them), and links to other hosts
// stay as they are: downloads with a signature in their query, pages for people.
type linkRule struct {
	location bool       // Location of a 202
	members  [][]string // of a JSON body: paths from the root; [] is each element of an array
}

// The documented links of these APIs, and where the documentation shows them absolute.
var (
	// https://learn.microsoft.com/partner-center/developer/referral-resources
	referralLinks = &linkRule{members: [][]string{
		{"links", "self", "uri"},
		{"links", "relatedReferrals", "uri"},
	}}
	// The next page is in clear text: http://api.partner.microsoft.com/v1.0/referrals.
	referralListLinks = &linkRule{members: [][]string{
		{"@odata.context"},
		{"@odata.nextLink"},
		{"value", "[]", "links", "self", "uri"},
		{"value", "[]", "links", "relatedReferrals", "uri"},
	}}
	insightsLinks = &linkRule{members: [][]string{{"nextLink"}}}
	exportLinks   = &linkRule{location: true}
)

// linkRoutes is every route whose answers have such links. In path, * is one segment
// and ** the rest. Both spellings of engagements are in Microsoft's own links.
var linkRoutes = [...]struct {
	upstream, method, path string
	rule                   *linkRule
}{
	{"partner-api", "GET", "/v1.0/engagements/referrals", referralListLinks},
	{"partner-api", "GET", "/v1.0/engagments/referrals", referralListLinks},
	{"partner-api", "GET", "/v1.0/referrals", referralListLinks}, // where the next pages are
	{"partner-api", "POST", "/v1.0/engagements/referrals", referralLinks},
	{"partner-api", "GET", "/v1.0/engagements/referrals/*", referralLinks},
	{"partner-api", "GET", "/v1.0/engagments/referrals/*", referralLinks},
	{"partner-api", "PUT", "/v1.0/engagements/referrals/*", referralLinks},
	{"partner-api", "PATCH", "/v1.0/engagements/referrals/*", referralLinks},
	{"partner-center", "GET", "/insights/v1/mpn/**", insightsLinks},
	{"partner-center", "GET", "/insights/v1/cmp/**", insightsLinks},
	{"graph", "POST", "/v1.0/reports/partners/billing/reconciliation/*/export", exportLinks},
	{"graph", "POST", "/v1.0/reports/partners/billing/usage/*/export", exportLinks},
}

// linksOf returns the rule for a call, or nil. path has neither query nor /i/ prefix.
func linksOf(upstream, method, path string) *linkRule {
	for i := range linkRoutes {
		r := &linkRoutes[i]
		if r.upstream == upstream && r.method == method && matchesRoute(r.path, path) {
			return r.rule
		}
	}
	return nil
}

// matchesRoute compares without case and drops empty segments, as Microsoft's
// gateways do.
func matchesRoute(pattern, path string) bool {
	for {
		want, morePattern := nextSegment(&pattern)
		if want == "**" {
			return true
		}
		got, morePath := nextSegment(&path)
		switch {
		case !morePattern || !morePath:
			return morePattern == morePath
		case want != "*" && !strings.EqualFold(want, got):
			return false
		}
	}
}

func nextSegment(path *string) (segment string, ok bool) {
	for *path != "" && segment == "" {
		segment, *path, _ = strings.Cut(*path, "/")
	}
	return segment, segment != ""
}

// linkBase is how the client reached the guard: scheme, Host as it sent it, and the
// /i/{name} prefix if it used one (integration is then not empty). Where TLS ends in
// front of the guard, the scheme is http. It is empty for a request without Host.
func linkBase(r *http.Request, integration string) string {
	if r.Host == "" {
		return ""
	}
	base := "http://" + r.Host
	if r.TLS != nil {
		base = "https://" + r.Host
	}
	if integration != "" {
		base += "/i/" + integration
	}
	return base
}

// linkHost is the form in which rewrite takes u's host: lower case, without the
// default port.
func linkHost(u *url.URL) string {
	host, port := strings.ToLower(u.Host), u.Port()
	if u.Scheme == "https" && port == "443" || u.Scheme == "http" && port == "80" {
		host = strings.TrimSuffix(host, ":"+port)
	}
	return host
}

// prepare asks the upstream for a body that can be read. It changes only requests to
// routes whose bodies have links.
func (r *linkRule) prepare(out http.Header) {
	if r != nil && len(r.members) > 0 {
		out["Accept-Encoding"] = []string{"identity"}
	}
}

// rewrite makes res's links to own hosts begin with base instead. own are hosts as
// linkHost gives them; http and https links are both taken for them. A body is
// rewritten while it streams, and only if it is the whole of an application/json
// entity without Content-Encoding; it then has no Content-Length, nor digests, which
// would be wrong. ETag stays: clients send it back in If-Match.
func (r *linkRule) rewrite(res *http.Response, own []string, base string) {
	if r == nil || len(own) == 0 || !isLinkBase(base) {
		return
	}
	switch res.StatusCode {
	case http.StatusAccepted:
		if !r.location {
			return
		}
		locations := res.Header["Location"]
		for i, v := range locations {
			if end := originEnd(v); slices.Contains(linkOrigins(own), strings.ToLower(v[:end])) {
				locations[i] = base + v[end:]
			}
		}
	case http.StatusOK, http.StatusCreated:
		if len(r.members) == 0 || res.ContentLength == 0 || !isPlainJSON(res.Header) {
			return
		}
		for _, name := range [...]string{"Content-Length", "Content-Md5", "Content-Digest", "Repr-Digest", "Digest"} {
			delete(res.Header, name)
		}
		res.ContentLength = -1
		res.Body = &linkBody{src: res.Body, origins: linkOrigins(own), base: base, linkScanner: linkScanner{members: r.members}}
	}
}

// isLinkBase reports whether base can stand in a header and in a JSON string as it is.
func isLinkBase(base string) bool {
	for i := range len(base) {
		if c := base[i]; c <= ' ' || c > '~' || c == '"' || c == '\\' {
			return false
		}
	}
	return base != ""
}

func isPlainJSON(h http.Header) bool {
	mediaType, _, _ := strings.Cut(headerValue(h, "Content-Type"), ";")
	if !strings.EqualFold(strings.TrimSpace(mediaType), "application/json") {
		return false
	}
	encoding := h["Content-Encoding"]
	return len(encoding) == 0 || len(encoding) == 1 && (encoding[0] == "" || strings.EqualFold(encoding[0], "identity"))
}

// originEnd is the length of scheme and authority of an absolute URL, else 0.
func originEnd(link string) int {
	i := strings.Index(link, "://")
	if i < 0 {
		return 0
	}
	i += len("://")
	if end := strings.IndexAny(link[i:], "/?#"); end >= 0 {
		return i + end
	}
	return len(link)
}

// linkOrigins is every scheme and authority that stands for one of own, in lower case.
func linkOrigins(own []string) []string {
	origins := make([]string, 0, 4*len(own))
	for _, host := range own {
		origins = append(origins, "http://"+host, "http://"+host+":80", "https://"+host, "https://"+host+":443")
	}
	return origins
}

// linkBody is a JSON body whose links are rewritten while it is read. It holds back
// only what may still become the origin of a link.
type linkBody struct {
	linkScanner
	src     io.ReadCloser
	origins []string
	base    string

	buf  [1024]byte
	in   []byte // of buf, not looked at yet
	out  []byte // to go out before in
	err  error  // of src, after in
	held []byte // of a link not decided yet, as it came
	like int    // the first of origins that begins like it
	same int    // the bytes that they have in common
	mark int    // where in held the character at hand begins
}

// Read implements io.Reader.
func (b *linkBody) Read(p []byte) (int, error) {
	n := 0
	for n < len(p) {
		switch {
		case len(b.out) > 0:
			k := copy(p[n:], b.out)
			b.out = b.out[k:]
			n += k
		case len(b.in) > 0 && b.state == inLink:
			b.in = b.in[b.decide(b.in):]
		case len(b.in) > 0:
			k := b.pass(b.in[:min(len(b.in), len(p)-n)])
			copy(p[n:], b.in[:k])
			b.in = b.in[k:]
			n += k
		case n > 0:
			return n, nil
		case b.err != nil && len(b.held) > 0:
			b.out, b.held, b.state = b.held, nil, inRest
		case b.err != nil:
			return 0, b.err
		case b.state == inRest:
			return b.src.Read(p)
		default:
			k, err := b.src.Read(b.buf[:])
			b.in, b.err = b.buf[:k], err
			if k == 0 && err == nil {
				return 0, nil
			}
		}
	}
	return n, nil
}

// Close implements io.Closer.
func (b *linkBody) Close() error { return b.src.Close() }

// decide reads on in a link until its origin is known to be one of own or not, and
// returns how much of p it took. What it took goes out, or stays held.
func (b *linkBody) decide(p []byte) int {
	for i, c := range p {
		if len(b.held) == 0 {
			b.like, b.same = 0, 0
		}
		if b.escape.pending == 0 {
			b.mark = len(b.held)
		}
		b.held = append(b.held, c)
		ch, state := b.escape.next(c)
		switch {
		case state == charOpen:
			continue
		case state == charWhole && b.follow(ch):
			continue
		case state == charEnd, ch == '/', ch == '?', ch == '#':
			if seen := b.origins[b.like][:b.same]; slices.Contains(b.origins[b.like:], seen) {
				b.held = slices.Replace(b.held, 0, b.mark, []byte(b.base)...)
			}
		}
		b.out, b.held = b.held, b.held[:0] // the next link begins only once out is out
		switch b.state = inString; state {
		case charEnd:
			b.endString()
		case charBad:
			b.state = inRest
		}
		return i + 1
	}
	return len(p)
}

// follow reports whether some origin goes on with ch after what has been seen of it.
func (b *linkBody) follow(ch byte) bool {
	if 'A' <= ch && ch <= 'Z' {
		ch |= 0x20
	}
	seen := b.origins[b.like][:b.same]
	for i, o := range b.origins[b.like:] {
		if len(o) > b.same && o[b.same] == ch && o[:b.same] == seen {
			b.like += i
			b.same++
			return true
		}
	}
	return false
}

// linkScanner walks through JSON text and finds the strings at certain paths. It
// keeps no more of the text than a member's name. What is not JSON it leaves alone
// from there on.
type linkScanner struct {
	members [][]string

	state  scanState
	bom    int         // bytes of it seen
	live   uint8       // members whose path leads to the value that comes now
	frames [8]struct { // containers that some member's path leads into
		array bool
		live  uint8
	}
	depth   int  // of frames in use
	skip    int  // containers open in a value that no path leads into
	escaped bool // the byte before, in inString, was a backslash
	escape  unescaper
	name    []byte // of a member, decoded
}

// scanState is what the next byte may be.
type scanState uint8

const (
	atStart scanState = iota
	atValue
	atName // or the end of an object
	inName
	atColon
	atComma   // or the end of a container
	inScalar  // a number, true, false, null
	inString  // one that is no link
	inSkipped // a container that no path leads into
	inLink    // a string that is a link, its origin still undecided
	inRest    // nothing more is of interest
)

// pass looks at bytes that go out as they are and returns how many: all, or up to the
// beginning of a link.
func (s *linkScanner) pass(p []byte) int {
	for i := 0; i < len(p); i++ {
		c := p[i]
		switch s.state {
		case inRest:
			return len(p)
		case inString:
			if s.escaped {
				s.escaped = false
				continue
			}
			k := bytes.IndexByte(p[i:], '"')
			if k < 0 {
				k = len(p) - i
			}
			if esc := bytes.IndexByte(p[i:i+k], '\\'); esc >= 0 {
				i += esc
				s.escaped = true
				continue
			}
			if i += k; i == len(p) {
				return i
			}
			s.endString()
		case inSkipped:
			switch c {
			case '"':
				s.state = inString
			case '{', '[':
				s.skip++
			case '}', ']':
				if s.skip--; s.skip == 0 {
					s.endValue()
				}
			}
		case inName:
			switch ch, state := s.escape.next(c); state {
			case charBad:
				s.state = inRest
			case charEnd:
				s.live = s.named()
				s.state = atColon
			case charWhole:
				if len(s.name) < 32 { // longer than any name looked for
					s.name = append(s.name, ch)
				}
			}
		case inScalar:
			if c == ',' || c == '}' || c == ']' || isSpace(c) {
				s.endValue()
				i-- // it belongs to what follows
			}
		case atStart:
			const mark = "\xEF\xBB\xBF"
			switch {
			case c == mark[s.bom]:
				if s.bom++; s.bom < len(mark) {
					continue
				}
			case s.bom > 0:
				s.state = inRest
				continue
			default:
				i--
			}
			s.live = 1<<len(s.members) - 1
			s.state = atValue
		case atValue:
			if s.beginValue(c) {
				return i + 1
			}
		default:
			s.punctuation(c)
		}
	}
	return len(p)
}

// punctuation reads a byte between names and values.
func (s *linkScanner) punctuation(c byte) {
	switch {
	case isSpace(c):
	case s.state == atName && c == '"':
		s.state, s.name = inName, s.name[:0]
	case s.state == atColon && c == ':':
		s.state = atValue
	case s.state == atComma && c == ',':
		s.state = atName
		if f := &s.frames[s.depth-1]; f.array {
			s.state, s.live = atValue, f.live
		}
	case s.state != atColon && c == '}' && !s.frames[s.depth-1].array, s.state == atComma && c == ']' && s.frames[s.depth-1].array:
		s.depth--
		s.endValue()
	default:
		s.state = inRest
	}
}

// beginValue reads the first byte of a value, or spaces before it, and reports whether
// a link begins.
func (s *linkScanner) beginValue(c byte) bool {
	switch {
	case isSpace(c):
	case c == '"':
		s.state = inString
		for i, path := range s.members {
			if s.live&(1<<i) != 0 && len(path) == s.depth {
				s.state = inLink
				return true
			}
		}
	case c == '{' || c == '[':
		array := c == '['
		var live uint8
		for i, path := range s.members {
			if s.live&(1<<i) != 0 && len(path) > s.depth && (path[s.depth] == "[]") == array {
				live |= 1 << i
			}
		}
		if live == 0 {
			s.skip, s.state = 1, inSkipped
			return false
		}
		s.frames[s.depth].array, s.frames[s.depth].live = array, live
		s.depth++
		s.state, s.live = atName, live
		if array {
			s.state = atValue
		}
	case c == ']' && s.depth > 0 && s.frames[s.depth-1].array:
		s.depth--
		s.endValue()
	case c == '-' || '0' <= c && c <= '9' || c == 't' || c == 'f' || c == 'n':
		s.state = inScalar
	default:
		s.state = inRest
	}
	return false
}

// named returns the members whose path goes on with the name just read.
func (s *linkScanner) named() (live uint8) {
	for i, path := range s.members {
		if s.frames[s.depth-1].live&(1<<i) != 0 && path[s.depth-1] == string(s.name) {
			live |= 1 << i
		}
	}
	return live
}

func (s *linkScanner) endString() {
	if s.skip > 0 {
		s.state = inSkipped
		return
	}
	s.endValue()
}

func (s *linkScanner) endValue() {
	s.state = atComma
	if s.depth == 0 {
		s.state = inRest
	}
}

func isSpace(c byte) bool { return c == ' ' || c == '\n' || c == '\r' || c == '\t' }

// unescaper decodes the characters of a JSON string one byte at a time.
type unescaper struct {
	pending uint8 // 0: none; 1: after a backslash; 2 to 5: before a hex digit of \u
	code    uint16
}

// charState is how far a character of a JSON string has been read.
type charState uint8

const (
	charOpen  charState = iota // in the middle of an escape
	charWhole                  // there is a character
	charEnd                    // the closing quote
	charBad                    // no JSON string
)

// next takes the next byte. Characters outside ASCII come as 0xFF.
func (u *unescaper) next(c byte) (byte, charState) {
	switch u.pending {
	case 0:
		switch {
		case c == '"':
			return 0, charEnd
		case c == '\\':
			u.pending = 1
			return 0, charOpen
		case c < ' ':
			return 0, charBad
		case c >= 0x80:
			return 0xFF, charWhole
		}
		return c, charWhole
	case 1:
		u.pending = 0
		switch c {
		case '"', '\\', '/':
			return c, charWhole
		case 'b', 'f', 'n', 'r', 't':
			return 0xFF, charWhole // in no name or link looked for
		case 'u':
			u.pending, u.code = 2, 0
			return 0, charOpen
		}
		return 0, charBad
	}
	var digit byte
	switch {
	case '0' <= c && c <= '9':
		digit = c - '0'
	case 'a' <= c|0x20 && c|0x20 <= 'f':
		digit = c | 0x20 - 'a' + 10
	default:
		return 0, charBad
	}
	u.code = u.code<<4 | uint16(digit)
	if u.pending++; u.pending <= 5 {
		return 0, charOpen
	}
	u.pending = 0
	if u.code >= 0x80 {
		return 0xFF, charWhole
	}
	return byte(u.code), charWhole
}
