package entra

import (
	"fmt"
	"strings"

	"github.com/partnerguard/partnerguard/policy"
)

// Cloud is a Microsoft cloud: where its keys are published and how its issuers
// are written. The zero Cloud is Global.
type Cloud uint8

const (
	Global Cloud = iota
	USGov
	China
)

// version is the format of a token, told by the form of its issuer: v1 tokens are
// checked against the v1 keys and v2 tokens against the v2 keys, whatever endpoint
// they came from. The zero version is unknown.
type version uint8

const (
	v1 version = 1
	v2 version = 2
)

// String returns the word of the ver claim; empty when unknown.
func (v version) String() string {
	switch v {
	case v1:
		return "1.0"
	case v2:
		return "2.0"
	}
	return ""
}

// issuerForm is an issuer with a tenant id between prefix and suffix. The v1 form
// ends with a slash, the v2 form does not.
// https://learn.microsoft.com/entra/identity-platform/access-tokens
type issuerForm struct{ prefix, suffix string }

type cloudPreset struct {
	name      string
	authority string
	issuers   [2]issuerForm // v1, v2
}

var clouds = [...]cloudPreset{
	Global: {"global", "https://login.microsoftonline.com", [2]issuerForm{
		{"https://sts.windows.net/", "/"}, {"https://login.microsoftonline.com/", "/v2.0"}}},
	// The v1 issuer of US Government is not documented; tenants there are known to
	// share the commercial one.
	USGov: {"usgov", "https://login.microsoftonline.us", [2]issuerForm{
		{"https://sts.windows.net/", "/"}, {"https://login.microsoftonline.us/", "/v2.0"}}},
	China: {"china", "https://login.partner.microsoftonline.cn", [2]issuerForm{
		{"https://sts.chinacloudapi.cn/", "/"}, {"https://login.partner.microsoftonline.cn/", "/v2.0"}}},
}

// String returns the word of the configuration file.
func (c Cloud) String() string {
	if int(c) >= len(clouds) {
		return fmt.Sprintf("Cloud(%d)", uint8(c))
	}
	return clouds[c].name
}

// ParseCloud reads global, usgov or china.
func ParseCloud(s string) (Cloud, error) {
	for c := range clouds {
		if s == clouds[c].name {
			return Cloud(c), nil
		}
	}
	return Global, fmt.Errorf("cloud %q is not known; write global, usgov or china", s)
}

// parseIssuer splits an issuer of this cloud into its version and tenant. The
// version is unknown when iss is not exactly of one of the cloud's forms.
func (p *cloudPreset) parseIssuer(iss string) (version, string) {
	for i, form := range p.issuers {
		rest, ok := strings.CutPrefix(iss, form.prefix)
		if !ok {
			continue
		}
		if tenant, ok := strings.CutSuffix(rest, form.suffix); ok && policy.IsGUID(tenant) {
			return version(i + 1), tenant
		}
	}
	return 0, ""
}

// issuer is the issuer of a tenant (lower case).
func (p *cloudPreset) issuer(v version, tenant string) string {
	form := p.issuers[v-1]
	return form.prefix + tenant + form.suffix
}

// mayIssue reports whether a key that is published with the issuer bound may sign
// for iss, an issuer of this cloud with that tenant. Keys carry either a template
// with {tenantid} or the issuer of one tenant. The v1 list is said to publish the
// same keys as the v2 list, so a v2 issuer there binds the tenant only.
func (p *cloudPreset) mayIssue(bound, iss, tenant string) bool {
	if bound == "" {
		return true
	}
	bound = strings.Replace(bound, "{tenantid}", tenant, 1)
	return bound == iss || bound == p.issuer(v2, tenant)
}
