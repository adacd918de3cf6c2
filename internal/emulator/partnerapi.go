package emulator

import (
	"archive/zip"
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"strconv"
	"strings"

	"github.com/google/uuid"
)

// partnerAPIRoutes lists the emulated operations of api.partner.microsoft.com. The
// second path of the referrals is that of their next pages.
func partnerAPIRoutes() []route {
	const user, both = true, false
	return []route{
		newRoute("GET", "/v1.0/engagements/referrals", user, listReferrals),
		newRoute("GET", "/v1.0/referrals", user, listReferrals),
		newRoute("POST", "/v1.0/engagements/referrals", user, createReferral),
		newRoute("GET", "/v1.0/engagements/referrals/{referral}", user, getReferral),
		newRoute("PUT", "/v1.0/engagements/referrals/{referral}", user, changeReferral),
		newRoute("PATCH", "/v1.0/engagements/referrals/{referral}", user, changeReferral),

		newRoute("GET", "/v1.0/sales/pricesheets(*/$value", user, downloadPriceSheet),
		newRoute("GET", "/v1.0/sales/fxrates(*/$value", user, downloadRates),

		newRoute("POST", "/v1.0/payouts/payments", both, requestPayments),
		newRoute("GET", "/v1.0/payouts/payments/{request}", both, getPayments),

		newRoute("GET", "/v1.0/_large", both, downloadLarge),
		newRoute("POST", "/v1.0/_upload", both, upload),
	}
}

func (c *call) referralID(i int) string {
	return guid("referral", strconv.FormatUint(c.e.cfg.Seed, 10), strconv.Itoa(i))
}

// referral has absolute links, and the same link in what a user wrote.
func (c *call) referral(id string, version int) object {
	const path = "/v1.0/engagements/referrals"
	engagement := guid("engagement", id)
	return object{
		{"id", id}, {"engagementId", engagement}, {"name", "Sample referral " + id[:min(4, len(id))]}, {"status", "New"}, {"substatus", "Pending"},
		{"direction", "Incoming"}, {"type", "Independent"},
		{"details", object{{"notes", "See " + c.absolute("https", path+"/"+id)}, {"dealValue", 10000}, {"currency", "USD"}}},
		{"eTag", referralTag(id, version)},
		{"links", object{
			{"relatedReferrals", object{{"uri", c.absolute("https", path+"?$filter=engagementId eq '"+engagement+"'")}, {"method", "GET"}}},
			{"self", object{{"uri", c.absolute("https", path+"/"+id)}, {"method", "GET"}}},
		}},
	}
}

func referralTag(id string, version int) string {
	return fmt.Sprintf("\"%s-%d\"", guid("etag", id)[:8], version)
}

// listReferrals has the next page's link in clear text and with another path, as the
// original does.
func listReferrals(c *call) response {
	from, to, next, err := c.page("$skiptoken", referralCount)
	if err != nil {
		return odataError(http.StatusBadRequest, err.Error())
	}
	items := []object{}
	for i := from; i < to; i++ {
		items = append(items, c.referral(c.referralID(i), 1))
	}
	body := object{{"@odata.context", c.absolute("http", "/v1.0/$metadata#referrals")}, {"value", items}}
	if next != "" {
		body.set("@odata.nextLink", c.absolute("http", "/v1.0/referrals?$skiptoken="+next))
	}
	return jsonResponse(http.StatusOK, body)
}

func createReferral(c *call) response {
	if !json.Valid(c.body) {
		return odataError(http.StatusBadRequest, "The request body is not a referral.")
	}
	id := uuid.NewString()
	c.state.poll("referral " + id)
	res := jsonResponse(http.StatusCreated, c.referral(id, 1))
	res.header["ETag"] = []string{referralTag(id, 1)}
	return res
}

func getReferral(c *call) response {
	id := strings.ToLower(c.params[0])
	if uuid.Validate(id) != nil {
		return odataError(http.StatusNotFound, "The referral was not found.")
	}
	version := c.referralVersion(id)
	res := jsonResponse(http.StatusOK, c.referral(id, version))
	res.header["ETag"] = []string{referralTag(id, version)}
	return res
}

func (c *call) referralVersion(id string) int { return max(1, c.state.polled("referral "+id)) }

// changeReferral takes any JSON. A PATCH answers with the referral only if asked to.
func changeReferral(c *call) response {
	id := strings.ToLower(c.params[0])
	switch match := c.r.Header.Get("If-Match"); {
	case uuid.Validate(id) != nil:
		return getReferral(c)
	case !json.Valid(c.body):
		return odataError(http.StatusBadRequest, "The request body is not JSON.")
	case match != "" && match != referralTag(id, c.referralVersion(id)):
		return odataError(http.StatusPreconditionFailed, "The referral has been changed since it was read; the ETag is stale.")
	}
	if c.state.poll("referral "+id) == 1 {
		c.state.poll("referral " + id) // version 1 was the sample's
	}
	if c.r.Method == http.MethodPatch && !strings.EqualFold(c.r.Header.Get("Prefer"), "return=representation") {
		return newResponse(http.StatusNoContent, "", nil)
	}
	return getReferral(c)
}

// downloadPriceSheet sends CSV. To a client that accepts deflate it sends a ZIP
// file, which is no content coding: the bytes must arrive as they are.
func downloadPriceSheet(c *call) response {
	body := priceSheet()
	if strings.Contains(strings.ToLower(c.r.Header.Get("Accept-Encoding")), "deflate") {
		var b bytes.Buffer
		archive := zip.NewWriter(&b)
		file, err := archive.Create("PriceSheet.csv")
		if err == nil {
			_, err = file.Write(body)
		}
		if err == nil {
			err = archive.Close()
		}
		if err != nil {
			return partnerError(http.StatusInternalServerError, "500", err.Error())
		}
		body = b.Bytes()
	}
	res := newResponse(http.StatusOK, "application/octet-stream", body)
	res.chunked = true
	return res
}

// priceSheet is a few megabytes of rows that repeat.
func priceSheet() []byte {
	var rows []byte
	for i := range 500 {
		rows = fmt.Appendf(rows, "Sample product %04d,CFQ7TTC%05d,%04d,Sample SKU,Microsoft Corporation,%d.%02d,USD,US,2026-06-01T00:00:00Z\r\n",
			i, i, i%40, i, i%100)
	}
	const header = "ProductTitle,ProductId,SkuId,SkuTitle,Publisher,UnitPrice,Currency,Market,EffectiveStartDate\r\n"
	return append([]byte(header), bytes.Repeat(rows, priceSheetRows/500)...)
}

func downloadRates(*call) response {
	return newResponse(http.StatusOK, "application/octet-stream",
		[]byte("FromCurrency,ToCurrency,Rate\r\nEUR,USD,1.08\r\nGBP,USD,1.27\r\n"))
}

func requestPayments(*call) response {
	return insights([]object{{{"requestId", uuid.NewString()}, {"requestTime", "2026-06-01T12:00:00Z"}, {"status", "Submitted"}, {"blobLocation", nil}}}, nil)
}

// getPayments is done when asked twice, and then names a file by a link with a
// signature in its query.
func getPayments(c *call) response {
	request := object{{"requestId", c.params[0]}, {"requestTime", "2026-06-01T12:00:00Z"}, {"status", "InProgress"}, {"blobLocation", nil}}
	if c.state.poll("payments "+c.params[0]) > 1 {
		request.set("status", "Completed")
		request.set("blobLocation", signedURL("payouts/"+c.params[0]+".csv.gz"))
	}
	return insights([]object{request}, nil)
}
