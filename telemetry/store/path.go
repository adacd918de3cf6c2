package store

import (
	"encoding/binary"
	"errors"
	"strings"

	"github.com/google/uuid"
)

// A path says little that its route and its customer do not, and yet it would be the
// longest column of a call. Of a path that is its route with values for the names in
// braces, packPath keeps the values only: each begins with one of these.
const (
	valueCustomer = iota // the call's customer
	valueGUID            // 16 bytes
	valueText            // its length, as a uvarint, and the text
)

// packPath returns nil for a path that follows from route and customer, the values as
// bytes when it follows with them, else the path itself.
func packPath(path, route, customer string) any {
	var values []byte
	known := true // so far all values are the customer
	rest := path
	for {
		literal, after, named := strings.Cut(route, "{")
		var ok bool
		if rest, ok = strings.CutPrefix(rest, literal); !ok {
			return path
		}
		if !named {
			break
		}
		if _, route, ok = strings.Cut(after, "}"); !ok {
			return path
		}
		end := strings.IndexByte(rest, '/')
		if end < 0 {
			end = len(rest)
		}
		value := rest[:end]
		rest = rest[end:]
		if value == customer {
			values = append(values, valueCustomer)
			continue
		}
		known = false
		if guid, ok := parseGUID(value); ok {
			values = append(append(values, valueGUID), guid[:]...)
			continue
		}
		values = binary.AppendUvarint(append(values, valueText), uint64(len(value)))
		values = append(values, value...)
	}
	switch {
	case rest != "", len(values) > len(path) && !known:
		return path
	case known:
		return nil
	}
	return values
}

var errPath = errors.New("values of a path do not match its route")

// unpackPath is the path of which packPath, with the same route and customer, made v.
func unpackPath(v any, route, customer string) (string, error) {
	var values []byte
	switch v := v.(type) {
	case nil:
	case string:
		return v, nil
	case []byte:
		values = v
	default:
		return "", errPath
	}
	if !strings.Contains(route, "{") {
		return route, nil
	}
	var b strings.Builder
	for {
		literal, after, named := strings.Cut(route, "{")
		b.WriteString(literal)
		if !named {
			break
		}
		_, route, _ = strings.Cut(after, "}")
		kind := byte(valueCustomer)
		if v != nil {
			if len(values) == 0 {
				return "", errPath
			}
			kind, values = values[0], values[1:]
		}
		switch kind {
		case valueCustomer:
			b.WriteString(customer)
		case valueGUID:
			if len(values) < 16 {
				return "", errPath
			}
			b.WriteString(uuid.UUID(values[:16]).String())
			values = values[16:]
		case valueText:
			n, size := binary.Uvarint(values)
			if size <= 0 || n > uint64(len(values)-size) {
				return "", errPath
			}
			b.Write(values[size : size+int(n)])
			values = values[size+int(n):]
		default:
			return "", errPath
		}
	}
	if len(values) > 0 {
		return "", errPath
	}
	return b.String(), nil
}
