package reconcile

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/partnerguard/partnerguard/policy"
	"github.com/partnerguard/partnerguard/telemetry/report"
)

// verdictKey tells differing verdicts apart.
type verdictKey struct{ integration, app, ref, microsoft, guard, amr string }

type verdictGroup struct {
	verdictKey
	calls, byAttributes int
	first, last         time.Time
	source              string
	ids, calledAs       []string
}

// compareVerdicts finds the calls on whose MFA Microsoft and we do not agree. A call
// of which we cannot say is no contradiction unless Microsoft says no.
func (j *judge) compareVerdicts() {
	groups := map[verdictKey]*verdictGroup{}
	for _, r := range j.requests {
		if r.call == nil || r.compliant == unsaid || r.at.Before(j.cfg.Since) {
			continue
		}
		guard := policy.MFAUnknown.String()
		if r.call.verified && r.call.mfa != "" {
			guard = r.call.mfa
		}
		microsoft := "compliant"
		if r.compliant == saidFalse {
			microsoft = "non_compliant"
		}
		switch {
		case guard == policy.MFAPresent.String() && r.compliant == saidTrue,
			guard == policy.MFAAbsent.String() && r.compliant == saidFalse,
			guard != policy.MFAPresent.String() && guard != policy.MFAAbsent.String() && r.compliant == saidTrue:
			continue
		}
		key := verdictKey{r.call.integration, cmp.Or(r.app, r.call.app), r.call.ref, microsoft, guard, r.call.amr}
		g := groups[key]
		if g == nil {
			g = &verdictGroup{verdictKey: key, first: r.at}
			groups[key] = g
		}
		g.calls++
		if r.byAttributes {
			g.byAttributes++
		}
		g.first, g.last, g.source = earlier(g.first, r.at), later(g.last, r.at), r.source
		if len(g.calledAs) < maxExamples {
			if g.calledAs = append(g.calledAs, r.call.id); r.id != "" {
				g.ids = append(g.ids, r.id)
			}
		}
	}
	sorted := slices.SortedFunc(maps.Values(groups), func(a, b *verdictGroup) int {
		return cmp.Or(strings.Compare(b.microsoft, a.microsoft), -cmp.Compare(a.calls, b.calls), strings.Compare(a.integration, b.integration),
			strings.Compare(a.app, b.app), strings.Compare(a.ref, b.ref), strings.Compare(a.guard, b.guard), strings.Compare(a.amr, b.amr))
	})
	for i, g := range sorted {
		if i == maxFindings {
			j.note(fmt.Sprintf("%d more groups of calls with differing verdicts are not shown.", len(sorted)-i))
			break
		}
		f := Finding{
			Code: VerdictDiffers, Severity: Medium, Confidence: policy.Certain.String(),
			AppID: g.app, App: j.appName(g.app), ObjectID: j.ours.objectOf(g.ref), User: cleanText(report.UserName(j.ours.identities, g.ref)), Source: g.source,
			Integrations: []Use{j.ours.use(g.integration)},
			Calls:        g.calls, First: g.first.UTC(), Last: g.last.UTC(),
			Microsoft: g.microsoft, Guard: g.guard, AMR: cleanText(g.amr), RequestID: g.ids, CallIDs: g.calledAs,
		}
		if g.byAttributes == g.calls {
			f.Confidence = policy.Possible.String() // they may be other calls
		}
		switch {
		case g.guard == policy.MFAPresent.String():
			f.Severity, f.NonCompliant = High, g.calls
			f.Text = fmt.Sprintf("Microsoft counts %s of %s as without MFA, and the guard saw MFA in the tokens.", calls(g.calls), g.integration)
			f.Fix = "Take Microsoft's word: have the user sign in anew with MFA, and look which of the amr values counts (entra.mfa_values)."
		case g.microsoft == "compliant":
			f.Text = fmt.Sprintf("Microsoft counts %s of %s as with MFA, and the guard saw none in the tokens: enforcing would refuse what Microsoft takes.", calls(g.calls), g.integration)
			f.Fix = "Leave the integration in audit until it is clear which amr value Microsoft takes for MFA (entra.mfa_values)."
		default:
			f.NonCompliant = g.calls
			f.Text = fmt.Sprintf("Microsoft counts %s of %s as without MFA, and the guard could not tell from the tokens.", calls(g.calls), g.integration)
			f.Fix = "Take Microsoft's word: have the user sign in anew with MFA and replace the stored token."
		}
		j.find(f)
	}
}

