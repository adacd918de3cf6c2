package store

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/partnerguard/partnerguard/telemetry/ledger"
)

// postgres is the fleet's database as one guard writes it: one connection, held by
// an advisory lock on the ledger's identity.
//
// Whatever goes wrong there ends in an error, upon which the Store closes the
// connection and opens another one: what the database then says of the position is
// where it goes on, also when the answer to a commit was lost.
type postgres struct {
	cfg     Config
	at      postgresConfig
	id      uuid.UUID // of the ledger; read when it is first needed
	rebuild bool      // what the database holds of the ledger is no good

	conn   *pgx.Conn // nil while closed
	ledger int32     // its number in the database
	joiner *joiner
	// The days that have partitions, and of these those whose filters are as good as can be.
	days, filtered map[int32]bool
	// What was needed lately: dims by what they hold, details and tokens likewise, each
	// with the seq of the call that it came with first, and what the calls of a day
	// count under.
	dims                  map[string]*pgDim
	details, tokens       map[string]uint64
	admitted              map[int32]*pgAdmitted
	maxDims, maxCustomers int
	pending               pgPending
	foldAt                int              // how many calls are folded
	folded                uint64           // the seq up to which they are
	lastHour              int64            // the latest of which there are sums
	stripped              map[int32]string // whose calls of a day are removed already
	key                   []byte           // scratch, like those below
	rows                  copyBuffer
	newDetails, newTokens copyBuffer
	heard                 time.Time // when the database was last told that this guard lives
	people                people
}

// How long the database may take. A statement that waits for a lock gives up before
// it counts as slow, a connection that is silent counts as lost after pgTimeout.
const (
	pgConnectTimeout   = 10 * time.Second
	pgStatementTimeout = 30 * time.Second
	pgLockTimeout      = 10 * time.Second
	pgIdleTimeout      = 30 * time.Second // within a transaction
	pgTimeout          = 45 * time.Second // of one step with all its statements
	pgMigrationTimeout = time.Hour
	pgHeartbeat        = 10 * time.Second // of a guard that has nothing to write
)

func newPostgres(cfg Config) (*postgres, error) {
	at, err := parsePostgres(cfg.Postgres)
	if err != nil {
		return nil, err
	}
	p := &postgres{cfg: cfg, at: at, maxDims: maxDims, maxCustomers: maxCustomers, foldAt: foldCalls}
	if cfg.Ledger != "" {
		if p.id, err = uuid.Parse(cfg.Ledger); err != nil {
			return nil, fmt.Errorf("store: Config.Ledger: %w", err)
		}
	}
	return p, nil
}

// postgresConfig is where the database is.
type postgresConfig struct {
	conn                 *pgx.ConnConfig
	schema               string
	timeout, lockTimeout time.Duration // pgTimeout and pgLockTimeout; tests are less patient
}

// defaultSchema holds the tables unless search_path in the URL names another one.
const defaultSchema = "partnerguard"

// parsePostgres reads a URL or DSN. Its error does not repeat it: a password is in it.
func parsePostgres(dsn string) (postgresConfig, error) {
	conn, err := pgx.ParseConfig(dsn)
	if err != nil {
		return postgresConfig{}, &hintError{
			errors.New("the PostgreSQL URL is not valid, or a file that it names cannot be read"),
			"write postgres://USER:PASSWORD@HOST:5432/DATABASE?sslmode=verify-full; escape special characters in the password by %XX",
		}
	}
	at := postgresConfig{conn: conn, schema: defaultSchema, timeout: pgTimeout, lockTimeout: pgLockTimeout}
	if path := conn.RuntimeParams["search_path"]; path != "" {
		first, _, _ := strings.Cut(path, ",")
		at.schema = strings.Trim(strings.TrimSpace(first), `"`)
	}
	delete(conn.RuntimeParams, "search_path")
	if conn.ConnectTimeout == 0 || conn.ConnectTimeout > pgConnectTimeout {
		conn.ConnectTimeout = pgConnectTimeout
	}
	conn.DialFunc = (&net.Dialer{KeepAliveConfig: net.KeepAliveConfig{
		Enable: true, Idle: 15 * time.Second, Interval: 5 * time.Second, Count: 3,
	}}).DialContext
	return at, nil
}

