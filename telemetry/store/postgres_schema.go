package store

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
)

// migration is one step of the schema. Steps are only ever added: a fleet is
// upgraded guard by guard, and the programs of two versions write side by side.
type migration struct {
	// compatibleFrom is the number of migrations that a program must know at least to
	// go on working after this one. A step that adds what older programs can leave
	// alone says 1, or what the one before it says.
	compatibleFrom int
	sql            string
	// then, if not nil, does what SQL cannot, in the same transaction.
	then func(ctx context.Context, tx pgx.Tx) error
}

// migrations are the schema. Times of calls are those of the guards, heard and
// stopped those of the database; hours are hours since 1970, days are of UTC.
var migrations = []migration{{1, `
-- The ledgers of the fleet, and how far each is in here: written with the rows that
-- the position accounts for.
CREATE TABLE ledgers (
	ledger    integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
	id        uuid NOT NULL UNIQUE,
	instance  text NOT NULL,
	version   text NOT NULL, -- of the program that writes
	retention bigint NOT NULL, -- seconds; -1 keeps all
	segment   bigint NOT NULL DEFAULT 0,
	"offset"  bigint NOT NULL DEFAULT 0,
	seq       bigint NOT NULL DEFAULT 0,
	newest    timestamptz, -- when the latest call began
	caught_up boolean NOT NULL DEFAULT false,
	heard     timestamptz NOT NULL DEFAULT clock_timestamp(),
	stopped   timestamptz, -- set while the guard does not run
	rebuild   boolean NOT NULL DEFAULT false -- what is here of it is being removed
);

-- The greatest finish. Who raises it holds its row until the calls are committed, so
-- that no smaller finish ever appears behind a greater one.
CREATE TABLE fleet (one boolean PRIMARY KEY DEFAULT true CHECK (one), finish bigint NOT NULL);
INSERT INTO fleet (finish) VALUES (0);

-- The calls that ended. seq is the number of the line that ended them in their ledger,
-- finish one of the whole fleet in the order in which they came in here. Ids are NULL
-- when they are unknown, or no GUID as this program writes them: then they stand in odd
-- (call, request, correlation, upstream's request and correlation, customer), and in
-- small letters and cut off in odd_folded. Bits of same: the upstream's request id, or
-- correlation id, is the client's. path is NULL when it is the route. rest is what dim
-- says only that it is something else.
CREATE TABLE calls (
	finish bigint NOT NULL, "time" timestamptz NOT NULL, seq bigint NOT NULL, dim bigint NOT NULL, detail bigint NOT NULL, token bigint,
	day date NOT NULL, ledger integer NOT NULL,
	bytes_in bigint, bytes_out bigint, duration_us bigint, upstream_us bigint,
	call uuid, request_id uuid, correlation_id uuid, upstream_request_id uuid, upstream_correlation_id uuid, customer uuid,
	same smallint NOT NULL, path text, rest jsonb, odd text[], odd_folded text[],
	PRIMARY KEY (day, ledger, seq)
) PARTITION BY RANGE (day);
CREATE INDEX ON calls (finish);
CREATE INDEX ON calls (dim);
CREATE INDEX ON calls (call);
CREATE INDEX ON calls (request_id);
CREATE INDEX ON calls (correlation_id);
CREATE INDEX ON calls (upstream_request_id) WHERE upstream_request_id IS NOT NULL;
CREATE INDEX ON calls (upstream_correlation_id) WHERE upstream_correlation_id IS NOT NULL;
CREATE INDEX ON calls (customer) WHERE customer IS NOT NULL;
CREATE INDEX ON calls USING gin (odd_folded) WHERE odd_folded IS NOT NULL;

-- What the calls of a sum have in common. hash is that of the rest, day the last one
-- with such a call.
CREATE TABLE dims (
	dim bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, hash uuid NOT NULL UNIQUE, day date NOT NULL,
	integration text NOT NULL, owner text NOT NULL, tid text NOT NULL, app_id text NOT NULL, user_ref text NOT NULL,
	kind text NOT NULL, verified boolean NOT NULL, route text NOT NULL, mode text NOT NULL,
	effect text NOT NULL, reason text NOT NULL, would_reject boolean NOT NULL, status bigint NOT NULL,
	rejection text NOT NULL, code text NOT NULL, mfa text NOT NULL, mfa_compliant text NOT NULL, amr text NOT NULL
);

-- What else repeats, by the call that it came with first.
CREATE TABLE details (
	day date NOT NULL, ledger integer NOT NULL, detail bigint NOT NULL,
	generation bigint NOT NULL, replays bigint NOT NULL,
	instance text NOT NULL, listener text NOT NULL, peer text NOT NULL, method text NOT NULL, query_names text NOT NULL,
	upstream text NOT NULL, evidence text NOT NULL, rule text NOT NULL, application text NOT NULL, user_agent text NOT NULL,
	upstream_status text NOT NULL, error text NOT NULL,
	PRIMARY KEY (day, ledger, detail)
) PARTITION BY RANGE (day);

-- The tokens, by the hour in which the calls began and the call that they came with
-- first. caller is its dim.
CREATE TABLE tokens (
	day date NOT NULL, ledger integer NOT NULL, token bigint NOT NULL, hour integer NOT NULL, caller bigint NOT NULL,
	uti text NOT NULL, iat bigint NOT NULL, exp bigint NOT NULL,
	PRIMARY KEY (day, ledger, token)
) PARTITION BY RANGE (day);

-- The calls that began in an hour: by what they have in common, by customer instead of
-- route, and between which finishes they lie.
CREATE TABLE sums (
	day date NOT NULL, dim bigint NOT NULL, hour integer NOT NULL, ledger integer NOT NULL,
	calls bigint NOT NULL, first timestamptz NOT NULL, last timestamptz NOT NULL,
	PRIMARY KEY (day, dim, hour, ledger)
) PARTITION BY RANGE (day);
CREATE TABLE customer_sums (
	day date NOT NULL, dim bigint NOT NULL, hour integer NOT NULL, ledger integer NOT NULL, customer text NOT NULL,
	calls bigint NOT NULL, first timestamptz NOT NULL, last timestamptz NOT NULL,
	PRIMARY KEY (day, dim, hour, ledger, customer)
) PARTITION BY RANGE (day);
CREATE TABLE hours (
	hour integer, ledger integer, low bigint NOT NULL, high bigint NOT NULL,
	PRIMARY KEY (hour, ledger)
);

-- Decisions without outcome so far, as the ledgers have them.
CREATE TABLE open (
	ledger integer, call text, seq bigint NOT NULL, "time" timestamptz NOT NULL, line bytea NOT NULL,
	PRIMARY KEY (ledger, call)
);

-- Records that a ledger could not take.
CREATE TABLE gaps (
	ledger integer, seq bigint, calls bigint NOT NULL, outcomes bigint NOT NULL,
	since timestamptz NOT NULL, until timestamptz NOT NULL, cause text NOT NULL,
	PRIMARY KEY (ledger, seq)
);

-- What the guards signed: a copy that whoever changes a ledger does not reach.
CREATE TABLE checkpoints (
	ledger integer, seq bigint, "time" timestamptz NOT NULL, "commit" bigint NOT NULL, hash bytea NOT NULL, key text NOT NULL, signature bytea NOT NULL,
	PRIMARY KEY (ledger, seq, signature)
);

-- Whom the references to users stand for, which differ from ledger to ledger.
CREATE TABLE identities (
	ledger integer, user_ref text, tid text NOT NULL, oid text NOT NULL, upn text NOT NULL,
	PRIMARY KEY (ledger, user_ref)
);
`, nil}, {2, `
-- Bits of same, further: the request id, or the correlation id, is the call's own. A path
-- that is its route with values for the names in braces is those in path_values (see
-- packPath), or in neither column if it follows from route and customer.
ALTER TABLE calls ADD COLUMN path_values bytea;

-- An entry of an index of random ids takes 40 bytes, and writing it touches a page of its
-- own. A filter says of the rows of some pages which ids are not among them, in 2 bytes a
-- row: a search reads all filters, and then very few rows.
DROP INDEX calls_call_idx, calls_request_id_idx, calls_correlation_id_idx;
CREATE INDEX ON calls USING brin (call uuid_bloom_ops (n_distinct_per_range = 2150, false_positive_rate = 0.001)) WITH (pages_per_range = 44, autosummarize = on);
CREATE INDEX ON calls USING brin (request_id uuid_bloom_ops (n_distinct_per_range = 2150, false_positive_rate = 0.001)) WITH (pages_per_range = 44, autosummarize = on);
CREATE INDEX ON calls USING brin (correlation_id uuid_bloom_ops (n_distinct_per_range = 2150, false_positive_rate = 0.001)) WITH (pages_per_range = 44, autosummarize = on);

-- First what is asked for: within a partition the day is always the same.
ALTER TABLE sums DROP CONSTRAINT sums_pkey, ADD PRIMARY KEY (dim, hour, ledger, day);
ALTER TABLE customer_sums DROP CONSTRAINT customer_sums_pkey, ADD PRIMARY KEY (customer, dim, hour, ledger, day);
CREATE INDEX ON dims (user_ref);
CREATE INDEX ON dims (app_id);
`, nil}, {3, `
-- Who writes holds the row of its ledger.
LOCK TABLE ledgers IN ACCESS EXCLUSIVE MODE;

-- What the calls of a ledger come to that began in an hour or on a day, for a kind of sums
-- (see appendSums); start is the hour, or day, since 1970. A day has one from when a later
-- one has begun on. Calls behind seq folded are not in them yet.
CREATE TABLE tallies (
	day date NOT NULL, ledger integer NOT NULL, kind integer NOT NULL, start bigint NOT NULL, entries bytea NOT NULL,
	PRIMARY KEY (ledger, kind, start, day)
) PARTITION BY RANGE (day);
ALTER TABLE ledgers ADD COLUMN folded bigint NOT NULL DEFAULT 0;
UPDATE ledgers SET folded = seq;
ALTER TABLE calls DROP CONSTRAINT calls_pkey, ADD PRIMARY KEY (ledger, seq, day);
`, foldSums}}

