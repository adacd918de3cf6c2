package listen

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"io/fs"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caddyserver/certmagic"
	"github.com/google/go-cmp/cmp"
	"github.com/partnerguard/partnerguard/internal/pgtest"
)

// fleetKey is a fresh key of a fleet's storage.
func fleetKey() string {
	key := make([]byte, 32)
	rand.Read(key)
	return base64.StdEncoding.EncodeToString(key)
}

func openStorage(t *testing.T, cfg PostgresConfig) *PostgresStorage {
	t.Helper()
	s, err := OpenPostgres(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

// Certmagic's own storage says what is right.
func TestStorageConformance(t *testing.T) {
	t.Run("files", func(t *testing.T) {
		testStorage(t, func(t *testing.T) certmagic.Storage { return &certmagic.FileStorage{Path: t.TempDir()} })
	})
	t.Run("PostgreSQL", func(t *testing.T) {
		testStorage(t, func(t *testing.T) certmagic.Storage {
			return openStorage(t, PostgresConfig{URL: postgres.NewDatabase(t), Key: fleetKey()})
		})
	})
}

func testStorage(t *testing.T, open func(*testing.T) certmagic.Storage) {
	ctx := t.Context()
	store := func(t *testing.T, s certmagic.Storage, key, value string) {
		t.Helper()
		if err := s.Store(ctx, key, []byte(value)); err != nil {
			t.Fatal(err)
		}
	}
	load := func(t *testing.T, s certmagic.Storage, key, want string) {
		t.Helper()
		if got, err := s.Load(ctx, key); err != nil || string(got) != want {
			t.Errorf("Load(%s) = %q, %v, want %q", key, got, err, want)
		}
	}
	list := func(t *testing.T, s certmagic.Storage, directory string, recursive bool, want ...string) {
		t.Helper()
		got, err := s.List(ctx, directory, recursive)
		if err != nil {
			t.Errorf("List(%q, %v): %v", directory, recursive, err)
		}
		slices.Sort(got) // files come in the order of a walk, "a/b" before "a.b"
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("List(%q, %v) (-want +got):\n%s", directory, recursive, diff)
		}
	}
	for name, test := range map[string]func(*testing.T, certmagic.Storage){
		"a value is what was stored last": func(t *testing.T, s certmagic.Storage) {
			store(t, s, "acme/ca/users/a.json", "one")
			store(t, s, "acme/ca/users/a.json", "")
			load(t, s, "acme/ca/users/a.json", "")
			store(t, s, "acme/ca/users/a.json", "two\x00\xff")
			load(t, s, "acme/ca/users/a.json", "two\x00\xff")
		},
		"what does not exist": func(t *testing.T, s certmagic.Storage) {
			store(t, s, "a/bc", "x")
			for _, key := range []string{"b", "a/b", "a/bcd", "a/bc/d", "a/%", "a/b_"} {
				if v, err := s.Load(ctx, key); !errors.Is(err, fs.ErrNotExist) && key != "a/bc/d" || err == nil {
					t.Errorf("Load(%s) = %q, %v, want fs.ErrNotExist", key, v, err)
				}
				if key == "a/bc/d" {
					continue // below a file; a file system says it in other words
				}
				if info, err := s.Stat(ctx, key); !errors.Is(err, fs.ErrNotExist) {
					t.Errorf("Stat(%s) = %v, %v, want fs.ErrNotExist", key, info, err)
				}
				if s.Exists(ctx, key) {
					t.Errorf("Exists(%s) = true", key)
				}
				if keys, err := s.List(ctx, key, true); !errors.Is(err, fs.ErrNotExist) {
					t.Errorf("List(%s) = %v, %v, want fs.ErrNotExist", key, keys, err)
				}
				if err := s.Delete(ctx, key); err != nil {
					t.Errorf("Delete(%s) = %v, want nil", key, err)
				}
			}
			load(t, s, "a/bc", "x")
		},
		"a directory is no file": func(t *testing.T, s certmagic.Storage) {
			store(t, s, "a/b/c", "x")
			if v, err := s.Load(ctx, "a/b"); err == nil {
				t.Errorf("Load of a directory gives %q", v)
			}
			if !s.Exists(ctx, "a") || !s.Exists(ctx, "a/b") {
				t.Error("a directory does not exist")
			}
			info, err := s.Stat(ctx, "a/b")
			if err != nil || info.IsTerminal || info.Key != "a/b" {
				t.Errorf("Stat of a directory = %+v, %v", info, err)
			}
		},
		"stat": func(t *testing.T, s certmagic.Storage) {
			before := time.Now().Add(-2 * time.Second)
			store(t, s, "a/b", "12345")
			info, err := s.Stat(ctx, "a/b")
			if err != nil || !info.IsTerminal || info.Key != "a/b" || info.Size != 5 || info.Modified.Before(before) || info.Modified.After(time.Now().Add(2*time.Second)) {
				t.Errorf("Stat = %+v, %v", info, err)
			}
		},
		"lists": func(t *testing.T, s certmagic.Storage) {
			for _, key := range []string{"a/b/c", "a/b/d", "a/e", "a/é/f", "ab/c", "top"} {
				store(t, s, key, "x")
			}
			list(t, s, "a", false, "a/b", "a/e", "a/é")
			list(t, s, "a", true, "a/b", "a/b/c", "a/b/d", "a/e", "a/é", "a/é/f")
			list(t, s, "a/b", false, "a/b/c", "a/b/d")
			list(t, s, "a/e", true)
			list(t, s, "", false, "a", "ab", "top")
		},
		"delete takes what is below, and nothing beside": func(t *testing.T, s certmagic.Storage) {
			for _, key := range []string{"a/b/c", "a/b/d/e", "a/bc", "a%/x"} {
				store(t, s, key, "x")
			}
			if err := s.Delete(ctx, "a/b"); err != nil {
				t.Fatal(err)
			}
			if s.Exists(ctx, "a/b/c") || s.Exists(ctx, "a/b/d") || s.Exists(ctx, "a/b") {
				t.Error("something is left of a deleted directory")
			}
			load(t, s, "a/bc", "x")
			load(t, s, "a%/x", "x")
		},
		"concurrent stores do not mix": func(t *testing.T, s certmagic.Storage) {
			done := make(chan error)
			values := [][]byte{bytes.Repeat([]byte("a"), 10_000), bytes.Repeat([]byte("b"), 20_000)}
			for _, v := range values {
				go func() {
					var err error
					for range 20 {
						err = errors.Join(err, s.Store(ctx, "k", v))
					}
					done <- err
				}()
			}
			for range values {
				if err := <-done; err != nil {
					t.Error(err)
				}
			}
			got, err := s.Load(ctx, "k")
			if err != nil || !bytes.Equal(got, values[0]) && !bytes.Equal(got, values[1]) {
				t.Errorf("Load gives %d bytes, %v: neither of the two values", len(got), err)
			}
		},
		"a lock is one holder's": func(t *testing.T, s certmagic.Storage) {
			if err := s.Lock(ctx, "order"); err != nil {
				t.Fatal(err)
			}
			if err := s.Lock(ctx, "another"); err != nil {
				t.Fatal(err)
			}
			short, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
			defer cancel()
			if err := s.Lock(short, "order"); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("a second Lock gives %v, want the context's error", err)
			}
			if locked, err := s.(certmagic.TryLocker).TryLock(ctx, "order"); locked || err != nil {
				t.Errorf("TryLock = %v, %v on a lock that is held", locked, err)
			}
			waited := make(chan error)
			go func() { waited <- s.Lock(ctx, "order") }()
			select {
			case err := <-waited:
				t.Fatalf("Lock did not wait: %v", err)
			case <-time.After(100 * time.Millisecond):
			}
			if err := s.Unlock(ctx, "order"); err != nil {
				t.Fatal(err)
			}
			if err := <-waited; err != nil {
				t.Errorf("Lock after Unlock: %v", err)
			}
			if err := s.Unlock(ctx, "order"); err != nil {
				t.Error(err)
			}
			if err := s.Unlock(ctx, "order"); err == nil {
				t.Error("Unlock of what is not locked gives no error")
			}
			s.Unlock(ctx, "another")
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			test(t, open(t))
		})
	}
}

