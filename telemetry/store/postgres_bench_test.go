//go:build unix

package store

import (
	"testing"
	"time"
)

// BenchmarkIngestPostgres measures one guard: calls a second, CPU time of the guard a
// call, and bytes of PostgreSQL a call, indexes included.
func BenchmarkIngestPostgres(b *testing.B) {
	const calls, chunk = 200_000, 10_000
	for _, bm := range ingestCalls {
		b.Run(bm.name, func(b *testing.B) {
			server := postgresServer.Server(b)
			var cpu, took time.Duration
			var size string
			for b.Loop() {
				place, j := postgresShelf(b), &journal{}
				place.url = postgresServer.NewDatabase(b)
				cfg := place.config(j, nil)
				cfg.Retention = -1
				s, err := Open(cfg)
				if err != nil {
					b.Fatal(err)
				}
				for i := range calls {
					j.call(benchCall(i, bm.call))
					if (i+1)%chunk != 0 {
						continue
					}
					before, began := cpuTime(b), time.Now()
					if n, err := s.CatchUp(b.Context()); err != nil || n != 2*chunk {
						b.Fatal(n, err)
					}
					cpu, took = cpu+cpuTime(b)-before, took+time.Since(began)
					for k := range j.entries {
						j.entries[k].Line = nil
					}
				}
				if err := s.Close(); err != nil {
					b.Fatal(err)
				}
				rows := server.Rows(b, place.url, `SELECT coalesce(i.indrelid, c.oid)::regclass || ' ' || c.relname || ' ' || pg_relation_size(c.oid) FROM pg_class c LEFT JOIN pg_index i ON i.indexrelid = c.oid
					WHERE relnamespace = 'partnerguard'::regnamespace AND pg_relation_size(c.oid) > 1000000 ORDER BY pg_relation_size(c.oid) DESC`)
				for _, row := range rows {
					b.Log(row)
				}
				size = server.Rows(b, place.url, "SELECT sum(CASE relkind WHEN 'r' THEN pg_table_size(oid) ELSE pg_relation_size(oid) END)::bigint FROM pg_class WHERE relnamespace = 'partnerguard'::regnamespace")[0]
			}
			b.Log("bytes", size)
			b.ReportMetric(float64(cpu.Nanoseconds())/1000/float64(b.N*calls), "µs-cpu/call")
			b.ReportMetric(float64(b.N*calls)/took.Seconds(), "calls/s")
			b.ReportMetric(0, "ns/op")
		})
	}
}
