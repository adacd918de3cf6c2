package main

import (
	"errors"
	"io"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/partnerguard/partnerguard/telemetry/store"
)

// FuzzCallFilter: whatever the flags of calls hold, they give either a filter that
// says exactly that or an error of usage, and never another kind of error.
func FuzzCallFilter(f *testing.F) {
	for _, window := range [][2]string{
		{"24h", ""}, {"30d", "12h"}, {"1d12h", "0s"}, {"2026-11-01", "2026-11-01T08:00:00Z"}, {"2026-11-01T08:00:00.123456789+14:00", "2026-11-01T08:00:00-00:01"},
		{"", ""}, {"-1h", "1h"}, {"65535d", "2562047h47m16s"}, {"65536d", "1"}, {"0001-01-01", "0001-01-01T00:00:00Z"}, {"0000-01-01", "9999-12-31"},
		{"yesterday", "now"}, {"7D", "1e3s"}, {"+7d", " 7d"}, {"d", "٣d"}, {"2026-02-30", "2026-11-01T24:00:00Z"},
	} {
		f.Add(window[0], window[1], "401", "mfa_missing", "nightly-billing", "1000")
		f.Add(window[1], window[0], "4xx", "", "", "0")
	}
	for _, status := range []string{"4XX", "xx", "6xx", "099", "600", "+401", "0401", "40l", " 401", "401 ", "4x", "-4xx", "99999999999999999999", "4xx\x00"} {
		f.Add("24h", "", status, "' OR 1=1 --", "a\x00b\xff", "-1")
	}
	f.Add("24h", "", "", "--help", "-f", "1e3")
	f.Fuzz(func(t *testing.T, since, until, status, reason, text, limit string) {
		c := newCalls(environment{out: io.Discard, err: io.Discard, env: func(string) string { return "" }})
		args := []string{"--since=" + since, "--until=" + until, "--status=" + status, "--reason=" + reason, "--limit=" + limit}
		for _, flag := range []string{"integration", "user", "app", "customer", "call", "request-id", "correlation-id"} {
			args = append(args, "--"+flag+"="+text)
		}
		number, notNumber := strconv.ParseInt(limit, 0, 64)
		if err := c.ParseFlags(args); err != nil {
			if notNumber == nil {
				t.Fatalf("%q is refused: %v", args, err)
			}
			return
		}
		before := time.Now()
		got, err := callFilter(c)
		if err != nil {
			var usage *failure
			if !errors.As(err, &usage) || usage.code != exitUsage || err.Error() == "" {
				t.Fatalf("%q: error %v, want one of usage", args, err)
			}
			return
		}
		want := store.Filter{
			Since: got.Since, Until: got.Until, Status: status, Reason: reason, Limit: int(number),
			Integration: text, User: text, App: text, Customer: text, Call: text, RequestID: text, CorrelationID: text,
		}
		if got != want {
			t.Errorf("%q gives %+v, want %+v", args, got, want)
		}
		if _, _, err := store.ParseStatus(status); got.Limit < 0 || status != "" && err != nil {
			t.Errorf("%q: limit %d, status %q: %v", args, got.Limit, status, err)
		}
		look := func(flag, text string, got time.Time) {
			at, err := time.Parse(time.RFC3339, text)
			if err != nil {
				at, err = time.Parse(time.DateOnly, text)
			}
			switch {
			case got.IsZero() != (text == ""):
				t.Errorf("--%s=%q gives %v; only an absent one may be no time", flag, text, got)
			case text == "":
			case err == nil && !got.Equal(at):
				t.Errorf("--%s=%q gives %v, want %v", flag, text, got, at)
			case err != nil && got.After(time.Now()):
				t.Errorf("--%s=%q gives %v, which is to come", flag, text, got)
			case err != nil && !strings.ContainsAny(text, "123456789") && before.Sub(got) > time.Minute:
				t.Errorf("--%s=%q gives %v, want about now", flag, text, got)
			}
		}
		look("since", since, got.Since)
		look("until", until, got.Until)
	})
}
