package entra

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"strings"
	"sync"
	"time"

	"github.com/partnerguard/partnerguard/policy"
)

// cache keeps what verified tokens say, by the SHA-256 of the whole token. Entries
// lie as bytes in large chunks, without pointers: a hundred thousand of them cost
// the garbage collector next to nothing. The oldest chunk goes first, which is
// nearly the order in which tokens expire.
type cache struct {
	entries int // at most
	shards  [16]shard
}

const (
	chunkSize  = 32 << 10
	entrySize  = 512 // assumed on average when bounding the bytes
	entryStart = 2 + sha256.Size
)

type shard struct {
	mu     sync.Mutex
	index  map[uint64]uint32 // first bytes of the hash → number of the chunk << 16 | offset
	chunks []chunk           // oldest first
	first  uint16            // number of chunks[0]; counts around

	maxEntries, maxChunks int
}

// chunk holds entries: length (2 bytes), hash, content. What is written stays.
type chunk struct {
	data  []byte
	until int64 // when the last of its entries expires
}

func newCache(entries int) *cache {
	c := &cache{entries: entries}
	for i := range c.shards {
		s := &c.shards[i]
		s.index = map[uint64]uint32{}
		s.maxEntries = (entries + len(c.shards) - 1) / len(c.shards)
		s.maxChunks = min(s.maxEntries*entrySize/chunkSize+2, 1<<15)
	}
	return c
}

func (c *cache) shard(hash *[sha256.Size]byte) (*shard, uint64) {
	return &c.shards[hash[8]%uint8(len(c.shards))], binary.LittleEndian.Uint64(hash[:])
}

// get returns the content kept for hash, or nil. It must not be changed.
func (c *cache) get(hash *[sha256.Size]byte) []byte {
	s, k := c.shard(hash)
	s.mu.Lock()
	defer s.mu.Unlock()
	at, ok := s.index[k]
	if !ok {
		return nil
	}
	return s.entry(at, hash)
}

// entry returns the content at a place if it is of hash, or nil.
func (s *shard) entry(at uint32, hash *[sha256.Size]byte) []byte {
	e := s.chunks[uint16(at>>16)-s.first].data[at&0xffff:]
	if !bytes.Equal(e[2:entryStart], hash[:]) {
		return nil
	}
	return e[entryStart:binary.LittleEndian.Uint16(e)]
}

// put keeps content for hash until the given second. It keeps nothing that is
// there already, nor what is too large.
func (c *cache) put(hash *[sha256.Size]byte, content []byte, until, now int64) {
	n := entryStart + len(content)
	if n > chunkSize/4 {
		return
	}
	s, k := c.shard(hash)
	s.mu.Lock()
	defer s.mu.Unlock()
	if at, ok := s.index[k]; ok && bytes.Equal(s.entry(at, hash), content) {
		return
	}
	for len(s.chunks) > 0 && (s.chunks[0].until <= now || len(s.index) >= s.maxEntries) {
		s.evict()
	}
	last := len(s.chunks) - 1
	if last < 0 || len(s.chunks[last].data)+n > chunkSize {
		for len(s.chunks) >= s.maxChunks {
			s.evict()
		}
		s.chunks = append(s.chunks, chunk{data: make([]byte, 0, chunkSize)})
		last = len(s.chunks) - 1
	}
	ch := &s.chunks[last]
	s.index[k] = uint32(s.first+uint16(last))<<16 | uint32(len(ch.data))
	ch.data = binary.LittleEndian.AppendUint16(ch.data, uint16(n))
	ch.data = append(ch.data, hash[:]...)
	ch.data = append(ch.data, content...)
	ch.until = max(ch.until, until)
}

