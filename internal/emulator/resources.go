package emulator

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"
)

// The size of the sample data.
const (
	customerCount     = 103
	subscriptionCount = 3 // per customer
	invoiceCount      = 25
	lineItemCount     = 240 // per invoice
	statementBytes    = 200_000
	priceSheetRows    = 60_000
	reportCount       = 120 // of Insights
	referralCount     = 230
	relationshipCount = 120
)

// state is what calls change.
type state struct {
	mu            sync.Mutex
	subscriptions map[string]*subscriptionState // by customer and subscription
	objects       map[string]object             // created orders, carts, batches, by path
	polls         map[string]int                // of asynchronous work, by key
}

type subscriptionState struct {
	quantity int
	status   string
	version  int
}

func newState() *state {
	return &state{
		subscriptions: map[string]*subscriptionState{},
		objects:       map[string]object{},
		polls:         map[string]int{},
	}
}

// poll counts the calls for a key, from 1.
func (s *state) poll(key string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.polls[key]++
	return s.polls[key]
}

// polled is how often poll was called for a key.
func (s *state) polled(key string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.polls[key]
}

func (s *state) put(path string, o object) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.objects[strings.ToLower(path)] = o
}

func (s *state) get(path string) (object, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	o, ok := s.objects[strings.ToLower(path)]
	return o, ok
}

// centerRoutes lists the emulated operations of Partner Center; paths, methods and who
// may call them are those of the public documentation. What starts with _ is the
// emulator's own.
func centerRoutes() []route {
	const user, both = true, false
	return []route{
		newRoute("POST", "/generatetoken", both, generateToken),
		newRoute("POST", "/v3/generatetoken", both, generateToken),

		newRoute("GET", "/v1/customers", both, listCustomers),
		newRoute("GET", "/v1/customers/{customer}", user, getCustomer),
		newRoute("GET", "/v1/customers/{customer}/profiles/billing", both, getBillingProfile),
		newRoute("GET", "/v1/customers/{customer}/profiles/company", user, getCompanyProfile),
		newRoute("GET", "/v1/customers/{customer}/subscribedskus", user, listSubscribedSKUs),
		newRoute("GET", "/v1/customers/{customer}/users", user, listUsers),
		newRoute("GET", "/v1/customers/{customer}/users/{user}", user, getUser),
		newRoute("GET", "/v1/customers/{customer}/users/{user}/licenses", user, listLicenses),
		newRoute("POST", "/v1/customers/{customer}/users/{user}/licenseupdates", user, updateLicenses),
		newRoute("GET", "/v1/customers/{customer}/directoryroles", user, listRoles),

		newRoute("GET", "/v1/customers/{customer}/subscriptions", both, listSubscriptions),
		newRoute("GET", "/v1/customers/{customer}/subscriptions/{subscription}", both, getSubscription),
		newRoute("PATCH", "/v1/customers/{customer}/subscriptions/{subscription}", both, patchSubscription),
		newRoute("GET", "/v1/customers/{customer}/subscriptions/{subscription}/utilizations/azure", both, listUtilization),

		newRoute("GET", "/v1/customers/{customer}/orders", both, listOrders),
		newRoute("POST", "/v1/customers/{customer}/orders", both, createOrder),
		newRoute("GET", "/v1/customers/{customer}/orders/{order}", both, getOrder),
		newRoute("POST", "/v1/customers/{customer}/carts", both, createCart),
		newRoute("GET", "/v1/customers/{customer}/carts/{cart}", both, getCart),
		newRoute("PUT", "/v1/customers/{customer}/carts/{cart}", both, putCart),
		newRoute("POST", "/v1/customers/{customer}/carts/{cart}/checkout", both, checkoutCart),

		newRoute("GET", "/v1/customers/{customer}/deviceBatches", both, listDeviceBatches),
		newRoute("POST", "/v1/customers/{customer}/deviceBatches", user, createDeviceBatch),
		newRoute("GET", "/v1/customers/{customer}/batchJobStatus/{tracking}", both, getBatchStatus),
		newRoute("POST", "/v1/productUpgrades", user, createUpgrade),
		newRoute("POST", "/v1/productUpgrades/eligibility", user, getEligibility),
		newRoute("POST", "/v1/productUpgrades/{upgrade}/status", user, getUpgradeStatus),

		newRoute("GET", "/v1/invoices", both, listInvoices),
		newRoute("GET", "/v1/invoices/summary", both, getInvoiceSummary),
		newRoute("GET", "/v1/invoices/{invoice}", user, getInvoice),
		newRoute("GET", "/v1/invoices/{invoice}/documents/statement", user, getStatement),
		newRoute("GET", "/v1/invoices/{invoice}/lineitems", both, listLineItems),
		newRoute("GET", "/v1/invoices/{invoice}/lineitems/{provider}/{type}", both, listLineItems),

		newRoute("GET", "/v1/products", both, listProducts),
		newRoute("GET", "/v1/products/{product}", both, getProduct),
		newRoute("GET", "/v1/margins/download", both, downloadMargins),

		newRoute("GET", "/v1/servicerequests", user, listServiceRequests),
		newRoute("GET", "/v1/servicerequests/{request}", user, getServiceRequest),
		newRoute("GET", "/v1/profiles/billing", user, getPartnerProfile),
		newRoute("GET", "/v1/profiles/legalbusiness", both, getPartnerProfile),
		newRoute("GET", "/v1/profiles/mpn", user, getPartnerProfile),
		newRoute("GET", "/v1/profiles/organization", user, getPartnerProfile),
		newRoute("GET", "/v1/profiles/support", user, getPartnerProfile),
		newRoute("GET", "/v1/auditrecords", both, listAuditRecords),
		newRoute("HEAD", "/v1/domains/{domain}", both, headDomain),

		newRoute("GET", "/insights/v1/mpn/ScheduledReport", both, listReports),
		newRoute("GET", "/insights/v1/cmp/ScheduledReport", both, listReports),
		newRoute("GET", "/insights/v1/mpn/ScheduledQueries", both, listQueries),
		newRoute("GET", "/insights/v1/cmp/ScheduledQueries", both, listQueries),
		newRoute("GET", "/insights/v1/mpn/ScheduledReport/execution/{report}", both, getExecution),
		newRoute("GET", "/insights/v1/cmp/ScheduledReport/execution/{report}", both, getExecution),

		newRoute("GET", "/v1/nonMfaCompliantPartnerPrincipals", user, listPrincipals),
		newRoute("GET", "/v1/partnerRequests", user, listPartnerRequests),
		newRoute("GET", "/v1/applicationmfaadoptionstatus", user, listAdoption),

		newRoute("GET", "/v1/_large", both, downloadLarge),
		newRoute("POST", "/v1/_upload", both, upload),
		newRoute("PUT", "/v1/_upload", both, upload),
	}
}