// String names the database, without user and password.
func (at postgresConfig) String() string {
	var hosts []string
	for _, server := range append([]*pgconn.FallbackConfig{{Host: at.conn.Host, Port: at.conn.Port}}, at.conn.Fallbacks...) {
		host := server.Host
		if !strings.HasPrefix(host, "/") {
			host = net.JoinHostPort(host, strconv.Itoa(int(server.Port)))
		}
		hosts = append(hosts, host)
	}
	// Each is there twice where a connection may be encrypted or not.
	return "PostgreSQL " + strings.Join(slices.Compact(hosts), ",") + "/" + at.conn.Database
}

// DescribePostgres says where a database is that Config.Postgres names, and how the
// connection is protected. It asks nobody, and the password is not in it.
func DescribePostgres(url string) (string, error) {
	at, err := parsePostgres(url)
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("%s, schema %s, as %s; %s", at, at.schema, at.conn.User, at.protection()), nil
}

func (at postgresConfig) protection() string {
	secure := at.conn.TLSConfig
	plain := secure == nil || slices.ContainsFunc(at.conn.Fallbacks, func(f *pgconn.FallbackConfig) bool { return f.TLSConfig == nil })
	switch {
	case strings.HasPrefix(at.conn.Host, "/"):
		return "a socket of this machine"
	case secure == nil:
		return "NOT ENCRYPTED: sslmode=verify-full encrypts and checks the server"
	case plain:
		return "NOT ENCRYPTED if the server does not offer it: sslmode=verify-full insists, and checks the server"
	case secure.InsecureSkipVerify && secure.VerifyPeerCertificate == nil && secure.VerifyConnection == nil:
		return "encrypted, the server NOT CHECKED: sslmode=verify-full checks it"
	}
	return "encrypted, the server checked"
}

// session makes conn's settings those of the guard. Readers cannot write.
func (at postgresConfig) session(app string, reader bool) *pgx.ConnConfig {
	conn := at.conn.Copy()
	if conn.RuntimeParams["application_name"] == "" {
		conn.RuntimeParams["application_name"] = app
	}
	settings := map[string]string{
		"search_path":                         pgx.Identifier{at.schema}.Sanitize(),
		"statement_timeout":                   milliseconds(pgStatementTimeout),
		"lock_timeout":                        milliseconds(at.lockTimeout),
		"idle_in_transaction_session_timeout": milliseconds(pgIdleTimeout),
		// So that PostgreSQL notices that a guard is gone, and lets go of its lock.
		"tcp_keepalives_idle":     "15",
		"tcp_keepalives_interval": "5",
		"tcp_keepalives_count":    "3",
		"tcp_user_timeout":        milliseconds(pgTimeout),
		// What is compiled for a statement of milliseconds costs a second.
		"jit":                           "off",
		"default_transaction_isolation": "read committed",
	}
	if reader {
		settings["default_transaction_read_only"] = "on"
		// A plan for any range of time suits none.
		settings["plan_cache_mode"] = "force_custom_plan"
	} else {
		// What a crash of the server takes is read from the ledger again: the position
		// goes with the calls.
		settings["synchronous_commit"] = "off"
		if conn.ValidateConnect == nil {
			conn.ValidateConnect = pgconn.ValidateConnectTargetSessionAttrsReadWrite
		}
	}
	var set []string
	for name, value := range settings {
		set = append(set, "set_config('"+name+"', '"+strings.ReplaceAll(value, "'", "''")+"', false)")
	}
	conn.AfterConnect = func(ctx context.Context, c *pgconn.PgConn) error {
		if encoding := c.ParameterStatus("server_encoding"); encoding != "UTF8" {
			return &hintError{fmt.Errorf("the database's encoding is %s", encoding), "create one with ENCODING 'UTF8'"}
		}
		return c.Exec(ctx, "SELECT "+strings.Join(set, ", ")).Close()
	}
	return conn
}

func milliseconds(d time.Duration) string { return strconv.FormatInt(d.Milliseconds(), 10) }

// lockKey is an advisory lock's. Such locks are the whole database's.
func (at postgresConfig) lockKey(what string) int64 {
	h := fnv.New64a()
	h.Write([]byte("partnerguard\x00" + at.schema + "\x00" + what))
	return int64(h.Sum64())
}

