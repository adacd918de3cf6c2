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

// adoption compares Microsoft's counts, which no window of rows cuts off, with ours,
// on the days that we recorded whole.
func (j *judge) adoption(ctx context.Context) error {
	type tally struct {
		Application
		direct, own int64
		first, last time.Time
	}
	found := map[string]*tally{}
	days := map[time.Time][]*apiRow{}
	// Answers of several times count a day several times; the greatest is the latest.
	type appDay struct {
		day time.Time
		app string
	}
	latest := map[appDay]*apiRow{}
	for i := range j.ms.apis[adoptionAPI].rows {
		r := &j.ms.apis[adoptionAPI].rows[i]
		key := appDay{r.Day.Time, strings.ToLower(string(r.AppID))}
		if o := latest[key]; o == nil || r.TotalCount > o.TotalCount {
			latest[key] = r
		}
	}
	sinceDay := j.cfg.Since.UTC().Truncate(24 * time.Hour)
	for i := range j.ms.apis[adoptionAPI].rows {
		r := &j.ms.apis[adoptionAPI].rows[i]
		day, app := r.Day.Time.Truncate(24*time.Hour), strings.ToLower(string(r.AppID))
		if day.Before(sinceDay) || latest[appDay{r.Day.Time, app}] != r {
			continue
		}
		t := found[app]
		if t == nil {
			t = &tally{Application: Application{AppID: app}, first: day}
			found[app] = t
		}
		t.Name = cmp.Or(t.Name, string(r.AppName))
		t.Days++
		t.Requests += int64(r.TotalCount)
		t.Compliant += int64(r.CompliantCount)
		// A day that had begun before our records, or of which some are still to come,
		// says nothing.
		if !j.ours.first.IsZero() && !day.Before(j.ours.first) && (j.ours.lag == 0 || !day.Add(24*time.Hour).After(j.ours.until)) {
			days[day] = append(days[day], r)
		}
	}
	for day, rows := range days {
		here, loose, err := j.callsOf(ctx, day)
		if err != nil {
			return err
		}
		direct, own := map[string]int64{}, map[string]int64{}
		for _, r := range j.requests {
			if r.at.Truncate(24 * time.Hour).Equal(day) {
				switch {
				case j.own[r.id]:
					own[r.app]++
				case r.call == nil:
					direct[r.app]++
				}
			}
		}
		j.result.Adoption.Here += loose
		for _, r := range rows {
			app := strings.ToLower(string(r.AppID))
			t := found[app]
			j.result.Adoption.Here += here[app]
			t.ComparedDays++
			t.Microsoft += int64(r.TotalCount)
			t.Here += here[app] + loose
			t.direct += direct[app]
			t.own += own[app]
			t.first, t.last = earlier(t.first, day), later(t.last, day)
		}
	}
	apps := slices.SortedFunc(maps.Values(found), func(a, b *tally) int {
		return cmp.Or(-cmp.Compare(a.Requests, b.Requests), strings.Compare(a.AppID, b.AppID))
	})
	for i, t := range apps {
		if i < maxApplications {
			j.result.Applications = append(j.result.Applications, t.Application)
		}
		sum := &j.result.Adoption
		sum.Applications++
		sum.Requests += t.Requests
		sum.Compliant += t.Compliant
		sum.Microsoft += t.Microsoft
		excess := t.Microsoft - t.own - t.direct - t.Here
		f := Finding{
			Severity: Medium, Confidence: policy.Possible.String(), AppID: t.AppID, App: t.Name, Calls: int(excess),
			First: t.first, Last: t.last, Integrations: j.ours.usesOf(t.AppID),
		}
		switch {
		case i >= maxFindings || t.ComparedDays == 0 || excess <= 0:
			continue
		case len(j.ours.apps[t.AppID]) == 0 && t.direct == 0:
			f.Code = ApplicationNotSeen
			f.NonCompliant = int(max(0, t.Requests-t.Compliant))
			f.Text = fmt.Sprintf("Microsoft counts %s of an application that never passed the guard.", requests(int(excess)))
			if len(f.Integrations) > 0 {
				f.Text = fmt.Sprintf("Microsoft counts %s of the application of %s, and none passed the guard.", requests(int(excess)), namesOf(f.Integrations))
			}
			f.Fix = "Find out whose it is (Entra admin center, App registrations and Enterprise applications) and point it at the guard."
		case excess > max(minExcess, t.Microsoft/10):
			f.Code = ApplicationPartlySeen
			f.Text = fmt.Sprintf("Microsoft counts %s, and %d of them passed the guard.", requests(int(t.Microsoft)), t.Here)
			if t.direct > 0 {
				f.Text += fmt.Sprintf(" %d are among the direct calls; the others Microsoft no longer lists one by one.", t.direct)
			}
			f.Fix = "Run more often, or read answers that are saved hourly with --from, until the direct caller shows among Microsoft's rows."
		default:
			continue
		}
		j.find(f)
	}
	return nil
}

const (
	maxApplications = 1000
	// minExcess is how far Microsoft's count of an app may lie above ours before that is
	// worth a finding; a tenth of the count is allowed, too. What Microsoft counts is
	// not documented to the call.
	minExcess = 10
)

// callsOf counts our calls of a day by app that Microsoft may have counted. loose are
// those of no known app.
func (j *judge) callsOf(ctx context.Context, day time.Time) (byApp map[string]int64, loose int64, err error) {
	sums, err := j.cfg.Store.Sums(ctx, day, day.Add(24*time.Hour))
	if err != nil {
		return nil, 0, err
	}
	byApp = map[string]int64{}
	for _, s := range sums {
		switch {
		case s.Effect == policy.Reject.String() || s.Verified && s.Kind == policy.KindAppOnly.String():
		case s.AppID == "":
			loose += s.Calls
		default:
			byApp[strings.ToLower(s.AppID)] += s.Calls
		}
	}
	return byApp, loose, nil
}