// Large returns the body of GET /v1/_large?bytes=n and of the body directive:
// n pseudo-random bytes, the same for the same Config.Seed.
func (e *Emulator) Large(n int64) io.Reader {
	var seed [32]byte
	copy(seed[:], fmt.Sprintf("large %d", e.cfg.Seed))
	return io.LimitReader(rand.NewChaCha8(seed), n)
}

// Customers returns the ids of the customers that GET /v1/customers lists. Any
// other GUID is taken for a customer, too, unless it starts with 00000000.
func (e *Emulator) Customers() []string {
	ids := make([]string, customerCount)
	for i := range ids {
		ids[i] = e.partner.customerID(i)
	}
	return ids
}

func (p *partner) customerID(i int) string {
	return guid("customer", strconv.FormatUint(p.e.cfg.Seed, 10), strconv.Itoa(i))
}

// withMark makes a response start with a byte order mark, as Partner Center's
// do on many routes, but not on invoices.
func withMark(res response) response {
	res.bom = true
	return res
}

func objectType(name string) object { return object{{"objectType", name}} }

func collection[T any](items []T) object {
	if items == nil {
		items = []T{}
	}
	return object{{"totalCount", len(items)}, {"items", items}, {"attributes", objectType("Collection")}}
}

func link(uri, method string, headers ...object) object {
	if headers == nil {
		headers = []object{}
	}
	return object{{"uri", uri}, {"method", method}, {"headers", headers}}
}

// number reads a query parameter.
func number(q url.Values, name string, otherwise int) int {
	for key, values := range q {
		if n, err := strconv.Atoi(values[0]); err == nil && strings.EqualFold(key, name) {
			return n
		}
	}
	return otherwise
}

// customerError answers for a customer that does not exist.
func customerError(c *call) (response, bool) {
	id := c.params[0]
	if uuid.Validate(id) != nil || strings.HasPrefix(id, "00000000") {
		return partnerError(http.StatusNotFound, "60003", "The tenant "+strconv.Quote(id)+" was not found."), true
	}
	return response{}, false
}

