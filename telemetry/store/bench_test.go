//go:build unix

package store

import (
	"fmt"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/partnerguard/partnerguard/policy"
	"github.com/partnerguard/partnerguard/proxy"
)

// ingestCalls are the calls that the benchmarks of ingest have.
var ingestCalls = []struct {
	name string
	call func(i int, r *proxy.Record)
}{
	// 20 integrations with 10 tokens each call 4 routes, at 100 calls a second.
	{"realistic", func(i int, r *proxy.Record) {
		token := i * 7 % 200
		r.Integration, r.Owner = fmt.Sprint("integration-", token%20), fmt.Sprintf("owner-%d@contoso.example", token%20)
		r.Token.UPN, r.Token.UTI = fmt.Sprintf("Vg3FQYb2Zp0%04x", token), fmt.Sprintf("EJwqP017IU6myA1eH3C%03x", token)
		r.Token.AppID = fmt.Sprintf("7d1f0a52-9b3c-4c1e-8f60-2a5b9c0d1e%02x", token%20)
		r.UserAgent = []string{"python-requests/2.32", "curl/8.5.0", "PartnerCenterSdk/3.4 (.NET)"}[token%3]
		switch i * 13 % 101 % 4 {
		case 0:
			r.Route, r.Path = "/v1/customers/{customer-id}/subscriptions", fmt.Sprintf("/v1/customers/7d1f0a52-9b3c-4c1e-8f60-2a5b9c0d1%03x/subscriptions", token)
			r.Customer = fmt.Sprintf("7d1f0a52-9b3c-4c1e-8f60-2a5b9c0d1%03x", token)
		case 1:
			r.Route, r.Path = "/v1/customers", "/v1/customers"
			r.QueryNames = []string{"size", "filter"}
		case 2:
			r.Route, r.Path = "/v1/invoices/{invoice-id}", fmt.Sprintf("/v1/invoices/G0%08d", i%3000)
		}
		if i%50 == 0 {
			r.Status, r.Rejection, r.Code, r.UpstreamStatus = 401, policy.RejectionMFARequired, "900421", "401 Unauthorized"
		}
	}},
	// No call repeats what another one was.
	{"all different", func(i int, r *proxy.Record) {
		r.Token.UPN, r.Token.UTI = fmt.Sprintf("Vg3FQYb2Zp0%08x", i), fmt.Sprintf("EJwqP017IU6m%010x", i)
		r.Customer = fmt.Sprintf("7d1f0a52-9b3c-4c1e-8f60-2a5b%08x", i)
		r.Path = "/v1/customers/" + r.Customer
		r.UserAgent = fmt.Sprint("agent/", i)
	}},
}

// BenchmarkIngest measures the whole way from line to row, index and sum: CPU time a
// call and bytes of database a call. Run it with -cpu 1.
func BenchmarkIngest(b *testing.B) {
	const calls, chunk = 200_000, 10_000
	for _, bm := range ingestCalls {
		b.Run(bm.name, func(b *testing.B) {
			var cpu time.Duration
			var size int64
			for b.Loop() {
				j, dir := &journal{}, b.TempDir()
				s, err := Open(Config{Dir: dir, Source: j.open, Retention: -1})
				if err != nil {
					b.Fatal(err)
				}
				for i := range calls {
					j.call(benchCall(i, bm.call))
					if (i+1)%chunk != 0 {
						continue
					}
					before := cpuTime(b)
					if n, err := s.CatchUp(b.Context()); err != nil || n != 2*chunk {
						b.Fatal(n, err)
					}
					cpu += cpuTime(b) - before
					for k := range j.entries {
						j.entries[k].Line = nil
					}
				}
				if err := s.Close(); err != nil {
					b.Fatal(err)
				}
				fi, err := os.Stat(dbPath(dir))
				if err != nil {
					b.Fatal(err)
				}
				size = fi.Size()
			}
			b.ReportMetric(float64(cpu.Nanoseconds())/1000/float64(b.N*calls), "µs-cpu/call")
			b.ReportMetric(float64(size)/calls, "B-db/call")
			b.ReportMetric(0, "ns/op")
		})
	}
}

func benchCall(i int, vary func(int, *proxy.Record)) proxy.Record {
	r := callAt(0)
	r.Time = start.Add(time.Duration(i) * 10 * time.Millisecond)
	r.Call = uuid.New()
	for k, ms := 0, r.Time.UnixMilli(); k < 6; k++ {
		r.Call[k] = byte(ms >> (40 - 8*k))
	}
	r.Call[6] = 0x70 | r.Call[6]&0xf
	r.RequestID, r.CorrelationID = uuid.NewString(), uuid.NewString()
	r.UpstreamRequestID, r.UpstreamCorrelationID = r.RequestID, r.CorrelationID
	r.Instance, r.Generation, r.Listener, r.Peer, r.Upstream, r.Evidence = "guard-1", 1, "main", "192.0.2.7", "partner-center", "app_id"
	r.Token.TenantID = "1b2c3d4e-0a1b-4c2d-8e3f-901234567890"
	r.Token.IssuedAt, r.Token.ExpiresAt = 1780996100, 1781000000
	r.Application = "Billing"
	r.BytesOut, r.Duration, r.UpstreamTime = int64(1000+i%5000), time.Duration(4000+i%3000)*time.Microsecond, time.Duration(3000+i%3000)*time.Microsecond
	vary(i, &r)
	return r
}

// cpuTime is the CPU time that this process has used.
func cpuTime(b *testing.B) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
