package reconcile

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
)

// jsonRows reads JSON: pages of Graph ({"value": […], "@odata.nextLink": …}), one
// behind the other or in an array, an array of sign-ins, or sign-ins one a line.
//
// encoding/json reads about 50 MB/s here, and a million sign-ins of Graph are some
// GB: so this looks at each byte once, takes the few members that matter, and is
// strict only about where values end.
type jsonRows struct {
	lookahead
	names   map[string]signInField
	inside  []byte // what the next row stands in, the innermost last: '[' a list, '{' a page
	pages   int64
	nexts   int64  // pages that name a next one
	problem string // that Graph reported instead of a page
	key     []byte // scratch
}

func newJSONRows(in io.Reader) *jsonRows {
	return &jsonRows{lookahead: newLookahead(in), names: fieldNames()}
}

var (
	errShort  = errors.New("cut short")
	errSyntax = errors.New("it is no JSON")
	errObject = errors.New("it is no object")
	errPage   = errors.New("a page begins")
)

func (j *jsonRows) next(r *exportRow) error {
	for {
		// What comes, past spaces and the record separators of RFC 7464.
		for j.pos < j.end && (isSpace(j.buf[j.pos]) || j.buf[j.pos] == ',' || j.buf[j.pos] == 0x1e) {
			j.pos++
		}
		if j.pos == j.end {
			if j.more() {
				continue
			}
			if len(j.inside) > 0 || j.err != nil {
				j.inside = nil
				err := j.cut(j.line())
				j.err = nil
				return err
			}
			return io.EOF
		}
		in := byte(0)
		if len(j.inside) > 0 {
			in = j.inside[len(j.inside)-1]
		}
		var n int
		var err error
		switch c := j.buf[j.pos]; {
		case c == ']' && in == '[' || c == '}' && in == '{':
			j.pos++
			j.inside = j.inside[:len(j.inside)-1]
			continue
		case c == '[' && in == 0:
			j.pos++
			j.inside = append(j.inside, '[')
			continue
		case c == '{' && in != '{':
			*r = exportRow{json: true}
			n, err = j.object(j.rest(), r)
		case c == '"' && in == '{':
			n, err = j.member(j.rest())
		case in == '[':
			if n, err = skipValue(j.rest(), 0); err == nil {
				err = errObject
			}
		default:
			err = errSyntax
		}
		switch {
		case err == nil:
			j.pos += n
			if in != '{' {
				return nil
			}
		case errors.Is(err, errPage):
			j.pos += n
			if in != '{' {
				j.inside = append(j.inside, '{')
				j.pages++
			}
			j.inside = append(j.inside, '[')
		case errors.Is(err, errShort) && j.more():
		default:
			return j.skip(err)
		}
	}
}

// skip passes over the row at pos, which err says is no good.
func (j *jsonRows) skip(err error) error {
	line := j.line()
	if errors.Is(err, errShort) && j.eof {
		j.pos, j.inside = j.end, nil
		err := j.cut(line)
		j.err = nil
		return err
	}
	bad := &rowError{reason: err.Error(), line: line}
	if errors.Is(err, errShort) {
		bad.reason = "it has more than 1 MiB"
	} else {
		n, err := skipValue(j.rest(), 0)
		for errors.Is(err, errShort) && j.more() {
			n, err = skipValue(j.rest(), 0)
		}
		if err == nil {
			j.pos += n
			return bad
		}
	}
	// Where the row ends is unknown. What begins in the first column of a line is
	// taken for a new one; inside a list laid out over lines there is no such sign.
	listed := len(j.inside) > 0
	j.inside = nil
	if !j.nextLine() {
		return bad
	}
	if c := j.buf[j.pos]; listed && c != '{' && c != '[' {
		bad.reason += "; what follows cannot be told apart and is not read"
		bad.last = true
		j.pos, j.end, j.eof = 0, 0, true
	}
	return bad
}

// object reads the object at the beginning of b into r and returns its length. If
// it is a page, the error is errPage and the length is that up to its first row.
func (j *jsonRows) object(b []byte, r *exportRow) (int, error) {
	next := false
	i := 1
	for {
		key, v, end, err := nextMember(b, i)
		if err != nil || key == nil {
			return end, err
		}
		name := j.lower(key)
		if b[v] == '[' && isList(name) {
			if next {
				j.nexts++
			}
			return v + 1, errPage
		}
		if end, err = skipValue(b, v); err != nil {
			return 0, err
		}
		if f, ok := j.names[string(name)]; ok {
			r.value[f] = b[v:end]
		} else if isNextLink(name) {
			next = b[v] == '"' && end-v > 2
		} else if string(name) == "error" && b[v] == '{' {
			eachMember(b[v:end], func(k, value []byte) {
				if string(k) == "code" {
					j.problem = signInText(unquote(value))
				}
			})
		}
		i = end
	}
}