// fail says what was being done, and what to do about it.
func (at postgresConfig) fail(doing string, err error) error {
	if err == nil {
		return nil
	}
	out := fmt.Errorf("%s: %s: %w", doing, at, err)
	hint := ""
	switch code(err) {
	case "28P01", "28000":
		hint = "check user and password in the secret that the store's URL comes from, and pg_hba.conf"
	case "3D000":
		hint = "create the database: see docs/fleet.md"
	case "42501":
		hint = fmt.Sprintf("let a DBA run: CREATE SCHEMA IF NOT EXISTS %[1]s; GRANT ALL ON SCHEMA %[1]s TO the role of the guards; tables that another role made must belong to that role",
			pgx.Identifier{at.schema}.Sanitize())
	case "25006":
		hint = readOnlyHint
	case "53300":
		hint = "every guard needs one connection, every reader up to four: raise max_connections or the role's connection limit"
	case "53100", "53200":
		hint = "give the database server room; nothing is lost while the guards' ledgers keep it"
	default:
		if !errors.Is(err, pgconn.ErrReadOnlyConnection) && !errors.Is(err, pgconn.ErrStandbyConnection) {
			return out
		}
		hint = readOnlyHint
	}
	return &hintError{out, hint}
}

const readOnlyHint = "no server that the URL names takes writes: promote one, or name the one that does; several hosts, separated by commas, are tried in order"

// code is PostgreSQL's code of err, empty when err is not PostgreSQL's.
func code(err error) string {
	var pg *pgconn.PgError
	if errors.As(err, &pg) {
		return pg.Code
	}
	return ""
}

func (p *postgres) name() string { return p.at.String() }

// limit bounds one step in time, whatever the network does.
func (at postgresConfig) limit(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(ctx, at.timeout)
}

func (p *postgres) open(ctx context.Context) (*joiner, error) {
	if p.id == uuid.Nil {
		id, err := ledger.ID(p.cfg.Dir)
		if err != nil {
			return nil, err
		}
		if p.id, err = uuid.Parse(id); err != nil {
			return nil, fmt.Errorf("read identity of the ledger: %w", err)
		}
	}
	err := p.connect(ctx)
	if err == nil && p.rebuild {
		if err = p.forgetLedger(ctx); err == nil {
			p.rebuild = false
		}
	}
	if err == nil {
		ctx, cancel := p.at.limit(ctx)
		defer cancel()
		err = p.load(ctx)
	}
	if err != nil {
		p.close()
		return nil, p.at.fail("open store", err)
	}
	return p.joiner, nil
}

// connect connects, sees to the schema, and takes the lock of the ledger.
func (p *postgres) connect(ctx context.Context) (err error) {
	p.renew()
	limited, cancel := p.at.limit(ctx)
	defer cancel()
	if p.conn, err = pgx.ConnectConfig(limited, p.at.session("partnerguard "+p.cfg.Instance, false)); err != nil {
		return err
	}
	if err := p.at.migrate(ctx, p.conn, migrations, p.cfg.Version); err != nil {
		return err
	}
	ctx, cancel = p.at.limit(ctx)
	defer cancel()
	if err := p.lock(ctx); err != nil {
		return err
	}
	retention := int64(p.longest() / time.Second)
	var unfinished bool
	err = p.conn.QueryRow(ctx, `
		INSERT INTO ledgers (id, instance, version, retention) VALUES ($1, $2, $3, $4)
		ON CONFLICT (id) DO UPDATE SET instance = $2, version = $3, retention = $4, heard = clock_timestamp(), stopped = NULL
		RETURNING ledger, rebuild`, p.id, pgText(p.cfg.Instance), pgText(p.cfg.Version), retention).Scan(&p.ledger, &unfinished)
	p.rebuild = p.rebuild || unfinished
	return err
}

// renew takes the URL as it stands now. Where that cannot be read, or is none, the one
// before may still do.
func (p *postgres) renew() {
	if p.cfg.CurrentPostgres == nil {
		return
	}
	url, err := p.cfg.CurrentPostgres()
	if err != nil || url == "" {
		return
	}
	if at, err := parsePostgres(url); err == nil {
		p.at.conn, p.at.schema = at.conn, at.schema
	}
}

// longest is how long the guard's calls may be needed; less than 0 for ever.
func (p *postgres) longest() time.Duration {
	longest := p.cfg.Retention
	for _, kept := range p.cfg.TenantRetention {
		if longest >= 0 {
			longest = max(longest, kept)
		}
	}
	if longest < 0 {
		return -time.Second
	}
	return longest
}

// lock takes the lock of the ledger, for as long as the connection lasts.
func (p *postgres) lock(ctx context.Context) error {
	// The session of a guard that just ended may be about to let go.
	patience := p.at.lockTimeout / 2
	_, err := p.conn.Exec(ctx, "SELECT set_config('lock_timeout', $1, false)", milliseconds(patience))
	if err == nil {
		_, err = p.conn.Exec(ctx, "SELECT pg_advisory_lock($1)", p.at.lockKey("ledger "+p.id.String()))
	}
	if code(err) == "55P03" {
		return &hintError{
			fmt.Errorf("another session writes the calls of ledger %s", p.id),
			"a data directory must not be copied for a second guard; the session of a guard that was cut off ends by itself within a minute",
		}
	}
	if err == nil {
		_, err = p.conn.Exec(ctx, "SELECT set_config('lock_timeout', $1, false)", milliseconds(p.at.lockTimeout))
	}
	return err
}

