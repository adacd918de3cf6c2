package main

import (
	"bufio"
	"bytes"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// load sends n calls over the cell's connections, as fast as they are answered,
// and returns how long each took.
func (b *bench) load(c *cell, n int) ([]time.Duration, error) {
	var next atomic.Int64
	var mu sync.Mutex
	var all []time.Duration
	var failure error
	var wait sync.WaitGroup
	for range b.conns {
		wait.Go(func() {
			lat, err := client(c, &next, n)
			mu.Lock()
			defer mu.Unlock()
			all = append(all, lat...)
			if err != nil {
				failure = err
			}
		})
	}
	wait.Wait()
	return all, failure
}

// client is one keep-alive connection. It parses just enough of an answer to know
// where it ends: the generator must cost less than what it measures.
func client(c *cell, next *atomic.Int64, n int) ([]time.Duration, error) {
	conn, err := net.Dial("tcp", c.address)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	r := bufio.NewReaderSize(conn, 16<<10)
	var lat []time.Duration
	for {
		i := int(next.Add(1)) - 1
		if i >= n {
			return lat, nil
		}
		start := time.Now()
		if _, err := conn.Write(c.requests[i%len(c.requests)]); err != nil {
			return lat, err
		}
		if err := answer(r, c.status); err != nil {
			return lat, err
		}
		lat = append(lat, time.Since(start))
	}
}

func answer(r *bufio.Reader, status string) error {
	length := 0
	for first := true; ; first = false {
		line, err := r.ReadSlice('\n')
		if err != nil {
			return err
		}
		if first && string(line[9:12]) != status {
			return fmt.Errorf("answer %q, want %s", bytes.TrimSpace(line), status)
		}
		if len(line) <= 2 {
			break
		}
		if len(line) > 16 && bytes.EqualFold(line[:15], []byte("Content-Length:")) {
			if length, err = strconv.Atoi(string(bytes.TrimSpace(line[15:]))); err != nil {
				return err
			}
		}
	}
	_, err := r.Discard(length)
	return err
}

// upstream answers every request with the same 2 KiB of JSON.
type upstream struct{ url string }

func newUpstream() (*upstream, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	body := `{"totalCount":1,"items":["` + strings.Repeat("x", 2048-28) + `"]}`
	reply := fmt.Appendf(nil, "HTTP/1.1 200 OK\r\nContent-Type: application/json; charset=utf-8\r\nContent-Length: %d\r\n"+
		"MS-RequestId: 6c583d8d-46cd-420c-ae3d-000000000001\r\nMS-CorrelationId: 6c583d8d-46cd-420c-ae3d-000000000002\r\n"+
		"MS-CV: AbCdEf123.0\r\nMS-ServerId: 202010406\r\nDate: Thu, 01 Oct 2026 00:00:00 GMT\r\nisMfaCompliant: true\r\n\r\n%s", len(body), body)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				r := bufio.NewReaderSize(c, 16<<10)
				for {
					for {
						line, err := r.ReadSlice('\n')
						if err != nil {
							return
						}
						if len(line) <= 2 {
							break
						}
					}
					if _, err := c.Write(reply); err != nil {
						return
					}
				}
			}()
		}
	}()
	return &upstream{url: "http://" + l.Addr().String()}, nil
}

var listening = regexp.MustCompile(`"msg":"listening","url":"http://([^"]*)"|^http://(\S+)$`)

// findAddress reads a child's output: where it listens, then nothing of interest.
func findAddress(r io.Reader, found chan<- string) {
	s := bufio.NewReaderSize(r, 64<<10)
	for {
		line, err := s.ReadString('\n')
		if m := listening.FindStringSubmatch(strings.TrimSpace(line)); m != nil {
			found <- m[1] + m[2]
			break
		}
		if err != nil {
			fmt.Fprint(os.Stderr, line)
			found <- ""
			return
		}
	}
	io.Copy(io.Discard, s)
}

// publicKey reads the first key of a key set as PEM.
func publicKey(keysURL string) ([]byte, error) {
	res, err := http.Get(keysURL)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	var set struct {
		Keys []struct{ N, E string }
	}
	if err := json.NewDecoder(res.Body).Decode(&set); err != nil {
		return nil, err
	}
	if len(set.Keys) == 0 {
		return nil, fmt.Errorf("no key at %s", keysURL)
	}
	n, err := base64.RawURLEncoding.DecodeString(set.Keys[0].N)
	if err != nil {
		return nil, err
	}
	e, err := base64.RawURLEncoding.DecodeString(set.Keys[0].E)
	if err != nil {
		return nil, err
	}
	der, err := x509.MarshalPKIXPublicKey(&rsa.PublicKey{N: new(big.Int).SetBytes(n), E: int(new(big.Int).SetBytes(e).Int64())})
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}), nil
}

// cpuTime is the processor time that a process has used (proc_pid_stat(5), fields
// 14 and 15, in ticks of 10 ms).
func cpuTime(pid int) (time.Duration, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, fmt.Errorf("read the CPU time of process %d (this needs Linux): %w", pid, err)
	}
	_, rest, _ := bytes.Cut(b, []byte(") "))
	f := strings.Fields(string(rest))
	user, err1 := strconv.Atoi(f[11])
	system, err2 := strconv.Atoi(f[12])
	if err1 != nil || err2 != nil {
		return 0, fmt.Errorf("read the CPU time of process %d: unexpected format", pid)
	}
	return time.Duration(user+system) * 10 * time.Millisecond, nil
}

// rss is the resident memory of a process in MiB; 0 where it cannot be read.
func rss(pid int) int {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
	f := strings.Fields(string(b))
	if len(f) < 2 {
		return 0
	}
	pages, _ := strconv.Atoi(f[1])
	return pages * os.Getpagesize() >> 20
}
