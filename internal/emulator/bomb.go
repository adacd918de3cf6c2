package emulator

import (
	"bytes"
	"compress/flate"
	"compress/gzip"
	"encoding/binary"
	"hash/crc32"
	"sync"
)

// bomb is a gzip stream of several members (RFC 1952 section 2.2) that unpacks to a
// JSON object with one endless string and, behind it, a code. The member in the middle
// is made of one compressed block over and over: it costs what the block costs.
type bomb struct {
	first, middle, last []byte
}

const (
	bombBlock   = 256 << 10 // bytes that one compressed block unpacks to
	bombBlocks  = 16        // in the member in the middle
	bombRepeats = 2560      // of that member: 10 GiB in all
)

var newBomb = sync.OnceValue(func() bomb {
	member := func(text string) []byte {
		var b bytes.Buffer
		w := gzip.NewWriter(&b)
		_, _ = w.Write([]byte(text)) // a Buffer takes everything
		_ = w.Close()
		return b.Bytes()
	}
	text := bytes.Repeat([]byte("A"), bombBlock)
	var block bytes.Buffer
	w, _ := flate.NewWriter(&block, flate.BestCompression) // fails on a bad level only
	_, _ = w.Write(text)
	_ = w.Flush() // ends at a byte, and the next block needs nothing of this one

	middle := []byte{0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 2, 0xff}
	sum := uint32(0)
	for range bombBlocks {
		middle = append(middle, block.Bytes()...)
		sum = crc32.Update(sum, crc32.IEEETable, text)
	}
	middle = append(middle, 3, 0) // the last block, empty
	middle = binary.LittleEndian.AppendUint32(middle, sum)
	middle = binary.LittleEndian.AppendUint32(middle, bombBlock*bombBlocks)
	return bomb{member(`{"description":"`), middle, member(`","code":"900421","data":[],"source":"bomb"}`)}
})

func (b bomb) size() int { return len(b.first) + bombRepeats*len(b.middle) + len(b.last) }

// writeTo sends the parts and reports whether all were taken.
func (b bomb) writeTo(send func(string) bool) bool {
	if !send(string(b.first)) {
		return false
	}
	middle := string(b.middle)
	for range bombRepeats {
		if !send(middle) {
			return false
		}
	}
	return send(string(b.last))
}
