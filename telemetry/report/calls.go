package report

import (
	"cmp"
	"io"
	"strconv"
	"strings"

	"github.com/partnerguard/partnerguard/policy"
	"github.com/partnerguard/partnerguard/telemetry/store"
)

// WriteCallJSON writes c as one JSON object and a line feed: the names of the
// ledger's decision and outcome lines, user where its name is known, and causes
// where Microsoft refused the call.
func WriteCallJSON(w io.Writer, c *store.Call, identities map[string]store.Identity) error {
	var causes []Cause
	if c.Rejection != "" {
		for _, cause := range policy.Diagnose(c.Token(), policy.Reason(c.Reason), policy.Rejection(c.Rejection), c.Code) {
			causes = append(causes, causeOf(cause))
		}
	}
	id := identities[c.UserRef]
	return EncodeJSON(w, struct {
		*store.Call
		User   string  `json:"user,omitempty"`
		Causes []Cause `json:"causes,omitempty"`
	}{c, cmp.Or(id.UPN, id.ObjectID), causes}, "")
}

// CallsTable writes calls for people, one a line, as they come. Under a call that
// Microsoft refused stands whose it is, why, and what to do.
type CallsTable struct {
	w          io.Writer
	style      Style
	identities map[string]store.Identity
	begun      bool
}

// NewCallsTable returns a table on w. identities say whom user_refs stand for.
func NewCallsTable(w io.Writer, identities map[string]store.Identity, style Style) *CallsTable {
	return &CallsTable{w: w, style: style, identities: identities}
}

// The columns of a CallsTable. What is longer is cut, but for the last: the call's
// id must be whole to be of use. Route takes what the width leaves.
var callColumns = [...]struct {
	name  string
	width int
}{
	{"TIME (UTC)", 19}, {"INTEGRATION", 20}, {"USER", 24}, {"METHOD", 6}, {"ROUTE", 0}, {"STATUS", 6}, {"EFFECT", 6}, {"REASON", 18}, {"REFUSED", 20}, {"CALL", 36},
}

const minRoute = 24

// Row writes c, before the first call the names of the columns.
func (t *CallsTable) Row(c *store.Call) error {
	var b strings.Builder
	if !t.begun {
		t.begun = true
		var names []string
		for _, col := range callColumns {
			names = append(names, col.name)
		}
		b.WriteString(t.style.Paint(Bold, t.line(names)) + "\n")
	}
	user := UserName(t.identities, c.UserRef)
	if user != "" && !c.Verified {
		user += "?" // claimed only
	}
	status := "-"
	switch {
	case c.Status != 0:
		status = strconv.FormatInt(c.Status, 10)
	case c.Open():
		status = "open"
	}
	line := t.line([]string{
		c.Time.UTC().Format("2006-01-02 15:04:05"), cmp.Or(c.Integration, "-"), cmp.Or(user, "-"), cmp.Or(c.Method, "-"), cmp.Or(c.Route, c.Path, "-"),
		status, cmp.Or(c.Effect, "-"), cmp.Or(c.Reason, "-"), cmp.Or(refused(c), c.Error, "-"), c.ID,
	})
	switch {
	case c.Rejection == string(policy.RejectionMFARequired):
		line = t.style.Paint(Red, line)
	case c.Rejection != "" || c.Effect == policy.Reject.String():
		line = t.style.Paint(Yellow, line)
	}
	b.WriteString(line + "\n")
	if c.Rejection != "" {
		b.WriteString(Wrap(diagnosis(c), "    ", "    ", t.style.Columns()))
	}
	_, err := io.WriteString(t.w, b.String())
	return err
}

func (t *CallsTable) line(cells []string) string {
	route := t.style.Columns()
	for _, col := range callColumns {
		route -= col.width + 1
	}
	var b strings.Builder
	for i, text := range cells {
		width := callColumns[i].width
		if width == 0 {
			width = max(route, minRoute)
		}
		if text = clean(text); i == len(cells)-1 {
			b.WriteString(text)
			break
		}
		b.WriteString(pad(fit(text, width), width) + " ")
	}
	return b.String()
}

// refused is the code of Microsoft's refusal, or its kind where it has none.
func refused(c *store.Call) string {
	if c.Rejection == "" {
		return ""
	}
	return cmp.Or(c.Code, c.Rejection)
}

// diagnosis says of a call that Microsoft refused whose it is, why, and what to do.
func diagnosis(c *store.Call) string {
	text := "Microsoft refused " + clean(cmp.Or(c.Integration, "a call without decision"))
	if c.Owner != "" {
		text += ", owner " + clean(c.Owner)
	}
	if c.Code != "" {
		text += ", code " + clean(c.Code)
	}
	text += " (" + clean(c.Rejection) + ")."
	causes := policy.Diagnose(c.Token(), policy.Reason(c.Reason), policy.Rejection(c.Rejection), c.Code)
	if len(causes) > 0 {
		best := causes[0]
		text += " Cause (" + best.Confidence.String() + "): " + clean(best.Text) + " Fix: " + clean(best.Fix)
	}
	return text
}
