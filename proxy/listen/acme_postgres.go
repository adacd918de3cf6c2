package listen

import (
	"cmp"
	"context"
	"crypto/aes"
	"crypto/cipher"
	"encoding/base64"
	"errors"
	"fmt"
	"hash/fnv"
	"io/fs"
	"math/rand/v2"
	"path"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/caddyserver/certmagic"
	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
)

// PostgresStorage is what a fleet of guards has in common for ACME: account,
// certificates with their keys, the answers to challenges that are under way, and
// the locks that have one guard at a time go to the CA. It is a
// [certmagic.Storage] in the tables acme and acme_locks of a PostgreSQL database,
// which it makes when they are missing.
//
// Values are encrypted, so that whoever reads the database, a replica or a backup
// of it has no key of a certificate: AES-256-GCM with a random nonce, bound to the
// key they are stored at, so that none can be put in the place of another. The
// keys' names, which hold the host names, are clear text.
//
// Nothing is connected until it is needed, and each operation is bounded in time,
// so it can be made while the database is down. It is safe for concurrent use.
type PostgresStorage struct {
	pool     *pgxpool.Pool
	aead     cipher.AEAD
	schema   string
	instance string
	lease    time.Duration

	mu       sync.Mutex
	prepared bool              // the tables exist
	held     map[string]*lease // by name, those that Lock took
	leases   context.Context   // ends all leases
	stop     context.CancelFunc
	renewing sync.WaitGroup
}

var (
	_ certmagic.Storage   = (*PostgresStorage)(nil)
	_ certmagic.TryLocker = (*PostgresStorage)(nil)
)

// PostgresConfig is what OpenPostgres needs. URL and Key are required.
type PostgresConfig struct {
	// URL is that of the database, in either form that libpq knows. It is a secret:
	// it holds a password. The tables are in the schema "partnerguard", or in the
	// first that search_path names.
	URL string
	// CurrentURL returns what URL would be now. It is asked for each connection: a
	// password that changed needs no restart. What is an error, or no URL, leaves the one
	// before. Nil: URL stands.
	CurrentURL func() (string, error)
	// Key encrypts the values: 32 bytes in base64 ("openssl rand -base64 32"). All
	// guards of the fleet have the same. What another key has encrypted cannot be
	// read; to change the key, give all guards the new one and empty the table: they
	// store the copies that they have on disk again.
	Key string
	// Instance names this guard in acme_locks, for people to read.
	Instance string

	lease time.Duration // zero is 30 seconds
}

const (
	// storageTimeout bounds one operation, a new connection included.
	storageTimeout = 5 * time.Second
	// lockPoll is how often Lock looks whether a lock has become free.
	lockPoll = time.Second
	// storageConnections are enough for an order and the answers to its challenges.
	storageConnections = 4
	// sealed is the first byte of a value: the version of its format. After it come
	// nonce and ciphertext.
	sealed byte = 1
)

var (
	errLocked    = errors.New("another guard holds the lock")
	errLeaseLost = errors.New("the lock was lost: the database could not be reached in time to keep it")
)

