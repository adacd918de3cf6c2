package ledger

import (
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"github.com/partnerguard/partnerguard/policy"
	"github.com/partnerguard/partnerguard/proxy"
)

// traffic makes calls as a partner's automation does: some programs of different
// habits, tokens that last an hour, customers of whom few are busy, ids that are
// random for each call.
type traffic struct {
	rnd      *rand.Rand
	now      time.Time
	at       atomic.Int64 // now, for other goroutines
	programs []program
	calls    uint64
}

type program struct {
	name, owner, app, agent, application, peer string
	users                                      []string
	customers                                  []string
	kind                                       policy.Kind
	mfa                                        policy.MFA
	routes                                     []int
	ownIDs                                     bool // sends its own MS-RequestId
	token                                      policy.Token
	until                                      time.Time
}

var trafficRoutes = []struct{ method, route, path string }{
	{"GET", "/v1/customers/{customer-tenant-id}/subscriptions", "/v1/customers/{customer}/subscriptions"},
	{"GET", "/v1/customers/{customer-tenant-id}/subscriptions/{subscription-id}", "/v1/customers/{customer}/subscriptions/{item}"},
	{"PATCH", "/v1/customers/{customer-tenant-id}/subscriptions/{subscription-id}", "/v1/customers/{customer}/subscriptions/{item}"},
	{"GET", "/v1/customers/{customer-tenant-id}", "/v1/customers/{customer}"},
	{"GET", "/v1/customers/{customer-tenant-id}/users", "/v1/customers/{customer}/users"},
	{"GET", "/v1/customers/{customer-tenant-id}/users/{user-id}/licenses", "/v1/customers/{customer}/users/{item}/licenses"},
	{"POST", "/v1/customers/{customer-tenant-id}/orders", "/v1/customers/{customer}/orders"},
	{"GET", "/v1/customers", "/v1/customers"},
	{"GET", "/v1/invoices", "/v1/invoices"},
	{"GET", "/v1/invoices/{invoice-id}/lineitems", "/v1/invoices/G0{number}/lineitems"},
}

func newTraffic() *traffic {
	t := &traffic{rnd: rand.New(rand.NewPCG(1, 2)), now: time.Date(2026, 3, 1, 0, 0, 3, 0, time.UTC)}
	t.at.Store(t.now.UnixMicro())
	agents := []string{"python-requests/2.32.3", "Java/17.0.10", "Partner Center .NET SDK/3.4.0", "axios/1.7.2", "PowerShell/7.4.2"}
	for i := range 20 {
		p := program{
			name: fmt.Sprintf("program-%02d", i), owner: fmt.Sprintf("team%d@contoso.example", i%7), app: t.uuid(),
			agent: agents[i%len(agents)], peer: fmt.Sprintf("10.20.%d.%d", i%4, 10+i), kind: policy.KindAppUser, mfa: policy.MFAPresent, ownIDs: i%2 == 0,
		}
		if i%5 == 4 {
			p.kind, p.mfa = policy.KindAppOnly, policy.MFANotApplicable
		} else if i%5 == 3 {
			p.mfa = policy.MFAAbsent
		}
		if i%3 == 0 {
			p.application = "Contoso Billing " + fmt.Sprint(i)
		}
		for range 1 + i%4 {
			p.users = append(p.users, t.uuid())
		}
		for range 300 {
			p.customers = append(p.customers, t.uuid())
		}
		for range 4 {
			p.routes = append(p.routes, t.rnd.IntN(len(trafficRoutes)))
		}
		t.programs = append(t.programs, p)
	}
	return t
}

func (t *traffic) uuid() string {
	id, _ := uuid.NewRandomFromReader(randReader{t.rnd})
	return id.String()
}

type randReader struct{ *rand.Rand }

func (r randReader) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = byte(r.Uint32())
	}
	return len(p), nil
}

// clock is the time of the latest call.
func (t *traffic) clock() time.Time { return time.UnixMicro(t.at.Load()).UTC() }

