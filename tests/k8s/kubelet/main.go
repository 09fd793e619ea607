// Kubelet is the part of a kubelet that kubectl talks to through the API server: exec, port-forward, attach, logs. Whatever it runs, it
// runs by a program that enters the container; it starts, watches and reports nothing.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/creack/pty"
	"k8s.io/cri-streaming/pkg/streaming/portforward"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
	utilexec "k8s.io/utils/exec"
)

// How long streams may take to be made, and may then be silent: a kubelet's own.
const (
	creation = 30 * time.Second
	idle     = 4 * time.Hour
)

func main() {
	listen := flag.String("listen", "", "host:port")
	cert := flag.String("cert", "", "certificate file")
	key := flag.String("key", "", "key file")
	dir := flag.String("dir", "", "directory of the node's pods")
	enter := flag.String("enter", "", "program that runs a command in a container")
	flag.Parse()
	node := &node{dir: *dir, enter: *enter}
	routes := http.NewServeMux()
	routes.HandleFunc("/exec/{namespace}/{pod}/{container}", node.exec)
	routes.HandleFunc("/attach/{namespace}/{pod}/{container}", node.attach)
	routes.HandleFunc("/portForward/{namespace}/{pod}", node.portForward)
	routes.HandleFunc("GET /containerLogs/{namespace}/{pod}/{container}", node.logs)
	log.Fatal(http.ListenAndServeTLS(*listen, *cert, *key, routes))
}

type node struct {
	dir   string
	enter string
}

// command enters a container; an empty one is the pod's network alone.
func (n *node) command(ctx context.Context, pod, container string, args []string) *exec.Cmd {
	whole := append([]string{"enter", "--dir", n.dir, "--pod", pod, "--container", container, "--"}, args...)
	cmd := exec.CommandContext(ctx, n.enter, whole...)
	// What it started may hold its pipes.
	cmd.WaitDelay = time.Second
	return cmd
}

func (n *node) exec(w http.ResponseWriter, req *http.Request) {
	options, err := remotecommand.NewOptions(req)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	pod := req.PathValue("namespace") + "/" + req.PathValue("pod")
	remotecommand.ServeExec(w, req, n, pod, "", req.PathValue("container"), req.Form["command"], options, idle, creation,
		remotecommand.SupportedStreamingProtocols)
}

// ExecInContainer implements remotecommand.Executor.
func (n *node) ExecInContainer(ctx context.Context, pod, _, container string, args []string, in io.Reader, out, errOut io.WriteCloser,
	tty bool, resize <-chan remotecommand.TerminalSize, _ time.Duration) error {
	cmd := n.command(ctx, pod, container, args)
	if tty {
		return inTerminal(cmd, in, out, resize)
	}
	// Not cmd.Stdin: Wait would wait for the end of what the client may never end.
	if in != nil {
		pipe, err := cmd.StdinPipe()
		if err != nil {
			return err
		}
		go func() {
			_, _ = io.Copy(pipe, in)
			_ = pipe.Close()
		}()
	}
	// A nil interface of a concrete type would be written to.
	if out != nil {
		cmd.Stdout = out
	}
	if errOut != nil {
		cmd.Stderr = errOut
	}
	return ended(cmd.Run())
}

func inTerminal(cmd *exec.Cmd, in io.Reader, out io.Writer, resize <-chan remotecommand.TerminalSize) error {
	terminal, err := pty.Start(cmd)
	if err != nil {
		return err
	}
	defer terminal.Close()
	go func() {
		for size := range resize {
			_ = pty.Setsize(terminal, &pty.Winsize{Rows: size.Height, Cols: size.Width})
		}
	}()
	if in != nil {
		go func() { _, _ = io.Copy(terminal, in) }()
	}
	var copied sync.WaitGroup
	if out != nil {
		// It ends with EIO when the last process of the terminal has ended.
		copied.Go(func() { _, _ = io.Copy(out, terminal) })
	}
	err = cmd.Wait()
	copied.Wait()
	return ended(err)
}

func ended(err error) error {
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return &utilexec.CodeExitError{Err: err, Code: exit.ExitCode()}
	}
	return err
}

func (n *node) portForward(w http.ResponseWriter, req *http.Request) {
	options, err := portforward.NewV4Options(req)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	pod := req.PathValue("namespace") + "/" + req.PathValue("pod")
	portforward.ServePortForward(w, req, n, pod, "", options, idle, creation, portforward.SupportedProtocols)
}

// PortForward implements portforward.PortForwarder.
func (n *node) PortForward(ctx context.Context, pod, _ string, port int32, stream io.ReadWriteCloser) error {
	defer stream.Close()
	cmd := n.command(ctx, pod, "", []string{"socat", "-", fmt.Sprintf("TCP4:localhost:%d", port)})
	pipe, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	cmd.Stdout = stream
	go func() {
		_, _ = io.Copy(pipe, stream)
		_ = pipe.Close()
	}()
	return cmd.Run()
}

func (n *node) attach(w http.ResponseWriter, req *http.Request) {
	options, err := remotecommand.NewOptions(req)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	pod := req.PathValue("namespace") + "/" + req.PathValue("pod")
	remotecommand.ServeAttach(w, req, n, pod, "", req.PathValue("container"), options, idle, creation,
		remotecommand.SupportedStreamingProtocols)
}

// AttachContainer implements remotecommand.Attacher, for output alone: from the container's start to its end.
func (n *node) AttachContainer(ctx context.Context, pod, _, container string, _ io.Reader, out, _ io.WriteCloser, _ bool,
	_ <-chan remotecommand.TerminalSize) error {
	if out == nil {
		return nil
	}
	// Both end with names that the API server has admitted.
	base := filepath.Join(n.dir, "running", strings.Replace(pod, "/", "_", 1), container)
	file, err := os.Open(base + ".log")
	if err != nil {
		return err
	}
	defer file.Close()
	for {
		_, ended := os.Stat(base + ".json")
		if _, err := io.Copy(out, file); err != nil {
			return err
		}
		if ended != nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// logs are one file a container, without the runs before the last one apart.
func (n *node) logs(w http.ResponseWriter, req *http.Request) {
	parts := []string{req.PathValue("namespace"), req.PathValue("pod"), req.PathValue("container")}
	if slices.ContainsFunc(parts, func(part string) bool { return part == "" || strings.ContainsAny(part, "/\\") || part == ".." }) {
		http.Error(w, "no such container", http.StatusBadRequest)
		return
	}
	file, err := os.Open(filepath.Join(n.dir, "running", parts[0]+"_"+parts[1], parts[2]+".log"))
	if err != nil {
		http.Error(w, err.Error(), http.StatusNotFound)
		return
	}
	defer file.Close()
	follow := req.FormValue("follow") == "true"
	for {
		if _, err := io.Copy(w, file); err != nil || !follow {
			return
		}
		if flusher, ok := w.(http.Flusher); ok {
			flusher.Flush()
		}
		select {
		case <-req.Context().Done():
			return
		case <-time.After(200 * time.Millisecond):
		}
	}
}