// generateToken exchanges the caller's token for one that only Partner Center
// can read.
func generateToken(c *call) response {
	form, err := url.ParseQuery(string(c.body))
	if err != nil || form.Get("grant_type") != "jwt_token" {
		return partnerError(http.StatusBadRequest, "400", "The grant_type must be jwt_token.")
	}
	token := c.issue(newOpaqueToken(), mustJSON(c.claims))
	return jsonResponse(http.StatusOK, object{
		{"access_token", token}, {"token_type", "bearer"}, {"expires_in", int64(tokenLifetime / time.Second)},
	})
}

// listCustomers pages by seeking: the next link is relative and names the token
// in a header.
func listCustomers(c *call) response {
	query := c.r.URL.Query()
	size, offset := number(query, "size", 40), 0
	if size < 1 || size > 500 {
		return partnerError(http.StatusBadRequest, "400", "The page size must be between 1 and 500.")
	}
	if strings.EqualFold(query.Get("seekOperation"), "Next") {
		raw, err := base64.StdEncoding.DecodeString(c.r.Header.Get("MS-ContinuationToken"))
		if err != nil {
			return partnerError(http.StatusBadRequest, "400", "The continuation token is not valid.")
		}
		if _, err := fmt.Sscanf(string(raw), "page:%d:%d", &offset, &size); err != nil ||
			size < 1 || size > 500 || offset < 0 || offset > customerCount {
			return partnerError(http.StatusBadRequest, "400", "The continuation token is not valid.")
		}
	}
	var items []object
	for i := offset; i < min(offset+size, customerCount); i++ {
		items = append(items, c.customer(c.customerID(i)))
	}
	links := object{{"self", link("/customers?size="+strconv.Itoa(size), "GET")}}
	body := collection(items)
	body.set("totalCount", customerCount)
	if next := offset + size; next < customerCount {
		token := base64.StdEncoding.EncodeToString(fmt.Appendf(nil, "page:%d:%d", next, size))
		links.set("next", link("/customers?seekOperation=Next", "GET",
			object{{"key", "MS-ContinuationToken"}, {"value", token}}))
		body.set("continuationToken", token)
	}
	body.set("links", links)
	return withMark(jsonResponse(http.StatusOK, body))
}

func (p *partner) customer(id string) object {
	short := strings.ToLower(id[:8])
	return object{
		{"id", id},
		{"commerceId", guid("commerce", id)},
		{"companyProfile", object{
			{"tenantId", id}, {"domain", "customer" + short + ".onmicrosoft.com"}, {"companyName", "Customer " + short},
			{"attributes", objectType("CustomerCompanyProfile")},
		}},
		{"relationshipToPartner", "reseller"},
		{"links", object{{"self", link("/customers/"+id, "GET")}}},
		{"attributes", objectType("Customer")},
	}
}

func getCustomer(c *call) response {
	if res, missing := customerError(c); missing {
		return res
	}
	return withMark(jsonResponse(http.StatusOK, c.customer(c.params[0])))
}

func getBillingProfile(c *call) response {
	if res, missing := customerError(c); missing {
		return res
	}
	return jsonResponse(http.StatusOK, object{
		{"id", guid("billing", c.params[0])}, {"email", "billing@customer.example"}, {"culture", "en-US"}, {"language", "en"},
		{"companyName", "Customer " + c.params[0][:8]},
		{"attributes", object{{"etag", `"1"`}, {"objectType", "CustomerBillingProfile"}}},
	})
}

func getCompanyProfile(c *call) response {
	if res, missing := customerError(c); missing {
		return res
	}
	return jsonResponse(http.StatusOK, object{
		{"tenantId", c.params[0]}, {"companyName", "Customer " + c.params[0][:8]}, {"attributes", objectType("CustomerCompanyProfile")},
	})
}

func listSubscribedSKUs(c *call) response {
	return jsonResponse(http.StatusOK, collection([]object{{
		{"availableUnits", 11}, {"activeUnits", 25}, {"consumedUnits", 14}, {"suspendedUnits", 0}, {"totalUnits", 25}, {"warningUnits", 0},
		{"productSku", object{{"id", guid("sku")}, {"name", "Microsoft 365 Business Premium"}, {"skuPartNumber", "SPB"}, {"targetType", "User"}}},
		{"capabilityStatus", "Enabled"}, {"attributes", objectType("SubscribedSku")},
	}}))
}