func TestLockOfADeadHolderIsTakenOver(t *testing.T) {
	t.Parallel()
	cfg := PostgresConfig{URL: postgres.NewDatabase(t), Key: fleetKey(), Instance: "guard-1", lease: 600 * time.Millisecond}
	dead, alive := openStorage(t, cfg), openStorage(t, cfg)
	held, err := dead.acquire(t.Context(), "order")
	if err != nil {
		t.Fatal(err)
	}
	// Twice the lease: it is kept.
	for end := time.Now().Add(2 * cfg.lease); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if locked, err := alive.TryLock(t.Context(), "order"); locked || err != nil {
			t.Fatalf("TryLock = %v, %v while the holder lives", locked, err)
		}
	}
	held.end() // as a process that dies: nobody renews, nobody releases
	start := time.Now()
	next, err := alive.acquire(t.Context(), "order")
	for ; errors.Is(err, errLocked); next, err = alive.acquire(t.Context(), "order") {
		if time.Since(start) > 10*time.Second {
			t.Fatal("the lock of a dead holder stays")
		}
		time.Sleep(10 * time.Millisecond)
	}
	if err != nil {
		t.Fatal(err)
	}
	// The dead one, if it was only asleep, can no longer change anything.
	if err := alive.storeHeld(t.Context(), next, "certificate", []byte("new")); err != nil {
		t.Fatal(err)
	}
	if err := dead.storeHeld(t.Context(), held, "certificate", []byte("old")); !errors.Is(err, errLeaseLost) {
		t.Errorf("the former holder's store gives %v, want %v", err, errLeaseLost)
	}
	if err := held.release(t.Context()); err != nil {
		t.Error(err)
	}
	if got, err := alive.Load(t.Context(), "certificate"); err != nil || string(got) != "new" {
		t.Errorf("Load = %q, %v, want the value of the holder", got, err)
	}
	if locked, err := dead.TryLock(t.Context(), "order"); locked || err != nil {
		t.Errorf("the former holder's release freed the lock of the new one: %v, %v", locked, err)
	}
	if err := next.release(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestStorageWhileTheDatabaseIsDown(t *testing.T) {
	t.Parallel()
	server := pgtest.Start(t)
	url := server.NewDatabase(t)
	server.Stop(t)
	s := openStorage(t, PostgresConfig{URL: url, Key: fleetKey(), lease: 500 * time.Millisecond})
	if v, err := s.Load(t.Context(), "a"); err == nil || errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Load = %q, %v, want an error other than fs.ErrNotExist", v, err)
	}
	server.Restart(t)
	if err := s.Store(t.Context(), "a", []byte("1")); err != nil {
		t.Fatalf("after the database came up: %v", err)
	}
	held, err := s.acquire(t.Context(), "order")
	if err != nil {
		t.Fatal(err)
	}
	server.Kill(t)
	select {
	case <-held.held.Done():
	case <-time.After(5 * time.Second):
		t.Error("a lease that cannot be renewed does not end")
	}
	server.Restart(t)
	if got, err := s.Load(t.Context(), "a"); err != nil || string(got) != "1" {
		t.Errorf("after the database was killed: %q, %v", got, err)
	}

	thaw := server.Freeze(t)
	start := time.Now()
	if _, err := s.Load(t.Context(), "a"); err == nil || errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Load from a database that does not answer: %v", err)
	}
	if took := time.Since(start); took > 2*storageTimeout {
		t.Errorf("Load from a database that does not answer took %v", took)
	}
	thaw()
	if _, err := s.Load(t.Context(), "a"); err != nil {
		t.Errorf("after the database answers again: %v", err)
	}
	server.Exec(t, url, "DROP TABLE partnerguard.acme")
	s.Load(t.Context(), "a")
	if err := s.Store(t.Context(), "a", []byte("2")); err != nil {
		t.Errorf("after the table was lost: %v", err)
	}
}

