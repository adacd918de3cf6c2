package emulator

import (
	"fmt"
	"hash/fnv"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"
)

// Shape is the form in which a call is refused for lack of MFA. All of them
// have been documented or met; clients and proxies must know them all.
type Shape int

// The shapes of a refusal.
const (
	ShapeCodeString   Shape = iota // 401, Partner Center's error with "code":"900421"
	ShapeCodeNumber                // the same with "code":900421
	ShapeReasonPhrase              // status line "401 Unauthorized - MFA required", empty chunked body
	ShapeSDKText                   // 401, text "Authentication failed. MFA required. (10001)"
	ShapeGraphNested               // 401 and 403 by turns, Graph's error, the code in innerError
	ShapeGraphPascal               // 403, {"Error":{"Code":"Unauthorized_MissingMFA",…}}
	ShapeHTML                      // 401, an HTML page
	ShapeMixed                     // all of them in turn, later also with BOM and, if accepted, gzip
)

var shapeNames = [...]string{"code-string", "code-number", "reason-phrase", "sdk-text", "graph-nested", "graph-pascal", "html", "mixed"}

// String returns the shape's name in the Emulate header.
func (s Shape) String() string {
	if s < 0 || int(s) >= len(shapeNames) {
		return fmt.Sprintf("Shape(%d)", int(s))
	}
	return shapeNames[s]
}

// ParseShape is the inverse of String.
func ParseShape(name string) (Shape, error) {
	for i, n := range shapeNames {
		if n == name {
			return Shape(i), nil
		}
	}
	return -1, fmt.Errorf("unknown shape %q, want one of %s", name, strings.Join(shapeNames[:], ", "))
}

// Shapes returns all shapes but ShapeMixed.
func Shapes() []Shape {
	shapes := make([]Shape, ShapeMixed)
	for i := range shapes {
		shapes[i] = Shape(i)
	}
	return shapes
}

func (p *partner) setShape(s Shape)    { p.shape.Store(int64(s)) }
func (p *partner) currentShape() Shape { return Shape(p.shape.Load()) }

// refusal is the answer to a call without MFA.
func (p *partner) refusal(c *call, shape Shape) response {
	n := int(p.refusals.Add(1) - 1)
	if shape == ShapeMixed {
		res := p.refusalOf(Shape(n%int(ShapeMixed)), n)
		switch n / int(ShapeMixed) % 3 {
		case 1:
			res.bom = true
		case 2:
			if strings.Contains(c.r.Header.Get("Accept-Encoding"), "gzip") {
				res.encode("gzip")
			}
		}
		return res
	}
	return p.refusalOf(shape, n)
}

func (p *partner) refusalOf(shape Shape, n int) response {
	const invalid = `Bearer error="invalid_token"`
	var res response
	switch shape {
	case ShapeCodeNumber:
		res = partnerError(http.StatusUnauthorized, 900421, "The MFA claim is missing in the app+user token.")
	case ShapeReasonPhrase:
		res = newResponse(http.StatusUnauthorized, "", nil)
		res.statusLine = "401 Unauthorized - MFA required"
		res.chunked = true
	case ShapeSDKText:
		res = newResponse(http.StatusUnauthorized, "text/plain; charset=utf-8", []byte("Authentication failed. MFA required. (10001)"))
	case ShapeGraphNested:
		status := http.StatusUnauthorized
		if n%2 == 1 {
			status = http.StatusForbidden
		}
		res = jsonResponse(status, object{{"error", object{
			{"code", "unauthorized"},
			{"message", "You are not authorized to access the resource."},
			{"innerError", object{
				{"code", "unauthorizedMissingMfaTokenClaim"},
				{"message", "The MFA claim was missing in the token."},
				{"target", nil},
				{"details", nil},
				{"date", time.Now().UTC().Format("2006-01-02T15:04:05")},
				{"request-id", uuid.NewString()},
				{"client-request-id", uuid.NewString()},
			}},
		}}})
	case ShapeGraphPascal:
		return jsonResponse(http.StatusForbidden, object{{"Error", object{
			{"Code", "Unauthorized_MissingMFA"},
			{"Message", "MFA is required for this request. The provided authentication token does not have MFA claims."},
		}}})
	case ShapeHTML:
		res = newResponse(http.StatusUnauthorized, "text/html; charset=utf-8", []byte(
			"<!DOCTYPE html>\n<html><head><title>Unauthorized</title></head><body><h2>401 - Unauthorized</h2>"+
				"<p>MFA is required to access this resource.</p></body></html>\n"))
	default:
		res = partnerError(http.StatusUnauthorized, "900421", "The MFA claim is missing in the app+user token.")
	}
	res.header["Www-Authenticate"] = []string{invalid}
	return res
}

// exposure decides which calls without MFA are refused: a share that may grow.
// Each pair of app and user carries its own remainder, so that the share holds
// for each of them and its calls work and fail by turns.
type exposure struct {
	seed uint64

	mu         sync.Mutex
	share      float64
	growth     float64 // per 100 calls
	seen       int     // calls without MFA since set
	apps       map[string]float64
	remainders map[string]float64
}

func newExposure(cfg Config) *exposure {
	return &exposure{
		seed:       cfg.Seed,
		share:      cfg.Exposure,
		growth:     cfg.ExposureGrowth,
		apps:       map[string]float64{},
		remainders: map[string]float64{},
	}
}

func (x *exposure) set(share float64) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.share, x.seen = share, 0
}

func (x *exposure) setApp(appID string, share float64) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.apps[strings.ToLower(appID)] = share
}

func (x *exposure) refuse(appID, objectID string) bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	share, own := x.apps[strings.ToLower(appID)]
	if !own {
		share = min(1, x.share+x.growth*float64(x.seen)/100)
		x.seen++
	}
	principal := appID + " " + objectID
	remainder, ok := x.remainders[principal]
	if !ok {
		h := fnv.New64a()
		fmt.Fprintf(h, "%d %s", x.seed, principal)
		remainder = float64(h.Sum64()>>11) / (1 << 53)
	}
	remainder += share
	refused := remainder >= 1
	if refused {
		remainder--
	}
	x.remainders[principal] = remainder
	return refused
}
