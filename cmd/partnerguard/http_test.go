package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/partnerguard/partnerguard/internal/emulator"
)

// wireRequest is one request as it stood on the wire to the upstream.
type wireRequest struct {
	method, target string
	header         []string // lines, in order
	framing        string   // none, length or chunked
	body           string
	cut            bool // the connection ended within it
}

// get returns all values of a header, the name without case.
func (r wireRequest) get(name string) (values []string) {
	for _, l := range r.header {
		if n, v, _ := strings.Cut(l, ": "); strings.EqualFold(n, name) {
			values = append(values, v)
		}
	}
	return values
}

// wireServer is an upstream that takes nothing but well-formed requests, one after
// the other, read by the letter of RFC 9112 and with no tolerance. It shares no code
// with net/http.
type wireServer struct {
	url    string
	answer func(c net.Conn, r wireRequest) (goOn bool) // nil answers 200

	mu       sync.Mutex
	requests []wireRequest
	faults   []error // what was not well-formed
}

func startWire(t *testing.T) *wireServer {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &wireServer{url: "http://" + l.Addr().String()}
	serveConns(t, l, s.serve)
	return s
}

// serveConns serves the connections of l until the test ends.
func serveConns(t *testing.T, l net.Listener, serve func(net.Conn)) {
	var (
		serving sync.WaitGroup
		mu      sync.Mutex
		open    = map[net.Conn]struct{}{}
	)
	serving.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			open[c] = struct{}{}
			mu.Unlock()
			serving.Go(func() {
				defer func() {
					c.Close()
					mu.Lock()
					delete(open, c)
					mu.Unlock()
				}()
				serve(c)
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		mu.Lock()
		for c := range open {
			c.Close()
		}
		mu.Unlock()
		serving.Wait()
	})
}

const wireOK = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 11\r\n\r\n"

func (s *wireServer) serve(c net.Conn) {
	br := bufio.NewReader(c)
	for {
		r, err := readWire(br)
		if r.method == "" && errors.Is(err, io.EOF) {
			return
		}
		s.mu.Lock()
		switch {
		case errors.Is(err, io.ErrUnexpectedEOF):
			r.cut = true
		case err != nil:
			s.faults = append(s.faults, err)
		}
		s.requests = append(s.requests, r)
		answer := s.answer
		s.mu.Unlock()
		switch {
		case err != nil:
			return
		case answer != nil:
			if !answer(c, r) {
				return
			}
		default:
			wireAnswers(c, r)
		}
	}
}

// wireAnswers gives the usual answer.
func wireAnswers(c net.Conn, r wireRequest) {
	if r.method == http.MethodHead {
		io.WriteString(c, wireOK)
		return
	}
	io.WriteString(c, wireOK+`{"ok":true}`)
}

// respond sets the answer to the next calls.
func (s *wireServer) respond(answer func(c net.Conn, r wireRequest) bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.answer = answer
}

// of returns the requests with that MS-RequestId.
func (s *wireServer) of(id string) (found []wireRequest) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, r := range s.requests {
		if slices.Contains(r.get("MS-RequestId"), id) {
			found = append(found, r)
		}
	}
	return found
}

// all returns every request, and fails the test for what was not well-formed.
func (s *wireServer) all(t *testing.T) []wireRequest {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, err := range s.faults {
		t.Errorf("the upstream got what is no well-formed request: %v", err)
	}
	return slices.Clone(s.requests)
}

var (
	wireName   = regexp.MustCompile("^[A-Za-z0-9!#$%&'*+.^_`|~-]+$")
	wireValue  = regexp.MustCompile(`^([!-~\x80-\xff]([ \t!-~\x80-\xff]*[!-~\x80-\xff])?)?$`)
	wireLength = regexp.MustCompile(`^(0|[1-9][0-9]*)$`)
	wireSize   = regexp.MustCompile(`^[0-9a-f]+$`)
)