// load reads what the writer keeps in memory.
func (p *postgres) load(ctx context.Context) error {
	p.dims, p.details, p.tokens, p.admitted = map[string]*pgDim{}, map[string]uint64{}, map[string]uint64{}, map[int32]*pgAdmitted{}
	in := &joiner{pace: atOnce, open: map[string]*openCall{}}
	var segment, seq int64
	var newest *time.Time
	err := p.conn.QueryRow(ctx, `SELECT segment, "offset", seq, newest FROM ledgers WHERE ledger = $1`, p.ledger).
		Scan(&segment, &in.position.Offset, &seq, &newest)
	if err != nil {
		return err
	}
	in.position.Segment, in.seq = uint64(segment), uint64(seq)
	if newest != nil {
		in.newest = newest.UTC()
	}
	rows, err := p.conn.Query(ctx, "SELECT seq, line FROM open WHERE ledger = $1", p.ledger)
	if err != nil {
		return err
	}
	var line []byte
	_, err = pgx.ForEachRow(rows, []any{&seq, &line}, func() error {
		o := &openCall{seq: uint64(seq), stored: true}
		if err := decodeDecision(string(line), &o.call); err != nil {
			return fmt.Errorf("read open call: %w", err)
		}
		in.open[o.call.ID] = o
		return nil
	})
	if err != nil {
		return err
	}
	if err := p.loadDays(ctx); err != nil {
		return err
	}
	if _, err := p.conn.Exec(ctx, stagingTables); err != nil {
		return err
	}
	p.joiner, p.heard = in, time.Time{}
	p.people = people{}
	return p.loadFold(ctx)
}

func (p *postgres) close() error {
	if p.conn == nil {
		return nil
	}
	// A server that does not answer gets no time to say goodbye.
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	err := p.conn.Close(ctx)
	p.conn, p.joiner, p.days, p.filtered, p.dims, p.details, p.tokens, p.admitted = nil, nil, nil, nil, nil, nil, nil, nil
	p.stripped, p.pending = nil, pgPending{}
	p.rows, p.newDetails, p.newTokens, p.people = copyBuffer{}, copyBuffer{}, copyBuffer{}, people{}
	return err
}

// release tells the fleet that this guard stops: it does not lag from now on.
func (p *postgres) release() error {
	if p.conn != nil {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		defer cancel()
		p.conn.Exec(ctx, "UPDATE ledgers SET stopped = clock_timestamp(), heard = clock_timestamp() WHERE ledger = $1", p.ledger)
	}
	p.close() // of a connection that breaks meanwhile there is nothing to tell
	return nil
}

func (p *postgres) recover(err error) error {
	if !errors.Is(err, ledger.ErrPosition) {
		return err
	}
	p.cfg.Event(Event{Outdated, p.name(), err})
	p.rebuild = true
	return nil
}

// idle tells the fleet every few seconds that this guard lives.
func (p *postgres) idle(ctx context.Context, caughtUp bool) error {
	ctx, cancel := p.at.limit(ctx)
	defer cancel()
	err := p.followPeople(ctx)
	if err == nil && caughtUp {
		if err = p.foldEnded(ctx); err == nil {
			err = p.filterEnded(ctx)
		}
	}
	if now := time.Now(); err == nil && now.Sub(p.heard) >= pgHeartbeat {
		p.heard = now
		_, err = p.conn.Exec(ctx, "UPDATE ledgers SET heard = clock_timestamp(), caught_up = $2 WHERE ledger = $1", p.ledger, caughtUp)
	}
	return p.at.fail("write store", err)
}

func (p *postgres) holds(ctx context.Context, call string) (known bool, err error) {
	ctx, cancel := p.at.limit(ctx)
	defer cancel()
	cond, args := "odd[1] = $2 AND odd_folded @> ARRAY[$3]", []any{p.ledger, pgText(call), foldOdd(call)}
	if id, ok := parseGUID(call); ok {
		cond, args = "call = $2", []any{p.ledger, [16]byte(id)}
	}
	err = p.conn.QueryRow(ctx, "SELECT EXISTS (SELECT 1 FROM calls WHERE ledger = $1 AND "+cond+")", args...).Scan(&known)
	return known, p.at.fail("write store", err)
}

