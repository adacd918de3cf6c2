package config

import (
	"errors"
	"fmt"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/lexer"
	"github.com/goccy/go-yaml/parser"
	"github.com/goccy/go-yaml/token"
)

// Bounds that no sensible file comes near. They keep a damaged or hostile one
// from exhausting memory: the parser recurses, and aliases multiply.
const (
	maxBytes  = 1 << 20
	maxFlow   = 16      // nested [ and {
	maxIndent = 200     // column of a block sequence entry
	maxNodes  = 100_000 // values read, aliases counted each time
)

// decoder turns a YAML document into a Config and remembers where each key stood.
//
// It walks the syntax tree itself because yaml.Decoder stops at the first mistake
// and drops positions, which the checks after decoding need as well.
type decoder struct {
	file     string
	problems []Problem
	places   map[string]*token.Position // by path of the key; "" is the whole
	failed   map[string]bool            // paths whose value could not be read
	anchors  []*ast.AnchorNode          // in the order of the file
	nodes    int
}

// document decodes data over the defaults in c. It reports whether there was
// anything to check further.
func (d *decoder) document(data []byte, c *Config) bool {
	d.places = map[string]*token.Position{}
	d.failed = map[string]bool{}
	root := d.parse(data)
	if root == nil {
		return false
	}
	d.places[""] = start(root)
	if _, ok := root.(ast.MapNode); !ok {
		d.addAt(start(root), "", "the file is "+kind(root)+", not a mapping", "write keys and values, beginning with version: 1")
		return false
	}
	ast.Walk(anchorVisitor{d}, root)
	d.structure(root, "", reflect.ValueOf(c).Elem())
	return true
}

// parse returns the root of data's only document, or nil after a problem.
func (d *decoder) parse(data []byte) ast.Node {
	whole := &token.Position{Line: 1, Column: 1}
	if len(data) > maxBytes {
		d.addAt(whole, "", fmt.Sprintf("the file is larger than %d bytes", maxBytes), "is this the configuration?")
		return nil
	}
	for i, line := range strings.Split(string(data), "\n") {
		if !utf8.ValidString(line) {
			d.addAt(&token.Position{Line: i + 1, Column: 1}, "", "is not UTF-8", "save the file in this encoding")
			return nil
		}
	}
	tokens := lexer.Tokenize(string(data))
	if at := tooDeep(tokens); at != nil {
		d.addAt(at, "", "is nested too deeply", "no key needs this")
		return nil
	}
	file, err := parser.Parse(tokens, 0, parser.AllowDuplicateMapKey()) // duplicates are found by entries
	if err != nil {
		at, message, hint := whole, err.Error(), ""
		var syntax yaml.Error
		if errors.As(err, &syntax) {
			message = syntax.GetMessage()
			if t := syntax.GetToken(); t != nil && t.Position != nil {
				at = t.Position
			}
		}
		if strings.Contains(message, "\t") {
			message, hint = strings.ReplaceAll(message, "\t", `\t`), "indent with spaces"
		}
		d.addAt(at, "", "is not YAML: "+message, hint)
		return nil
	}
	docs := slices.DeleteFunc(file.Docs, func(doc *ast.DocumentNode) bool {
		_, directive := doc.Body.(*ast.DirectiveNode)
		return doc.Body == nil || directive
	})
	if len(docs) == 0 {
		d.addAt(whole, "", "the file is empty", "write at least version: 1")
		return nil
	}
	for _, doc := range docs[1:] {
		at := start(doc.Body)
		if doc.Start != nil { // after ... there is none
			at = doc.Start.Position
		}
		d.addAt(at, "", "a second YAML document begins here", "write everything into one, without ---")
	}
	return docs[0].Body
}

// tooDeep returns where tokens nest deeper than is sane, or nil. Block mappings
// need no bound: each level takes a line and a deeper column.
func tooDeep(tokens token.Tokens) *token.Position {
	flow := 0
	for _, t := range tokens {
		switch t.Type {
		case token.SequenceStartType, token.MappingStartType:
			flow++
		case token.SequenceEndType, token.MappingEndType:
			flow--
		case token.SequenceEntryType, token.MappingKeyType:
			if t.Position.Column > maxIndent {
				return t.Position
			}
		}
		if flow > maxFlow {
			return t.Position
		}
	}
	return nil
}

