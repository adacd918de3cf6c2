package reconcile

import (
	"regexp"
	"slices"
	"strings"

	"github.com/partnerguard/partnerguard/telemetry/store"
)

// pseudonyms gives the users of Microsoft's records the user_refs that ours have.
type pseudonyms struct {
	ref     func(tenantID, objectID string) string
	known   map[string]bool // references in our records
	tenants []string        // whose users these are
}

// maxRefTenants bounds the tenants that are tried for a user.
const maxRefTenants = 8

func newPseudonyms(ref func(tenantID, objectID string) string) *pseudonyms {
	return &pseudonyms{ref: ref, known: map[string]bool{}}
}

// add takes note of who is in our records.
func (p *pseudonyms) add(d *store.Dim) {
	if d.UserRef == "" || len(p.known) >= maxCallers {
		return
	}
	p.known[d.UserRef] = true
	if d.Verified && len(p.tenants) < maxRefTenants && !slices.Contains(p.tenants, d.TenantID) {
		p.tenants = append(p.tenants, d.TenantID)
	}
}

// of is the reference of a user. Where a row does not name the tenant of the token, he
// is one whom our records know all the same.
func (p *pseudonyms) of(tenant, object string) string {
	if tenant == "" && len(p.tenants) > 0 {
		tenant = p.tenants[0]
	}
	own := p.ref(tenant, object)
	if !p.known[own] {
		for _, t := range p.tenants {
			if ref := p.ref(t, object); p.known[ref] {
				return ref
			}
		}
	}
	return own
}

// ofName is what stands for a user of whom there is only the name: no record has it.
func (p *pseudonyms) ofName(upn string) string { return "upn:" + p.ref("", upn) }

// fleetNote stands in results of several guards. Each has a key of its own.
const fleetNote = "Users of other guards have references that nobody here can compute: whoever is said not to have passed the guard may be one of them."

// userLike matches what may say who a user is: a name, or an id.
var userLike = regexp.MustCompile(`[^\s"<>(),;:|=/\\]+(?:@|%40)[^\s"<>(),;:|=/\\]+|[[:xdigit:]]{8}-?(?:[[:xdigit:]]{4}-?){3}[[:xdigit:]]{12}`)

// hide takes that out of a text of Microsoft's, or of somebody who named a file.
func hide(text string) string { return userLike.ReplaceAllLiteralString(text, "{hidden}") }

// hideNames leaves ids.
func hideNames(text string) string {
	if strings.Contains(text, "@") {
		return hide(text)
	}
	return text
}

// hiddenError is an error whose text says of no user who it is.
type hiddenError struct{ error }

func (e hiddenError) Error() string { return hide(e.error.Error()) }
func (e hiddenError) Unwrap() error { return e.error }

// refer puts references in the place of the users' object ids, and hides what else may
// say who they are. What calls are found by stays, and so does UPN, for findings to name
// the user by: see withoutNames. It returns the names by reference.
func (ms *microsoft) refer(p *pseudonyms) map[string]store.Identity {
	names := map[string]store.Identity{}
	ms.source = hide(ms.source)
	for a := range ms.apis {
		d := &ms.apis[a]
		d.absent = hide(d.absent)
		for i := range d.defects {
			d.defects[i] = hide(d.defects[i])
		}
		for i := range d.rows {
			r := &d.rows[i]
			for _, id := range []*apiText{&r.SourceAddress, &r.Address, &r.TenantID, &r.AppID} {
				*id = apiText(hideNames(string(*id)))
			}
			r.AppName = apiText(hide(string(r.AppName)))
			switch {
			case r.ObjectID != "":
				r.ObjectID = apiText(p.of(string(r.TenantID), string(r.ObjectID)))
			case r.UPN != "":
				r.ObjectID = apiText(p.ofName(string(r.UPN)))
			}
			if r.UPN != "" {
				names[string(r.ObjectID)] = store.Identity{UPN: string(r.UPN)}
			}
		}
	}
	return names
}

// withoutNames is r as it is kept where users are pseudonymous.
func (r *Result) withoutNames() *Result {
	kept := *r
	kept.Findings = slices.Clone(r.Findings)
	for i := range kept.Findings {
		f := &kept.Findings[i]
		if f.User != "" {
			f.Text = strings.ReplaceAll(f.Text, f.User, f.ObjectID)
		}
		f.User = ""
		f.Operations, f.RequestID = slices.Clone(f.Operations), slices.Clone(f.RequestID)
		for i, text := range f.Operations {
			f.Operations[i] = hide(text)
		}
		for i, id := range f.RequestID {
			f.RequestID[i] = hideNames(id)
		}
	}
	return &kept
}

// withoutNames is s as it is kept where users are pseudonymous.
func (s *SignIns) withoutNames() *SignIns {
	kept := *s
	kept.Strangers = slices.Clone(s.Strangers)
	for i := range kept.Strangers {
		kept.Strangers[i].User = ""
	}
	return &kept
}
