package reconcile

import (
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"
)

// download is what one API said, all pages together.
type download struct {
	rows    []apiRow
	skipped int      // rows that tell nothing
	defects []string // why rows are missing
	absent  string   // why there is no answer at all
}

// add takes over a page.
func (d *download) add(p *apiPage) {
	d.skipped += p.skipped
	d.rows = append(d.rows, p.rows...)
	for _, reason := range p.reasons {
		d.defect("skipped " + reason)
	}
	if more := p.skipped - len(p.reasons); more > 0 {
		d.defect(fmt.Sprintf("skipped %d rows more that cannot be read", more))
	}
	if p.cut != nil {
		d.defect(p.cut.Error())
	}
}

// count compares totalCount with what came. What was skipped came, too.
func (d *download) count(total int64) {
	if n := int64(len(d.rows) + d.skipped); total > n {
		d.defect(fmt.Sprintf("Microsoft counts %d rows and sent %d", total, n))
	}
}

// maxDefects bounds the reasons that a download of many pages collects.
const maxDefects = 20

func (d *download) defect(reason string) {
	if len(d.defects) < maxDefects {
		d.defects = append(d.defects, reason)
	}
}

// microsoft is what Microsoft says.
type microsoft struct {
	apis   [apis]download
	source string
	// taken is when it was asked: no row is later, but for clocks that differ. live
	// says that it is known exactly; of a file it is an upper bound.
	taken time.Time
	live  bool
	own   []ownRequest // that were made to ask
}

// ownRequest is a request of this program to the Security APIs, which Microsoft lists
// like any other.
type ownRequest struct {
	ID   string    `json:"id"`
	Time time.Time `json:"time"`
}

// AnswerError is a refusal of Partner Center's, or of what stands in front of it.
type AnswerError struct {
	API    string // the last segment of its path
	Status int
	Text   string // its code and message, as far as it has them; never a secret
}

func (e *AnswerError) Error() string {
	s := fmt.Sprintf("ask %s: %d %s", e.API, e.Status, http.StatusText(e.Status))
	if e.Text != "" {
		s += ", " + e.Text
	}
	return s
}

// Hint says what to do about it.
func (e *AnswerError) Hint() string {
	switch {
	case strings.Contains(e.Text, "900421"):
		return "Microsoft's records need a token with MFA: sign in anew with MFA, as an app+user sign-in with Partner Center as resource"
	case strings.Contains(e.Text, "900420"):
		return "get the token for the resource https://api.partnercenter.microsoft.com"
	case strings.Contains(e.Text, "900329"):
		return "these APIs take app+user tokens only, no app-only ones: sign in as a user of the partner tenant, with MFA"
	case e.Status == http.StatusUnauthorized:
		return "get a fresh app+user token for https://api.partnercenter.microsoft.com with MFA; partnerguard explain says what is wrong with one"
	case e.Status == http.StatusForbidden:
		return "the user of the token needs a role in Partner Center that may see the security reports"
	case e.Status == http.StatusTooManyRequests:
		return "Partner Center throttles the tenant; try again later, or save its answers and read them with --from"
	case e.Status >= 300 && e.Status < 400:
		return "it answers with a redirection, which no token follows: check the upstream's url"
	}
	return "try again later, or save Microsoft's answers and read them with --from"
}

const (
	maxPages      = 200             // of one API
	maxThrottles  = 8               // answers of 429 to one request
	maxFailures   = 3               // other answers that may pass, to one request
	maxRetryAfter = 5 * time.Minute // a longer wait is left to the caller
)

// client asks the Security APIs.
type client struct {
	http    http.Client
	base    *url.URL
	token   func(context.Context) (string, error)
	now     func() time.Time
	waiting func(time.Duration, string)

	bearer      string
	refreshed   bool // the token was asked for a second time
	correlation string
	own         []ownRequest
}