// OpenPostgres checks the configuration; it contacts nobody. Close must follow.
func OpenPostgres(cfg PostgresConfig) (*PostgresStorage, error) {
	key, err := base64.StdEncoding.DecodeString(cfg.Key)
	if err != nil || len(key) != 32 {
		return nil, errors.New("its key must be 32 bytes in base64, as from openssl rand -base64 32")
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	aead, err := cipher.NewGCMWithRandomNonce(block)
	if err != nil {
		return nil, err
	}
	pc, err := pgxpool.ParseConfig(cfg.URL)
	if err != nil {
		return nil, errors.New("its database must be given as postgres://USER:PASSWORD@HOST/DATABASE") // what is wrong with it may be the password
	}
	pc.MaxConns, pc.MinConns = storageConnections, 0
	schema := storageSession(pc.ConnConfig)
	if cfg.CurrentURL != nil {
		pc.BeforeConnect = func(_ context.Context, cc *pgx.ConnConfig) error {
			url, err := cfg.CurrentURL()
			if err != nil || url == "" {
				return nil
			}
			if now, err := pgxpool.ParseConfig(url); err == nil {
				storageSession(now.ConnConfig)
				*cc = *now.ConnConfig
			}
			return nil
		}
	}
	pool, err := pgxpool.NewWithConfig(context.Background(), pc)
	if err != nil {
		return nil, fmt.Errorf("prepare ACME storage: %w", err)
	}
	s := &PostgresStorage{
		pool: pool, aead: aead, schema: schema, instance: cfg.Instance,
		lease: cmp.Or(cfg.lease, 30*time.Second), held: map[string]*lease{},
	}
	s.leases, s.stop = context.WithCancel(context.Background())
	return s, nil
}

// storageSession makes cc's settings those of the storage, and returns the schema.
func storageSession(cc *pgx.ConnConfig) (schema string) {
	cc.ConnectTimeout = cmp.Or(cc.ConnectTimeout, storageTimeout)
	// No prepared statements, which poolers like PgBouncer may lose.
	cc.DefaultQueryExecMode = pgx.QueryExecModeExec
	several := slices.ContainsFunc(cc.Fallbacks, func(f *pgconn.FallbackConfig) bool { return f.Host != cc.Host || f.Port != cc.Port })
	if several && cc.ValidateConnect == nil { // the first may be a standby
		cc.ValidateConnect = pgconn.ValidateConnectTargetSessionAttrsReadWrite
	}
	if cc.RuntimeParams["application_name"] == "" {
		cc.RuntimeParams["application_name"] = "partnerguard acme"
	}
	schema = "partnerguard"
	if given := cc.RuntimeParams["search_path"]; given != "" {
		first, _, _ := strings.Cut(given, ",")
		schema = strings.Trim(strings.TrimSpace(first), `"`)
	}
	cc.RuntimeParams["search_path"] = pgx.Identifier{schema}.Sanitize()
	return schema
}

// Close gives up what is held and ends the connections. Nothing may be called
// after it.
func (s *PostgresStorage) Close() {
	s.mu.Lock()
	held := s.held
	s.held = map[string]*lease{}
	s.mu.Unlock()
	for _, l := range held {
		l.release(context.Background())
	}
	s.stop()
	s.renewing.Wait()
	s.pool.Close()
}

// Store is certmagic.Storage's.
func (s *PostgresStorage) Store(ctx context.Context, key string, value []byte) error {
	_, err := s.exec(ctx, storeValue+` VALUES ($1, $2, clock_timestamp()) `+overwriteValue, key, s.seal(key, value))
	if err != nil {
		return storageError("store", key, err)
	}
	return nil
}

const (
	storeValue     = `INSERT INTO acme (key, value, modified)`
	overwriteValue = `ON CONFLICT (key) DO UPDATE SET value = excluded.value, modified = excluded.modified`
)

// storeHeld stores a value if l is still held, in one step: the lease is its
// fencing token. Otherwise the error is errLeaseLost, and nothing is changed.
func (s *PostgresStorage) storeHeld(ctx context.Context, l *lease, key string, value []byte) error {
	tag, err := s.exec(ctx, storeValue+`
		SELECT $1, $2, clock_timestamp() FROM acme_locks
		WHERE name = $3 AND holder = $4 AND expires > clock_timestamp() FOR SHARE `+overwriteValue,
		key, s.seal(key, value), l.name, l.holder)
	if err == nil && tag.RowsAffected() == 0 {
		err = errLeaseLost
	}
	if err != nil {
		return storageError("store", key, err)
	}
	return nil
}

// Load is certmagic.Storage's. A value that cannot be decrypted is an error, and
// not fs.ErrNotExist: it must not be ordered anew.
func (s *PostgresStorage) Load(ctx context.Context, key string) ([]byte, error) {
	var value []byte
	err := s.row(ctx, []any{&value}, `SELECT value FROM acme WHERE key = $1`, key)
	if err == nil {
		value, err = s.open(key, value)
	}
	if err != nil {
		return nil, storageError("load", key, err)
	}
	return value, nil
}

// Delete is certmagic.Storage's.
func (s *PostgresStorage) Delete(ctx context.Context, key string) error {
	if _, err := s.exec(ctx, `DELETE FROM acme WHERE `+keyOrBelow, key); err != nil {
		return storageError("delete", key, err)
	}
	return nil
}

// keyOrBelow selects a key, and all keys that it is a directory of.
const keyOrBelow = `(key = $1 OR starts_with(key, $1 || '/'))`

// Exists is certmagic.Storage's. What cannot be found out does not exist.
func (s *PostgresStorage) Exists(ctx context.Context, key string) bool {
	_, err := s.Stat(ctx, key)
	return err == nil
}

// List is certmagic.Storage's. As with certmagic.FileStorage the keys are sorted
// and directories are among them, and a directory that does not exist is
// fs.ErrNotExist.
func (s *PostgresStorage) List(ctx context.Context, directory string, recursive bool) ([]string, error) {
	var all []string
	err := s.row(ctx, []any{&all}, `SELECT coalesce(array_agg(key), '{}') FROM acme WHERE $1 = '' OR `+keyOrBelow, directory)
	if err == nil && len(all) == 0 {
		err = fs.ErrNotExist
	}
	if err != nil {
		return nil, storageError("list", directory, err)
	}
	var keys []string
	for _, key := range all {
		below := strings.TrimPrefix(strings.TrimPrefix(key, directory), "/")
		for i, r := range below {
			if r == '/' && (recursive || !strings.Contains(below[:i], "/")) {
				keys = append(keys, path.Join(directory, below[:i]))
			}
		}
		if below != "" && (recursive || !strings.Contains(below, "/")) {
			keys = append(keys, key)
		}
	}
	slices.Sort(keys)
	return slices.Compact(keys), nil
}

// Stat is certmagic.Storage's.
func (s *PostgresStorage) Stat(ctx context.Context, key string) (certmagic.KeyInfo, error) {
	info := certmagic.KeyInfo{Key: key}
	var size int64
	err := s.row(ctx, []any{&info.IsTerminal, &info.Modified, &size}, `
		SELECT key = $1, modified, octet_length(value) FROM acme
		WHERE `+keyOrBelow+` ORDER BY key = $1 DESC, modified DESC LIMIT 1`, key)
	if err != nil {
		return certmagic.KeyInfo{}, storageError("stat", key, err)
	}
	if info.IsTerminal {
		info.Size = size - int64(1+s.aead.Overhead())
	}
	return info, nil
}

// Lock is certmagic.Locker's. A lock is a lease of 30 seconds by the database's
// clock, renewed in the background: when its holder dies, or has not reached the
// database for so long, the lock is free.
func (s *PostgresStorage) Lock(ctx context.Context, name string) error {
	for {
		locked, err := s.TryLock(ctx, name)
		if locked || err != nil {
			return err
		}
		timer := time.NewTimer(lockPoll + rand.N(lockPoll/4))
		select {
		case <-ctx.Done():
			timer.Stop()
			return storageError("lock", name, ctx.Err())
		case <-timer.C:
		}
	}
}

// TryLock is certmagic.TryLocker's.
func (s *PostgresStorage) TryLock(ctx context.Context, name string) (bool, error) {
	l, err := s.acquire(ctx, name)
	if errors.Is(err, errLocked) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	s.mu.Lock()
	s.held[name] = l
	s.mu.Unlock()
	return true, nil
}

// Unlock is certmagic.Locker's. A lock that was lost meanwhile is not an error:
// it is released.
func (s *PostgresStorage) Unlock(ctx context.Context, name string) error {
	s.mu.Lock()
	l := s.held[name]
	delete(s.held, name)
	s.mu.Unlock()
	if l == nil {
		return storageError("unlock", name, errors.New("it is not locked here"))
	}
	return l.release(ctx)
}

// lease is a lock that is held.
type lease struct {
	storage *PostgresStorage
	name    string
	holder  string          // of this lease alone; nobody else can renew or end it
	held    context.Context // ends with the lease, whether released or lost
	end     context.CancelFunc
}

// acquire takes a lock that is free, or else returns errLocked.
func (s *PostgresStorage) acquire(ctx context.Context, name string) (*lease, error) {
	l := &lease{storage: s, name: name, holder: uuid.NewString()}
	before := time.Now()
	tag, err := s.exec(ctx, `
		INSERT INTO acme_locks AS l (name, holder, instance, expires)
		VALUES ($1, $2, $3, clock_timestamp() + $4)
		ON CONFLICT (name) DO UPDATE SET holder = excluded.holder, instance = excluded.instance, expires = excluded.expires
		WHERE l.expires <= clock_timestamp()`, name, l.holder, s.instance, s.lease)
	if err == nil && tag.RowsAffected() == 0 {
		err = errLocked
	}
	if err != nil {
		return nil, storageError("lock", name, err)
	}
	l.held, l.end = context.WithCancel(s.leases)
	s.renewing.Go(func() { l.renew(before.Add(s.lease)) })
	return l, nil
}

// renew keeps the lease until it ends. It is taken to run out at expires by this
// machine's clock, which began to count before the database's.
func (l *lease) renew(expires time.Time) {
	defer l.end()
	every := l.storage.lease / 6
	timer := time.NewTimer(every)
	defer timer.Stop()
	for {
		select {
		case <-l.held.Done():
			return
		case <-timer.C:
		}
		before := time.Now()
		ctx, cancel := context.WithDeadline(l.held, expires)
		tag, err := l.storage.exec(ctx, `UPDATE acme_locks SET expires = clock_timestamp() + $3
			WHERE name = $1 AND holder = $2 AND expires > clock_timestamp()`, l.name, l.holder, l.storage.lease)
		cancel()
		switch {
		case err == nil && tag.RowsAffected() == 0:
			return // somebody else has it
		case err == nil:
			expires = before.Add(l.storage.lease)
		}
		if !time.Now().Before(expires) {
			return
		}
		timer.Reset(min(every, time.Until(expires)))
	}
}

// release ends the lease, lost or not.
func (l *lease) release(ctx context.Context) error {
	l.end()
	_, err := l.storage.exec(context.WithoutCancel(ctx), `DELETE FROM acme_locks WHERE name = $1 AND holder = $2`, l.name, l.holder)
	if err != nil {
		return storageError("unlock", l.name, err)
	}
	return nil
}

// seal encrypts a value for the key that it is stored at.
func (s *PostgresStorage) seal(key string, value []byte) []byte {
	return s.aead.Seal([]byte{sealed}, nil, value, []byte(key))
}

func (s *PostgresStorage) open(key string, value []byte) ([]byte, error) {
	if len(value) == 0 || value[0] != sealed {
		return nil, errors.New("it was not stored by this version of partnerguard")
	}
	text, err := s.aead.Open(nil, nil, value[1:], []byte(key))
	if err != nil {
		return nil, errors.New("it is encrypted with another key: all guards of a fleet need the same")
	}
	return text, nil
}

// exec runs one statement, after the tables have been made.
func (s *PostgresStorage) exec(ctx context.Context, sql string, args ...any) (tag pgconn.CommandTag, err error) {
	err = s.do(ctx, func(ctx context.Context) error {
		tag, err = s.pool.Exec(ctx, sql, args...)
		return err
	})
	return tag, err
}

// row reads one row into into. None is fs.ErrNotExist.
func (s *PostgresStorage) row(ctx context.Context, into []any, sql string, args ...any) error {
	return s.do(ctx, func(ctx context.Context) error {
		err := s.pool.QueryRow(ctx, sql, args...).Scan(into...)
		if errors.Is(err, pgx.ErrNoRows) {
			err = fs.ErrNotExist
		}
		return err
	})
}

func (s *PostgresStorage) do(ctx context.Context, statement func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, storageTimeout)
	defer cancel()
	if err := s.prepare(ctx); err != nil {
		return err
	}
	err := statement(ctx)
	var pg *pgconn.PgError
	if errors.As(err, &pg) {
		switch pg.Code {
		case "42P01": // undefined_table: somebody has removed it
			s.mu.Lock()
			s.prepared = false
			s.mu.Unlock()
		case "25006": // read_only_sql_transaction: the server is no longer the primary
			s.pool.Reset()
		}
	}
	return err
}

