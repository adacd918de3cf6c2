package main

import (
	"context"
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"github.com/partnerguard/partnerguard/policy"
	"github.com/partnerguard/partnerguard/proxy"
	"github.com/partnerguard/partnerguard/telemetry/ledger"
)

const (
	estateTenant       = "1b2c3d4e-0a1b-4c2d-8e3f-901234567890"
	estateIntegrations = 60
	estateUsers        = 400
	estateCustomers    = 3000
	// rareCalls is how many calls each of the rare users and customers makes.
	rareCalls = 40
	rareNames = 20
)

// estateRoutes are what the integrations call; in path, {customer-tenant-id} is one
// of the customers and any other name an id of its own.
var estateRoutes = strings.Fields(`
	/v1/customers /v1/customers/{customer-tenant-id} /v1/customers/{customer-tenant-id}/subscriptions
	/v1/customers/{customer-tenant-id}/subscriptions/{subscription-id} /v1/invoices /v1/invoices/{invoice-id}
	/v1/invoices/{invoice-id}/lineitems/OneTime/BillingLineItems /v1/customers/{customer-tenant-id}/users
	/v1/customers/{customer-tenant-id}/users/{user-id}/licenses /v1/customers/{customer-tenant-id}/orders
	/v1/customers/{customer-tenant-id}/orders/{order-id} /v1/customers/{customer-tenant-id}/subscribedskus
	/v1/customers/{customer-tenant-id}/profiles/billing /v1/customers/{customer-tenant-id}/profiles/company
	/v1/customers/{customer-tenant-id}/qualifications /v1/customers/{customer-tenant-id}/agreements
	/v1/customers/{customer-tenant-id}/servicerequests /v1/customers/{customer-tenant-id}/carts/{cart-id}
	/v1/customers/{customer-tenant-id}/carts /v1/customers/{customer-tenant-id}/subscriptions/{subscription-id}/usagerecords/resources
	/v1/customers/{customer-tenant-id}/usagesummary /v1/customers/{customer-tenant-id}/usagebudget
	/v1/customers/{customer-tenant-id}/products/{product-id}/skus/{sku-id}/availabilities /v1/customers/{customer-tenant-id}/products
	/v1/customers/{customer-tenant-id}/transfers /v1/customers/{customer-tenant-id}/relationships /v1/products /v1/products/{product-id}
	/v1/products/{product-id}/skus/{sku-id}/availabilities /v1/auditrecords /v1/agreements /v1/profiles/legalbusiness /v1/profiles/mpn
	/v1/servicerequests /v1/serviceincidents /v1/domains /v1/countryvalidationrules/DE /v1/ratecards/azure
	/v1/customers/{customer-tenant-id}/analytics/licenses/usage /generatetoken`)

// estate makes the calls of a partner: integrations of very different use, each with
// a few applications, users and routes, for customers of very different size, with
// tokens that serve for about an hour, and a few odd callers.
type estate struct {
	rng          *rand.Rand
	from, until  time.Time
	calls        int
	integrations []*scripted
	customers    []string
	use          *rand.Zipf // of integrations
	size         *rand.Zipf // of customers
	now          atomic.Int64

	samples []sample
}

// scripted is one integration.
type scripted struct {
	name, owner, peer, agent, application, rule string
	mode                                        policy.Mode
	ownIDs                                      bool // sends MS-RequestId and MS-CorrelationId
	apps                                        []string
	users                                       []person
	routes                                      []string
	pick                                        *rand.Zipf // of routes
	tokens                                      map[[2]int]policy.Token
}

type person struct {
	oid, upn string
	mfa      bool
}

// sample is what a search may ask for.
type sample struct {
	call, request, correlation, user, customer, integration string

	time time.Time
	n    int
}