type anchorVisitor struct{ d *decoder }

func (v anchorVisitor) Visit(n ast.Node) ast.Visitor {
	if a, ok := n.(*ast.AnchorNode); ok {
		v.d.anchors = append(v.d.anchors, a)
	}
	return v
}

// structure decodes the mapping n into the struct dst, key by key.
func (d *decoder) structure(n ast.Node, path string, dst reflect.Value) {
	fields := map[string]reflect.Value{}
	var known []string
	for i := range dst.NumField() {
		key := dst.Type().Field(i).Tag.Get("yaml")
		fields[key] = dst.Field(i)
		known = append(known, key)
	}
	entries := d.entries(n, path)
	for _, e := range entries {
		at := join(path, e.key)
		field, ok := fields[e.key]
		if !ok {
			hint := "no key is known here"
			if near := nearest(e.key, known); near != "" {
				hint = "did you mean " + near + "?"
				if !slices.ContainsFunc(entries, func(e entry) bool { return e.key == near }) {
					d.failed[join(path, near)] = true // it is not missing, it is misspelt
				}
			} else if len(known) > 0 {
				hint = "known keys are " + strings.Join(known, ", ")
			}
			d.addAt(e.place, at, "unknown key", hint)
			continue
		}
		d.places[at] = e.place
		d.value(e.value, at, field)
	}
}

// value decodes n, the value of the key at path, into dst.
func (d *decoder) value(n ast.Node, path string, dst reflect.Value) {
	n = d.resolve(n, path)
	if n == nil {
		return
	}
	_, null := n.(*ast.NullNode)
	if p, ok := newScalar(dst); ok {
		switch text, quoted, isScalar := scalarText(n); {
		case null:
			d.fail(path, "has no value", p.hint+", or remove the key")
		case !isScalar:
			d.fail(path, "is "+kind(n), p.hint)
		default:
			if problem, hint := p.set(text, quoted); problem != "" {
				d.fail(path, problem, hint)
			}
		}
		return
	}
	if null {
		return // a section with everything in it commented out
	}
	switch dst.Kind() {
	case reflect.Pointer:
		dst.Set(reflect.New(dst.Type().Elem()))
		d.value(n, path, dst.Elem())
	case reflect.Struct:
		if d.isMapping(n, path) {
			d.structure(n, path, dst)
		}
	case reflect.Map:
		if d.isMapping(n, path) {
			d.mapping(n, path, dst)
		}
	case reflect.Slice:
		d.list(n, path, dst)
	}
}

func (d *decoder) isMapping(n ast.Node, path string) bool {
	_, ok := n.(ast.MapNode)
	if !ok {
		d.fail(path, "is "+kind(n), "write a mapping, key: value")
	}
	return ok
}

// mapping decodes n into a map by name; values are decoded over those that dst
// already holds, or over their preset.
func (d *decoder) mapping(n ast.Node, path string, dst reflect.Value) {
	for _, e := range d.entries(n, path) {
		if dst.IsNil() {
			dst.Set(reflect.MakeMap(dst.Type()))
		}
		at, key := join(path, e.key), reflect.ValueOf(e.key)
		d.places[at] = e.place
		v := reflect.New(dst.Type().Elem()).Elem()
		if old := dst.MapIndex(key); old.IsValid() {
			v.Set(old)
		} else if p, ok := v.Addr().Interface().(interface{ preset() }); ok {
			p.preset()
		}
		d.value(e.value, at, v)
		dst.SetMapIndex(key, v)
	}
}