// stagingTables are where rows wait that a batch brings.
const stagingTables = `
CREATE TEMPORARY TABLE staging (
	ord integer, hour integer, "time" timestamptz, seq bigint, dim bigint, detail bigint, token bigint, day date,
	bytes_in bigint, bytes_out bigint, duration_us bigint, upstream_us bigint,
	call uuid, request_id uuid, correlation_id uuid, upstream_request_id uuid, upstream_correlation_id uuid, customer uuid,
	same smallint, path text, path_values bytea, rest json, odd text[], odd_folded text[]
) ON COMMIT DELETE ROWS;
CREATE TEMPORARY TABLE new_dims (hash uuid, day date,
	integration text, owner text, tid text, app_id text, user_ref text,
	kind text, verified boolean, route text, mode text,
	effect text, reason text, would_reject boolean, status bigint,
	rejection text, code text, mfa text, mfa_compliant text, amr text
) ON COMMIT DELETE ROWS;
`

// tables are those of the schema, to tell a foreign one.
var tables = []string{"ledgers", "fleet", "calls", "dims", "details", "tokens", "tallies", "hours", "open", "gaps", "checkpoints", "identities"}

// migrate brings the schema to what this program knows, each step in a transaction of
// its own. A newer schema is fine as long as it says so. A step takes the time that an
// index of all calls takes; to look whether there is one must not.
func (at postgresConfig) migrate(ctx context.Context, conn *pgx.Conn, known []migration, program string) error {
	limited, cancel := at.limit(ctx)
	defer cancel()
	version, err := at.schemaVersion(limited, conn, known)
	if err != nil || version >= len(known) {
		return err
	}
	ctx, cancel = context.WithTimeout(ctx, pgMigrationTimeout)
	defer cancel()
	for err == nil && version < len(known) {
		version, err = at.migrateOnce(ctx, conn, known, program)
	}
	return err
}

