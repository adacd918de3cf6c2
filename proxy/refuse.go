package proxy

import (
	"encoding/base64"
	"encoding/json"
	"net/http"
	"strconv"

	"github.com/partnerguard/partnerguard/policy"
)

// refusal is the body of a guard-made answer: Microsoft's shape, so that existing
// error handling works, told apart by source.
type refusal struct {
	Code        string   `json:"code"`
	Description string   `json:"description"`
	Data        []string `json:"data"`
	Source      string   `json:"source"`
}

// mfaClaims is the claims challenge (RFC 9470's purpose in Entra's form) that asks
// the client for a token with MFA.
const mfaClaims = `{"access_token":{"amr":{"essential":true,"values":["mfa"]}}}`

// refuse answers in Microsoft's stead. It is the only place where the guard makes
// an answer.
func (g *Guard) refuse(c *call, reason policy.Reason) {
	status := reason.Status()
	h := c.ResponseWriter.Header()
	// Nothing of an upstream answer that was given up may show.
	clear(h)
	c.mark(h, policy.Reject, reason)
	h["Content-Type"] = jsonType
	h["Ms-Requestid"] = c.in.Header["Ms-Requestid"]
	h["Ms-Correlationid"] = c.in.Header["Ms-Correlationid"]
	if challenge := challenge(reason); challenge != "" {
		h["Www-Authenticate"] = []string{challenge}
	}
	switch status {
	case http.StatusServiceUnavailable:
		h["Retry-After"] = []string{"5"}
	case http.StatusTooManyRequests:
		h["Retry-After"] = []string{"1"}
	case http.StatusMethodNotAllowed:
		h["Allow"] = []string{"GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"}
	}
	code := string(reason)
	if reason == policy.ReasonMFAMissing {
		code = "900421"
	}
	body, err := json.Marshal(refusal{
		Code:        code,
		Description: c.describe(reason),
		Data: []string{
			"reason: " + string(reason),
			"integration: " + c.rec.Integration,
			"call: " + c.rec.Call.String(),
		},
		Source: "partnerguard",
	})
	if err != nil {
		panic(err) // strings always marshal
	}
	h["Content-Length"] = []string{strconv.Itoa(len(body))}
	c.WriteHeader(status)
	if c.in.Method != http.MethodHead {
		c.Write(body) // a failed write is the client's hang-up; Write keeps it
	}
}

var jsonType = []string{"application/json; charset=utf-8"}

// challenge is the WWW-Authenticate of a 401 (RFC 6750 section 3).
func challenge(reason policy.Reason) string {
	switch {
	case reason.Status() != http.StatusUnauthorized:
		return ""
	case reason == policy.ReasonTokenMissing:
		return "Bearer"
	case reason == policy.ReasonMFAMissing:
		return `Bearer error="insufficient_claims", claims="` + base64.StdEncoding.EncodeToString([]byte(mfaClaims)) + `"`
	}
	return `Bearer error="invalid_token", error_description="` + string(reason) + `"`
}

// describe says in a sentence what is wrong and what to do.
func (c *call) describe(reason policy.Reason) string {
	switch reason {
	case policy.ReasonRequestAmbiguous:
		return "The request can be read in two ways: a dot segment, a bad escape, %00, a raw backslash, # or control byte in the path, or two Authorization headers. Send it in one unmistakable form."
	case policy.ReasonMethodRefused:
		return "The method " + printable(clip(c.in.Method, 16), 16) + " is not forwarded."
	case policy.ReasonIntegrationUnknown:
		return "No integration is configured under this /i/{name}/ prefix. Check the base URL of the client, or add the integration to the guard's configuration."
	case policy.ReasonLimitExceeded:
		return "So many calls of " + c.rec.Integration + " are in flight that the guard takes no more of them. The call was not sent; repeat it after Retry-After, or raise max_calls of the integration (limits.calls for all)."
	case policy.ReasonUpstreamUnreachable:
		if c.ownListener {
			return "The guard would call itself: the upstream's name resolves to one of its own listeners. Set dial of the upstream to Microsoft's address."
		}
		return c.upstream.title + " could not be reached by the guard; the call may or may not have arrived. Repeat it only if it is safe to repeat, with the same MS-RequestId."
	case policy.ReasonUpstreamTimeout:
		return c.upstream.title + " did not answer the guard in time; the call may or may not have been carried out. Repeat it only if it is safe to repeat, with the same MS-RequestId."
	case policy.ReasonUpstreamCircuitOpen:
		return c.upstream.title + " failed so often in the last seconds that calls are held back for a moment. The call was not sent; repeat it after Retry-After."
	}
	causes := policy.Diagnose(c.rec.Token, reason, "", "")
	if len(causes) == 0 {
		return "The call was refused: " + string(reason) + "."
	}
	text := causes[0].Text + " " + causes[0].Fix
	if reason == policy.ReasonMFAMissing {
		text = "MFA is required: the token has no MFA claim. Most likely: " + text
	}
	return clip(text, 1024)
}