// fetch asks all three. An API that fails is absent; an error is returned when all do,
// and when the token is no good.
func fetch(ctx context.Context, cfg *Config) (*microsoft, error) {
	base, err := url.Parse(cfg.URL)
	if err != nil {
		return nil, fmt.Errorf("reconcile: %w", err)
	}
	c := &client{
		http: http.Client{
			Transport: cfg.Transport,
			// The token goes nowhere but where it was told to go.
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
		base: base, token: cfg.Token, now: cfg.Now, waiting: cfg.Waiting, correlation: uuid.NewString(),
	}
	if c.bearer, err = c.token(ctx); err != nil {
		return nil, err
	}
	ms := &microsoft{source: cfg.URL, taken: cfg.Now().UTC(), live: true}
	var last error
	failed := 0
	for a := range apis {
		query := url.Values{}
		if a == adoptionAPI {
			from := ms.taken.Add(-keptByMicrosoft)
			if cfg.Since.After(from) {
				from = cfg.Since.UTC()
			}
			query.Set("startDate", from.Format(time.DateOnly))
			query.Set("endDate", ms.taken.Format(time.DateOnly))
		}
		err := c.all(ctx, a, query, &ms.apis[a])
		var answer *AnswerError
		switch {
		case err == nil:
			continue
		case ctx.Err() != nil:
			return nil, ctx.Err()
		case errors.As(err, &answer) && answer.Status == http.StatusUnauthorized:
			return nil, err
		}
		failed, last = failed+1, err
		ms.apis[a].absent = err.Error()
	}
	if failed == int(apis) {
		return nil, last
	}
	ms.own = c.own
	return ms, nil
}

// all reads every page of an API. Whether they have further pages is not documented
// (links are those of other collections).
func (c *client) all(ctx context.Context, a api, query url.Values, d *download) error {
	target := c.base.JoinPath("v1", a.String())
	target.RawQuery = query.Encode()
	header := http.Header{}
	seen := map[string]bool{}
	total := int64(-1)
	for n := 0; ; n++ {
		body, err := c.get(ctx, a, target, header)
		var page *apiPage
		if err == nil {
			if page, err = parseAnswer(body); err != nil {
				err = fmt.Errorf("read the answer of %s: %w", a, err)
			}
		}
		switch {
		case err != nil && n == 0:
			return err
		case err != nil: // what came before is of use
			if ctx.Err() != nil {
				return ctx.Err()
			}
			d.defect(fmt.Sprintf("page %d is missing: %v", n+1, err))
			return nil
		}
		total = max(total, page.total)
		if d.add(page); page.cut != nil || page.next == nil {
			d.count(total)
			return nil
		}
		next, more, err := c.follow(page.next)
		key := ""
		if err == nil {
			key = fmt.Sprint(next, more)
		}
		switch {
		case err != nil:
			d.defect(err.Error())
		case seen[key]:
			d.defect("the link to the next page leads round in a circle")
		case n+1 == maxPages || len(d.rows) >= maxAPIRows:
			d.defect(fmt.Sprintf("there are more than %d pages or %d rows", maxPages, maxAPIRows))
		default:
			seen[key] = true
			target, header = next, more
			continue
		}
		return nil
	}
}

// follow resolves a link. It must lead to where the first request went: a token goes
// nowhere else.
func (c *client) follow(l *apiLink) (*url.URL, http.Header, error) {
	u, err := url.Parse(string(l.URI))
	if err != nil {
		return nil, nil, errors.New("the link to the next page is no URI")
	}
	if u.Host == "" {
		// As the SDKs do: links have the version or not, a slash in front or not.
		path := "/" + strings.TrimPrefix(u.Path, "/")
		if !strings.HasPrefix(strings.ToLower(path), "/v1/") {
			path = "/v1" + path
		}
		u = &url.URL{Scheme: c.base.Scheme, Host: c.base.Host, Path: path, RawQuery: u.RawQuery}
	}
	if u.Scheme != c.base.Scheme || u.Host != c.base.Host || u.User != nil {
		return nil, nil, errors.New("the link to the next page leads to another host")
	}
	header := http.Header{}
	for _, h := range l.Headers {
		if strings.EqualFold(string(h.Key), "MS-ContinuationToken") {
			header.Set("MS-ContinuationToken", string(h.Value))
		}
	}
	return u, header, nil
}

// get asks once for one page, and again where the answer says that it will pass. Every
// attempt has an id of its own, which tells it from the calls of others in Microsoft's
// records.
func (c *client) get(ctx context.Context, a api, target *url.URL, header http.Header) ([]byte, error) {
	throttles, failures := 0, 0
	for {
		body, res, err := c.once(ctx, target, header)
		wait, why := time.Duration(0), ""
		switch {
		case err != nil:
			if failures++; ctx.Err() != nil || failures == maxFailures {
				return nil, fmt.Errorf("ask %s: %w", a, err)
			}
			wait, why = backOff(failures), "Partner Center cannot be reached"
		case res.StatusCode == http.StatusOK:
			return body, nil
		case res.StatusCode == http.StatusUnauthorized && !c.refreshed:
			c.refreshed = true
			fresh, err := c.token(ctx)
			if err != nil {
				return nil, err
			}
			if fresh == c.bearer {
				return nil, c.refusal(a, res, body)
			}
			c.bearer = fresh
			continue
		case res.StatusCode == http.StatusNoContent && res.Header.Get("Retry-After") == "":
			return []byte("[]"), nil
		case res.StatusCode == http.StatusTooManyRequests || res.StatusCode == http.StatusNoContent: // 204: not ready yet
			throttles++
			if wait = retryAfter(res.Header, c.now()); wait < 0 {
				wait = backOff(throttles)
			}
			if why = "Partner Center throttles"; throttles > maxThrottles || wait > maxRetryAfter {
				return nil, c.refusal(a, res, body)
			}
		case res.StatusCode >= 500:
			failures++
			if wait = retryAfter(res.Header, c.now()); wait < 0 {
				wait = backOff(failures)
			}
			if why = "Partner Center fails"; failures == maxFailures || wait > maxRetryAfter {
				return nil, c.refusal(a, res, body)
			}
		default:
			return nil, c.refusal(a, res, body)
		}
		c.waiting(wait, why)
		timer := time.NewTimer(wait)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return nil, ctx.Err()
		}
	}
}