// member reads a member of a page other than its rows, at the beginning of b.
func (j *jsonRows) member(b []byte) (int, error) {
	key, v, _, err := nextMember(b, 0)
	if err != nil {
		return 0, err
	}
	name := j.lower(key)
	if b[v] == '[' && isList(name) {
		return v + 1, errPage
	}
	end, err := skipValue(b, v)
	if err == nil && isNextLink(name) && b[v] == '"' && end-v > 2 {
		j.nexts++
	}
	return end, err
}

func isList(name []byte) bool     { return string(name) == "value" }
func isNextLink(name []byte) bool { return string(name) == "@odata.nextlink" }

// lower is key in lower case; PowerShell writes AppId for appId. It is good until
// the next call.
func (j *jsonRows) lower(key []byte) []byte {
	j.key = append(j.key[:0], key...)
	for i, c := range j.key {
		if 'A' <= c && c <= 'Z' {
			j.key[i] = c + 'a' - 'A'
		}
	}
	return j.key
}

// nextMember finds the member of an object that begins at or behind b[i]: its key
// without quotes, and where its value begins. At the end of the object key is nil
// and end is behind it.
func nextMember(b []byte, i int) (key []byte, value, end int, err error) {
	for i < len(b) && (isSpace(b[i]) || b[i] == ',') {
		i++
	}
	switch {
	case i == len(b):
		return nil, 0, 0, errShort
	case b[i] == '}':
		return nil, 0, i + 1, nil
	case b[i] != '"':
		return nil, 0, 0, errSyntax
	}
	begin := i + 1
	if i, err = skipString(b, i); err != nil {
		return nil, 0, 0, err
	}
	key = b[begin : i-1 : i-1]
	for i < len(b) && isSpace(b[i]) {
		i++
	}
	if i < len(b) && b[i] != ':' {
		return nil, 0, 0, errSyntax
	}
	for i++; i < len(b) && isSpace(b[i]); {
		i++
	}
	if i >= len(b) {
		return nil, 0, 0, errShort
	}
	return key, i, 0, nil
}

// eachMember visits the members of an object, eachElement the elements of an array;
// what is neither, or ends early, has no more.
func eachMember(b []byte, visit func(key, value []byte)) {
	if len(b) == 0 || b[0] != '{' {
		return
	}
	for i := 1; ; {
		key, v, _, err := nextMember(b, i)
		if err != nil || key == nil {
			return
		}
		end, err := skipValue(b, v)
		if err != nil {
			return
		}
		visit(key, b[v:end])
		i = end
	}
}

func eachElement(b []byte, visit func(value []byte)) {
	if len(b) == 0 || b[0] != '[' {
		return
	}
	for i := 1; ; {
		for i < len(b) && (isSpace(b[i]) || b[i] == ',') {
			i++
		}
		if i == len(b) || b[i] == ']' {
			return
		}
		end, err := skipValue(b, i)
		if err != nil {
			return
		}
		visit(b[i:end])
		i = end
	}
}

// skipValue returns where the value at b[i] ends.
func skipValue(b []byte, i int) (int, error) {
	switch c := b[i]; {
	case c == '"':
		return skipString(b, i)
	case c == '{' || c == '[':
		depth := 0
		for i < len(b) {
			switch b[i] {
			case '"':
				end, err := skipString(b, i)
				if err != nil {
					return 0, err
				}
				i = end
				continue
			case '{', '[':
				depth++
			case '}', ']':
				if depth--; depth == 0 {
					return i + 1, nil
				}
			}
			i++
		}
		return 0, errShort
	case c == 't' || c == 'f' || c == 'n' || c == '-' || '0' <= c && c <= '9':
		for ; i < len(b); i++ {
			switch c := b[i]; {
			case isSpace(c) || c == ',' || c == '}' || c == ']':
				return i, nil
			case c == '"' || c == '{' || c == '[' || c == ':':
				return 0, errSyntax
			}
		}
		return 0, errShort
	}
	return 0, errSyntax
}

// skipString returns where the string that begins with the quote b[i] ends.
func skipString(b []byte, i int) (int, error) {
	for begin := i + 1; ; {
		n := bytes.IndexByte(b[i+1:], '"')
		if n < 0 {
			return 0, errShort
		}
		i += 1 + n
		escapes := i
		for escapes > begin && b[escapes-1] == '\\' {
			escapes--
		}
		if (i-escapes)%2 == 0 {
			return i + 1, nil
		}
	}
}

func isSpace(c byte) bool { return c == ' ' || c == '\n' || c == '\r' || c == '\t' }

// unquote is the text of a JSON value: that in a string, nothing for null, else the
// value as it stands.
func unquote(b []byte) []byte {
	switch {
	case len(b) >= 2 && b[0] == '"':
		inner := b[1 : len(b)-1]
		if bytes.IndexByte(inner, '\\') < 0 {
			return inner
		}
		var s string
		if json.Unmarshal(b, &s) != nil {
			return inner
		}
		return []byte(s)
	case string(b) == "null":
		return nil
	}
	return b
}

// text is the text of a field.
func (r *exportRow) text(f signInField) []byte {
	if r.json {
		return unquote(r.value[f])
	}
	return r.value[f]
}
