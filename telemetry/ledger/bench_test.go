package ledger

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"io"
	"testing"
)

// One operation is a decision and its outcome.
func BenchmarkDecide(b *testing.B) {
	b.Run("serial", func(b *testing.B) {
		l := mustOpen(b, Config{Dir: b.TempDir()})
		defer mustClose(b, l)
		rec, n := record(), uint64(0)
		b.ReportAllocs()
		for b.Loop() {
			n++
			binary.BigEndian.PutUint64(rec.Call[:], n)
			if l.Decide(rec) != nil || l.Finish(rec) != nil {
				b.Fatal("not recorded")
			}
		}
	})
	b.Run("parallel", func(b *testing.B) {
		l := mustOpen(b, Config{Dir: b.TempDir()})
		defer mustClose(b, l)
		b.ReportAllocs()
		b.SetParallelism(32)
		b.RunParallel(func(pb *testing.PB) {
			rec, n := record(), uint64(0)
			for pb.Next() {
				n++
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

func mustUnmarshal(t testing.TB, b []byte, v any) {
	t.Helper()
	if err := json.Unmarshal(b, v); err != nil {
		t.Fatal(err)
	}
}
