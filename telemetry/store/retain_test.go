package store

import (
	"fmt"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// Tenants can be kept shorter or longer than the rest. Sums go by the hour with their
// calls.
func TestTenantsAreKeptAsLongAsTheyShall(t *testing.T) {
	now := time.Now().UTC()
	j := &journal{}
	const minutes = 5 * 24 * 60
	for i := 0; i < minutes; i += 10 {
		r := callAt(i)
		r.Time = now.Add(time.Duration(i-minutes) * time.Minute)
		r.Call[13], r.Call[14] = byte(i>>16), byte(i>>8)
		r.Token.TenantID = []string{"short", "usual", "long", "short"}[i/10%4]
		r.Token.Verified = i/10%4 != 3 // who only claims to be of a tenant is of none
		r.Token.AppID = fmt.Sprint("app-", i/10%7)
		j.call(r)
	}
	place := sqliteShelf(t, 50)
	cfg := place.config(j, nil)
	cfg.Now = func() time.Time { return now }
	cfg.Retention = 2 * 24 * time.Hour
	cfg.TenantRetention = map[string]time.Duration{"short": 24 * time.Hour, "long": 3 * 24 * time.Hour}
	s, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	writerOf(s).foldAt = place.foldAt
	for range 3 {
		for range 4 { // a part at a time
			s.pruned = time.Time{}
			catchUp(t, s)
		}
		checkTenants(t, place.reader(t), now)
		now = now.Add(90 * time.Minute)
	}
}

func checkTenants(t *testing.T, r Reader, now time.Time) {
	t.Helper()
	kept := map[string]time.Duration{"short": 24 * time.Hour, "usual": 48 * time.Hour, "long": 72 * time.Hour, "claimed": 48 * time.Hour}
	oldest, calls := map[string]time.Time{}, map[string]int64{}
	for _, c := range readCalls(t, r, Filter{}) {
		tenant := c.TenantID
		if !c.Verified {
			tenant = "claimed"
		}
		calls[c.Integration]++
		if at, ok := oldest[tenant]; !ok || c.Time.Before(at) {
			oldest[tenant] = c.Time
		}
	}
	for tenant, d := range kept {
		// Whole hours go; the first of those that stay is ten minutes in at most, with
		// a call of each tenant every forty.
		if late := oldest[tenant].Sub(now.Add(-d).Truncate(time.Hour)); late < 0 || late > 40*time.Minute {
			t.Errorf("the oldest call of %s is of %v, %v after what is kept begins", tenant, oldest[tenant], late)
		}
	}
	sums := map[string]int64{}
	for _, s := range readSums(t, r) {
		sums[s.Integration] += s.Calls
	}
	if diff := cmp.Diff(calls, sums); diff != "" {
		t.Errorf("sums (-calls +sums):\n%s", diff)
	}
	customers, err := r.CustomerSums(t.Context(), time.Time{}, time.Time{})
	if err != nil {
		t.Fatal(err)
	}
	clear(sums)
	for _, s := range customers {
		sums[s.Integration] += s.Calls
	}
	if diff := cmp.Diff(calls, sums); diff != "" {
		t.Errorf("sums by customer (-calls +sums):\n%s", diff)
	}
}