// migrateOnce takes one step, or none when another program was quicker, and returns
// the version then.
func (at postgresConfig) migrateOnce(ctx context.Context, conn *pgx.Conn, known []migration, program string) (version int, err error) {
	err = pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, "SELECT pg_advisory_xact_lock($1)", at.lockKey("migrate")); err != nil {
			return err
		}
		if version, err = at.schemaVersion(ctx, conn, known); err != nil || version >= len(known) {
			return err
		}
		if version == 0 {
			if err := at.create(ctx, tx); err != nil {
				return err
			}
		}
		step := known[version]
		version++
		if _, err := tx.Exec(ctx, "SET LOCAL statement_timeout = 0; "+step.sql); err != nil {
			if code(err) == "42704" { // undefined_object: an operator class
				return &hintError{fmt.Errorf("migrate schema %s to version %d: %w", at.schema, version, err), "PostgreSQL 14 or later is needed"}
			}
			return fmt.Errorf("migrate schema %s to version %d: %w", at.schema, version, err)
		}
		if step.then != nil {
			if err := step.then(ctx, tx); err != nil {
				return fmt.Errorf("migrate schema %s to version %d: %w", at.schema, version, err)
			}
		}
		_, err := tx.Exec(ctx, "INSERT INTO migrations (version, compatible_from, program) VALUES ($1, $2, $3)", version, step.compatibleFrom, pgText(program))
		return err
	})
	return version, err
}

