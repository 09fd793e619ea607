// Spire-downstream has a SPIRE server sign a certificate request as a downstream CA, as a nested SPIRE server does: over
// mTLS with the SVID of a -downstream entry, which the agent gives it. It writes what came back as PEM.
package main

import (
	"bytes"
	"context"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"os"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
)

func main() {
	socket := flag.String("socket", "", "the agent's Workload API, as unix:///path")
	server := flag.String("server", "", "host:port of the server")
	identity := flag.String("id", "", "SPIFFE ID of the -downstream entry")
	csr := flag.String("csr", "", "certificate request, PEM")
	chain := flag.String("chain", "", "file to write the signed certificate and those above it to")
	roots := flag.String("roots", "", "file to write the server's roots to")
	flag.Parse()
	if err := run(*socket, *server, *identity, *csr, *chain, *roots); err != nil {
		fmt.Fprintln(os.Stderr, "spire-downstream:", err)
		os.Exit(1)
	}
}

func run(socket, server, identity, csrFile, chainFile, rootsFile string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	id, err := spiffeid.FromString(identity)
	if err != nil {
		return err
	}
	text, err := os.ReadFile(csrFile)
	if err != nil {
		return err
	}
	block, _ := pem.Decode(text)
	if block == nil {
		return errors.New("no PEM in " + csrFile)
	}
	pick := func(svids []*x509svid.SVID) *x509svid.SVID {
		for _, svid := range svids {
			if svid.ID == id {
				return svid
			}
		}
		return svids[0]
	}
	source, err := workloadapi.NewX509Source(ctx,
		workloadapi.WithClientOptions(workloadapi.WithAddr(socket)), workloadapi.WithDefaultX509SVIDPicker(pick))
	if err != nil {
		return err
	}
	defer source.Close()
	peer, err := spiffeid.FromPath(id.TrustDomain(), "/spire/server")
	if err != nil {
		return err
	}
	tls := tlsconfig.MTLSClientConfig(source, source, tlsconfig.AuthorizeID(peer))
	conn, err := grpc.NewClient(server, grpc.WithTransportCredentials(credentials.NewTLS(tls)))
	if err != nil {
		return err
	}
	defer conn.Close()
	request := &svidv1.NewDownstreamX509CARequest{Csr: block.Bytes}
	signed, err := svidv1.NewSVIDClient(conn).NewDownstreamX509CA(ctx, request)
	if err != nil {
		return err
	}
	if err := write(chainFile, signed.CaCertChain); err != nil {
		return err
	}
	return write(rootsFile, signed.X509Authorities)
}

func write(file string, certificates [][]byte) error {
	var text bytes.Buffer
	for _, der := range certificates {
		if err := pem.Encode(&text, &pem.Block{Type: "CERTIFICATE", Bytes: der}); err != nil {
			return err
		}
	}
	return os.WriteFile(file, text.Bytes(), 0o644)
}
