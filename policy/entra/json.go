package entra

import (
	"errors"
	"hash/maphash"
	"math"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf16"
	"unicode/utf8"
)

// Why not encoding/json: it takes the last of duplicate members, folds the case of
// their names and replaces invalid UTF-8, so that two readers of one token could
// see different claims. Here a token is read once, strictly, without building a
// tree.

const (
	maxNesting = 64
	maxMembers = 256 // of one object: bounds the comparison of names with each other
)

var (
	errJSON     = errors.New("invalid JSON")
	errUTF8     = errors.New("invalid UTF-8")
	errNesting  = errors.New("JSON nested too deeply")
	errMembers  = errors.New("too many JSON members")
	errTrailing = errors.New("text after the JSON object")
)

// value is the text of one JSON value, as it stands; empty when missing.
type value string

// str returns the string that v is; ok is false for any other type.
func (v value) str() (s string, ok bool) {
	if len(v) < 2 || v[0] != '"' {
		return "", false
	}
	return unquote(string(v)), true
}

// seconds returns the whole number of seconds that v is, up to the end of the
// year 9999. Fractions, negative numbers and numbers in strings are none.
func (v value) seconds() (n int64, ok bool) {
	const max = 253402300799
	if v == "" || v[0] < '0' || v[0] > '9' {
		return 0, false
	}
	if n, err := strconv.ParseInt(string(v), 10, 64); err == nil {
		return n, n <= max
	}
	f, err := strconv.ParseFloat(string(v), 64) // 1.78e9
	if err != nil || f != math.Trunc(f) || f > max {
		return 0, false
	}
	return int64(f), true
}

// elements calls visit with each element of the array v, until visit returns
// false. ok is false when v is no array.
func (v value) elements(visit func(value) bool) (ok bool) {
	if v == "" || v[0] != '[' {
		return false
	}
	s := scanner{text: string(v), pos: 1}
	for s.next() != ']' {
		start := s.pos
		if s.skip(0) != nil || !visit(value(s.text[start:s.pos])) {
			return true
		}
		if s.next() == ',' {
			s.pos++
			s.next()
		}
	}
	return true
}

// unquote decodes a JSON string that has been scanned.
func unquote(quoted string) string {
	s := quoted[1 : len(quoted)-1]
	i := strings.IndexByte(s, '\\')
	if i < 0 {
		return s
	}
	b := make([]byte, 0, len(s))
	for ; i >= 0; i = strings.IndexByte(s, '\\') {
		b = append(b, s[:i]...)
		c := s[i+1]
		s = s[i:]
		switch c {
		case 'u':
			r := rune(hex4(s))
			if utf16.IsSurrogate(r) {
				s = s[6:]
				r = utf16.DecodeRune(r, rune(hex4(s)))
			}
			b = utf8.AppendRune(b, r)
			s = s[6:]
			continue
		case 'b':
			c = '\b'
		case 'f':
			c = '\f'
		case 'n':
			c = '\n'
		case 'r':
			c = '\r'
		case 't':
			c = '\t'
		}
		b = append(b, c)
		s = s[2:]
	}
	return string(append(b, s...))
}

// scanObject reads text, which must be one JSON object and nothing else, and
// calls visit with each member: its decoded name and where its value stands.
// Duplicate reports members whose names are the same or told apart only by case;
// nested objects are checked for syntax only, since nothing reads them.
func scanObject(text string, visit func(name string, start, end int)) (duplicate bool, err error) {
	if !utf8.ValidString(text) {
		return false, errUTF8
	}
	s := scanner{text: text}
	if s.next() != '{' {
		return false, errJSON
	}
	s.pos++
	var (
		buf   [48]memberName
		names = buf[:0]
	)
	if s.next() == '}' {
		s.pos++
	} else {
		for {
			start := s.pos
			if err := s.skipString(); err != nil {
				return duplicate, err
			}
			name := newMemberName(unquote(text[start:s.pos]))
			for i := range names {
				duplicate = duplicate || names[i].equal(&name)
			}
			if names = append(names, name); len(names) > maxMembers {
				return duplicate, errMembers
			}
			if s.next() != ':' {
				return duplicate, errJSON
			}
			s.pos++
			s.next()
			start = s.pos
			if err := s.skip(1); err != nil {
				return duplicate, err
			}
			visit(name.text, start, s.pos)
			c := s.next()
			s.pos++
			if c == '}' {
				break
			}
			if c != ',' {
				return duplicate, errJSON
			}
			s.next()
		}
	}
	if s.next(); s.pos < len(text) {
		return duplicate, errTrailing
	}
	return duplicate, nil
}

// memberName is a name with a sum that names which differ in more than case do not
// share. The seed keeps anyone from choosing names that do: comparing hundreds of
// those with each other would cost more than verifying a signature.
type memberName struct {
	text string
	sum  uint64
}

var nameSeed = maphash.MakeSeed()

