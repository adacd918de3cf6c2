# partnerguard in a container: one static binary, no shell, no root.
FROM golang:1.26 AS build
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY . .
RUN CGO_ENABLED=0 go build -trimpath -ldflags="-s -w" -o /out/partnerguard ./cmd/partnerguard \
 && mkdir -m 0700 /out/data

FROM scratch
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/
COPY --from=build /out/partnerguard /partnerguard
# 65532 is the customary user of images without an /etc/passwd.
COPY --from=build --chown=65532:65532 /out/data /data
USER 65532:65532
VOLUME /data
ENV PARTNERGUARD_DATA_DIR=/data
# Loopback: right for a sidecar, which shares the network of the script beside it.
# To take calls from other hosts, mount a configuration with a TLS listener and run
# serve -c FILE; a listener in clear text off loopback refuses to start by itself.
ENV PARTNERGUARD_LISTEN=127.0.0.1:8080
ENV PARTNERGUARD_ADMIN=127.0.0.1:9090
EXPOSE 8080
HEALTHCHECK --interval=10s --timeout=6s --start-period=10s CMD ["/partnerguard", "check", "--running"]
ENTRYPOINT ["/partnerguard"]
CMD ["serve"]