func TestStorageFollowsThePrimary(t *testing.T) {
	t.Parallel()
	primary := pgtest.Start(t)
	standby := primary.Standby(t)
	url := strings.Replace(pgtest.URLOfAny(t, "postgres", standby, primary), "&target_session_attrs=read-write", "", 1)
	s := openStorage(t, PostgresConfig{URL: url, Key: fleetKey()})
	if err := s.Store(t.Context(), "a", []byte("1")); err != nil {
		t.Fatalf("with the standby as the first host: %v", err)
	}
	primary.Stop(t) // after it gave the standby all it had
	standby.Promote(t)
	s.Load(t.Context(), "a") // may notice that the connection is gone
	if got, err := s.Load(t.Context(), "a"); err != nil || string(got) != "1" {
		t.Errorf("after the switch-over, Load = %q, %v", got, err)
	}
	if err := s.Store(t.Context(), "a", []byte("2")); err != nil {
		t.Errorf("after the switch-over: %v", err)
	}
}

func TestStorageTakesAChangedPassword(t *testing.T) {
	t.Parallel()
	url := postgres.NewDatabase(t)
	change := func(password string) string {
		return postgres.Server(t).NewRole(t, url, "acme_rotated", password)
	}
	first := change("hunter2")
	postgres.Server(t).Exec(t, url, "CREATE SCHEMA partnerguard AUTHORIZATION acme_rotated")
	var current atomic.Pointer[string]
	current.Store(&first)
	s := openStorage(t, PostgresConfig{URL: first, CurrentURL: func() (string, error) {
		if now := current.Load(); now != nil {
			return *now, nil
		}
		return "", errors.New("it cannot be read just now")
	}, Key: fleetKey()})
	if err := s.Store(t.Context(), "a", []byte("1")); err != nil {
		t.Fatal(err)
	}
	current.Store(nil)
	s.pool.Reset() // every connection ends
	if _, err := s.Load(t.Context(), "a"); err != nil {
		t.Errorf("with the URL from before: %v", err)
	}
	second := change("hunter3")
	current.Store(&second)
	s.pool.Reset()
	if got, err := s.Load(t.Context(), "a"); err != nil || string(got) != "1" {
		t.Errorf("after the password changed, Load = %q, %v", got, err)
	}
}