func (p *partner) customerUser(customer, id string) object {
	return object{
		{"id", id}, {"userPrincipalName", "user-" + id[:4] + "@customer" + customer[:min(8, len(customer))] + ".example"},
		{"displayName", "User " + id[:4]}, {"usageLocation", "DE"}, {"state", "active"},
		{"links", object{{"self", link("/customers/"+customer+"/users/"+id, "GET")}}},
		{"attributes", objectType("CustomerUser")},
	}
}

func listUsers(c *call) response {
	if res, missing := customerError(c); missing {
		return res
	}
	items := make([]object, 5)
	for i := range items {
		items[i] = c.customerUser(c.params[0], guid("user", c.params[0], strconv.Itoa(i)))
	}
	return withMark(jsonResponse(http.StatusOK, collection(items)))
}

func getUser(c *call) response {
	if uuid.Validate(c.params[1]) != nil {
		return partnerError(http.StatusNotFound, "20000", "The user was not found.")
	}
	return withMark(jsonResponse(http.StatusOK, c.customerUser(c.params[0], c.params[1])))
}

func listLicenses(c *call) response {
	return jsonResponse(http.StatusOK, collection([]object{{
		{"productSku", object{{"id", guid("sku")}, {"name", "Microsoft 365 Business Premium"}, {"skuPartNumber", "SPB"}}},
		{"servicePlans", []any{}}, {"attributes", objectType("License")},
	}}))
}

func updateLicenses(c *call) response {
	return jsonResponse(http.StatusCreated, object{
		{"licensesToAssign", []any{}}, {"licensesToRemove", []any{}}, {"licenseWarnings", []any{}}, {"attributes", objectType("LicenseUpdate")},
	})
}

func listRoles(*call) response {
	return jsonResponse(http.StatusOK, collection([]object{
		{{"name", "Helpdesk Administrator"}, {"id", guid("role", "helpdesk")}, {"attributes", objectType("DirectoryRole")}},
		{{"name", "User Account Administrator"}, {"id", guid("role", "users")}, {"attributes", objectType("DirectoryRole")}},
	}))
}

// subscription returns the resource and its entity tag.
func (p *partner) subscription(customer, id string) (object, string) {
	p.state.mu.Lock()
	s := *p.state.subscriptionLocked(customer, id)
	p.state.mu.Unlock()
	etag := s.etag(id)
	return object{
		{"id", id},
		{"offerName", "Microsoft 365 Business Premium"},
		{"friendlyName", "Microsoft 365 Business Premium"},
		{"quantity", s.quantity},
		{"unitType", "Licenses"},
		{"status", s.status},
		{"autoRenewEnabled", true},
		{"billingType", "license"},
		{"billingCycle", "monthly"},
		{"orderId", guid("order", id)[:12]},
		{"links", object{{"self", link("/customers/"+customer+"/subscriptions/"+id, "GET")}}},
		{"attributes", object{{"etag", etag}, {"objectType", "Subscription"}}},
	}, etag
}

func (s *subscriptionState) etag(id string) string {
	return `"` + base64.StdEncoding.EncodeToString(fmt.Appendf(nil, "%s:%d", id, s.version)) + `"`
}

// subscriptionLocked is called with the lock held.
func (s *state) subscriptionLocked(customer, id string) *subscriptionState {
	key := strings.ToLower(customer + "/" + id)
	found := s.subscriptions[key]
	if found == nil {
		found = &subscriptionState{quantity: 10, status: "active", version: 1}
		s.subscriptions[key] = found
	}
	return found
}

func listSubscriptions(c *call) response {
	if res, missing := customerError(c); missing {
		return res
	}
	items := make([]object, subscriptionCount)
	for i := range items {
		items[i], _ = c.subscription(c.params[0], guid("subscription", c.params[0], strconv.Itoa(i)))
	}
	return withMark(jsonResponse(http.StatusOK, collection(items)))
}

func getSubscription(c *call) response {
	if res, missing := customerError(c); missing {
		return res
	}
	body, etag := c.subscription(c.params[0], c.params[1])
	res := withMark(jsonResponse(http.StatusOK, body))
	res.header["ETag"] = []string{etag}
	return res
}