// evict forgets the oldest chunk.
func (s *shard) evict() {
	data := s.chunks[0].data
	for at := 0; at < len(data); {
		k := binary.LittleEndian.Uint64(data[at+2:])
		if place := uint32(s.first)<<16 | uint32(at); s.index[k] == place {
			delete(s.index, k)
		}
		at += int(binary.LittleEndian.Uint16(data[at:]))
	}
	s.chunks[0] = chunk{}
	s.chunks = s.chunks[1:]
	s.first++
}

// drop forgets hash.
func (c *cache) drop(hash *[sha256.Size]byte) {
	s, k := c.shard(hash)
	s.mu.Lock()
	defer s.mu.Unlock()
	if at, ok := s.index[k]; ok && s.entry(at, hash) != nil {
		delete(s.index, k)
	}
}

// Flags of an entry.
const (
	oidIsGUID = 1 << iota
	appIDIsGUID
)

// remember keeps what the verified token t says, and the key that said so.
func (v *Verifier) remember(t *token, p *policy.Token) {
	var buf [512]byte
	b := append(buf[:0], t.key.id[:]...)
	b = binary.LittleEndian.AppendUint64(b, uint64(p.ExpiresAt))
	b = binary.LittleEndian.AppendUint64(b, uint64(p.NotBefore))
	b = binary.LittleEndian.AppendUint64(b, uint64(p.IssuedAt))
	flags := byte(0)
	if policy.IsGUID(p.ObjectID) {
		flags |= oidIsGUID
	}
	if policy.IsGUID(p.AppID) {
		flags |= appIDIsGUID
	}
	b = append(b, flags, byte(t.version), byte(p.Kind), byte(p.MFA))
	b = appendGUID(b, p.TenantID)
	b = appendText(b, p.Audience)
	b = appendID(b, p.ObjectID, flags&oidIsGUID != 0)
	b = appendID(b, p.AppID, flags&appIDIsGUID != 0)
	for _, s := range [...]string{p.UPN, p.UTI, p.IdP, p.AppAuth} {
		b = appendText(b, s)
	}
	b = append(b, byte(len(p.AMR)))
	for _, s := range p.AMR {
		b = appendText(b, s)
	}
	v.cache.put(&t.hash, b, p.ExpiresAt+int64(v.leeway/time.Second)+1, t.now.Unix())
}

// recognise returns what is kept of the token with this hash if it holds now and
// for one of audiences: times, tenant and audience are checked again, and the key
// that verified it must still be listed. ok is false for anything else; the
// ordinary checks then find out why.
func (v *Verifier) recognise(hash *[sha256.Size]byte, audiences []string, now time.Time) (p policy.Token, ok bool) {
	b := v.cache.get(hash)
	if b == nil {
		return p, false
	}
	d := decoder(b)
	id := keyID(d.next(len(keyID{})))
	p.ExpiresAt, p.NotBefore, p.IssuedAt = d.int64(), d.int64(), d.int64()
	if v.expired(p.ExpiresAt, now) || v.future(p.NotBefore, now) || v.future(p.IssuedAt, now) {
		return policy.Token{}, false
	}
	head := d.next(4)
	flags, ver := head[0], version(head[1])
	p.Kind, p.MFA = policy.Kind(head[2]), policy.MFA(head[3])

	var buf [768]byte
	form := &v.cloud.issuers[ver-1]
	text := append(buf[:0], form.prefix...)
	text = appendHex(text, d.next(16))
	tid := text[len(form.prefix):]
	tenant := v.tenants[string(tid)]
	if tenant == nil {
		if tenant = v.tenants[common]; tenant == nil {
			return policy.Token{}, false
		}
	}
	set := v.usable(&tenant.sources[ver-1], now)
	if set == nil {
		return policy.Token{}, false
	}
	if _, listed := set.listed[id]; !listed {
		v.cache.drop(hash)
		return policy.Token{}, false
	}
	audience := d.text()
	for _, a := range audiences {
		if a == string(audience) {
			p.Audience = a
		}
	}
	if p.Audience == "" {
		return policy.Token{}, false
	}

	// All text goes into one string, and each field is a part of it.
	tidEnd := len(text)
	text = append(text, form.suffix...)
	var ends [7 + maxAMR]int
	ends[0] = len(text)
	for i, guid := range [...]bool{flags&oidIsGUID != 0, flags&appIDIsGUID != 0} {
		if guid {
			text = appendHex(text, d.next(16))
		} else {
			text = append(text, d.text()...)
		}
		ends[i+1] = len(text)
	}
	for i := 3; i < 7; i++ {
		text = append(text, d.text()...)
		ends[i] = len(text)
	}
	methods := int(d.next(1)[0])
	for i := range methods {
		text = append(text, d.text()...)
		ends[7+i] = len(text)
	}
	all := string(text)
	p.Verified = true
	p.Version = ver.String()
	p.Issuer = all[:ends[0]]
	p.TenantID = all[len(form.prefix):tidEnd]
	p.ObjectID = all[ends[0]:ends[1]]
	p.AppID = all[ends[1]:ends[2]]
	p.UPN = all[ends[2]:ends[3]]
	p.UTI = all[ends[3]:ends[4]]
	p.IdP = all[ends[4]:ends[5]]
	p.AppAuth = all[ends[5]:ends[6]]
	if methods > 0 {
		p.AMR = make([]string, methods)
		for i := range p.AMR {
			p.AMR[i] = all[ends[6+i]:ends[7+i]]
		}
	}
	return p, true
}

