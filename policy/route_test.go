package policy_test

import (
	"os"
	"strings"
	"testing"

	. "github.com/partnerguard/partnerguard/policy"
)

func TestFindRoute(t *testing.T) {
	const customer = "c0ffee00-4444-4a4a-9b9b-121212121212"
	type found struct{ template, area, auth, customer string }
	invoices := found{"/v1/invoices", "invoices", "both", ""}
	none := found{}
	for _, tt := range []struct {
		name, method, path string
		want               found
	}{
		{"a resource as documented", "GET", "/v1/invoices", invoices},
		{"in any case", "GET", "/V1/Invoices", invoices},
		{"with doubled slashes", "GET", "/v1//invoices", invoices},
		{"with a slash at the end", "GET", "//v1/invoices/", invoices},
		{"a path documented in mixed case", "GET", "/v1/nonmfacompliantpartnerprincipals", found{"/v1/nonMfaCompliantPartnerPrincipals", "security", "app+user", ""}},
		{"a customer", "GET", "/v1/customers/" + customer, found{"/v1/customers/{customer-tenant-id}", "customers", "app+user", customer}},
		{"a customer written in capitals", "GET", "/v1/Customers/" + strings.ToUpper(customer) + "/orders/77", found{"/v1/customers/{customer-tenant-id}/orders/{order-id}", "orders", "both", customer}},
		{"an id that is no tenant", "GET", "/v1/customers/contoso.example/orders", found{"/v1/customers/{customer-tenant-id}/orders", "orders", "both", ""}},
		{"a literal segment where a customer could stand", "GET", "/v1/customers/relationshiprequests", found{"/v1/customers/relationshiprequests", "relationships", "app+user", ""}},
		{"a literal segment where an invoice could stand", "GET", "/v1/invoices/SUMMARY", found{"/v1/invoices/summary", "invoices", "both", ""}},
		{"the same place with a parameter", "GET", "/v1/invoices/G000123", found{"/v1/invoices/{invoice-id}", "invoices", "app+user", ""}},
		{"an order id with colons and equals signs", "GET", "/v1/customers/" + customer + "/orders/a:b=c;d", found{"/v1/customers/{customer-tenant-id}/orders/{order-id}", "orders", "both", customer}},
		{"a price sheet, whose arguments stand in the path", "GET", "/v1.0/sales/pricesheets(Market='US',PricesheetView='updatedlicensebased')/$value", found{"/v1.0/sales/pricesheets(Market='{market}',PricesheetView='{view}')/$value", "pricing", "app+user", ""}},
		{"exchange rates", "GET", "/v1.0/Sales/FxRates(Month='2026-06')/$value", found{"/v1.0/sales/fxrates(Month='{month}')/$value", "pricing", "app+user", ""}},
		{"a method of its own", "HEAD", "/v1/domains/contoso", found{"/v1/domains/{domain}", "validation", "both", ""}},
		{"a method that is not documented there has the template alone", "DELETE", "/v1/invoices", found{"/v1/invoices", "invoices", "unknown", ""}},
		{"the token exchange", "POST", "/v3/generatetoken", found{"/v3/generatetoken", "auth", "both", ""}},
		{"a path of Graph", "GET", "/v1.0/auditLogs/signIns", found{"/v1.0/auditLogs/signIns", "graph-signins", "both", ""}},

		{"the root", "GET", "/", none},
		{"nothing", "GET", "", none},
		{"a path that only leads to others", "GET", "/v1", none},
		{"a path below a documented one", "GET", "/v1/usagesummary/x", none},
		{"an unknown path", "GET", "/v9/unheard/of", none},
		{"an unknown path below a customer still names the customer", "GET", "/v1/customers/" + customer + "/unheard/of", found{customer: customer}},
	} {
		r, c := FindRoute(tt.method, tt.path)
		if got := (found{r.Template, r.Area, r.Auth, c}); got != tt.want {
			t.Errorf("%s: FindRoute(%s, %s) = %+v, want %+v", tt.name, tt.method, tt.path, got, tt.want)
		}
	}
}

// Every documented route is found by a path made from its own template.
func TestFindRouteFindsEveryDocumentedRoute(t *testing.T) {
	table, err := os.ReadFile("routes.tsv")
	if err != nil {
		t.Fatal(err)
	}
	fill := strings.NewReplacer("{customer-tenant-id}", home, "{", "", "}", "")
	lines := strings.Split(strings.TrimSpace(string(table)), "\n")[1:]
	if len(lines) < 300 {
		t.Fatalf("the table has %d routes, want at least 300", len(lines))
	}
	for _, line := range lines {
		f := strings.Split(line, "\t")
		if len(f) != 4 {
			t.Errorf("%q has %d columns, want 4", line, len(f))
			continue
		}
		want := Route{Template: f[1], Auth: f[2], Area: f[3]}
		wantCustomer := ""
		if strings.Contains(f[1], "{customer-tenant-id}") {
			wantCustomer = home
		}
		got, customer := FindRoute(f[0], strings.ToUpper(fill.Replace(f[1])))
		if got != want || customer != wantCustomer {
			t.Errorf("FindRoute(%s, a path of %s) = %+v, %q; want %+v, %q", f[0], f[1], got, customer, want, wantCustomer)
		}
	}
}