// readWire reads one request. io.EOF means that the connection ended before it,
// io.ErrUnexpectedEOF within it, any other error that it is malformed.
func readWire(br *bufio.Reader) (r wireRequest, err error) {
	begun := false
	defer func() {
		if begun && err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
	}()
	line := func() (string, error) {
		l, err := br.ReadString('\n')
		begun = begun || l != ""
		if err != nil {
			var ne net.Error
			if errors.As(err, &ne) {
				err = io.EOF // a reset
			}
			return "", err
		}
		l, ok := strings.CutSuffix(l, "\r\n")
		if !ok || strings.ContainsAny(l, "\r\n\x00") {
			return "", fmt.Errorf("line %q", l)
		}
		return l, nil
	}
	first, err := line()
	if err != nil {
		return r, err
	}
	parts := strings.Split(first, " ")
	if len(parts) != 3 || !wireName.MatchString(parts[0]) || parts[2] != "HTTP/1.1" {
		return r, fmt.Errorf("request line %q", first)
	}
	r.method, r.target, r.framing = parts[0], parts[1], "none"
	for {
		l, err := line()
		if err != nil {
			return r, err
		}
		if l == "" {
			break
		}
		name, value, ok := strings.Cut(l, ": ")
		if !ok || !wireName.MatchString(name) || !wireValue.MatchString(value) {
			return r, fmt.Errorf("header line %q", l)
		}
		r.header = append(r.header, l)
	}
	length, chunked := r.get("Content-Length"), r.get("Transfer-Encoding")
	if len(length) > 1 || len(chunked) > 1 || len(length)+len(chunked) > 1 || len(r.get("Host")) != 1 {
		return r, fmt.Errorf("framing of %q", r.header)
	}
	take := func(n int64) error {
		b := make([]byte, n)
		m, err := io.ReadFull(br, b)
		r.body += string(b[:m])
		if err != nil {
			return io.ErrUnexpectedEOF
		}
		return nil
	}
	switch {
	case len(length) == 1:
		r.framing = "length"
		n, err := strconv.ParseInt(length[0], 10, 64)
		if err != nil || !wireLength.MatchString(length[0]) {
			return r, fmt.Errorf("Content-Length %q", length[0])
		}
		return r, take(n)
	case len(chunked) == 1:
		r.framing = "chunked"
		if chunked[0] != "chunked" {
			return r, fmt.Errorf("Transfer-Encoding %q", chunked[0])
		}
		for {
			size, err := line()
			if err != nil {
				return r, err
			}
			n, err := strconv.ParseInt(size, 16, 64)
			if err != nil || !wireSize.MatchString(size) {
				return r, fmt.Errorf("chunk size %q", size)
			}
			if err := take(n); err != nil {
				return r, err
			}
			if end, err := line(); err != nil || end != "" {
				return r, errors.Join(err, fmt.Errorf("end of chunk %q", end))
			}
			if n == 0 {
				return r, nil
			}
		}
	}
	return r, nil
}

// wireYAML is the configuration of a guard in front of s.
func wireYAML(em *emulator.Emulator, s *wireServer, mode string, more ...string) string {
	return strings.Replace(guardYAML(em, mode, more...), em.PartnerURL(), s.url, 1)
}

// wireAnswer is what a client reads off the wire.
type wireAnswer struct {
	status int
	header http.Header
	body   string
	err    error // of the body
}

