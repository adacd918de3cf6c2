package reconcile

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/partnerguard/partnerguard/policy"
)

// directKey tells integrations that go to Microsoft directly apart.
type directKey struct{ app, object, source string }

type directGroup struct {
	directKey
	upn                 string
	calls, nonCompliant int
	first, last         time.Time
	operations          map[string]int
	monitoring          bool // only the Security APIs
	ids                 []string
	shared              int // calls whose id is one of ours
	gaps                int // calls in hours in which our records have gaps
}

// maxDirectGroups bounds the direct callers that are told apart, and maxFindings the
// findings of one code.
const (
	maxDirectGroups = 10_000
	maxFindings     = 200
)

// judgeRequests says of every request whether it passed the guard.
func (j *judge) judgeRequests(ctx context.Context) error {
	n := &j.result.Requests
	n.Rows = len(j.requests)
	n.OffsetSeconds = j.match.offset.Seconds()
	j.direct = map[directKey]*directGroup{}
	gaps := map[int64]bool{}
	for _, r := range j.requests {
		switch {
		case j.own[r.id]:
			n.Own++
			continue
		case r.at.Before(j.cfg.Since):
			n.Outside++
			continue
		case r.call != nil:
			if n.Listed++; r.byAttributes {
				n.ByAttributes++
			}
			switch {
			case !r.call.verified:
			case r.call.mfa == policy.MFAPresent.String():
				n.MFAPresent++
			case r.call.mfa == policy.MFAAbsent.String():
				n.MFAMissing++
			}
			n.judged(r.compliant)
			continue
		case j.ours.first.IsZero() || r.at.Before(j.ours.first) || j.ours.lag > 0 && r.at.After(j.ours.until.Add(-j.cfg.Skew)):
			n.Outside++
			continue
		case r.undecided:
			n.Undecided++
			continue
		}
		n.Direct++
		n.judged(r.compliant)
		hour := r.at.Unix() / 3600
		gap, known := gaps[hour]
		if !known {
			calls, _, err := j.cfg.Store.Gaps(ctx, r.at, r.at.Add(1))
			if err != nil {
				return err
			}
			gap = calls > 0
			gaps[hour] = gap
		}
		j.addDirect(r, gap)
	}
	if n.Undecided > 0 {
		w := &j.result.Windows[requestsAPI]
		w.Reasons = append(w.Reasons, fmt.Sprintf("%d requests could not be judged: too many of our calls have the same id", n.Undecided))
	}
	groups := slices.SortedFunc(maps.Values(j.direct), func(a, b *directGroup) int {
		return cmp.Or(-cmp.Compare(a.nonCompliant, b.nonCompliant), -cmp.Compare(a.calls, b.calls),
			strings.Compare(a.app, b.app), strings.Compare(a.object, b.object), strings.Compare(a.source, b.source))
	})
	for i, g := range groups {
		if i == maxFindings {
			j.note(fmt.Sprintf("%d more direct callers (app, user and address) are not shown.", len(groups)-i))
			break
		}
		j.find(j.directFinding(g))
	}
	return nil
}

// judged counts Microsoft's word on a request.
func (n *Requests) judged(compliant apiFlag) {
	switch compliant {
	case saidTrue:
		n.Compliant++
	case saidFalse:
		n.NonCompliant++
	}
}

func (j *judge) addDirect(r *listed, gap bool) {
	key := directKey{r.app, r.object, r.source}
	g := j.direct[key]
	if g == nil {
		if len(j.direct) == maxDirectGroups {
			key = directKey{}
			g = j.direct[key]
		}
		if g == nil {
			g = &directGroup{directKey: key, first: r.at, monitoring: true, operations: map[string]int{}}
			j.direct[key] = g
		}
	}
	g.calls++
	if r.compliant == saidFalse {
		g.nonCompliant++
	}
	g.upn = cmp.Or(r.upn, g.upn)
	g.first, g.last = earlier(g.first, r.at), later(g.last, r.at)
	if len(g.operations) < 100 || g.operations[r.operation] > 0 {
		g.operations[r.operation]++
	}
	if r.id != "" && len(g.ids) < maxExamples {
		g.ids = append(g.ids, r.id)
	}
	if len(j.match.found[r.id]) > 0 {
		g.shared++
	}
	if gap {
		g.gaps++
	}
	last := ""
	if len(r.segments) > 0 {
		last = r.segments[len(r.segments)-1]
	}
	if apiOfName(last) == unknownAPI {
		g.monitoring = false
	}
}

// maxOwn bounds the own requests that are remembered.
const maxOwn = 10_000

// maxExamples is how many ids a finding names.
const maxExamples = 3

func (j *judge) directFinding(g *directGroup) Finding {
	f := Finding{
		Code: DirectCalls, Severity: Medium, Confidence: policy.Likely.String(),
		AppID: g.app, App: j.appName(g.app), ObjectID: g.object, User: g.upn, Source: g.source,
		Integrations: j.ours.usesOf(g.app),
		Calls:        g.calls, NonCompliant: g.nonCompliant, First: g.first.UTC(), Last: g.last.UTC(), RequestID: g.ids,
	}
	f.Operations = mostFrequent(g.operations)
	whose := "an application that never passed the guard"
	if len(f.Integrations) > 0 {
		whose = "the application of " + namesOf(f.Integrations)
	}
	f.Text = fmt.Sprintf("%s called Microsoft directly %s", upper(whose), times(g.calls))
	if g.nonCompliant > 0 {
		if f.Severity = High; g.nonCompliant < g.calls {
			f.Text += ", " + times(g.nonCompliant)
		}
		f.Text += " without MFA"
	}
	f.Text += "."
	f.Fix = "Point it at the guard (its base URL, or the name by DNS), or give it an owner who answers for it."
	if j.match.egress[g.source] {
		f.Text += " It shares the guard's own address: it runs beside the guard, or another guard with a data directory of its own does."
	}
	if g.shared > 0 {
		f.Text += fmt.Sprintf(" %s with the request id of a call that passed the guard: it may be the same program, which falls back to the direct way.", upper(times(g.shared)))
	}
	if g.gaps > 0 {
		f.Confidence = policy.Possible.String()
		f.Reasons = append(f.Reasons, fmt.Sprintf("in the hours of %d of these calls the ledger could not take every record", g.gaps))
	}
	if g.monitoring {
		f.Severity = Low
		f.Text += " It reads the Security APIs only: somebody who looks at the same records as this report."
		f.Fix = "Nothing, if you know who it is."
	}
	return f
}
