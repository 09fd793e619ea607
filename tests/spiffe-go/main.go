// Spiffe-probe is an application as SPIFFE users write it, on go-spiffe alone: the scenario tests run it against the
// sockets of real sidecars. Each command prints one JSON object per line and exits with 1 when something fails.
package main

import (
	"bufio"
	"context"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/federation"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// patience bounds every command that ends by itself.
const patience = 20 * time.Second

type options struct {
	socket, address, peer, audience, token string
	url, domain, roots                     string
}

type command func(context.Context, options) error

var commands = map[string]command{
	"serve": serve, "call": call, "watch": watch, "jwt": jwt, "validate": validate, "codes": codes, "bundle": bundle,
}

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "spiffe-probe:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) == 0 || commands[args[0]] == nil {
		return errors.New("usage: spiffe-probe serve|call|watch|jwt|validate|codes|bundle [flags]")
	}
	var o options
	flags := flag.NewFlagSet(args[0], flag.ContinueOnError)
	flags.StringVar(&o.socket, "socket", "", "the Workload API, as unix:///path")
	flags.StringVar(&o.address, "address", "", "host:port to listen on or to call")
	flags.StringVar(&o.peer, "peer", "", "SPIFFE ID that the peer must have")
	flags.StringVar(&o.audience, "audience", "", "of a token")
	flags.StringVar(&o.token, "token", "", "a JWT-SVID to judge")
	flags.StringVar(&o.url, "url", "", "of a bundle endpoint")
	flags.StringVar(&o.domain, "domain", "", "trust domain of a bundle")
	flags.StringVar(&o.roots, "roots", "", "PEM file with what a bundle endpoint is judged by")
	if err := flags.Parse(args[1:]); err != nil {
		return err
	}
	ctx := context.Background()
	if args[0] != "serve" && args[0] != "watch" {
		limited, cancel := context.WithTimeout(ctx, patience)
		defer cancel()
		ctx = limited
	}
	return commands[args[0]](ctx, o)
}

func say(line map[string]any) error {
	return json.NewEncoder(os.Stdout).Encode(line)
}

func client(o options) workloadapi.SourceOption {
	return workloadapi.WithClientOptions(workloadapi.WithAddr(o.socket))
}

// serve answers each connection of the allowed peer with the peer's SPIFFE ID.
func serve(ctx context.Context, o options) error {
	source, err := workloadapi.NewX509Source(ctx, client(o))
	if err != nil {
		return err
	}
	defer source.Close()
	peer, err := spiffeid.FromString(o.peer)
	if err != nil {
		return err
	}
	mode := spiffetls.MTLSServerWithSource(tlsconfig.AuthorizeID(peer), source)
	listener, err := spiffetls.ListenWithMode(ctx, "tcp", o.address, mode)
	if err != nil {
		return err
	}
	if err := say(map[string]any{"listening": listener.Addr().String()}); err != nil {
		return err
	}
	for {
		conn, err := listener.Accept()
		if err != nil {
			return err
		}
		go greet(conn)
	}
}

func greet(conn net.Conn) {
	defer conn.Close()
	if _, err := bufio.NewReader(conn).ReadString('\n'); err != nil {
		return
	}
	id, err := spiffetls.PeerIDFromConn(conn)
	if err != nil {
		return
	}
	fmt.Fprintln(conn, id)
}

// call dials the peer, and prints what it says: who it takes us for.
func call(ctx context.Context, o options) error {
	source, err := workloadapi.NewX509Source(ctx, client(o))
	if err != nil {
		return err
	}
	defer source.Close()
	peer, err := spiffeid.FromString(o.peer)
	if err != nil {
		return err
	}
	mode := spiffetls.MTLSClientWithSource(tlsconfig.AuthorizeID(peer), source)
	conn, err := spiffetls.DialWithMode(ctx, "tcp", o.address, mode)
	if err != nil {
		return err
	}
	defer conn.Close()
	fmt.Fprintln(conn, "hello")
	answer, err := bufio.NewReader(conn).ReadString('\n')
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	if len(answer) == 0 {
		return errors.New("the peer said nothing")
	}
	return say(map[string]any{"takenFor": answer[:len(answer)-1]})
}

// watch prints every X.509 and JWT update as it is pushed.
func watch(ctx context.Context, o options) error {
	return workloadapi.WatchX509Context(ctx, printer{}, workloadapi.WithAddr(o.socket))
}

type printer struct{}

func (printer) OnX509ContextUpdate(update *workloadapi.X509Context) {
	svid := update.DefaultSVID()
	domains := []string{}
	for _, bundle := range update.Bundles.Bundles() {
		domains = append(domains, bundle.TrustDomain().Name())
	}
	leaf := svid.Certificates[0]
	_ = say(map[string]any{
		"id": svid.ID.String(), "serial": hex.EncodeToString(leaf.SerialNumber.Bytes()),
		"chain": len(svid.Certificates), "key": fingerprint(leaf), "domains": domains,
	})
}