// prepare makes the tables when they are missing. An administrator may have made
// them; then the guard needs no right to.
func (s *PostgresStorage) prepare(ctx context.Context) error {
	s.mu.Lock()
	prepared := s.prepared
	s.mu.Unlock()
	if prepared {
		return nil
	}
	var exist bool
	err := s.pool.QueryRow(ctx, `SELECT to_regclass('acme') IS NOT NULL AND to_regclass('acme_locks') IS NOT NULL`).Scan(&exist)
	if err == nil && !exist {
		err = pgx.BeginFunc(ctx, s.pool, func(tx pgx.Tx) error {
			// Guards that start at once would be in each other's way. The number is that
			// under which the store of the calls is made.
			lock := fnv.New64a()
			lock.Write([]byte("partnerguard\x00" + s.schema + "\x00migrate"))
			if _, err := tx.Exec(ctx, `SELECT pg_advisory_xact_lock($1)`, int64(lock.Sum64())); err != nil {
				return err
			}
			if err := tx.QueryRow(ctx, `SELECT EXISTS (SELECT 1 FROM pg_namespace WHERE nspname = $1)`, s.schema).Scan(&exist); err != nil {
				return err
			}
			if !exist {
				if _, err := tx.Exec(ctx, `CREATE SCHEMA `+pgx.Identifier{s.schema}.Sanitize()); err != nil {
					return err
				}
			}
			for _, sql := range []string{
				`CREATE TABLE IF NOT EXISTS acme (
					key      text COLLATE "C" PRIMARY KEY,
					value    bytea NOT NULL, -- encrypted
					modified timestamptz NOT NULL
				)`,
				`CREATE TABLE IF NOT EXISTS acme_locks (
					name     text COLLATE "C" PRIMARY KEY,
					holder   text NOT NULL,
					instance text NOT NULL,
					expires  timestamptz NOT NULL -- then it is free
				)`,
			} {
				if _, err := tx.Exec(ctx, sql); err != nil {
					return err
				}
			}
			return nil
		})
	}
	if err != nil {
		return err
	}
	s.mu.Lock()
	s.prepared = true
	s.mu.Unlock()
	return nil
}

func storageError(operation, key string, err error) error {
	return fmt.Errorf("%s %s in the fleet's ACME storage: %w", operation, key, err)
}