func newEstate(from, until time.Time, calls int) *estate {
	e := &estate{rng: rand.New(rand.NewPCG(1, 2)), from: from, until: until, calls: calls}
	e.use = rand.NewZipf(e.rng, 1.2, 4, estateIntegrations-1)
	e.size = rand.NewZipf(e.rng, 1.1, 20, estateCustomers-1)
	for range estateCustomers {
		e.customers = append(e.customers, e.guid())
	}
	modes := []policy.Mode{policy.Audit, policy.Audit, policy.TagMode, policy.Enforce}
	agents := []string{"python-requests/2.32.3", "PartnerCenterSdk/3.4 (.NET)", "curl/8.5.0", "axios/1.7.2", "PostmanRuntime/7.39"}
	for i := range estateIntegrations {
		s := &scripted{
			name: fmt.Sprintf("integration-%02d", i), owner: fmt.Sprintf("team-%d@contoso.example", i%12), peer: fmt.Sprintf("10.20.%d.%d", i/16, 10+i),
			agent: agents[i%len(agents)], mode: modes[i%len(modes)], ownIDs: i%2 == 1, tokens: map[[2]int]policy.Token{},
		}
		if i%3 == 0 {
			s.application = "Contoso " + s.name
		}
		if s.mode != policy.Audit {
			s.rule = "wave " + fmt.Sprint(i%5)
		}
		for range 1 + i%3 {
			s.apps = append(s.apps, e.guid())
		}
		for _, k := range e.rng.Perm(len(estateRoutes))[:6+i%10] {
			s.routes = append(s.routes, estateRoutes[k])
		}
		s.pick = rand.NewZipf(e.rng, 1.3, 2, uint64(len(s.routes)-1))
		e.integrations = append(e.integrations, s)
	}
	for i := range estateUsers {
		s := e.integrations[i%estateIntegrations]
		s.users = append(s.users, person{e.guid(), fmt.Sprintf("svc-%03d@contoso.example", i), i%7 != 0})
	}
	return e
}

func (e *estate) guid() string {
	var id uuid.UUID
	binary.BigEndian.PutUint64(id[:8], e.rng.Uint64())
	binary.BigEndian.PutUint64(id[8:], e.rng.Uint64())
	id[6], id[8] = 0x40|id[6]&0xf, 0x80|id[8]&0x3f
	return id.String()
}

func (e *estate) rareUser(s sample) string {
	return fmt.Sprintf("rare-%d@contoso.example", s.n%rareNames)
}

func (e *estate) rareCustomer(s sample) string {
	return fmt.Sprintf("7a7e0000-0000-4000-8000-%012d", s.n%rareNames)
}

// write writes the calls into the ledger of dir.
func (e *estate) write(ctx context.Context, dir string) error {
	e.now.Store(e.from.UnixMicro())
	l, err := ledger.Open(ledger.Config{
		Dir: dir, Instance: "guard-1", Retention: -1,
		Now: func() time.Time { return time.UnixMicro(e.now.Load()).UTC() },
	})
	if err != nil {
		return err
	}
	step := e.until.Sub(e.from).Microseconds() / int64(e.calls)
	// A few calls are under way at any time.
	under := make([]*proxy.Record, 4)
	var rec proxy.Record
	for i := range e.calls {
		if i%10_000 == 0 && ctx.Err() != nil {
			l.Close()
			return ctx.Err()
		}
		at := e.now.Add(1 + e.rng.Int64N(2*step-1))
		slot := &under[i%len(under)]
		if *slot != nil {
			if err := l.Finish(*slot); err != nil {
				l.Close()
				return err
			}
			rec = proxy.Record{Encoded: (*slot).Encoded[:0]}
		} else {
			rec = proxy.Record{}
		}
		next := rec
		e.call(i, time.UnixMicro(at).UTC(), &next)
		if err := l.Decide(&next); err != nil {
			l.Close()
			return err
		}
		*slot = &next
	}
	for _, rec := range under {
		if rec != nil {
			if err := l.Finish(rec); err != nil {
				l.Close()
				return err
			}
		}
	}
	return l.Close()
}

