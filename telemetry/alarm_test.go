package telemetry

import (
	"testing"

	"github.com/partnerguard/partnerguard/policy"
	"github.com/partnerguard/partnerguard/proxy"
)

func TestTheTokenAlarm(t *testing.T) {
	type second struct{ good, broken, careless int } // careless: expired, or for another API
	steady := func(n int, s second) []second {
		all := make([]second, n)
		for i := range all {
			all[i] = s
		}
		return all
	}
	then := func(parts ...[]second) (all []second) {
		for _, p := range parts {
			all = append(all, p...)
		}
		return all
	}
	for _, row := range []struct {
		name  string
		calls []second
		want  bool
	}{
		{"all is well", steady(300, second{good: 10}), false},
		{"no calls at all", steady(300, second{}), false},
		{"all tokens break at noon", then(steady(300, second{good: 10}), steady(40, second{broken: 10})), true},
		{"a quiet estate: a call every ten seconds", then(steady(60, second{good: 1}), steady(60, second{}), steady(5, second{broken: 1})), true},
		{"four broken tokens prove nothing", then(steady(300, second{good: 10}), steady(60, second{}), steady(4, second{broken: 1})), false},
		{"one of ten callers always sends opaque tokens", steady(300, second{good: 9, broken: 1}), false},
		{"most callers always send opaque tokens", steady(300, second{good: 1, broken: 9}), false},
		{"nothing was ever verified", steady(300, second{broken: 10}), false},
		{"tokens expire", then(steady(300, second{good: 10}), steady(60, second{careless: 10})), false},
		{"the night after it keeps the alarm", then(steady(300, second{good: 10}), steady(60, second{broken: 10}), steady(3600, second{})), true},
		{"it ends when most are verified again", then(steady(300, second{good: 10}), steady(60, second{broken: 10}), steady(40, second{good: 10})), false},
	} {
		t.Run(row.name, func(t *testing.T) {
			var a TokenAlarm
			var on bool
			for _, s := range row.calls {
				for range s.good {
					a.count(&proxy.Record{Decided: proxy.Decided{Token: policy.Token{Verified: true}, Decision: policy.Decision{Reason: policy.ReasonMFAMissing}}})
				}
				for range s.broken {
					a.count(&proxy.Record{Decided: proxy.Decided{Decision: policy.Decision{Reason: policy.ReasonTokenEncrypted}}})
				}
				for range s.careless {
					a.count(&proxy.Record{Decided: proxy.Decided{Decision: policy.Decision{Reason: policy.ReasonTokenExpired}}})
				}
				_, _, on = a.Look()
			}
			if on != row.want {
				t.Errorf("alarm %v, want %v", on, row.want)
			}
		})
	}
}