// create makes the schema, if it is not there, and the table of migrations. A schema
// that holds tables of something else is left alone.
func (at postgresConfig) create(ctx context.Context, tx pgx.Tx) error {
	var exists bool
	if err := tx.QueryRow(ctx, "SELECT EXISTS (SELECT 1 FROM pg_namespace WHERE nspname = $1)", at.schema).Scan(&exists); err != nil {
		return err
	}
	if !exists {
		if _, err := tx.Exec(ctx, "CREATE SCHEMA IF NOT EXISTS "+pgx.Identifier{at.schema}.Sanitize()); err != nil {
			return err
		}
	}
	var foreign []string
	err := tx.QueryRow(ctx, "SELECT coalesce(array_agg(tablename::text ORDER BY tablename), '{}') FROM pg_tables WHERE schemaname = $1 AND tablename = ANY($2)",
		at.schema, append([]string{"migrations", "sums", "customer_sums"}, tables...)).Scan(&foreign)
	if err != nil {
		return err
	}
	if len(foreign) > 0 {
		return at.foreign(strings.Join(foreign, ", "))
	}
	_, err = tx.Exec(ctx, `CREATE TABLE migrations (
		version integer PRIMARY KEY, compatible_from integer NOT NULL, program text NOT NULL, applied timestamptz NOT NULL DEFAULT clock_timestamp())`)
	return err
}

func (at postgresConfig) foreign(what string) error {
	return &hintError{
		fmt.Errorf("schema %s holds tables of something else: %s", at.schema, what),
		"give the store a schema of its own, by search_path in the URL: postgres://…/DATABASE?search_path=SCHEMA",
	}
}

const compatibility = "SELECT coalesce(max(version), 0), coalesce(max(compatible_from), 0) FROM migrations"

// schemaVersion returns how many migrations the schema has had, 0 for none, and an
// error when the programs that know only those of known must not touch it.
func (at postgresConfig) schemaVersion(ctx context.Context, conn *pgx.Conn, known []migration) (version int, err error) {
	var there bool
	if err := conn.QueryRow(ctx, "SELECT to_regclass('migrations') IS NOT NULL").Scan(&there); err != nil || !there {
		return 0, err
	}
	var needed int
	err = conn.QueryRow(ctx, compatibility).Scan(&version, &needed)
	if code(err) == "42703" { // no such column
		return 0, at.foreign("migrations")
	}
	if err != nil {
		return 0, err
	}
	return version, at.compatible(version, needed, len(known))
}

// compatible returns an error when a schema that needs programs that know so many
// migrations is none for one that knows fewer.
func (at postgresConfig) compatible(version, needed, known int) error {
	if needed <= known {
		return nil
	}
	return &hintError{
		fmt.Errorf("schema %s has version %d and needs a program that knows %d; this one knows %d", at.schema, version, needed, known),
		"run the newer partnerguard that the fleet was upgraded to",
	}
}

