package ledger

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/klauspost/compress/zstd"
)

// segmentFile reads a segment from its beginning to its end, compressed or not.
// While it is open the segment may be compressed, rewritten or removed: it reads
// what was there.
type segmentFile struct {
	name string // of the file
	f    *os.File
	z    *zstd.Decoder // nil when the file is not compressed
}

// errUnreadable says that a segment cannot be read any further, for what is in it.
var errUnreadable = errors.New("not readable from here on")

// maxWindow is what a compressed segment may ask for to be read, in bytes.
const maxWindow = 32 << 20

// openSegment opens segment num; where both files are there, the one that is not
// compressed: the other may have been made of something older. The error wraps
// fs.ErrNotExist when there is neither.
func openSegment(dir string, num uint64) (*segmentFile, error) {
	s, err := openPlain(segmentPath(dir, num))
	if !errors.Is(err, fs.ErrNotExist) {
		return s, err
	}
	// Compression puts the one in its place before it takes the other away, so that
	// who finds neither knows that the segment is gone.
	z, zerr := openCompressed(compressedPath(dir, num))
	if errors.Is(zerr, fs.ErrNotExist) {
		return nil, err
	}
	return z, zerr
}

func openPlain(path string) (*segmentFile, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	return &segmentFile{name: filepath.Base(path), f: f}, nil
}

func openCompressed(path string) (*segmentFile, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	z, err := zstd.NewReader(f, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(maxWindow))
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("%s: %w", filepath.Base(path), err)
	}
	return &segmentFile{name: filepath.Base(path), f: f, z: z}, nil
}

// Read goes on behind an io.EOF when a file that is not compressed has grown.
func (s *segmentFile) Read(p []byte) (int, error) {
	if s.z == nil {
		return s.f.Read(p)
	}
	n, err := s.z.Read(p)
	var failed *fs.PathError
	if err != nil && !errors.Is(err, io.EOF) && !errors.As(err, &failed) {
		err = fmt.Errorf("%w: the compressed file is damaged: %w", errUnreadable, err)
	}
	return n, err
}

// skip moves on to offset, from the beginning; io.EOF when there is less.
func (s *segmentFile) skip(offset int64) error {
	if s.z != nil {
		_, err := io.CopyN(io.Discard, s, offset)
		return err
	}
	fi, err := s.f.Stat()
	if err != nil {
		return err
	}
	if fi.Size() < offset {
		return io.EOF
	}
	_, err = s.f.Seek(offset, io.SeekStart)
	return err
}

// consumed returns how many bytes of the file have been read.
func (s *segmentFile) consumed() int64 {
	n, err := s.f.Seek(0, io.SeekCurrent)
	if err != nil {
		return 0
	}
	return n
}

func (s *segmentFile) Close() error {
	if s.z != nil {
		s.z.Close()
	}
	return s.f.Close()
}