func patchSubscription(c *call) response {
	if res, missing := customerError(c); missing {
		return res
	}
	var change struct {
		Quantity *int
		Status   *string
	}
	if err := json.Unmarshal(bytes.TrimPrefix(c.body, []byte(byteOrderMark)), &change); err != nil {
		return partnerError(http.StatusBadRequest, "400", "The request body is not a subscription.")
	}
	c.state.mu.Lock()
	s := c.state.subscriptionLocked(c.params[0], c.params[1])
	if match := c.r.Header.Get("If-Match"); match != "" && match != s.etag(c.params[1]) {
		c.state.mu.Unlock()
		return partnerError(http.StatusBadRequest, "2055", "The resource has been changed since it was read; the ETag is stale.")
	}
	if change.Quantity != nil {
		s.quantity = *change.Quantity
	}
	if change.Status != nil {
		s.status = *change.Status
	}
	s.version++
	c.state.mu.Unlock()
	return getSubscription(c)
}

// listUtilization is not ready when first asked: 204 with Retry-After.
func listUtilization(c *call) response {
	if c.state.poll("utilization "+strings.Join(c.params, "/")) == 1 {
		res := newResponse(http.StatusNoContent, "", nil)
		res.header["Retry-After"] = []string{"1"}
		return res
	}
	body := collection([]object{{
		{"usageStartTime", "2026-06-01T00:00:00Z"}, {"usageEndTime", "2026-06-02T00:00:00Z"},
		{"resource", object{{"id", guid("meter")}, {"name", "Compute Hours"}, {"category", "Virtual Machines"}}},
		{"quantity", 24}, {"unit", "Hours"}, {"attributes", objectType("AzureUtilizationRecord")},
	}})
	// Real links of this resource lack the first slash.
	body.set("links", object{{"self", link("customers/"+c.params[0]+"/subscriptions/"+c.params[1]+"/utilizations/azure", "GET")}})
	return jsonResponse(http.StatusOK, body)
}

func (p *partner) order(customer, id string) object {
	return object{
		{"id", id}, {"referenceCustomerId", customer}, {"billingCycle", "monthly"}, {"currencyCode", "USD"},
		{"lineItems", []object{{
			{"lineItemNumber", 0}, {"offerId", "CFQ7TTC0LCHC:0002:CFQ7TTC0XZM0"}, {"subscriptionId", guid("subscription", customer, "0")}, {"quantity", 1},
		}}},
		{"creationDate", "2026-06-01T12:00:00.000Z"}, {"status", "completed"},
		{"links", object{{"self", link("/customers/"+customer+"/orders/"+id, "GET")}}},
		{"attributes", objectType("Order")},
	}
}

func listOrders(c *call) response {
	if res, missing := customerError(c); missing {
		return res
	}
	return withMark(jsonResponse(http.StatusOK, collection([]object{c.order(c.params[0], guid("order", c.params[0])[:12])})))
}

func createOrder(c *call) response {
	if res, missing := customerError(c); missing {
		return res
	}
	if !json.Valid(bytes.TrimPrefix(c.body, []byte(byteOrderMark))) {
		return partnerError(http.StatusBadRequest, "400", "The request body is not an order.")
	}
	id := strings.ReplaceAll(uuid.NewString(), "-", "")[:12]
	order := c.order(c.params[0], id)
	path := "/customers/" + c.params[0] + "/orders/" + id
	c.state.put(path, order)
	res := jsonResponse(http.StatusCreated, order)
	res.header["Location"] = []string{path}
	return res
}

func getOrder(c *call) response {
	if order, ok := c.state.get("/customers/" + c.params[0] + "/orders/" + c.params[1]); ok {
		return withMark(jsonResponse(http.StatusOK, order))
	}
	if c.params[1] == guid("order", c.params[0])[:12] {
		return withMark(jsonResponse(http.StatusOK, c.order(c.params[0], c.params[1])))
	}
	return partnerError(http.StatusNotFound, "20000", "The order was not found.")
}

func cartPath(customer, cart string) string { return "/customers/" + customer + "/carts/" + cart }

func newCart(customer, id string) object {
	return object{
		{"id", id}, {"status", "Active"}, {"creationTimestamp", "2026-06-01T12:00:00Z"}, {"lineItems", []any{}},
		{"links", object{{"self", link(cartPath(customer, id), "GET")}}}, {"attributes", objectType("Cart")},
	}
}

func createCart(c *call) response {
	if res, missing := customerError(c); missing {
		return res
	}
	id := uuid.NewString()
	cart := newCart(c.params[0], id)
	c.state.put(cartPath(c.params[0], id), cart)
	res := jsonResponse(http.StatusCreated, cart)
	res.header["Location"] = []string{cartPath(c.params[0], id)}
	return res
}

