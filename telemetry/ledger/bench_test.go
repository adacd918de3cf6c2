package ledger

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"io"
	"sync/atomic"
	"testing"
)

// One operation is a decision and its outcome.
func BenchmarkDecide(b *testing.B) {
	b.Run("serial", func(b *testing.B) {
		l, err := Open(Config{Dir: b.TempDir(), MinFree: -1})
		if err != nil {
			b.Fatal(err)
		}
		defer mustClose(b, l)
		rec, n := record(), uint64(0)
		b.ReportAllocs()
		for b.Loop() {
			n++
			rec.Encoded = rec.Encoded[:0]
			binary.BigEndian.PutUint64(rec.Call[:], n)
			if l.Decide(rec) != nil || l.Finish(rec) != nil {
				b.Fatal("not recorded")
			}
		}
	})
	b.Run("parallel", func(b *testing.B) {
		l, err := Open(Config{Dir: b.TempDir(), MinFree: -1})
		if err != nil {
			b.Fatal(err)
		}
		defer mustClose(b, l)
		b.ReportAllocs()
		b.SetParallelism(32)
		var goroutines atomic.Uint64
		b.RunParallel(func(pb *testing.PB) {
			rec, n := record(), goroutines.Add(1)<<32
			for pb.Next() {
				n++
				rec.Encoded = rec.Encoded[:0]
				binary.BigEndian.PutUint64(rec.Call[:], n)
				if l.Decide(rec) != nil || l.Finish(rec) != nil {
					b.Error("not recorded")
				}
			}
		})
	})
}

func BenchmarkReader(b *testing.B) {
	dir := b.TempDir()
	l := mustOpen(b, Config{Dir: dir})
	for range 10000 {
		rec := record()
		decide(b, l, rec)
		finish(b, l, rec)
	}
	mustClose(b, l)
	b.ReportAllocs()
	b.ResetTimer()
	var r *Reader
	for range b.N {
		if r == nil {
			r, _ = NewReader(dir, Position{})
		}
		if _, err := r.Next(); errors.Is(err, io.EOF) {
			r.Close()
			r = nil
		} else if err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkWrite is the floor: the two writes of a call, without anything else.
func BenchmarkWrite(b *testing.B) {
	f, err := osFiles{}.create(b.TempDir() + "/file")
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	p := make([]byte, 1200)
	for b.Loop() {
		f.Write(p)
		f.Write(p[:600])
	}
}

func mustUnmarshal(t testing.TB, b []byte, v any) {
	t.Helper()
	if err := json.Unmarshal(b, v); err != nil {
		t.Fatal(err)
	}
}