func TestStoredKeysAreEncrypted(t *testing.T) {
	t.Parallel()
	url, key := postgres.NewDatabase(t), fleetKey()
	s := openStorage(t, PostgresConfig{URL: url, Key: key, Instance: "guard-1"})
	for _, name := range []string{"a", "b"} {
		if err := s.Store(t.Context(), name, []byte("PRIVATE KEY of "+name)); err != nil {
			t.Fatal(err)
		}
	}
	rows := postgres.Server(t).Rows(t, url, "SELECT encode(value, 'escape') FROM partnerguard.acme")
	if len(rows) != 2 || strings.Contains(strings.Join(rows, ""), "PRIVATE") {
		t.Errorf("the database holds %q", rows)
	}
	load := func(name, want string) {
		t.Helper()
		got, err := s.Load(t.Context(), name)
		if err == nil || errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), key) {
			t.Errorf("Load(%s) = %q, %v, want an error with %q", name, got, err, want)
		}
	}
	exec := func(sql string) { postgres.Server(t).Exec(t, url, sql) }
	exec("UPDATE partnerguard.acme SET value = (SELECT value FROM partnerguard.acme WHERE key = 'b') WHERE key = 'a'")
	load("a", "another key")
	exec("UPDATE partnerguard.acme SET value = set_byte(value, 20, get_byte(value, 20) # 1) WHERE key = 'b'")
	load("b", "another key")
	exec("UPDATE partnerguard.acme SET value = 'PRIVATE KEY' WHERE key = 'a'")
	load("a", "not stored by this version")
	exec("UPDATE partnerguard.acme SET value = '' WHERE key = 'a'")
	load("a", "not stored by this version")
	s = openStorage(t, PostgresConfig{URL: url, Key: fleetKey()})
	load("b", "all guards of a fleet need the same")
}