// call makes the ith call.
func (e *estate) call(i int, at time.Time, r *proxy.Record) {
	s := e.integrations[e.use.Uint64()]
	app, user := e.rng.IntN(len(s.apps)), e.rng.IntN(len(s.users))
	route := s.routes[s.pick.Uint64()]
	binary.BigEndian.PutUint64(r.Call[:8], uint64(at.UnixMilli())<<16|7<<12|0xb3d)
	binary.BigEndian.PutUint64(r.Call[8:], 1<<63|0x1a3c5e1177f20000+uint64(i))
	r.Time, r.Instance, r.Generation, r.Listener, r.Peer, r.Upstream = at, "guard-1", 3, "main", s.peer, "partner-center"
	r.Integration, r.Owner, r.Evidence = s.name, s.owner, "app_id"
	r.Mode, r.Rule, r.Effect = s.mode, s.rule, policy.Allow
	r.RequestID, r.CorrelationID, r.UserAgent, r.Application = r.Call.String(), r.Call.String(), s.agent, s.application
	if s.ownIDs {
		r.RequestID, r.CorrelationID = e.guid(), e.guid()
	}
	r.Method = "GET"
	if strings.HasSuffix(route, "carts") || route == "/generatetoken" {
		r.Method = "POST"
	}
	customer := e.customers[e.size.Uint64()]
	who := s.users[user]
	rare := e.calls / (rareNames * rareCalls)
	if rare > 0 && i%rare == 0 {
		n := i / rare % rareNames
		route, customer = "/v1/customers/{customer-tenant-id}/users/{user-id}/licenses", e.rareCustomer(sample{n: n})
		who, user = person{fmt.Sprintf("7a7e0000-0000-4000-8000-1%011d", n), e.rareUser(sample{n: n}), true}, 1000+n
	}
	r.Route, r.Path = route, e.path(route, customer)
	if strings.Contains(route, "{customer-tenant-id}") {
		r.Customer = customer
	} else if e.rng.IntN(3) == 0 {
		r.QueryNames = []string{"size", "offset"}
	}
	r.Token = s.token(e, app, user, who, at)
	r.Reason = policy.ReasonMFAPresent
	if r.Token.MFA == policy.MFAAbsent {
		r.Reason, r.WouldReject = policy.ReasonMFAMissing, true
	}
	e.oddities(r)
	e.outcome(r)
	if i >= len(e.samples)*(e.calls/repeats) && len(e.samples) < repeats && r.Customer != "" && r.Token.UPN != "" {
		e.samples = append(e.samples, sample{r.Call.String(), r.RequestID, r.CorrelationID, who.upn, r.Customer, r.Integration, at, i})
	}
}

// path puts values for the names in a route.
func (e *estate) path(route, customer string) string {
	var b strings.Builder
	for {
		literal, rest, found := strings.Cut(route, "{")
		b.WriteString(literal)
		if !found {
			return b.String()
		}
		name, after, _ := strings.Cut(rest, "}")
		switch name {
		case "customer-tenant-id":
			b.WriteString(customer)
		case "product-id", "sku-id":
			fmt.Fprintf(&b, "CFQ7TTC0%04X", e.rng.IntN(200))
		case "invoice-id":
			fmt.Fprintf(&b, "G0%08d", e.rng.IntN(3000))
		default:
			b.WriteString(e.guid())
		}
		route = after
	}
}

// token is the one that an application has for a user: it serves for 60 to 90
// minutes.
func (s *scripted) token(e *estate, app, user int, who person, at time.Time) policy.Token {
	key := [2]int{app, user}
	t, ok := s.tokens[key]
	if ok && t.ExpiresAt > at.Unix() {
		return t
	}
	var uti [16]byte
	binary.BigEndian.PutUint64(uti[:8], e.rng.Uint64())
	binary.BigEndian.PutUint64(uti[8:], e.rng.Uint64())
	t = policy.Token{
		Verified: true, Kind: policy.KindAppUser, MFA: policy.MFAPresent, TenantID: estateTenant, AppID: s.apps[app], ObjectID: who.oid, UPN: who.upn,
		UTI: base64.RawURLEncoding.EncodeToString(uti[:]), AMR: []string{"pwd", "mfa"}, IssuedAt: at.Unix() - 300, ExpiresAt: at.Unix() + 3600 + e.rng.Int64N(1800),
	}
	if !who.mfa {
		t.MFA, t.AMR = policy.MFAAbsent, []string{"pwd"}
	}
	s.tokens[key] = t
	return t
}