// version is schemaVersion for those who do not write: there must be a schema, and it
// must be what this program knows or newer.
func (at postgresConfig) version(ctx context.Context, conn *pgx.Conn) (int, error) {
	version, err := at.schemaVersion(ctx, conn, migrations)
	switch {
	case err != nil:
		return 0, err
	case version == 0:
		return 0, &hintError{
			fmt.Errorf("schema %s: %w", at.schema, ErrNoStore),
			"guards with store.postgres write one as calls come in; search_path in the URL names another schema",
		}
	case version < len(migrations):
		return 0, &hintError{
			fmt.Errorf("schema %s has version %d, this program needs %d", at.schema, version, len(migrations)),
			"a guard of this version upgrades it when it starts; until then use the program of the guards",
		}
	}
	return version, nil
}

// partitioned are the tables with a partition a day.
var partitioned = []string{"calls", "details", "tokens", "tallies"}

const dayLayout = "20060102"

// dayOf is the day since 1970 that t lies in.
func dayOf(t time.Time) int32 {
	seconds := t.Unix()
	day := seconds / 86400
	if seconds%86400 < 0 {
		day--
	}
	return int32(day)
}

func dayTime(day int32) time.Time { return time.Unix(int64(day)*86400, 0).UTC() }

// loadDays finds the partitions, and makes those of the days to come.
func (p *postgres) loadDays(ctx context.Context) error {
	rows, err := p.conn.Query(ctx, "SELECT relname::text FROM pg_inherits JOIN pg_class ON oid = inhrelid WHERE inhparent = 'calls'::regclass")
	if err != nil {
		return err
	}
	names, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return err
	}
	p.days, p.filtered = map[int32]bool{}, map[int32]bool{}
	for _, name := range names {
		if day, err := time.Parse(dayLayout, strings.TrimPrefix(name, "calls_")); err == nil {
			p.days[dayOf(day)] = true
		}
	}
	return p.aheadDays(ctx)
}

// aheadDays makes the partitions of today and the days to come: it must not be left
// to the first call of a day.
func (p *postgres) aheadDays(ctx context.Context) error {
	today := dayOf(p.cfg.Now())
	return p.makeDays(ctx, today, today+1, today+2)
}

