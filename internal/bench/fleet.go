package main

import (
	"context"
	"fmt"
	"net/url"
	"os"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/partnerguard/partnerguard/telemetry/store"
)

// storeVariable tells the guard's program where the database is.
const storeVariable = "PARTNERGUARD_BENCH_STORE"

// fleet is a schema of a PostgreSQL database.
type fleet struct {
	url, schema string
	conn        *pgx.Conn
}

func newFleet(ctx context.Context, database string) (*fleet, error) {
	u, err := url.Parse(database)
	if err != nil {
		return nil, fmt.Errorf("-postgres is no URL")
	}
	f := &fleet{schema: fmt.Sprint("partnerguard_bench_", time.Now().Unix())}
	if f.conn, err = pgx.Connect(ctx, database); err != nil {
		return nil, err
	}
	query := u.Query()
	query.Set("search_path", f.schema)
	u.RawQuery = query.Encode()
	f.url = u.String()
	return f, nil
}

func (f *fleet) remove() {
	ctx := context.Background()
	f.conn.Exec(ctx, "DROP SCHEMA "+pgx.Identifier{f.schema}.Sanitize()+" CASCADE")
	f.conn.Close(ctx)
}

// fillFleet follows the ledger in dir as a guard of a fleet does.
func (t *scaleTable) fillFleet(ctx context.Context, f *fleet, dir string, n int) error {
	start := time.Now()
	before, err := cpuTime(os.Getpid())
	if err != nil {
		return err
	}
	s, err := store.Open(store.Config{Dir: dir, Postgres: f.url, Instance: "guard-1", Retention: -1})
	if err != nil {
		return err
	}
	if _, err := s.CatchUp(ctx); err != nil {
		s.Close()
		return err
	}
	after, err := cpuTime(os.Getpid())
	if err != nil {
		s.Close()
		return err
	}
	t.set("ingest: calls/s", float64(n)/time.Since(start).Seconds())
	t.set("ingest: CPU µs a call, the database's left out", float64((after-before).Microseconds())/float64(n))
	// What a guard does of days that ended, a second at a time.
	for quick := false; !quick; {
		began := time.Now()
		if _, err := s.CatchUp(ctx); err != nil {
			s.Close()
			return err
		}
		quick = time.Since(began) < time.Second
	}
	if err := s.Close(); err != nil {
		return err
	}
	// As PostgreSQL itself does in the course of days.
	if _, err := f.conn.Exec(ctx, "VACUUM (ANALYZE)"); err != nil {
		return err
	}
	rows, err := f.conn.Query(ctx, `SELECT regexp_replace(c.relname, '_?[0-9]{8}', ''), sum(CASE c.relkind WHEN 'r' THEN pg_table_size(c.oid) ELSE pg_relation_size(c.oid) END)::float8
		FROM pg_class c WHERE relnamespace = $1::regnamespace GROUP BY ROLLUP (1) ORDER BY 2 DESC`, f.schema)
	if err != nil {
		return err
	}
	var name *string
	var size float64
	_, err = pgx.ForEachRow(rows, []any{&name, &size}, func() error {
		if name == nil {
			t.set("store: bytes a call", size/float64(n))
		} else if size > float64(n) {
			t.set("store: bytes a call in "+*name, size/float64(n))
		}
		return nil
	})
	return err
}