func getCart(c *call) response {
	cart, ok := c.state.get(cartPath(c.params[0], c.params[1]))
	if !ok {
		return partnerError(http.StatusNotFound, "800002", "The cart was not found.")
	}
	return jsonResponse(http.StatusOK, cart)
}

func putCart(c *call) response {
	res := getCart(c)
	if res.status == http.StatusOK && !json.Valid(c.body) {
		return partnerError(http.StatusBadRequest, "400", "The request body is not a cart.")
	}
	return res
}

func checkoutCart(c *call) response {
	if res := getCart(c); res.status != http.StatusOK {
		return res
	}
	id := guid("order", c.params[1])[:12]
	order := c.order(c.params[0], id)
	c.state.put("/customers/"+c.params[0]+"/orders/"+id, order)
	return jsonResponse(http.StatusCreated, object{{"orders", []object{order}}, {"attributes", objectType("CartCheckoutResult")}})
}

func listDeviceBatches(*call) response {
	return jsonResponse(http.StatusOK, collection([]object{{
		{"id", "sample-batch"}, {"createdBy", "devices@contoso.example"}, {"devicesCount", 2}, {"attributes", objectType("DeviceBatch")},
	}}))
}

// createDeviceBatch answers 202 with a relative Location.
func createDeviceBatch(c *call) response {
	if res, missing := customerError(c); missing {
		return res
	}
	res := newResponse(http.StatusAccepted, "", nil)
	res.header["Location"] = []string{"/customers/" + c.params[0] + "/batchJobStatus/" + uuid.NewString()}
	return res
}

func getBatchStatus(c *call) response {
	status := "Finished"
	switch c.state.poll("batch " + c.params[1]) {
	case 1:
		status = "Queued"
	case 2:
		status = "Processing"
	}
	return jsonResponse(http.StatusOK, object{
		{"batchTrackingId", c.params[1]}, {"batchStatus", status}, {"startedTime", "2026-06-01T12:00:00Z"},
		{"devicesStatus", []any{}}, {"attributes", objectType("BatchUploadDetails")},
	})
}

// createUpgrade answers 202 with a Location that lacks the first slash.
func createUpgrade(*call) response {
	res := newResponse(http.StatusAccepted, "", nil)
	res.header["Location"] = []string{"productUpgrades/" + uuid.NewString()}
	return res
}

func getEligibility(*call) response {
	return jsonResponse(http.StatusOK, object{{"isEligible", true}, {"upgradeId", guid("upgrade")}, {"attributes", objectType("ProductUpgradeEligibility")}})
}

func getUpgradeStatus(c *call) response {
	status := "completed"
	if c.state.poll("upgrade "+c.params[0]) == 1 {
		status = "in_progress"
	}
	return jsonResponse(http.StatusOK, object{{"id", c.params[0]}, {"status", status}, {"lineItems", []any{}}, {"attributes", objectType("ProductUpgradeStatus")}})
}

func invoice(i int) object {
	id := fmt.Sprintf("G%09d", 10_000_000+i)
	return object{
		{"id", id}, {"invoiceDate", fmt.Sprintf("202%d-%02d-08T00:00:00Z", 4+i/12, i%12+1)},
		{"totalCharges", 1000 + 37*i}, {"paidAmount", 0}, {"currencyCode", "USD"}, {"currencySymbol", "$"},
		{"pdfDownloadLink", "/invoices/" + id + "/documents/statement"}, {"invoiceType", "Recurring"}, {"documentType", "invoice"},
		{"links", object{{"self", link("/invoices/"+id, "GET")}}}, {"attributes", objectType("Invoice")},
	}
}

// listInvoices pages by size and offset.
func listInvoices(c *call) response {
	query := c.r.URL.Query()
	size, offset := number(query, "size", 20), number(query, "offset", 0)
	if size < 1 || size > 2000 || offset < 0 {
		return partnerError(http.StatusBadRequest, "400", "size or offset is out of range.")
	}
	var items []object
	for i := offset; i < min(offset+size, invoiceCount); i++ {
		items = append(items, invoice(i))
	}
	page := func(offset int) object { return link(fmt.Sprintf("/invoices?size=%d&offset=%d", size, offset), "GET") }
	links := object{{"self", page(offset)}}
	if offset+size < invoiceCount {
		links.set("next", page(offset+size))
	}
	if offset > 0 {
		links.set("previous", page(max(0, offset-size)))
	}
	body := collection(items)
	body.set("totalCount", invoiceCount)
	body.set("links", links)
	return jsonResponse(http.StatusOK, body)
}