// makeDays makes the partitions of days that are missing.
func (p *postgres) makeDays(ctx context.Context, days ...int32) error {
	for _, day := range days {
		if p.days[day] {
			continue
		}
		name, from, to := dayTime(day).Format(dayLayout), dayTime(day).Format(time.DateOnly), dayTime(day+1).Format(time.DateOnly)
		err := pgx.BeginFunc(ctx, p.conn, func(tx pgx.Tx) error {
			if _, err := tx.Exec(ctx, "SELECT pg_advisory_xact_lock($1)", p.at.lockKey("partitions")); err != nil {
				return err
			}
			for _, table := range partitioned {
				child := table + "_" + name
				var there bool
				if err := tx.QueryRow(ctx, "SELECT to_regclass($1) IS NOT NULL", child).Scan(&there); err != nil {
					return err
				}
				if there {
					continue
				}
				// Attached rather than made as a partition, which would keep all readers out.
				if _, err := tx.Exec(ctx, fmt.Sprintf("CREATE TABLE %s (LIKE %s INCLUDING DEFAULTS INCLUDING STORAGE)", child, table)); err != nil {
					return err
				}
				if _, err := tx.Exec(ctx, fmt.Sprintf("ALTER TABLE %s ATTACH PARTITION %s FOR VALUES FROM ('%s') TO ('%s')", table, child, from, to)); err != nil {
					return err
				}
				// A filter that stands is written again, all 4 KB of it, with every row of its
				// range. PostgreSQL makes them when a range is full; this one is there at once.
				if _, err := tx.Exec(ctx, "SELECT brin_desummarize_range(c.oid, 0)"+filtersOf, child); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return fmt.Errorf("make partition of %s: %w", from, err)
		}
		p.days[day] = true
	}
	return nil
}

// filtersOf are the BRIN indexes c of a table.
const filtersOf = ` FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
	WHERE i.indrelid = to_regclass($1) AND c.relam = (SELECT oid FROM pg_am WHERE amname = 'brin')`

// filterEnded makes what is missing of the filters of days that ended: their last ranges
// will not fill up. It takes its time only when there is nothing else to do.
func (p *postgres) filterEnded(ctx context.Context) error {
	const patience = time.Second
	began, today := time.Now(), dayOf(p.cfg.Now())
	for day := range p.days {
		if day >= today || p.filtered[day] {
			continue
		}
		_, err := p.conn.Exec(ctx, "SELECT brin_summarize_new_values(c.oid)"+filtersOf, "calls_"+dayTime(day).Format(dayLayout))
		if code := code(err); err != nil && code != "55P03" && code != "57014" { // locked, or too much at once: searches read those rows
			return err
		}
		p.filtered[day] = true
		if time.Since(began) > patience {
			break
		}
	}
	return nil
}

// prune drops the days that ended before all guards' retention, those that were not
// heard from for a month left out. One guard at a time does it.
func (p *postgres) prune(ctx context.Context, cutoff time.Time) (done bool, err error) {
	ctx, cancel := p.at.limit(ctx)
	defer cancel()
	err = p.aheadDays(ctx)
	if err == nil {
		err = p.foldEnded(ctx)
	}
	if err != nil {
		return false, p.at.fail("prune store", err)
	}
	var now time.Time
	var longest int64
	var forever bool
	err = p.conn.QueryRow(ctx, `SELECT clock_timestamp(), coalesce(max(retention), 0), coalesce(bool_or(retention < 0), false)
		FROM ledgers WHERE heard > clock_timestamp() - interval '30 days'`).Scan(&now, &longest, &forever)
	if err == nil {
		done, err = p.pruneTenants(ctx, cutoff)
	}
	if err != nil || forever || !done {
		return done, p.at.fail("prune store", err)
	}
	// A guard whose clock is wrong must not take the others' calls.
	if before := now.Add(-time.Duration(longest) * time.Second); before.Before(cutoff) {
		cutoff = before
	}
	first := dayOf(cutoff)
	var old []int32
	for day := range p.days {
		if day < first {
			old = append(old, day)
		}
	}
	slices.Sort(old)
	for _, day := range old {
		var dropped bool
		err := pgx.BeginFunc(ctx, p.conn, func(tx pgx.Tx) error {
			if err := tx.QueryRow(ctx, "SELECT pg_try_advisory_xact_lock($1)", p.at.lockKey("retention")).Scan(&dropped); err != nil || !dropped {
				return err
			}
			// A report may be reading; those behind it must not wait for this.
			if _, err := tx.Exec(ctx, "SET LOCAL lock_timeout = '1s'"); err != nil {
				return err
			}
			for _, table := range partitioned {
				if _, err := tx.Exec(ctx, "DROP TABLE IF EXISTS "+table+"_"+dayTime(day).Format(dayLayout)); err != nil {
					return err
				}
			}
			return p.pruneBefore(ctx, tx, day+1)
		})
		if code(err) == "55P03" || err == nil && !dropped {
			return true, nil // in use, or another guard is at it: the next time will do
		}
		if err != nil {
			return false, p.at.fail("prune store", err)
		}
		delete(p.days, day)
		delete(p.stripped, day)
		delete(p.filtered, day)
	}
	return true, nil
}

// pruneTenants removes of this guard's calls those of tenants that are kept shorter,
// and when a tenant is kept longer, the others. Their days stay for the rest. cutoff is
// that of all.
func (p *postgres) pruneTenants(ctx context.Context, cutoff time.Time) (done bool, err error) {
	if len(p.cfg.TenantRetention) == 0 {
		return true, nil
	}
	now := cutoff.Add(p.cfg.Retention)
	for day := range p.days {
		end := dayTime(day + 1)
		var over, kept []string
		for tenant, retention := range p.cfg.TenantRetention {
			if retention >= 0 && !end.After(now.Add(-retention)) {
				over = append(over, tenant)
			} else {
				kept = append(kept, tenant)
			}
		}
		cond, tenants := "= ANY($2)", over
		if !end.After(cutoff) {
			cond, tenants = "<> ALL($2)", kept
		} else if len(over) == 0 {
			continue
		}
		slices.Sort(tenants)
		what := cond + strings.Join(tenants, " ")
		if p.stripped[day] == what {
			continue
		}
		for _, q := range [...]struct{ table, join, tenant string }{
			{"calls", "USING (dim)", "coalesce(t.rest->>'tid', tid)"}, {"tokens", "ON dim = caller", "tid"},
		} {
			const some = 10_000 // so that no transaction is long
			table := q.table + "_" + dayTime(day).Format(dayLayout)
			tag, err := p.conn.Exec(ctx, fmt.Sprintf("DELETE FROM %[1]s WHERE ctid = ANY(ARRAY(SELECT t.ctid FROM %[1]s t JOIN dims %[2]s WHERE t.ledger = $1 AND %[3]s %[4]s LIMIT %[5]d))",
				table, q.join, q.tenant, cond, some), p.ledger, tenants)
			if err != nil || tag.RowsAffected() == some {
				return false, err
			}
		}
		if err := p.stripSums(ctx, day, cond, tenants); err != nil {
			return false, err
		}
		if p.stripped == nil {
			p.stripped = map[int32]string{}
		}
		p.stripped[day] = what
	}
	return true, nil
}

// pruneBefore removes what is not kept by the day.
func (p *postgres) pruneBefore(ctx context.Context, tx pgx.Tx, day int32) error {
	at := dayTime(day)
	for _, q := range []struct {
		sql string
		arg any
	}{
		{"DELETE FROM hours WHERE hour < $1", hourOf(at)},
		// Two days later, so that no guard still knows it for a call that is kept.
		{"DELETE FROM dims WHERE day < $1", at.AddDate(0, 0, -2)},
		{"DELETE FROM gaps WHERE until < $1", at},
		{"DELETE FROM open WHERE time < $1", at},
		{"DELETE FROM checkpoints WHERE time < $1", at},
	} {
		if _, err := tx.Exec(ctx, q.sql, q.arg); err != nil {
			return err
		}
	}
	return nil
}

// forgetLedger removes all that the database holds of the ledger, so that it can be
// read anew. A day at a time, as there may be millions of calls.
func (p *postgres) forgetLedger(ctx context.Context) error {
	short, cancel := p.at.limit(ctx)
	defer cancel()
	if _, err := p.conn.Exec(short, "UPDATE ledgers SET rebuild = true WHERE ledger = $1", p.ledger); err != nil {
		return err
	}
	rows, err := p.conn.Query(short, `SELECT c.relname::text FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid JOIN pg_class t ON t.oid = i.inhparent
		WHERE t.relname = ANY($1) AND t.relnamespace = $2::regnamespace AND c.relkind = 'r'`, partitioned, pgx.Identifier{p.at.schema}.Sanitize())
	if err != nil {
		return err
	}
	names, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return err
	}
	names = append(names, "hours", "open", "gaps")
	const patience = 10 * time.Minute // for one of them
	if _, err := p.conn.Exec(short, "SELECT set_config('statement_timeout', $1, false)", milliseconds(patience)); err != nil {
		return err
	}
	for _, name := range names {
		one, cancel := context.WithTimeout(ctx, patience)
		_, err := p.conn.Exec(one, "DELETE FROM "+pgx.Identifier{name}.Sanitize()+" WHERE ledger = $1", p.ledger)
		cancel()
		if err != nil {
			return err
		}
	}
	last, cancelLast := p.at.limit(ctx)
	defer cancelLast()
	if _, err := p.conn.Exec(last, "SELECT set_config('statement_timeout', $1, false)", milliseconds(pgStatementTimeout)); err != nil {
		return err
	}
	_, err = p.conn.Exec(last, `UPDATE ledgers SET segment = 0, "offset" = 0, seq = 0, folded = 0, newest = NULL, caught_up = false, rebuild = false WHERE ledger = $1`, p.ledger)
	return err
}