// oddities makes some calls the unusual ones of a real estate.
func (e *estate) oddities(r *proxy.Record) {
	switch n := e.rng.IntN(1000); {
	case n < 40:
		r.Token.Kind, r.Token.MFA, r.Token.AMR, r.Token.UPN, r.Token.ObjectID = policy.KindAppOnly, policy.MFANotApplicable, nil, "", ""
		r.Reason, r.WouldReject = policy.ReasonAppOnly, false
	case n < 60:
		r.Token.Verified, r.Token.MFA = false, policy.MFAUnknown
		r.Reason, r.WouldReject, r.Evidence = policy.ReasonTokenExpired, true, "source"
	case n < 65:
		r.Token = policy.Token{Kind: policy.KindOpaque}
		r.Reason, r.WouldReject, r.Evidence = policy.ReasonTokenOpaque, true, "path_prefix"
	case n < 68: // a scanner
		r.Token = policy.Token{}
		r.Integration, r.Owner, r.Evidence, r.Mode, r.Rule = "unknown", "", "none", policy.Audit, ""
		r.Reason, r.WouldReject, r.Customer = policy.ReasonTokenMissing, true, ""
		r.Route, r.Path, r.UserAgent = "", fmt.Sprintf("/%08x.php", e.rng.Uint32()), fmt.Sprintf("scan/%d", e.rng.IntN(5000))
	case n < 70: // claims whatever it likes
		r.Token = policy.Token{Kind: policy.KindAppUser, AppID: e.guid(), ObjectID: e.guid(), TenantID: e.guid(), UTI: e.guid(), AMR: []string{"mfa"}}
		r.Integration, r.Owner, r.Evidence, r.Mode, r.Rule = "unknown", "", "none", policy.Audit, ""
		r.Reason, r.WouldReject = policy.ReasonTokenBadSignature, true
	}
	if r.WouldReject && r.Mode == policy.Enforce {
		r.Effect = policy.Reject
	} else if r.WouldReject && r.Mode == policy.TagMode {
		r.Effect = policy.Tag
	}
}

func (e *estate) outcome(r *proxy.Record) {
	r.Duration = time.Duration(300+e.rng.IntN(900)) * time.Microsecond
	if r.Effect == policy.Reject {
		r.Status, r.BytesOut = 401, 600
		return
	}
	r.UpstreamTime = time.Duration(40_000+e.rng.IntN(900_000)) * time.Microsecond
	r.Duration += r.UpstreamTime
	r.Status, r.BytesOut = 200, 500+e.rng.Int64N(60_000)
	r.UpstreamRequestID, r.UpstreamCorrelationID = r.RequestID, r.CorrelationID
	switch n := e.rng.IntN(1000); {
	case !r.Token.Verified:
		r.Status, r.Rejection, r.Code, r.UpstreamStatus = 401, policy.RejectionTokenRefused, "800001", "401 Unauthorized"
	case r.Reason == policy.ReasonMFAMissing && n < 300:
		r.Status, r.Rejection, r.Code, r.UpstreamStatus, r.MFACompliant = 401, policy.RejectionMFARequired, "900421", "401 Unauthorized - MFA required", policy.CompliantFalse
	case n < 20:
		r.Status = 404
	case n < 24:
		r.Status = 429
	case n < 27:
		r.Status, r.UpstreamRequestID = 502, ""
	case n < 28:
		r.Status, r.Error = 0, "client_canceled"
	}
	if r.Method == "GET" && r.Token.Verified && r.Token.Kind == policy.KindAppUser && r.MFACompliant == policy.CompliantUnknown && r.Status == 200 {
		r.MFACompliant = policy.CompliantTrue
	}
}
