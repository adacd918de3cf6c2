package emulator

import (
	"net/http"
	"strconv"
	"strings"

	"github.com/google/uuid"
)

// graphRoutes lists the emulated operations of graph.microsoft.com.
func graphRoutes() []route {
	const user, both = true, false
	const billing, relationships = "/v1.0/reports/partners/billing", "/v1.0/tenantRelationships/delegatedAdminRelationships"
	return []route{
		newRoute("POST", billing+"/reconciliation/billed/export", both, createExport),
		newRoute("POST", billing+"/reconciliation/unbilled/export", both, createExport),
		newRoute("POST", billing+"/usage/billed/export", both, createExport),
		newRoute("POST", billing+"/usage/unbilled/export", both, createExport),
		newRoute("GET", billing+"/operations/{operation}", both, getOperation),
		newRoute("GET", billing+"/manifests/{manifest}", both, getManifest),

		newRoute("GET", relationships, both, listRelationships),
		newRoute("GET", relationships+"/{relationship}", both, getRelationship),

		newRoute("GET", "/beta/security/partner/securityScore", both, getSecurityScore),
		newRoute("GET", "/beta/tenantRelationships/managedTenants/tenants", user, listTenants),

		newRoute("GET", "/v1.0/_large", both, downloadLarge),
		newRoute("POST", "/v1.0/_upload", both, upload),
	}
}

// createExport answers 202 with an absolute Location.
// See https://learn.microsoft.com/graph/api/partners-billing-unbilledreconciliation-export.
func createExport(c *call) response {
	res := newResponse(http.StatusAccepted, "", nil)
	res.header["Location"] = []string{c.absolute("https", "/v1.0/reports/partners/billing/operations/"+uuid.NewString())}
	return res
}

// getOperation is done when asked the third time.
func getOperation(c *call) response {
	id := c.params[0]
	if uuid.Validate(id) != nil {
		return odataError(http.StatusNotFound, "The operation was not found.")
	}
	body := object{
		{"@odata.context", c.absolute("https", "/v1.0/$metadata#reports/partners/billing/operations/$entity")},
		{"@odata.type", "#microsoft.graph.partners.billing.runningOperation"},
		{"id", id}, {"createdDateTime", "2026-06-01T12:00:00Z"}, {"lastActionDateTime", "2026-06-01T12:00:01Z"}, {"status", "running"},
	}
	switch c.state.poll("operation " + id) {
	case 1:
		body.set("@odata.type", "#microsoft.graph.partners.billing.operation")
		body.set("status", "notStarted")
	case 2:
	default:
		body.set("@odata.type", "#microsoft.graph.partners.billing.exportSuccessOperation")
		body.set("status", "succeeded")
		body.set("resourceLocation", c.manifest(id))
		return jsonResponse(http.StatusOK, body)
	}
	res := jsonResponse(http.StatusOK, body)
	res.header["Retry-After"] = []string{"10"}
	return res
}

// manifest names the files of an export; their links need no token but the signature.
func (c *call) manifest(id string) object {
	return object{
		{"@odata.type", "#microsoft.graph.partners.billing.manifest"},
		{"id", id}, {"createdDateTime", "2026-06-01T12:00:02Z"}, {"schemaVersion", "2"}, {"dataFormat", "compressedJSON"},
		{"partitionType", "default"}, {"eTag", guid("etag", id)[:12]}, {"partnerTenantId", c.e.cfg.Tenants[0]},
		{"rootDirectory", "https://samplestorage.blob.core.windows.net/exports/" + id}, {"sasToken", storageSignature},
		{"blobCount", 1}, {"blobs", []object{{{"name", "part-00000.json.gz"}, {"partitionValue", "default"}}}},
	}
}

func getManifest(c *call) response {
	if uuid.Validate(c.params[0]) != nil {
		return odataError(http.StatusNotFound, "The manifest was not found.")
	}
	return jsonResponse(http.StatusOK, c.manifest(c.params[0]))
}

func (c *call) relationship(id string) object {
	return object{
		{"id", id}, {"displayName", "Relationship " + id[:min(4, len(id))]}, {"duration", "P730D"}, {"status", "active"},
		{"autoExtendDuration", "P180D"}, {"createdDateTime", "2026-01-01T12:00:00Z"}, {"activatedDateTime", "2026-01-02T12:00:00Z"},
		{"customer", object{{"tenantId", guid("customer of", id)}, {"displayName", "Customer " + id[:min(4, len(id))]}}},
		{"accessDetails", object{{"unifiedRoles", []object{{{"roleDefinitionId", "729827e3-9c14-49f7-bb1b-9608f156bbb8"}}}}}},
	}
}

func (c *call) relationshipID(i int) string {
	seed := strconv.FormatUint(c.e.cfg.Seed, 10)
	return guid("relationship", seed, strconv.Itoa(i)) + "-" + guid("customer relationship", seed, strconv.Itoa(i))
}

func listRelationships(c *call) response {
	const path = "/v1.0/tenantRelationships/delegatedAdminRelationships"
	from, to, next, err := c.page("$skiptoken", relationshipCount)
	if err != nil {
		return odataError(http.StatusBadRequest, err.Error())
	}
	items := []object{}
	for i := from; i < to; i++ {
		items = append(items, c.relationship(c.relationshipID(i)))
	}
	body := object{{"@odata.context", c.absolute("https", "/v1.0/$metadata#tenantRelationships/delegatedAdminRelationships")}}
	if next != "" {
		body.set("@odata.nextLink", c.absolute("https", path+"?$skiptoken="+next))
	}
	body.set("value", items)
	return jsonResponse(http.StatusOK, body)
}

func getRelationship(c *call) response {
	id := strings.ToLower(c.params[0])
	if len(id) != 73 || uuid.Validate(id[:36]) != nil || uuid.Validate(id[37:]) != nil {
		return odataError(http.StatusNotFound, "The relationship was not found.")
	}
	return jsonResponse(http.StatusOK, c.relationship(id))
}

func getSecurityScore(c *call) response {
	return jsonResponse(http.StatusOK, object{
		{"@odata.context", c.absolute("https", "/beta/$metadata#security/partner/securityScore/$entity")},
		{"id", guid("score")}, {"currentScore", 72.5}, {"maxScore", 100}, {"lastRefreshDateTime", "2026-06-01T12:00:00Z"},
	})
}

func listTenants(c *call) response {
	return jsonResponse(http.StatusOK, object{{"value", []object{{{"tenantId", c.customerID(0)}, {"displayName", "Customer " + c.customerID(0)[:8]}}}}})
}