func newMemberName(text string) memberName {
	var buf [64]byte
	folded := buf[:0]
	for i := range len(text) {
		c := text[i]
		if c >= utf8.RuneSelf {
			folded = []byte(strings.Map(fold, text))
			break
		}
		if 'A' <= c && c <= 'Z' {
			c += 'a' - 'A'
		}
		folded = append(folded, c)
	}
	return memberName{text, maphash.Bytes(nameSeed, folded)}
}

// fold is one and the same for all runes that strings.EqualFold takes to be equal.
func fold(r rune) rune {
	least := r
	for f := unicode.SimpleFold(r); f != r; f = unicode.SimpleFold(f) {
		least = min(least, f)
	}
	if 'A' <= least && least <= 'Z' {
		least += 'a' - 'A'
	}
	return least
}

func (m *memberName) equal(o *memberName) bool {
	return m.sum == o.sum && strings.EqualFold(m.text, o.text)
}

// scanner walks over JSON text by RFC 8259. Its text is valid UTF-8.
type scanner struct {
	text string
	pos  int
}

// next skips white space and returns the byte at pos; 0 at the end.
func (s *scanner) next() byte {
	for s.pos < len(s.text) {
		switch c := s.text[s.pos]; c {
		case ' ', '\t', '\n', '\r':
			s.pos++
		default:
			return c
		}
	}
	return 0
}

// skip moves behind the value at pos, which lies in depth objects and arrays.
func (s *scanner) skip(depth int) error {
	if s.pos >= len(s.text) {
		return errJSON
	}
	switch c := s.text[s.pos]; c {
	case '"':
		return s.skipString()
	case '{', '[':
		if depth >= maxNesting {
			return errNesting
		}
		return s.skipComposite(c, depth+1)
	case 't':
		return s.skipWord("true")
	case 'f':
		return s.skipWord("false")
	case 'n':
		return s.skipWord("null")
	}
	return s.skipNumber()
}

func (s *scanner) skipComposite(open byte, depth int) error {
	closing := open + 2 // '{' → '}', '[' → ']'
	s.pos++
	if s.next() == closing {
		s.pos++
		return nil
	}
	for {
		if open == '{' {
			if err := s.skipString(); err != nil {
				return err
			}
			if s.next() != ':' {
				return errJSON
			}
			s.pos++
			s.next()
		}
		if err := s.skip(depth); err != nil {
			return err
		}
		c := s.next()
		s.pos++
		if c == closing {
			return nil
		}
		if c != ',' {
			return errJSON
		}
		s.next()
	}
}

func (s *scanner) skipWord(word string) error {
	if !strings.HasPrefix(s.text[s.pos:], word) {
		return errJSON
	}
	s.pos += len(word)
	return nil
}

func (s *scanner) skipString() error {
	if s.pos >= len(s.text) || s.text[s.pos] != '"' {
		return errJSON
	}
	for i := s.pos + 1; i < len(s.text); {
		switch c := s.text[i]; {
		case c == '"':
			s.pos = i + 1
			return nil
		case c == '\\':
			n := escapeLen(s.text[i:])
			if n == 0 {
				return errJSON
			}
			i += n
		case c < ' ':
			return errJSON
		default:
			i++
		}
	}
	return errJSON
}

// escapeLen is the length of the escape that s begins with; 0 when it is wrong.
// A surrogate must have its other half: alone it stands for no character.
func escapeLen(s string) int {
	if len(s) < 2 {
		return 0
	}
	switch s[1] {
	case '"', '\\', '/', 'b', 'f', 'n', 'r', 't':
		return 2
	case 'u':
		switch r := hex4(s); {
		case r < 0:
			return 0
		case r < 0xD800 || r > 0xDFFF:
			return 6
		case r < 0xDC00:
			if low := hex4(s[6:]); low >= 0xDC00 && low <= 0xDFFF {
				return 12
			}
		}
	}
	return 0
}

// hex4 is the number in \uXXXX at the start of s; negative when there is none.
func hex4(s string) int {
	if len(s) < 6 || s[0] != '\\' || s[1] != 'u' {
		return -1
	}
	n := 0
	for _, c := range []byte(s[2:6]) {
		switch {
		case '0' <= c && c <= '9':
			n = n<<4 | int(c-'0')
		case 'a' <= c && c <= 'f':
			n = n<<4 | int(c-'a'+10)
		case 'A' <= c && c <= 'F':
			n = n<<4 | int(c-'A'+10)
		default:
			return -1
		}
	}
	return n
}

func (s *scanner) skipNumber() error {
	if s.at('-') {
		s.pos++
	}
	switch {
	case s.at('0'):
		s.pos++
	case !s.digits():
		return errJSON
	}
	if s.at('.') {
		s.pos++
		if !s.digits() {
			return errJSON
		}
	}
	if s.at('e') || s.at('E') {
		s.pos++
		if s.at('+') || s.at('-') {
			s.pos++
		}
		if !s.digits() {
			return errJSON
		}
	}
	return nil
}

func (s *scanner) at(c byte) bool { return s.pos < len(s.text) && s.text[s.pos] == c }

func (s *scanner) digits() bool {
	start := s.pos
	for s.pos < len(s.text) && s.text[s.pos] >= '0' && s.text[s.pos] <= '9' {
		s.pos++
	}
	return s.pos > start
}
