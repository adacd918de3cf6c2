package ledger

import (
	"io"

	"github.com/parquet-go/parquet-go"
	"github.com/parquet-go/parquet-go/compress/zstd"
)

// parquetGroup is how many rows a row group has: what stands in memory at a time.
const parquetGroup = 32 << 10

// parquetRows writes Parquet: typed columns, zstd, dictionaries where values repeat.
type parquetRows struct {
	out *parquet.GenericWriter[exportRow]
	buf []exportRow
	n   int // rows in the group
}

func newParquetRows(w io.Writer) *parquetRows {
	return &parquetRows{
		out: parquet.NewGenericWriter[exportRow](w,
			parquet.Compression(&zstd.Codec{}),
			parquet.CreatedBy("partnerguard", "", ""),
		),
		buf: make([]exportRow, 0, 256),
	}
}

func (p *parquetRows) write(r *exportRow) error {
	p.buf = append(p.buf, *r)
	if len(p.buf) < cap(p.buf) {
		return nil
	}
	return p.flush()
}

func (p *parquetRows) flush() error {
	if _, err := p.out.Write(p.buf); err != nil {
		return err
	}
	p.n += len(p.buf)
	p.buf = p.buf[:0]
	if p.n < parquetGroup {
		return nil
	}
	p.n = 0
	return p.out.Flush()
}

func (p *parquetRows) close() error {
	if err := p.flush(); err != nil {
		return err
	}
	return p.out.Close()
}