// begin has nothing to do: the transaction begins when the batch is whole, so that
// no lock is held while the ledger is read.
func (p *postgres) begin(context.Context) error { return nil }

// people is what the database knows of identities.jsonl.
type people struct {
	looked time.Time           // at the files
	known  map[string]Identity // nil: not read yet
	stamp  [2]os.FileInfo      // of the files they came from
}

// followPeople brings the identities of the data directory into the database, and
// removes there who is no longer in it. It looks every few seconds.
func (p *postgres) followPeople(ctx context.Context) error {
	now := time.Now()
	if now.Sub(p.people.looked) < pgHeartbeat {
		return nil
	}
	p.people.looked = now
	return p.bringPeople(ctx)
}

func (p *postgres) bringPeople(ctx context.Context) error {
	var now map[string]Identity
	if !p.cfg.Pseudonymous {
		var stamp [2]os.FileInfo
		for i, name := range [...]string{"identities.jsonl", "forgotten"} {
			stamp[i], _ = os.Stat(filepath.Join(p.cfg.Dir, name)) // one that is missing holds nothing
		}
		if p.people.known != nil && sameFile(stamp[0], p.people.stamp[0]) && sameFile(stamp[1], p.people.stamp[1]) {
			return nil
		}
		var err error
		if now, err = ledger.Identities(p.cfg.Dir); err != nil {
			return err
		}
		p.people.stamp = stamp
	} else if p.people.known != nil {
		return nil
	}
	if p.people.known == nil {
		p.people.known = map[string]Identity{}
		rows, err := p.conn.Query(ctx, "SELECT user_ref, tid, oid, upn FROM identities WHERE ledger = $1", p.ledger)
		if err != nil {
			return err
		}
		var id Identity
		if _, err := pgx.ForEachRow(rows, []any{&id.UserRef, &id.TenantID, &id.ObjectID, &id.UPN}, func() error {
			p.people.known[id.UserRef] = id
			return nil
		}); err != nil {
			return err
		}
	}
	var refs, tids, oids, upns, gone []string
	for ref, id := range now {
		id = Identity{UserRef: pgText(ref), TenantID: pgText(id.TenantID), ObjectID: pgText(id.ObjectID), UPN: pgText(id.UPN)}
		if p.people.known[id.UserRef] != id {
			refs, tids, oids, upns = append(refs, id.UserRef), append(tids, id.TenantID), append(oids, id.ObjectID), append(upns, id.UPN)
			p.people.known[id.UserRef] = id
		}
	}
	for ref := range p.people.known {
		if _, ok := now[ref]; !ok {
			gone = append(gone, ref)
			delete(p.people.known, ref)
		}
	}
	if len(refs) > 0 {
		if _, err := p.conn.Exec(ctx, `
			INSERT INTO identities (ledger, user_ref, tid, oid, upn)
			SELECT $1, * FROM unnest($2::text[], $3::text[], $4::text[], $5::text[])
			ON CONFLICT (ledger, user_ref) DO UPDATE SET tid = excluded.tid, oid = excluded.oid, upn = excluded.upn`,
			p.ledger, refs, tids, oids, upns); err != nil {
			return err
		}
	}
	if len(gone) > 0 {
		if _, err := p.conn.Exec(ctx, "DELETE FROM identities WHERE ledger = $1 AND user_ref = ANY($2)", p.ledger, gone); err != nil {
			return err
		}
	}
	return nil
}

// sameFile reports whether nothing was written to a file since.
func sameFile(a, b os.FileInfo) bool {
	if a == nil || b == nil {
		return a == nil && b == nil
	}
	return os.SameFile(a, b) && a.Size() == b.Size() && a.ModTime().Equal(b.ModTime())
}

// Forget removes from the fleet's database who the given user_refs stand for. The
// guards forget them in their own data directories; until then they bring them again.
func Forget(ctx context.Context, url string, refs []string) error {
	at, err := parsePostgres(url)
	if err != nil {
		return err
	}
	ctx, cancel := at.limit(ctx)
	defer cancel()
	conn, err := pgx.ConnectConfig(ctx, at.session("partnerguard", false))
	if err == nil {
		defer conn.Close(context.WithoutCancel(ctx))
		if _, err = at.version(ctx, conn); err == nil {
			_, err = conn.Exec(ctx, "DELETE FROM identities WHERE user_ref = ANY($1)", refs)
		}
	}
	return at.fail("forget users", err)
}
