package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"net/url"
	"os"
	"time"

	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"
)

// schemaVersion stands in PRAGMA user_version. An older database is rebuilt from
// the ledger, a newer one refused.
const schemaVersion = 3

// applicationID stands in PRAGMA application_id, so that file(1) and this program
// know the database: "PGst".
const applicationID = 0x50477374

// The schema. Times are microseconds since 1970, hours and days are those since 1970,
// in UTC. What is not known is NULL in calls.
//
// A call costs one narrow row as it ends, behind all others: what repeats stands in
// dims, details and tokens. All else is derived from the rows, for some thousand calls
// at a time (folded), in rows that hold very many entries each, since a row in an index
// costs as much as a row in calls. A query asks what is folded and scans the rows
// behind position.folded.
const schema = `
-- The calls that ended. Ids are 16 bytes when they are GUIDs as this program writes
-- them, else text; Microsoft's are 0 when they are the client's. path: see packPath.
-- rest is what dim says only that it is something else, as JSON.
CREATE TABLE calls (
	finish INTEGER PRIMARY KEY,
	call NOT NULL,
	time INTEGER NOT NULL,
	dim INTEGER NOT NULL,
	detail INTEGER NOT NULL,
	token INTEGER,
	customer, path, rest TEXT,
	request_id, correlation_id, upstream_request_id, upstream_correlation_id,
	bytes_in INTEGER, bytes_out INTEGER, duration_us INTEGER, upstream_us INTEGER
);

-- What the calls of a sum have in common: what, see appendDim; hash is that of it. day
-- is the last one with such a call. The other columns are what is looked for: reading
-- a column costs as much as all of what.
CREATE TABLE dims (
	dim INTEGER PRIMARY KEY, hash BLOB NOT NULL UNIQUE, day INTEGER NOT NULL, what BLOB NOT NULL,
	integration TEXT NOT NULL, app_id TEXT NOT NULL, user_ref TEXT NOT NULL, verified INTEGER NOT NULL, reason TEXT NOT NULL, status INTEGER NOT NULL
);
CREATE INDEX dims_app ON dims (app_id);

-- What else repeats, by the day on which the calls began: see firstDetail.
CREATE TABLE details (
	detail INTEGER PRIMARY KEY,
	instance TEXT, generation INTEGER, listener TEXT, peer TEXT, method TEXT, query_names TEXT, upstream TEXT, evidence TEXT,
	rule TEXT, application TEXT, user_agent TEXT, upstream_status TEXT, replays INTEGER, error TEXT
);

-- The tokens, by the hour in which the calls began: see firstToken. uti is 16 bytes
-- when it can be, else text; caller is a dim of such a call.
CREATE TABLE tokens (token INTEGER PRIMARY KEY, caller INTEGER NOT NULL, uti, iat INTEGER, exp INTEGER);

-- What the folded calls come to that began in an hour or on a day: see sumKind.
CREATE TABLE sums (kind INTEGER, start INTEGER, entries BLOB NOT NULL, PRIMARY KEY (kind, start));

-- Between which finishes the folded calls lie that began in an hour.
CREATE TABLE hours (hour INTEGER PRIMARY KEY, low INTEGER NOT NULL, high INTEGER NOT NULL);

-- The folds: by dim, the finishes of the calls up to high that are in no earlier one.
CREATE TABLE folds (high INTEGER PRIMARY KEY, postings BLOB NOT NULL);

-- The ids of the folded calls: see idIndex.
CREATE TABLE ids (run INTEGER PRIMARY KEY, entries BLOB NOT NULL);

-- Decisions without outcome so far, as the ledger has them.
CREATE TABLE open (call TEXT PRIMARY KEY, seq INTEGER NOT NULL, line TEXT NOT NULL) WITHOUT ROWID;

-- Records that the ledger could not take.
CREATE TABLE gaps (seq INTEGER PRIMARY KEY, calls INTEGER NOT NULL, outcomes INTEGER NOT NULL, since INTEGER NOT NULL, until INTEGER NOT NULL, cause TEXT NOT NULL);

-- How far the ledger is in here, and up to which finish the calls are folded: one
-- row, written with the rows it accounts for.
CREATE TABLE position (one INTEGER PRIMARY KEY CHECK (one = 1), segment INTEGER NOT NULL, offset INTEGER NOT NULL, seq INTEGER NOT NULL, newest INTEGER NOT NULL, folded INTEGER NOT NULL);
INSERT INTO position VALUES (1, 0, 0, 0, 0, 0);
`

var (
	errOutdated = errors.New("the store's schema is of an older version")
	errForeign  = errors.New("it is a database of something else")
	errBusy     = errors.New("another process holds the database")
)

// openWriter opens the database at path for writing, and creates it if there is
// none. The error is errOutdated, or damaged reports true of it, when the database
// must make room for a new one.
func openWriter(path string) (*writer, error) {
	// SQLite gives its journal the permissions of the database. One that is there is
	// not opened: to close it would drop the locks of our own readers (POSIX).
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err == nil {
		err = f.Close()
	} else if errors.Is(err, os.ErrExist) {
		err = nil
	}
	if err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	db, err := openSQLite(path, "rwc", 5*time.Second,
		// Not WAL: its index is mapped memory. A write to that while the disk does not
		// answer is a page fault, which Go does not see, and the next garbage collection
		// would wait for it with every call in the process.
		"journal_mode(truncate)",
		"synchronous(normal)",
		"cache_size(-16384)", // KiB
	)
	if err != nil {
		return nil, err
	}
	w := &writer{joiner: joiner{pace: atOnce}, db: db, foldAt: foldCalls, maxDims: maxDims, maxCustomers: maxCustomers}
	if err := w.init(); err != nil {
		w.close()
		return nil, fmt.Errorf("open store %s: %w", path, err)
	}
	return w, nil
}

// openSQLite opens path in an access mode of SQLite's: rwc, rw or ro. Where another process
// reads or writes, it is waited for up to patience.
func openSQLite(path, mode string, patience time.Duration, pragmas ...string) (*sql.DB, error) {
	wait := fmt.Sprintf("busy_timeout(%d)", patience.Milliseconds())
	q := url.Values{"mode": {mode}, "_pragma": append([]string{wait}, pragmas...)}
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
	return is(err, sqlite3.SQLITE_CORRUPT) || is(err, sqlite3.SQLITE_NOTADB)
}

// is reports whether err has a code of SQLite's.
func is(err error, code int) bool {
	var e *sqlite.Error
	return errors.As(err, &e) && e.Code()&0xff == code // without the extended part
}