func appendText(b []byte, s string) []byte {
	return append(binary.AppendUvarint(b, uint64(len(s))), s...)
}

func appendID(b []byte, s string, guid bool) []byte {
	if guid {
		return appendGUID(b, s)
	}
	return appendText(b, s)
}

// appendGUID appends the 16 bytes of a GUID.
func appendGUID(b []byte, s string) []byte {
	b, _ = hex.AppendDecode(b, []byte(strings.ReplaceAll(s, "-", "")))
	return b
}

// appendHex appends the text of a GUID.
func appendHex(b, guid []byte) []byte {
	for i, part := range [...][2]int{{0, 4}, {4, 6}, {6, 8}, {8, 10}, {10, 16}} {
		if i > 0 {
			b = append(b, '-')
		}
		b = hex.AppendEncode(b, guid[part[0]:part[1]])
	}
	return b
}

// decoder reads an entry from its start.
type decoder []byte

func (d *decoder) next(n int) []byte {
	b := (*d)[:n]
	*d = (*d)[n:]
	return b
}

func (d *decoder) int64() int64 { return int64(binary.LittleEndian.Uint64(d.next(8))) }

func (d *decoder) text() []byte {
	n, size := binary.Uvarint(*d)
	d.next(size)
	return d.next(int(n))
}

// refusals keeps for a short while which tokens had a bad signature by which keys,
// so that repeating a forgery costs no second verification. It holds two maps and
// forgets the older one whole.
type refusals struct {
	mu         sync.Mutex
	young, old map[[sha256.Size]byte]refusal
	turned     int64 // when young was begun
}

type refusal struct {
	generation uint64 // of the key set
	until      int64
	reason     policy.Reason
}

const (
	maxRefusals  = 2048 // in each map
	refusalsLast = 30   // seconds
)

// get returns the reason that was kept for a token and the keys of a generation.
func (r *refusals) get(hash *[sha256.Size]byte, generation uint64, now int64) (policy.Reason, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	e, ok := r.young[*hash]
	if !ok {
		e, ok = r.old[*hash]
	}
	return e.reason, ok && e.generation == generation && now < e.until
}

func (r *refusals) put(hash *[sha256.Size]byte, generation uint64, reason policy.Reason, now int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.young == nil || len(r.young) >= maxRefusals || now >= r.turned+refusalsLast {
		r.old, r.young, r.turned = r.young, map[[sha256.Size]byte]refusal{}, now
	}
	r.young[*hash] = refusal{generation, now + refusalsLast, reason}
}