// call returns the next call, after on average gap.
func (t *traffic) call(gap time.Duration) *proxy.Record {
	t.now = t.now.Add(time.Duration(t.rnd.ExpFloat64() * float64(gap)))
	t.at.Store(t.now.UnixMicro())
	p := &t.programs[min(t.rnd.IntN(len(t.programs)), t.rnd.IntN(len(t.programs)))]
	if t.now.After(p.until) {
		p.until = t.now.Add(time.Hour)
		uti := make([]byte, 16)
		randReader{t.rnd}.Read(uti)
		p.token = policy.Token{
			Verified: true, Kind: p.kind, MFA: p.mfa, TenantID: "1b2c3d4e-0a1b-4c2d-8e3f-901234567890", AppID: p.app,
			ObjectID: p.users[t.rnd.IntN(len(p.users))], UTI: base64.RawURLEncoding.EncodeToString(uti),
			IssuedAt: t.now.Unix() - 5, ExpiresAt: t.now.Unix() + 4200 + int64(t.rnd.IntN(900)),
		}
		switch p.mfa {
		case policy.MFAPresent:
			p.token.AMR = []string{"pwd", "mfa"}
		case policy.MFAAbsent:
			p.token.AMR = []string{"pwd"}
		}
	}
	r := trafficRoutes[p.routes[t.rnd.IntN(len(p.routes))]]
	customer := p.customers[min(t.rnd.IntN(300), t.rnd.IntN(300))]
	item := uuid.NewSHA1(uuid.Nil, []byte(customer+strconv.Itoa(t.rnd.IntN(3)))).String()
	var id proxy.CallID // as the guard makes them
	t.calls++
	binary.BigEndian.PutUint64(id[:8], uint64(t.now.UnixMilli())<<16|7<<12|0xb3d)
	binary.BigEndian.PutUint64(id[8:], 1<<63|0x1a3c5e1177f20000+t.calls)
	rec := &proxy.Record{Decided: proxy.Decided{
		Call: id, Time: t.now, Instance: "guard-1", Generation: 1, Listener: "main", Peer: p.peer, Method: r.method, Route: r.route,
		Path:     strings.NewReplacer("{customer}", customer, "{item}", item, "{number}", strconv.Itoa(10000+t.rnd.IntN(500))).Replace(r.path),
		Upstream: "partner-center", Integration: p.name, Evidence: "app_id", Owner: p.owner, Token: p.token,
		RequestID: t.uuid(), CorrelationID: t.uuid(), Application: p.application, UserAgent: p.agent,
	}}
	if strings.Contains(r.path, "{customer}") {
		rec.Customer = customer
	}
	d := &rec.Decision
	d.Effect, d.Mode = policy.Allow, policy.Audit
	switch p.mfa {
	case policy.MFAAbsent:
		d.Reason, d.WouldReject = policy.ReasonMFAMissing, true
	case policy.MFANotApplicable:
		d.Reason = policy.ReasonAppOnly
	default:
		d.Reason = policy.ReasonMFAPresent
	}
	took := time.Duration(60+t.rnd.ExpFloat64()*200) * time.Millisecond
	took += time.Duration(t.rnd.IntN(1000)) * time.Microsecond
	rec.Finished = proxy.Finished{
		Status: 200, BytesOut: int64(400 + t.rnd.ExpFloat64()*3000), Duration: took,
		UpstreamTime: took - time.Duration(200+t.rnd.IntN(300))*time.Microsecond, MFACompliant: policy.CompliantTrue,
		UpstreamRequestID: rec.RequestID, UpstreamCorrelationID: rec.CorrelationID,
	}
	switch n := t.rnd.IntN(100); {
	case n < 2:
		rec.Finished.Status, rec.Finished.Code, rec.Finished.UpstreamStatus = 404, "3000", "404 Not Found"
	case n < 3:
		rec.Finished.Status, rec.Finished.UpstreamStatus = 429, "429 Too Many Requests"
	}
	return rec
}