func getInvoiceSummary(*call) response {
	return jsonResponse(http.StatusOK, object{{"balanceAmount", 4711.5}, {"currencyCode", "USD"}, {"attributes", objectType("InvoiceSummary")}})
}

func findInvoice(id string) (object, bool) {
	n, err := strconv.Atoi(strings.TrimPrefix(strings.ToUpper(id), "G"))
	i := n - 10_000_000
	if err != nil || i < 0 || i >= invoiceCount {
		return nil, false
	}
	return invoice(i), true
}

func invoiceMissing() response {
	return partnerError(http.StatusNotFound, "2002", "The invoice was not found.")
}

func getInvoice(c *call) response {
	found, ok := findInvoice(c.params[0])
	if !ok {
		return invoiceMissing()
	}
	return jsonResponse(http.StatusOK, found)
}

func getStatement(c *call) response {
	if _, ok := findInvoice(c.params[0]); !ok {
		return invoiceMissing()
	}
	body := io.MultiReader(strings.NewReader("%PDF-1.7\n"), c.e.Large(statementBytes))
	res := streamResponse("application/pdf", body, statementBytes)
	res.header["Content-Disposition"] = []string{`attachment; filename="` + c.params[0] + `.pdf"`}
	return res
}

func listLineItems(c *call) response {
	if _, ok := findInvoice(c.params[0]); !ok {
		return invoiceMissing()
	}
	query := c.r.URL.Query()
	size, offset := number(query, "size", 2000), number(query, "offset", 0)
	if token := c.r.Header.Get("MS-ContinuationToken"); token != "" {
		raw, _ := base64.StdEncoding.DecodeString(token)
		if _, err := fmt.Sscanf(string(raw), "items:%d", &offset); err != nil {
			return partnerError(http.StatusBadRequest, "400", "The continuation token is not valid.")
		}
	}
	if size < 1 || size > 2000 || offset < 0 {
		return partnerError(http.StatusBadRequest, "400", "size or offset is out of range.")
	}
	var items []object
	for i := offset; i < min(offset+size, lineItemCount); i++ {
		items = append(items, object{
			{"invoiceNumber", c.params[0]}, {"customerId", c.customerID(i % customerCount)}, {"productId", "CFQ7TTC0LCHC"},
			{"quantity", i%25 + 1}, {"unitPrice", 22}, {"currency", "USD"}, {"chargeType", "Cycle fee"}, {"attributes", objectType("OneTimeInvoiceLineItem")},
		})
	}
	body := collection(items)
	body.set("totalCount", lineItemCount)
	if next := offset + size; next < lineItemCount {
		body.set("continuationToken", base64.StdEncoding.EncodeToString(fmt.Appendf(nil, "items:%d", next)))
	}
	return jsonResponse(http.StatusOK, body)
}

func product(id string) object {
	return object{
		{"id", id}, {"title", "Microsoft 365 Business Premium"}, {"productType", object{{"id", "OnlineServicesNCE"}}},
		{"links", object{{"skus", link("/products/"+id+"/skus", "GET")}, {"self", link("/products/"+id, "GET")}}},
	}
}

func listProducts(*call) response {
	return withMark(jsonResponse(http.StatusOK, collection([]object{product("CFQ7TTC0LCHC"), product("CFQ7TTC0LH16"), product("DZH318Z0BPS6")})))
}

func getProduct(c *call) response {
	return withMark(jsonResponse(http.StatusOK, product(c.params[0])))
}

// downloadMargins is CSV under a label that says JSON, as in the original.
func downloadMargins(*call) response {
	return newResponse(http.StatusOK, "application/json",
		[]byte("ProductId,SkuId,Segment,Margin\r\nCFQ7TTC0LCHC,0002,Commercial,15.0\r\nCFQ7TTC0LH16,0001,Commercial,12.5\r\n"))
}

func serviceRequest(id string) object {
	return object{
		{"id", id}, {"title", "Sample request"}, {"severity", "minimal"}, {"status", "open"}, {"createdDate", "2026-06-01T12:00:00Z"},
		{"notes", []any{}}, {"attributes", objectType("ServiceRequest")},
	}
}

func listServiceRequests(*call) response {
	return withMark(jsonResponse(http.StatusOK, collection([]object{serviceRequest("616061600000001"), serviceRequest("616061600000002")})))
}