// talk writes raw on a connection of its own and returns the answers until it ends.
// An answer with status 0 stands for a connection that does not end.
func talk(t *testing.T, url, raw string) (answers []wireAnswer) {
	t.Helper()
	c, err := net.Dial("tcp", strings.TrimPrefix(url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(20 * time.Second))
	go io.WriteString(c, raw) // fails where the guard closes early
	br := bufio.NewReader(c)
	for {
		res, err := http.ReadResponse(br, nil)
		if err != nil {
			var ne net.Error
			if errors.As(err, &ne) && ne.Timeout() {
				answers = append(answers, wireAnswer{err: err})
			}
			return answers
		}
		body, err := io.ReadAll(res.Body)
		answers = append(answers, wireAnswer{res.StatusCode, res.Header, string(body), err})
	}
}

// statuses are those of answers, with the Reason where the guard refused.
func statuses(answers []wireAnswer) string {
	var s []string
	for _, a := range answers {
		word := strconv.Itoa(a.status)
		if a.header.Get("Partnerguard-Effect") == "reject" {
			word += " " + a.header.Get("Partnerguard-Reason")
		}
		if a.err != nil {
			word += " broken"
		}
		s = append(s, word)
	}
	return strings.Join(s, ", ")
}

// wireText makes the text of a request: its lines end in CRLF; ␊ and ␍ stand for a
// bare LF and CR, ␀ for NUL.
func wireText(text string) string {
	text = strings.ReplaceAll(text, "\n", "\r\n")
	return strings.NewReplacer("␊", "\n", "␍", "\r", "␀", "\x00").Replace(text)
}

// summary is what counts of the requests that reached the upstream.
func summary(requests []wireRequest) (lines []string) {
	for _, r := range requests {
		l := r.method + " " + r.target
		if r.framing != "none" {
			l += fmt.Sprintf(" %s %q", r.framing, r.body)
		}
		if r.cut {
			l += " cut"
		}
		lines = append(lines, l)
	}
	return lines
}

// Whatever shape a request comes in, the upstream sees one well-formed request for
// each call that the guard accepted, or none, and what follows on the connection is
// read where the request ended.
func TestHTTPFraming(t *testing.T) {
	t.Parallel()
	em := startEmulator(t, emulator.Config{})
	wire := startWire(t)
	dir := t.TempDir()
	g := startGuard(t, dir, wireYAML(em, wire, "enforce"))
	good, bad := em.Mint(emulator.TokenSpec{}), em.Mint(emulator.TokenSpec{AMR: []string{"pwd"}})

	const smuggled = "GET /v1/smuggled HTTP/1.1\nHost: x\nAuthorization: Bearer {good}\n\n"
	length := strconv.Itoa(len(wireText(strings.ReplaceAll(smuggled, "{good}", good))))
	body := strings.ReplaceAll(wireText(smuggled), "{good}", good)
	const (
		malformed = "400" // by net/http, which then ends the connection
		then      = ", 200"
	)
	tests := []struct {
		name, text string
		answers    string   // the last 200 is that of the call that follows
		upstream   []string // without the call that follows
		calls      int      // that have a record, without the call that follows
	}{
		{"a plain call", "GET /v1/x HTTP/1.1\nHost: g\n{good}\n\n", "200" + then, []string{"GET /v1/x"}, 1},
		{"a body with its length", "POST /v1/x HTTP/1.1\nHost: g\n{good}\nContent-Length: 2\n\n{}", "200" + then, []string{`POST /v1/x length "{}"`}, 1},
		{"a POST without a body", "POST /v1/x HTTP/1.1\nHost: g\n{good}\n\n", "200" + then, []string{`POST /v1/x length ""`}, 1},
		{"a GET with a body", "GET /v1/x HTTP/1.1\nHost: g\n{good}\nContent-Length: 2\n\n{}", "200" + then, []string{`GET /v1/x length "{}"`}, 1},

		// Two readers, two lengths.
		{"length and chunks", "POST /v1/x HTTP/1.1\nHost: g\n{good}\nContent-Length: 4\nTransfer-Encoding: chunked\n\n2\nab\n0\n\n", "200" + then, []string{`POST /v1/x chunked "ab"`}, 1},
		{"chunks and length", "POST /v1/x HTTP/1.1\nHost: g\n{good}\nTransfer-Encoding: chunked\nContent-Length: 400\n\n2\nab\n0\n\n", "200" + then, []string{`POST /v1/x chunked "ab"`}, 1},
		{"a request in chunks", "POST /v1/x HTTP/1.1\nHost: g\n{good}\nTransfer-Encoding: chunked\n\n{hexlength}\n{smuggled}\n0\n\n", "200" + then, []string{fmt.Sprintf("POST /v1/x chunked %q", body)}, 1},
		{"a request as a body", "POST /v1/x HTTP/1.1\nHost: g\n{good}\nContent-Length: {length}\n\n{smuggled}", "200" + then, []string{fmt.Sprintf("POST /v1/x length %q", body)}, 1},
		{"a request as the body of a GET", "GET /v1/x HTTP/1.1\nHost: g\n{good}\nContent-Length: {length}\n\n{smuggled}", "200" + then, []string{fmt.Sprintf("GET /v1/x length %q", body)}, 1},
		{"two equal lengths", "POST /v1/x HTTP/1.1\nHost: g\n{good}\nContent-Length: 2\nContent-Length: 2\n\n{}", "200" + then, []string{`POST /v1/x length "{}"`}, 1},
		{"two lengths", "POST /v1/x HTTP/1.1\nHost: g\n{good}\nContent-Length: 2\nContent-Length: 40\n\n{}", malformed, nil, 0},
		{"a list of equal lengths", "POST /v1/x HTTP/1.1\nHost: g\n{good}\nContent-Length: 2, 2\n\n{}", malformed, nil, 0},
		{"a length with a sign", "POST /v1/x HTTP/1.1\nHost: g\n{good}\nContent-Length: +2\n\n{}", malformed, nil, 0},
		{"a negative length", "POST /v1/x HTTP/1.1\nHost: g\n{good}\nContent-Length: -2\n\n{}", malformed, nil, 0},
		{"a hexadecimal length", "POST /v1/x HTTP/1.1\nHost: g\n{good}\nContent-Length: 0x2\n\n{}", malformed, nil, 0},
		{"an empty length", "POST /v1/x HTTP/1.1\nHost: g\n{good}\nContent-Length: \n\n{}", malformed, nil, 0},
		{"a length beyond 64 bits", "POST /v1/x HTTP/1.1\nHost: g\n{good}\nContent-Length: 18446744073709551618\n\n{}", malformed, nil, 0},
		{"a space before the colon", "POST /v1/x HTTP/1.1\nHost: g\n{good}\nContent-Length : 2\n\n{}", malformed, nil, 0},
		{"a tab before the colon", "POST /v1/x HTTP/1.1\nHost: g\n{good}\nTransfer-Encoding\t: chunked\n\n0\n\n", malformed, nil, 0},
		{"xchunked", "POST /v1/x HTTP/1.1\nHost: g\n{good}\nTransfer-Encoding: xchunked\n\n0\n\n", "501", nil, 0},
		{"chunked, identity", "POST /v1/x HTTP/1.1\nHost: g\n{good}\nTransfer-Encoding: chunked, identity\n\n0\n\n", "501", nil, 0},
		{"identity", "POST /v1/x HTTP/1.1\nHost: g\n{good}\nTransfer-Encoding: identity\nContent-Length: 2\n\n{}", "501", nil, 0},
		{"chunked twice", "POST /v1/x HTTP/1.1\nHost: g\n{good}\nTransfer-Encoding: chunked\nTransfer-Encoding: chunked\n\n0\n\n", "501", nil, 0},
		{"chunked after a vertical tab", "POST /v1/x HTTP/1.1\nHost: g\n{good}\nTransfer-Encoding: \vchunked\n\n0\n\n", malformed, nil, 0},
		{"CHUNKED", "POST /v1/x HTTP/1.1\nHost: g\n{good}\nTransfer-Encoding: CHUNKED\n\n2\nab\n0\n\n", "200" + then, []string{`POST /v1/x chunked "ab"`}, 1},
		{"chunks folded", "POST /v1/x HTTP/1.1\nHost: g\n{good}\nTransfer-Encoding:\n chunked\n\n2\nab\n0\n\n", "200" + then, []string{`POST /v1/x chunked "ab"`}, 1},
		{"a chunk extension", "POST /v1/x HTTP/1.1\nHost: g\n{good}\nTransfer-Encoding: chunked\n\n2;a=\"b\"\nab\n0;c\n\n", "200" + then, []string{`POST /v1/x chunked "ab"`}, 1},
		{"a bare LF in a chunk extension", "POST /v1/x HTTP/1.1\nHost: g\n{good}\nTransfer-Encoding: chunked\n\n2;a␊ab\n0\n\n", "", nil, 1},
		{"a chunk size with a prefix", "POST /v1/x HTTP/1.1\nHost: g\n{good}\nTransfer-Encoding: chunked\n\n0x2\nab\n0\n\n", "", nil, 1},
		{"a chunk size with a sign", "POST /v1/x HTTP/1.1\nHost: g\n{good}\nTransfer-Encoding: chunked\n\n+2\nab\n0\n\n", "", nil, 1},
		{"a chunk size beyond 64 bits", "POST /v1/x HTTP/1.1\nHost: g\n{good}\nTransfer-Encoding: chunked\n\n10000000000000002\nab\n0\n\n", "", nil, 1},
		{"a chunk longer than it says", "POST /v1/x HTTP/1.1\nHost: g\n{good}\nTransfer-Encoding: chunked\n\n2\nabcd\n0\n\n", "", nil, 1},
		{"chunks in HTTP/1.0", "POST /v1/x HTTP/1.0\nHost: g\n{good}\nConnection: keep-alive\nTransfer-Encoding: chunked\n\n{hexlength}\n{smuggled}\n0\n\n", "200", []string{`POST /v1/x length ""`}, 1},
		{"a request after one in HTTP/1.0", "GET /v1/x HTTP/1.0\nHost: g\n{good}\nConnection: keep-alive\n\n{smuggled}", "200", []string{"GET /v1/x"}, 1},
		{"one refused in HTTP/1.0", "GET /v1/x HTTP/1.0\nHost: g\n{bad}\nConnection: keep-alive\n\n{smuggled}", "401 mfa_missing", nil, 1},

		// Lines.
		{"bare LF", "POST /v1/x HTTP/1.1␊Host: g␊Authorization: Bearer {token}␊MS-RequestId: {id}␊Content-Length: 2␊␊{}", "200" + then, []string{`POST /v1/x length "{}"`}, 1},
		{"a bare CR in a value", "GET /v1/x HTTP/1.1\nHost: g\n{good}\nX-A: a␍Content-Length: 4\n\n", malformed, nil, 0},
		{"a NUL in a value", "GET /v1/x HTTP/1.1\nHost: g\n{good}\nX-A: a␀b\n\n", malformed, nil, 0},
		{"a folded value", "GET /v1/x HTTP/1.1\nHost: g\n{good}\nX-A: a\n\tb\n\n", "200" + then, []string{"GET /v1/x"}, 1},
		{"a fold before the first header", "GET /v1/x HTTP/1.1\n Host: g\n{good}\n\n", malformed, nil, 0},
		{"a header without a colon", "GET /v1/x HTTP/1.1\nHost: g\n{good}\nrubbish\n\n", malformed, nil, 0},
		{"a header without a name", "GET /v1/x HTTP/1.1\nHost: g\n{good}\n: x\n\n", malformed, nil, 0},
		{"a name with a space", "GET /v1/x HTTP/1.1\nHost: g\n{good}\nX A: x\n\n", malformed, nil, 0},
		{"no Host", "GET /v1/x HTTP/1.1\n{good}\n\n", malformed, nil, 0},
		{"two Hosts", "GET /v1/x HTTP/1.1\nHost: g\nHost: h\n{good}\n\n", malformed, nil, 0},
		{"a Host with a path", "GET /v1/x HTTP/1.1\nHost: g/v1\n{good}\n\n", malformed, nil, 0},
		{"a Host with user information", "GET /v1/x HTTP/1.1\nHost: api.partnercenter.microsoft.com@evil.example\n{good}\n\n", malformed, nil, 0},
		{"headers of 1 MB", "GET /v1/x HTTP/1.1\nHost: g\n{good}\nX-A: {1MB}\n\n", "431", nil, 0},
		{"a hundred thousand headers", "GET /v1/x HTTP/1.1\nHost: g\n{good}\n{100000}\n", "431", nil, 0},
		{"a target of 1 MB", "GET /{1MB} HTTP/1.1\nHost: g\n{good}\n\n", "431", nil, 0},

		// Other protocols.
		{"HTTP/0.9", "GET /v1/x\n", malformed, nil, 0},
		{"HTTP/0.9 by name", "GET /v1/x HTTP/0.9\nHost: g\n{good}\n\n", "505", nil, 0},
		{"http/1.1", "GET /v1/x http/1.1\nHost: g\n{good}\n\n", malformed, nil, 0},
		{"HTTP/2.0 in clear text", "GET /v1/x HTTP/2.0\nHost: g\n{good}\n\n", "505", nil, 0},
		{"the preface of HTTP/2", "PRI * HTTP/2.0\n\nSM\n\n", "505", nil, 0},
		{"a websocket", "GET /v1/x HTTP/1.1\nHost: g\n{good}\nConnection: Upgrade\nUpgrade: websocket\nSec-WebSocket-Version: 13\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\n\n", "200" + then, []string{"GET /v1/x"}, 1},
		{"h2c", "GET /v1/x HTTP/1.1\nHost: g\n{good}\nConnection: Upgrade, HTTP2-Settings\nUpgrade: h2c\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\n\n", "200" + then, []string{"GET /v1/x"}, 1},
		{"h2c, half named", "GET /v1/x HTTP/1.1\nHost: g\n{good}\nConnection: Upgrade\nUpgrade: h2c\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\n\n", "200" + then, []string{"GET /v1/x"}, 1},
		{"CONNECT", "CONNECT evil.example:443 HTTP/1.1\nHost: evil.example:443\n{good}\n\n", "405 method_refused" + then, nil, 1},
		{"CONNECT with a path", "CONNECT /v1/x HTTP/1.1\nHost: g\n{good}\n\n", "405 method_refused" + then, nil, 1},
		{"connect", "connect evil.example:443 HTTP/1.1\nHost: g\n{good}\n\n", "405 method_refused" + then, nil, 1},
		{"TRACE", "TRACE /v1/x HTTP/1.1\nHost: g\n{good}\nMax-Forwards: 0\n\n", "405 method_refused" + then, nil, 1},
		{"trace", "trace /v1/x HTTP/1.1\nHost: g\n{good}\n\n", "405 method_refused" + then, nil, 1},
		{"TRACK", "TRACK /v1/x HTTP/1.1\nHost: g\n{good}\n\n", "405 method_refused" + then, nil, 1},
		{"a method that is no token", "GE(T /v1/x HTTP/1.1\nHost: g\n{good}\n\n", malformed, nil, 0},
		{"a method of no known kind", "QUERY /v1/x HTTP/1.1\nHost: g\n{good}\nContent-Length: 2\n\n{}", "200" + then, []string{`QUERY /v1/x length "{}"`}, 1},
		{"Expect: 100-continue", "POST /v1/x HTTP/1.1\nHost: g\n{good}\nExpect: 100-continue\nContent-Length: 2\n\n{}", "100, 200" + then, []string{`POST /v1/x length "{}"`}, 1},
		{"another Expect", "GET /v1/x HTTP/1.1\nHost: g\n{good}\nExpect: 200-ok\n\n", "417", nil, 0},

		// What follows a call that was refused.
		{"refused, with a request as its body", "POST /v1/x HTTP/1.1\nHost: g\n{bad}\nContent-Length: {length}\n\n{smuggled}", "401 mfa_missing" + then, nil, 1},
		{"refused, with a request in chunks", "POST /v1/x HTTP/1.1\nHost: g\n{bad}\nTransfer-Encoding: chunked\n\n{hexlength}\n{smuggled}\n0\n\n", "401 mfa_missing" + then, nil, 1},
		{"refused GET with a request as its body", "GET /v1/x HTTP/1.1\nHost: g\n{bad}\nContent-Length: {length}\n\n{smuggled}", "401 mfa_missing" + then, nil, 1},
		{"ambiguous, with a request as its body", "POST /v1/../x HTTP/1.1\nHost: g\n{good}\nContent-Length: {length}\n\n{smuggled}", "400 request_ambiguous" + then, nil, 1},
		{"an unknown prefix, with a request as its body", "POST /i/nobody/v1/x HTTP/1.1\nHost: g\n{good}\nContent-Length: {length}\n\n{smuggled}", "404 integration_unknown" + then, nil, 1},
		{"TRACE with a request as its body", "TRACE /v1/x HTTP/1.1\nHost: g\n{good}\nContent-Length: {length}\n\n{smuggled}", "405 method_refused" + then, nil, 1},
		{"CONNECT with a request as its body", "CONNECT evil.example:443 HTTP/1.1\nHost: g\n{good}\nContent-Length: {length}\n\n{smuggled}", "405 method_refused" + then, nil, 1},
		{"refused before the body that waits for 100", "POST /v1/x HTTP/1.1\nHost: g\n{bad}\nExpect: 100-continue\nContent-Length: {length}\n\n{smuggled}", "401 mfa_missing", nil, 1},
		{"refused, with a broken body", "POST /v1/x HTTP/1.1\nHost: g\n{bad}\nTransfer-Encoding: chunked\n\nzz\n{smuggled}", "401 mfa_missing", nil, 1},
		{"refused, with a body of 1 MB", "POST /v1/x HTTP/1.1\nHost: g\n{bad}\nContent-Length: 1048576\n\n{1MB}", "401 mfa_missing", nil, 1},
	}
	t.Run("requests", func(t *testing.T) {
		for i, tt := range tests {
			t.Run(tt.name, func(t *testing.T) {
				t.Parallel()
				id := fmt.Sprintf("framing-%d", i)
				text := strings.NewReplacer(
					"{good}", "Authorization: Bearer {token}\nMS-RequestId: {id}", "{bad}", "Authorization: Bearer {badtoken}\nMS-RequestId: {id}",
					"{100000}", strings.Repeat("A: b\n", 100_000),
				).Replace(tt.text)
				text = strings.NewReplacer(
					"{token}", good, "{badtoken}", bad, "{id}", id, "{smuggled}", body, "{length}", length,
					"{hexlength}", fmt.Sprintf("%x", len(body)), "{1MB}", strings.Repeat("a", 1<<20),
				).Replace(wireText(text))
				after := fmt.Sprintf("GET /v1/after HTTP/1.1\r\nHost: g\r\nAuthorization: Bearer %s\r\nMS-RequestId: %s-after\r\nConnection: close\r\n\r\n", good, id)
				answers := talk(t, g.url, text+after)
				if got := statuses(answers); got != tt.answers {
					t.Errorf("answers %q, want %q", got, tt.answers)
				}
				if diff := cmp.Diff(tt.upstream, summary(wire.of(id))); diff != "" && tt.answers != "" {
					t.Errorf("the upstream saw (-want +got):\n%s", diff)
				}
				for _, r := range wire.of(id) {
					if tt.answers == "" && !r.cut {
						t.Errorf("the upstream saw a whole request: %+v", r)
					}
					for _, name := range []string{"Upgrade", "HTTP2-Settings", "Connection", "Trailer", "Keep-Alive"} {
						if v := r.get(name); len(v) > 0 {
							t.Errorf("the upstream saw %s: %q", name, v)
						}
					}
				}
				if followed := strings.HasSuffix(tt.answers, then); followed != (len(wire.of(id+"-after")) == 1) {
					t.Errorf("the next call reached the upstream %d times", len(wire.of(id+"-after")))
				}
			})
		}
	})
	unparsed := 0
	calls := map[string]int{}
	for i, tt := range tests {
		id := fmt.Sprintf("framing-%d", i)
		calls[id] = tt.calls
		if strings.HasSuffix(tt.answers, then) {
			calls[id+"-after"] = 1
		}
		if tt.calls == 0 {
			unparsed++
		}
	}
	awaiting(t, func() (string, bool) {
		n := metric(t, g, "partnerguard_unparsed_requests_total")
		return fmt.Sprintf("%v requests counted as unparsed, want %d", n, unparsed), n == float64(unparsed)
	})
	g.stop()
	for _, c := range storedCalls(t, dir) {
		calls[c.RequestID]--
	}
	for id, n := range calls {
		if n != 0 {
			t.Errorf("%s: %d records are missing", id, n)
		}
	}
	for _, r := range wire.all(t) {
		if strings.Contains(r.target, "smuggled") {
			t.Errorf("a smuggled request reached the upstream: %+v", r)
		}
		if host := r.get("Host"); "http://"+host[0] != wire.url {
			t.Errorf("Host %q upstream", host)
		}
	}
}
