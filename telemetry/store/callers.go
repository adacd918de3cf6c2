package store

import (
	"context"
	"maps"
	"time"
)

// Caller is who made calls, as the calls have it in common. Like a Dim it may say
// Other.
type Caller struct {
	Integration string
	Owner       string
	TenantID    string
	AppID       string // claimed only, unless Verified; so are TenantID and UserRef
	UserRef     string
	Kind        string
	Verified    bool

	Calls       int64
	First, Last time.Time // when the earliest and the latest of the calls began, UTC
}

// Token is a token that calls bore, as these calls have it in common.
type Token struct {
	UTI         string // that joins Entra's sign-in log
	AppID       string // claimed only, unless Verified; so is UserRef
	UserRef     string
	Integration string
	Verified    bool
	MFA         string
	IssuedAt    int64 // seconds since 1970; 0 is not known
}

func (r *sqliteReader) Callers(ctx context.Context, since, until time.Time) ([]Caller, error) {
	sums, err := r.Sums(ctx, since, until)
	if err != nil {
		return nil, err
	}
	return callersOf(sums), nil
}

func callersOf(sums []Sum) []Caller {
	at := map[Caller]int{}
	var callers []Caller
	for _, s := range sums {
		c := Caller{Integration: s.Integration, Owner: s.Owner, TenantID: s.TenantID, AppID: s.AppID, UserRef: s.UserRef, Kind: s.Kind, Verified: s.Verified}
		i, ok := at[c]
		if !ok {
			i = len(callers)
			at[c] = i
			c.First, c.Last = s.First, s.Last
			callers = append(callers, c)
		}
		callers[i].Calls += s.Calls
		callers[i].First, callers[i].Last = earlier(callers[i].First, s.First), later(callers[i].Last, s.Last)
	}
	return callers
}

// tokenPage is how many tokens are read at once: see page.
const tokenPage = 5000

func (r *sqliteReader) Tokens(ctx context.Context, since, until time.Time, yield func(Token) error) error {
	low, high := hourRange(since, until)
	next, end := firstToken(low), firstToken(min(high, 1<<36)+1) // their numbers end there
	callers := map[int64]Dim{}
	for {
		tokens, last, err := r.tokens(ctx, next, end, callers)
		if err != nil {
			return r.fail(err)
		}
		for _, t := range tokens {
			if err := yield(t); err != nil {
				return err
			}
		}
		if len(tokens) < tokenPage {
			return nil
		}
		next = last + 1
	}
}

// tokens reads a page of the tokens from next up to end, and returns the number of the
// last one. callers are the dims that were read before.
func (r *sqliteReader) tokens(ctx context.Context, next, end int64, callers map[int64]Dim) (tokens []Token, last int64, err error) {
	tx, err := r.db.BeginTx(ctx, nil)
	if err != nil {
		return nil, 0, err
	}
	defer tx.Rollback()
	rows, err := tx.QueryContext(ctx, "SELECT token, caller, uti, iat FROM tokens WHERE token >= ? AND token < ? AND uti IS NOT NULL ORDER BY token LIMIT ?", next, end, tokenPage)
	if err != nil {
		return nil, 0, err
	}
	defer rows.Close()
	var of []int64 // dims, as tokens
	missing := map[int64]Dim{}
	for rows.Next() {
		var t Token
		var caller int64
		if err := rows.Scan(&last, &caller, utiText{&t.UTI}, number(&t.IssuedAt)); err != nil {
			return nil, 0, err
		}
		if _, ok := callers[caller]; !ok {
			missing[caller] = Dim{}
		}
		tokens, of = append(tokens, t), append(of, caller)
	}
	if err := rows.Err(); err != nil {
		return nil, 0, err
	}
	if len(missing) > 0 {
		if err := readDims(ctx, tx, missing); err != nil {
			return nil, 0, err
		}
		maps.Copy(callers, missing)
	}
	for i := range tokens {
		t, d := &tokens[i], callers[of[i]]
		t.AppID, t.UserRef, t.Integration, t.Verified, t.MFA = d.AppID, d.UserRef, d.Integration, d.Verified, d.MFA
	}
	return tokens, last, nil
}