// An administrator may make the tables, and give the guard no more than it needs.
func TestStorageNeedsNoRightToMakeTables(t *testing.T) {
	t.Parallel()
	url := postgres.NewDatabase(t)
	exec := func(sql string) { postgres.Server(t).Exec(t, url, sql) }
	role := postgres.Server(t).NewRole(t, url, "acme_guard", "hunter2/@:é")
	s := openStorage(t, PostgresConfig{URL: role, Key: fleetKey()})
	err := s.Store(t.Context(), "a", []byte("1"))
	if err == nil || !strings.Contains(err.Error(), "permission denied") || strings.Contains(err.Error(), "hunter2") {
		t.Errorf("without any rights: %v", err)
	}
	admin := openStorage(t, PostgresConfig{URL: url, Key: fleetKey()})
	if err := admin.Store(t.Context(), "b", nil); err != nil {
		t.Fatal(err)
	}
	exec("GRANT USAGE ON SCHEMA partnerguard TO acme_guard; GRANT SELECT, INSERT, UPDATE, DELETE ON partnerguard.acme, partnerguard.acme_locks TO acme_guard")
	if err := s.Store(t.Context(), "a", []byte("1")); err != nil {
		t.Error(err)
	}
	if err := s.Lock(t.Context(), "order"); err != nil {
		t.Error(err)
	}
	if err := s.Unlock(t.Context(), "order"); err != nil {
		t.Error(err)
	}
	wrong := openStorage(t, PostgresConfig{URL: strings.Replace(role, "hunter2", "hunter3", 1), Key: fleetKey()})
	if err := wrong.Store(t.Context(), "a", nil); err == nil || !strings.Contains(err.Error(), "password authentication failed") || strings.Contains(err.Error(), "hunter3") {
		t.Errorf("with a wrong password: %v", err)
	}
	encrypted := openStorage(t, PostgresConfig{URL: postgres.Server(t).TLS(t, url), Key: fleetKey()})
	if err := encrypted.Store(t.Context(), "c", []byte("1")); err != nil {
		t.Errorf("over TLS: %v", err)
	}
	own := openStorage(t, PostgresConfig{URL: url + "&search_path=%22Guards%20of%20Contoso%22,public", Key: fleetKey()})
	if err := own.Store(t.Context(), "d", []byte("1")); err != nil {
		t.Error(err)
	}
	if got := postgres.Server(t).Rows(t, url, `SELECT key FROM "Guards of Contoso".acme`); len(got) != 1 || got[0] != "d" {
		t.Errorf("the schema that search_path names holds %v", got)
	}
}

// Guards that start at once all find the tables missing.
func TestStorageIsPreparedOnce(t *testing.T) {
	t.Parallel()
	cfg := PostgresConfig{URL: postgres.NewDatabase(t), Key: fleetKey()}
	errs := make(chan error)
	for range 8 {
		s := openStorage(t, cfg)
		go func() { errs <- s.Store(t.Context(), "a", []byte("1")) }()
	}
	for range 8 {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
}

func TestStorageRefusesBadConfiguration(t *testing.T) {
	for name, cfg := range map[string]PostgresConfig{
		"no key":           {URL: "postgres://guard:hunter2@127.0.0.1/db"},
		"a short key":      {URL: "postgres://guard:hunter2@127.0.0.1/db", Key: "aHVudGVyMg=="},
		"no base64":        {URL: "postgres://guard:hunter2@127.0.0.1/db", Key: "hunter2"},
		"a URL of nobody":  {URL: "postgres://guard:hunter2@127.0.0.1:x/db", Key: fleetKey()},
		"another protocol": {URL: "https://guard:hunter2@127.0.0.1/db", Key: fleetKey()},
	} {
		s, err := OpenPostgres(cfg)
		if err == nil {
			s.Close()
			t.Errorf("%s: OpenPostgres accepted it", name)
		} else if strings.Contains(err.Error(), "hunter2") || strings.Contains(err.Error(), "aHVudGVyMg") {
			t.Errorf("%s: the error holds a secret: %v", name, err)
		}
	}
}