// list decodes n into the slice dst, which it replaces. One scalar stands for a
// list of one.
func (d *decoder) list(n ast.Node, path string, dst reflect.Value) {
	element := reflect.New(dst.Type().Elem()).Elem()
	_, scalars := newScalar(element)
	var items []ast.Node
	switch seq, ok := n.(*ast.SequenceNode); {
	case ok:
		items = seq.Values
	case scalars:
		if _, _, isScalar := scalarText(n); !isScalar {
			d.fail(path, "is "+kind(n), "write one value or a list: [a, b]")
			return
		}
		items = []ast.Node{n}
	default:
		d.fail(path, "is "+kind(n), "write a list: each item on its own line after a -")
		return
	}
	dst.Set(reflect.MakeSlice(dst.Type(), len(items), len(items)))
	for i, item := range items {
		at := fmt.Sprintf("%s[%d]", path, i)
		d.places[at] = start(item)
		if _, null := item.(*ast.NullNode); null {
			d.fail(at, "has no value", "write one or remove the -")
			continue
		}
		d.value(item, at, dst.Index(i))
	}
}

// entry is one key of a mapping with its value.
type entry struct {
	key   string
	place *token.Position
	value ast.Node
}

// entries returns the keys of the mapping n in the order of the file, then those
// that merge keys (<<) bring in and n does not give itself.
func (d *decoder) entries(n ast.Node, path string) []entry {
	var entries []entry
	var merges []ast.Node
	first := map[string]*token.Position{}
	for it := n.(ast.MapNode).MapRange(); it.Next(); {
		if it.Key().IsMergeKey() {
			merges = append(merges, it.Value())
			continue
		}
		e := entry{place: start(it.Key()), value: it.Value()}
		var keyNode ast.Node = it.Key()
		if explicit, ok := keyNode.(*ast.MappingKeyNode); ok { // "? key"
			keyNode = explicit.Value
		}
		text, _, ok := scalarText(keyNode)
		if !ok {
			d.addAt(e.place, path, "a key is "+kind(keyNode), "write a plain word")
			continue
		}
		e.key = text
		if again, ok := first[e.key]; ok {
			d.addAt(e.place, join(path, e.key), fmt.Sprintf("is given twice, first in line %d", again.Line), "keep one of them")
			continue
		}
		first[e.key] = e.place
		entries = append(entries, e)
	}
	for _, m := range merges {
		for _, e := range d.merged(m, path) {
			if first[e.key] == nil {
				first[e.key] = e.place
				entries = append(entries, e)
			}
		}
	}
	return entries
}

// merged returns the entries of a merge key's value: a mapping, or a list of
// them of which the first wins.
func (d *decoder) merged(n ast.Node, path string) []entry {
	n = d.resolve(n, path)
	if n == nil {
		return nil
	}
	if list, ok := n.(*ast.SequenceNode); ok {
		var all []entry
		for _, item := range list.Values {
			all = append(all, d.merged(item, path)...)
		}
		return all
	}
	if _, ok := n.(ast.MapNode); ok {
		return d.entries(n, path)
	}
	d.addAt(start(n), join(path, "<<"), "is "+kind(n), "merge an alias of a mapping: <<: *name")
	return nil
}

// resolve follows anchors and aliases to the value itself, or returns nil after
// a problem. That never repeats the text, which may be a secret that someone did
// not quote.
func (d *decoder) resolve(n ast.Node, path string) ast.Node {
	for {
		if d.nodes++; d.nodes > maxNodes {
			if d.nodes == maxNodes+1 {
				d.addAt(start(n), path, "aliases make the file too large", "does one contain itself?")
			}
			d.failed[path] = true
			return nil
		}
		switch v := n.(type) {
		case *ast.AnchorNode:
			n = v.Value
		case *ast.AliasNode:
			target := d.anchor(v)
			if target == nil {
				d.addAt(start(v), path, "is an alias of no anchor before it", "quote the value if it only begins with *")
				d.failed[path] = true
				return nil
			}
			n = target.Value
		case *ast.TagNode:
			d.addAt(start(v), path, "has a tag, which is not understood", "remove it, or quote the value if it only begins with !")
			d.failed[path] = true
			return nil
		default:
			return n
		}
	}
}