func backOff(n int) time.Duration { return time.Second << min(n-1, 5) }

// retryAfter reads Retry-After (RFC 9110, section 10.2.3); less than 0 is not said.
func retryAfter(h http.Header, now time.Time) time.Duration {
	value := strings.TrimSpace(h.Get("Retry-After"))
	if seconds, err := strconv.ParseUint(value, 10, 32); err == nil {
		return time.Duration(seconds) * time.Second
	}
	if at, err := http.ParseTime(value); err == nil {
		return max(0, at.Sub(now))
	}
	return -1
}

// once makes one request and reads the answer whole.
func (c *client) once(ctx context.Context, target *url.URL, header http.Header) ([]byte, *http.Response, error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, target.String(), nil)
	if err != nil {
		return nil, nil, err
	}
	id := uuid.NewString()
	r.Header = header.Clone()
	r.Header.Set("Authorization", "Bearer "+c.bearer)
	r.Header.Set("Accept", "application/json")
	r.Header.Set("User-Agent", "partnerguard-reconcile")
	r.Header.Set("MS-RequestId", id)
	r.Header.Set("MS-CorrelationId", c.correlation)
	c.own = append(c.own, ownRequest{id, c.now().UTC()})
	res, err := c.http.Do(r)
	if err != nil {
		return nil, nil, err
	}
	defer res.Body.Close()
	in := io.Reader(res.Body)
	if strings.EqualFold(res.Header.Get("Content-Encoding"), "gzip") && !res.Uncompressed {
		if in, err = gzip.NewReader(in); err != nil {
			return nil, nil, err
		}
	}
	body, err := io.ReadAll(io.LimitReader(in, maxAnswer+1))
	switch {
	case err != nil:
		return nil, nil, err
	case len(body) > maxAnswer:
		return nil, nil, fmt.Errorf("the answer is larger than %d MiB", maxAnswer>>20)
	}
	return body, res, nil
}

// refusal is an answer as an error. A message that repeats the token, as some
// gateways do, is left out.
func (c *client) refusal(a api, res *http.Response, body []byte) error {
	e := &AnswerError{API: a.String(), Status: res.StatusCode}
	if f := parseFailure(body[:min(len(body), 64<<10)]); f.known() {
		e.Text = f.String()
	} else if status := res.Status; strings.Contains(status, "MFA") {
		e.Text = cleanText(status) // in one known shape the reason phrase is all there is
	}
	if holdsSecret(e.Text, c.bearer) {
		e.Text = ""
	}
	return e
}

// holdsSecret reports whether text holds secret, or a part of it that is worth
// keeping.
func holdsSecret(text, secret string) bool {
	const part = 12
	if len(secret) <= part {
		return secret != "" && strings.Contains(text, secret)
	}
	for i := 0; i+part <= len(text); i++ {
		if strings.Contains(secret, text[i:i+part]) {
			return true
		}
	}
	return false
}

// dedupe removes rows that say the same as another: pages that overlap, and rows that
// were logged twice. Rows that share only an id are not the same: clients reuse ids.
func dedupe(rows []apiRow) []apiRow {
	seen := make(map[apiRow]bool, len(rows))
	return slices.DeleteFunc(rows, func(r apiRow) bool {
		if seen[r] {
			return true
		}
		seen[r] = true
		return false
	})
}
