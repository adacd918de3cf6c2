package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"net/url"
	"os"

	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"
)

// schemaVersion stands in PRAGMA user_version. An older database is rebuilt from
// the ledger, a newer one refused.
const schemaVersion = 1

// applicationID stands in PRAGMA application_id, so that file(1) and this program
// know the database: "PGst".
const applicationID = 0x50477374

// The schema. Times are microseconds since 1970, hours are hours since 1970.
//
// calls has its rows in the order in which calls ended, so that every insertion is
// at the end and a follower needs only the last finish. Its indexes hold finish,
// too, by being SQLite's row id. hours leads from a time to the rows of it; this
// and the ids sorted into hours keep random ids (two GUIDs a call) from touching
// pages all over a large file.
const schema = `
CREATE TABLE calls (
	finish INTEGER PRIMARY KEY,
	seq INTEGER,
	call TEXT NOT NULL,
	time INTEGER NOT NULL,
	instance TEXT, generation INTEGER, listener TEXT, peer TEXT, method TEXT, route TEXT, path TEXT,
	query_names TEXT, upstream TEXT, integration TEXT, evidence TEXT, owner TEXT, customer TEXT,
	kind TEXT, verified INTEGER NOT NULL, tid TEXT, app_id TEXT, user_ref TEXT, uti TEXT, iat INTEGER, exp INTEGER,
	amr TEXT, mfa TEXT, mode TEXT, rule TEXT, effect TEXT, reason TEXT, would_reject INTEGER NOT NULL,
	request_id TEXT, correlation_id TEXT, application TEXT, user_agent TEXT,
	status INTEGER, rejection TEXT, code TEXT, upstream_status TEXT, mfa_compliant INTEGER,
	upstream_request_id TEXT, upstream_correlation_id TEXT, bytes_in INTEGER, bytes_out INTEGER,
	duration_ms REAL, upstream_ms REAL, replays INTEGER, error TEXT
);
CREATE INDEX calls_call ON calls (call);
CREATE INDEX calls_integration ON calls (integration);
CREATE INDEX calls_user_ref ON calls (user_ref) WHERE user_ref IS NOT NULL;

-- The finish of the calls that began in an hour lies between low and high.
CREATE TABLE hours (hour INTEGER PRIMARY KEY, low INTEGER NOT NULL, high INTEGER NOT NULL);

-- Request and correlation ids, by hash, of the calls that began in an hour.
CREATE TABLE ids (hour INTEGER, hash INTEGER, finish INTEGER, PRIMARY KEY (hour, hash, finish)) WITHOUT ROWID;

-- Decisions without outcome so far, as the ledger has them.
CREATE TABLE open (call TEXT PRIMARY KEY, seq INTEGER NOT NULL, line TEXT NOT NULL) WITHOUT ROWID;

-- What the calls of a sum have in common; dim is a hash of the rest.
CREATE TABLE dims (
	dim BLOB PRIMARY KEY,
	integration TEXT NOT NULL, owner TEXT NOT NULL, tid TEXT NOT NULL, app_id TEXT NOT NULL, user_ref TEXT NOT NULL,
	kind TEXT NOT NULL, verified INTEGER NOT NULL, customer TEXT NOT NULL, route TEXT NOT NULL, mode TEXT NOT NULL,
	effect TEXT NOT NULL, reason TEXT NOT NULL, would_reject INTEGER NOT NULL, status INTEGER NOT NULL,
	rejection TEXT NOT NULL, code TEXT NOT NULL, mfa TEXT NOT NULL, mfa_compliant TEXT NOT NULL, amr TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE sums (
	hour INTEGER, dim BLOB, calls INTEGER NOT NULL, first INTEGER NOT NULL, last INTEGER NOT NULL,
	PRIMARY KEY (hour, dim)
) WITHOUT ROWID;

-- Records that the ledger could not take.
CREATE TABLE gaps (seq INTEGER PRIMARY KEY, calls INTEGER NOT NULL, outcomes INTEGER NOT NULL, since INTEGER NOT NULL, until INTEGER NOT NULL, cause TEXT NOT NULL);

-- How far the ledger is in here: one row, written with the rows it accounts for.
CREATE TABLE position (one INTEGER PRIMARY KEY CHECK (one = 1), segment INTEGER NOT NULL, offset INTEGER NOT NULL, seq INTEGER NOT NULL, newest INTEGER NOT NULL);
INSERT INTO position VALUES (1, 0, 0, 0, 0);
`

var (
	errOutdated = errors.New("the store's schema is of an older version")
	errForeign  = errors.New("it is a database of something else")
)

// openWriter opens the database at path for writing, and creates it if there is
// none. The error is errOutdated, or damaged reports true of it, when the database
// must make room for a new one.
func openWriter(path string) (*writer, error) {
	// SQLite gives its log and index the permissions of the database.
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	if err := f.Close(); err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	db, err := openSQLite(path, "rwc",
		"journal_mode(wal)",
		// A power loss may cost the last transactions, never the order of them; the
		// position goes with them, so they are read from the ledger again.
		"synchronous(normal)",
		"cache_size(-16384)", // KiB
		"wal_autocheckpoint(4000)",
		"journal_size_limit(67108864)",
	)
	if err != nil {
		return nil, err
	}
	w := &writer{db: db}
	if err := w.init(); err != nil {
		w.close()
		return nil, fmt.Errorf("open store %s: %w", path, err)
	}
	return w, nil
}

// openSQLite opens path in an access mode of SQLite's: rwc or ro.
func openSQLite(path, mode string, pragmas ...string) (*sql.DB, error) {
	q := url.Values{"mode": {mode}, "_pragma": append([]string{"busy_timeout(5000)"}, pragmas...)}
	u := url.URL{Scheme: "file", Opaque: (&url.URL{Path: path}).EscapedPath(), RawQuery: q.Encode()}
	db, err := sql.Open("sqlite", u.String())
	if err != nil {
		return nil, fmt.Errorf("open store %s: %w", path, err)
	}
	return db, nil
}

// checkSchema returns 0 for an empty database and schemaVersion for one of ours.
func checkSchema(ctx context.Context, conn *sql.Conn) (int, error) {
	var version, id, tables int
	for pragma, v := range map[string]*int{
		"PRAGMA user_version":                &version,
		"PRAGMA application_id":              &id,
		"SELECT count(*) FROM sqlite_schema": &tables,
	} {
		if err := conn.QueryRowContext(ctx, pragma).Scan(v); err != nil {
			return 0, err
		}
	}
	switch {
	case tables == 0:
		return 0, nil
	case id != applicationID:
		return 0, errForeign
	case version < schemaVersion:
		return 0, errOutdated
	case version > schemaVersion:
		return 0, &hintError{
			fmt.Errorf("its schema has version %d, this program knows %d", version, schemaVersion),
			"run the newer partnerguard that wrote it, or remove store.db to have it rebuilt from the ledger",
		}
	}
	return version, nil
}

// damaged reports whether err says that the database file itself is no good.
func damaged(err error) bool {
	if errors.Is(err, errForeign) {
		return true
	}
	var e *sqlite.Error
	if !errors.As(err, &e) {
		return false
	}
	switch e.Code() & 0xff { // without the extended part
	case sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB:
		return true
	}
	return false
}