// anchor returns the last anchor of alias's name before it, or nil.
func (d *decoder) anchor(alias *ast.AliasNode) *ast.AnchorNode {
	name, offset := alias.Value.GetToken().Value, start(alias).Offset
	for _, a := range slices.Backward(d.anchors) {
		if a.Name.GetToken().Value == name && start(a).Offset < offset {
			return a
		}
	}
	return nil
}

// fail records that the value of the key at path cannot be read.
func (d *decoder) fail(path, message, hint string) {
	d.failed[path] = true
	d.addAt(d.place(path), path, message, hint)
}

// addUnlessFailed records a problem with a value that was read, and is silent
// about what could not be: that is not also missing or empty.
func (d *decoder) addUnlessFailed(path, message, hint string) {
	for at := path; at != ""; at = outer(at) {
		if d.failed[at] {
			return
		}
	}
	d.addAt(d.place(path), path, message, hint)
}

// place is where the key at path stands, or the nearest section around it.
func (d *decoder) place(path string) *token.Position {
	for {
		if p, ok := d.places[path]; ok {
			return p
		}
		path = outer(path)
	}
}

// outer is the path of the section around path; "" is the whole.
func outer(path string) string { return path[:max(strings.LastIndexAny(path, ".["), 0)] }

func (d *decoder) addAt(at *token.Position, path, message, hint string) {
	d.problems = append(d.problems, Problem{
		File: d.file, Line: at.Line, Column: at.Column,
		Path: path, Message: message, Hint: hint,
	})
}

// start is where n begins: for a block mapping its first key, since its own token
// is the colon.
func start(n ast.Node) *token.Position {
	switch v := n.(type) {
	case *ast.MappingNode:
		if !v.IsFlowStyle && len(v.Values) > 0 {
			return start(v.Values[0].Key)
		}
	case *ast.MappingValueNode:
		return start(v.Key)
	}
	return n.GetToken().Position
}

// kind says what n is, for messages.
func kind(n ast.Node) string {
	switch n.(type) {
	case ast.MapNode:
		return "a mapping"
	case *ast.SequenceNode:
		return "a list"
	case *ast.NullNode:
		return "nothing"
	case *ast.BoolNode:
		return "true or false"
	case *ast.IntegerNode, *ast.FloatNode, *ast.InfinityNode, *ast.NanNode:
		return "a number"
	case *ast.StringNode, *ast.LiteralNode:
		return "a text"
	}
	return "something else"
}

// scalarText returns the text of a scalar as it was written, without quotes.
func scalarText(n ast.Node) (text string, quoted, ok bool) {
	switch v := n.(type) {
	case *ast.StringNode:
		t := v.Token.Type
		return v.Value, t == token.SingleQuoteType || t == token.DoubleQuoteType, true
	case *ast.LiteralNode:
		return v.Value.Value, true, true
	case *ast.BoolNode, *ast.IntegerNode, *ast.FloatNode, *ast.InfinityNode, *ast.NanNode:
		return n.GetToken().Value, false, true
	}
	return "", false, false
}

var plainKey = regexp.MustCompile(`^([A-Za-z0-9_-]+|<<)$`)

// join is the path of key within path.
func join(path, key string) string {
	if !plainKey.MatchString(key) {
		key = strconv.Quote(key)
	}
	if path == "" {
		return key
	}
	return path + "." + key
}

// nearest returns the one of known that key most likely stands for, or "".
func nearest(key string, known []string) string {
	key = strings.ReplaceAll(strings.ToLower(key), "-", "_")
	best, near := 1+len(key)/3, ""
	for _, k := range known {
		if d := distance(key, k); d <= best && (near == "" || d < best) {
			best, near = d, k
		}
	}
	if near != "" {
		return near
	}
	for _, k := range known {
		if len(key) >= 4 && (strings.HasPrefix(k, key) || strings.HasPrefix(key, k)) {
			return k
		}
	}
	return ""
}

// distance is the number of letters to insert, drop or change to make a into b.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			change := diagonal
			if a[i] != b[j] {
				change++
			}
			diagonal = row[j+1]
			row[j+1] = min(change, row[j]+1, diagonal+1)
		}
	}
	return row[len(b)]
}