func getServiceRequest(c *call) response {
	return withMark(jsonResponse(http.StatusOK, serviceRequest(c.params[0])))
}

func getPartnerProfile(c *call) response {
	path := c.r.URL.Path
	kind := strings.ToLower(path[strings.LastIndexByte(path, '/')+1:])
	return jsonResponse(http.StatusOK, object{
		{"companyName", "Contoso Partner"}, {"country", "US"}, {"mpnId", "4711004"}, {"profileType", kind + "_profile"},
		{"links", object{{"self", link("/profiles/"+kind, "GET")}}}, {"attributes", objectType("PartnerProfile")},
	})
}

func listAuditRecords(c *call) response {
	return jsonResponse(http.StatusOK, collection([]object{{
		{"partnerId", c.e.cfg.Tenants[0]}, {"customerId", c.customerID(0)}, {"userPrincipalName", c.e.dir.users[0].UPN},
		{"applicationId", "FulfillmentService"}, {"resourceType", "order"}, {"operationDate", "2026-06-01T12:00:00Z"},
		{"operationType", "create_order"}, {"operationStatus", "succeeded"}, {"originalCorrelationId", guid("correlation")},
		{"customizedData", []any{}}, {"attributes", objectType("AuditRecord")},
	}}))
}

// headDomain says 200 for a name that is taken and 404 for a free one: the 404
// is no failure.
func headDomain(c *call) response {
	if strings.HasPrefix(strings.ToLower(c.params[0]), "contoso") {
		return newResponse(http.StatusOK, "", nil)
	}
	return newResponse(http.StatusNotFound, "", nil)
}

// insights is a collection of the Insights APIs.
func insights[T any](items []T, next any) response {
	if items == nil {
		items = []T{}
	}
	return jsonResponse(http.StatusOK, object{
		{"value", items}, {"nextLink", next}, {"totalCount", len(items)}, {"message", "Executed successfully"}, {"statusCode", 200},
	})
}

func listReports(c *call) response {
	from, to, next, err := c.page("pageToken", reportCount)
	if err != nil {
		return partnerError(http.StatusBadRequest, "400", err.Error())
	}
	var items []object
	for i := from; i < to; i++ {
		items = append(items, object{
			{"reportId", guid("report", strconv.Itoa(i))}, {"reportName", fmt.Sprintf("Sample report %03d", i)}, {"reportStatus", "Active"},
			{"callbackUrl", "https://reports.contoso.example/done"}, {"format", "csv"},
		})
	}
	if next == "" {
		return insights(items, nil)
	}
	return insights(items, c.absolute("https", c.r.URL.Path+"?pageToken="+next))
}

// listQueries has a relative next link, and one in what a user wrote, which is not.
func listQueries(c *call) response {
	return insights([]object{{
		{"queryId", guid("query")}, {"name", "Sample query"}, {"type", "userDefined"},
		{"description", "See " + c.absolute("https", c.r.URL.Path)}, {"query", "SELECT CustomerName FROM SeatUsage TIMESPAN LAST_MONTH"},
	}}, c.r.URL.Path+"?pageToken=none")
}

// getExecution names the file of a report by a link with a signature in its query.
func getExecution(c *call) response {
	return insights([]object{{
		{"executionId", guid("execution", c.params[0])}, {"reportId", c.params[0]}, {"executionStatus", "Completed"},
		{"reportAccessSecureLink", signedURL("reports/" + c.params[0] + ".csv")}, {"reportExpiryTime", "2026-07-01T00:00:00Z"},
	}}, nil)
}

// signedURL is a link to a file in Azure storage that needs no token.
func signedURL(path string) string {
	return "https://samplestorage.blob.core.windows.net/" + path + "?" + storageSignature
}

// storageSignature stands for a shared access signature; it opens nothing.
const storageSignature = "sv=2022-11-02&se=2026-07-01T00%3A00%3A00Z&sr=c&sp=rl&sig=c2FtcGxlLXNpZ25hdHVyZQ%3D%3D"

func downloadLarge(c *call) response {
	n, err := parseSize(c.r.URL.Query().Get("bytes"))
	if err != nil {
		return partnerError(http.StatusBadRequest, "400", "bytes must be a number.")
	}
	return streamResponse("application/octet-stream", c.e.Large(n), n)
}

func upload(c *call) response {
	return jsonResponse(http.StatusOK, object{{"bytes", c.size}, {"sha256", c.sum}})
}