// missedCalls tells of our calls that Microsoft should list and does not.
func (j *judge) missedCalls() {
	groups := slices.SortedFunc(maps.Values(j.match.missed), func(a, b *missedGroup) int {
		return cmp.Or(-cmp.Compare(a.calls, b.calls), strings.Compare(a.integration, b.integration), strings.Compare(a.app, b.app), strings.Compare(a.ref, b.ref))
	})
	for i, g := range groups {
		if g.calls <= 0 {
			break
		}
		j.result.Requests.Unlisted += int(g.calls)
		if i >= maxFindings {
			continue
		}
		j.find(Finding{
			Code: UnlistedCalls, Severity: Low, Confidence: policy.Possible.String(),
			Text: fmt.Sprintf("Microsoft does not list %s of %s, which it answered.", calls(int(g.calls)), g.integration),
			Fix:  "Run again later: Microsoft may be late. If it stays so, see whether these calls go to another tenant than the token of this run.",

			AppID: g.app, App: j.appName(g.app), ObjectID: j.ours.objectOf(g.ref), User: cleanText(report.UserName(j.ours.identities, g.ref)),
			Integrations: []Use{j.ours.use(g.integration)},
			Calls:        int(g.calls), First: g.first.UTC(), Last: g.last.UTC(), CallIDs: []string{g.example},
		})
	}
}

// principals says of every user that Microsoft calls non-compliant who it is here.
func (j *judge) principals() {
	rows := slices.Clone(j.ms.apis[principalsAPI].rows)
	at := func(r *apiRow) time.Time { return later(r.LastRequest.Time, r.LastLogin.Time).Add(-j.match.offset) }
	slices.SortStableFunc(rows, func(a, b apiRow) int { return at(&b).Compare(at(&a)) })
	seen := map[string]bool{}
	n := 0
	for i := range rows {
		r := &rows[i]
		last := at(r)
		key := strings.ToLower(cmp.Or(string(r.ObjectID), string(r.UPN)))
		if last.Before(j.cfg.Since) || seen[key] { // the latest counts
			continue
		}
		if seen[key] = true; n == maxFindings {
			j.note(fmt.Sprintf("%d principals that Microsoft calls non-compliant are listed; the latest %d are shown.", len(rows), n))
			break
		}
		n++
		j.find(j.principalFinding(r, last))
	}
}

func (j *judge) principalFinding(r *apiRow, last time.Time) Finding {
	object := strings.ToLower(string(r.ObjectID))
	f := Finding{
		Severity: High, Confidence: policy.Certain.String(), Microsoft: "non_compliant",
		ObjectID: string(r.ObjectID), User: string(r.UPN), Last: last.UTC(),
	}
	name := cmp.Or(f.User, f.ObjectID, "A user")
	sums := j.ours.users[object]
	var proved, missing time.Time
	for _, s := range sums {
		switch {
		case s.Verified && s.MFA == policy.MFAPresent.String():
			proved = later(proved, s.Last)
		case s.Kind == policy.KindAppUser.String():
			missing = later(missing, s.Last)
		}
	}
	sources, apps := map[string]int{}, map[string]int{}
	for _, g := range j.direct {
		if object != "" && strings.EqualFold(g.object, object) && g.nonCompliant > 0 {
			sources[g.source] += g.nonCompliant
			apps[g.app] += g.nonCompliant
			f.NonCompliant += g.nonCompliant
		}
	}
	f.Integrations = j.ours.uses(sums)
	switch {
	case len(sums) == 0:
		f.Code, f.Severity = NonCompliantPrincipalNotSeen, Medium
		f.Text = fmt.Sprintf("Microsoft calls %s non-compliant, and no call of this user passed the guard: it is the portal, or calls that go to Microsoft directly.", name)
		f.Fix = "Require MFA of the user by Conditional Access; find out what signs in as it (partnerguard signins)."
	case proved.After(last.Add(j.cfg.Skew)) && missing.Before(proved):
		f.Code, f.Severity = NonCompliantPrincipal, Low
		f.Text = fmt.Sprintf("Microsoft calls %s non-compliant, but since then calls of %s came with MFA: it looks fixed.", name, namesOf(f.Integrations))
		f.Fix = "Look again when 7 days are over: Microsoft lists users for that long."
	default:
		f.Code = NonCompliantPrincipal
		f.Text = fmt.Sprintf("Microsoft calls %s non-compliant. Here the user calls as %s.", name, namesOf(f.Integrations))
		f.Fix = "Sign in anew with MFA and replace the stored refresh token; partnerguard report says why for each integration."
	}
	if f.NonCompliant > 0 {
		f.Reasons = append(f.Reasons, fmt.Sprintf("called Microsoft directly without MFA %s, as %s from %s", times(f.NonCompliant),
			strings.Join(mostFrequent(apps), ", "), strings.Join(mostFrequent(sources), ", ")))
	}
	return f
}