func (printer) OnX509ContextWatchError(err error) {
	_ = say(map[string]any{"error": status.Code(err).String(), "text": err.Error()})
}

func fingerprint(leaf *x509.Certificate) string {
	return hex.EncodeToString(leaf.RawSubjectPublicKeyInfo)
}

// jwt fetches a token.
func jwt(ctx context.Context, o options) error {
	source, err := workloadapi.NewJWTSource(ctx, client(o))
	if err != nil {
		return err
	}
	defer source.Close()
	svid, err := source.FetchJWTSVID(ctx, jwtsvid.Params{Audience: o.audience})
	if err != nil {
		return err
	}
	return say(map[string]any{
		"id": svid.ID.String(), "token": svid.Marshal(), "secondsLeft": time.Until(svid.Expiry).Seconds(),
	})
}

// validate judges a token twice: by the bundles that were fetched, and by the Workload API's own word.
func validate(ctx context.Context, o options) error {
	source, err := workloadapi.NewJWTSource(ctx, client(o))
	if err != nil {
		return err
	}
	defer source.Close()
	result := map[string]any{}
	if svid, err := jwtsvid.ParseAndValidate(o.token, source, []string{o.audience}); err != nil {
		result["bundlesError"] = err.Error()
	} else {
		result["bundles"] = svid.ID.String()
	}
	judged, err := workloadapi.ValidateJWTSVID(ctx, o.token, o.audience, workloadapi.WithAddr(o.socket))
	if err != nil {
		result["apiError"] = status.Code(err).String()
	} else {
		result["api"] = judged.ID.String()
	}
	return say(result)
}

// codes asks in ways that are wrong, and prints the code of each refusal.
func codes(ctx context.Context, o options) error {
	conn, err := grpc.NewClient(o.socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer conn.Close()
	api := workload.NewSpiffeWorkloadAPIClient(conn)
	with := metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "true")
	first := func(ctx context.Context) error {
		stream, err := api.FetchX509SVID(ctx, &workload.X509SVIDRequest{})
		if err == nil {
			_, err = stream.Recv()
		}
		return err
	}
	token := func(request *workload.JWTSVIDRequest) error {
		_, err := api.FetchJWTSVID(with, request)
		return err
	}
	_, invalid := api.ValidateJWTSVID(with, &workload.ValidateJWTSVIDRequest{Audience: "a", Svid: "nonsense"})
	stream, wit := api.FetchWITSVID(with, &workload.WITSVIDRequest{})
	if wit == nil {
		_, wit = stream.Recv()
	}
	other := "spiffe://acme.example/cluster/east/ns/shop/sa/other"
	return say(map[string]any{
		"good":           status.Code(first(with)).String(),
		"noMetadata":     status.Code(first(ctx)).String(),
		"otherMetadata":  status.Code(first(metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "yes"))).String(),
		"token":          status.Code(token(&workload.JWTSVIDRequest{Audience: []string{"a"}})).String(),
		"noAudience":     status.Code(token(&workload.JWTSVIDRequest{})).String(),
		"otherID":        status.Code(token(&workload.JWTSVIDRequest{Audience: []string{"a"}, SpiffeId: other})).String(),
		"invalidToken":   status.Code(invalid).String(),
		"witUnsupported": status.Code(wit).String(),
	})
}

// bundle fetches a bundle: by profile https_spiffe when a peer is named, else by https_web.
func bundle(ctx context.Context, o options) error {
	domain, err := spiffeid.TrustDomainFromString(o.domain)
	if err != nil {
		return err
	}
	var how federation.FetchOption
	if o.peer != "" {
		roots, err := x509bundle.Load(domain, o.roots)
		if err != nil {
			return err
		}
		peer, err := spiffeid.FromString(o.peer)
		if err != nil {
			return err
		}
		how = federation.WithSPIFFEAuth(roots, peer)
	} else {
		pem, err := os.ReadFile(o.roots)
		if err != nil {
			return err
		}
		pool := x509.NewCertPool()
		if !pool.AppendCertsFromPEM(pem) {
			return errors.New("no roots in " + o.roots)
		}
		how = federation.WithWebPKIRoots(pool)
	}
	fetched, err := federation.FetchBundle(ctx, domain, o.url, how)
	if err != nil {
		return err
	}
	sequence, _ := fetched.SequenceNumber()
	hint, _ := fetched.RefreshHint()
	return say(map[string]any{
		"x509": len(fetched.X509Authorities()), "jwt": len(fetched.JWTAuthorities()),
		"sequence": sequence, "hintSeconds": hint.Seconds(),
	})
}
