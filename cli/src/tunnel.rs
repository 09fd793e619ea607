//! The way to a federator's admin socket inside Kubernetes: `tombolo admin-pipe` is run in its pod by `exec`, and carries the
//! bytes of one connection. Whoever may exec there may do anything to the federator anyway, and nothing listens for it.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use kube::api::{AttachParams, AttachedProcess, ListParams};
use kube::{Api, Client};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};

use crate::args::Connect;
use crate::failure::Failure;
use crate::kube_client;

/// Of the federator's pods, as the chart labels them.
pub const FEDERATORS: &str = "app.kubernetes.io/name=tombolo,app.kubernetes.io/component=federator";
const CONTAINER: &str = "federator";
/// A window of HTTP/2.
const BUFFER: usize = 64 * 1024;
/// What the program said before it ended.
const MAX_SAID: usize = 4096;
/// It ends at once when it can't reach the socket.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// Which federator is meant.
#[derive(Clone)]
pub struct Tunnel {
    client: Client,
    namespace: String,
    pod: String,
}

impl Tunnel {
    /// Finds a federator that is ready.
    pub async fn find(connect: &Connect) -> Result<Self, Failure> {
        let client = kube_client::connect(connect).await?;
        let namespace = connect.kube_namespace.clone();
        let pods: Api<Pod> = Api::namespaced(client.clone(), &namespace);
        let federators = ListParams::default().labels(FEDERATORS);
        let found = tokio::time::timeout(connect.timeout, pods.list(&federators));
        let found = found.await.map_err(|_| {
            Failure::timed_out(format_args!("the API server has not answered within {:?}", connect.timeout))
        })?;
        let found = found.map_err(|e| kube_client::failed("the federator's pod can't be looked for", &e))?;
        let ready = |pod: &&Pod| {
            let conditions = pod.status.as_ref().and_then(|status| status.conditions.as_ref());
            let ready = conditions.into_iter().flatten().any(|c| c.type_ == "Ready" && c.status == "True");
            ready && pod.metadata.deletion_timestamp.is_none()
        };
        let Some(pod) = found.items.iter().find(ready).and_then(|pod| pod.metadata.name.clone()) else {
            let what = match found.items.len() {
                0 => format!("there is no federator in namespace {namespace}"),
                _ => format!("the federator in namespace {namespace} is not ready"),
            };
            return Err(Failure::new(what).remedy(format_args!(
                "see `kubectl -n {namespace} get pods`; name another namespace with --kube-namespace, or install with `tombolo install`"
            )));
        };
        Ok(Self { client, namespace, pod })
    }

    /// For messages.
    pub fn place(&self) -> String {
        format!("pod {}/{}", self.namespace, self.pod)
    }

    /// One connection.
    pub async fn open(&self) -> io::Result<Pipe> {
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), &self.namespace);
        let params = AttachParams::default()
            .container(CONTAINER)
            .stdin(true)
            .stdout(true)
            .stderr(true)
            .tty(false)
            .max_stdin_buf_size(BUFFER)
            .max_stdout_buf_size(BUFFER);
        let started = pods.exec(&self.pod, ["tombolo", "admin-pipe"], &params).await;
        let mut process = started.map_err(|e| io::Error::other(crate::failure::chain(&e)))?;
        let (Some(input), Some(output), Some(said)) = (process.stdin(), process.stdout(), process.stderr())
        else {
            return Err(io::Error::other("the API server opened no streams"));
        };
        Ok(Pipe {
            input: Box::pin(input),
            output: Box::pin(output),
            said: Some(Box::pin(last_words(said))),
            ended: false,
            _process: process,
        })
    }
}

async fn last_words(said: impl AsyncRead + Unpin) -> String {
    let mut words = Vec::new();
    let mut said = said.take(MAX_SAID as u64);
    let _ = tokio::time::timeout(LAST_WORDS, said.read_to_end(&mut words)).await;
    String::from_utf8_lossy(&words).trim().to_owned()
}

type Words = Pin<Box<dyn Future<Output = String> + Send>>;

/// The bytes of one connection. When the program ends, reading fails with what it said.
pub struct Pipe {
    input: Pin<Box<dyn AsyncWrite + Send>>,
    output: Pin<Box<dyn AsyncRead + Send>>,
    said: Option<Words>,
    ended: bool,
    _process: AttachedProcess,
}

impl AsyncRead for Pipe {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        if !self.ended {
            match self.output.as_mut().poll_read(cx, buf) {
                Poll::Ready(Ok(())) if buf.filled().len() == before && buf.remaining() > 0 => {
                    self.ended = true
                }
                other => return other,
            }
        }
        let Some(said) = &mut self.said else { return Poll::Ready(Ok(())) };
        let words = std::task::ready!(said.as_mut().poll(cx));
        self.said = None;
        Poll::Ready(if words.is_empty() { Ok(()) } else { Err(io::Error::other(words)) })
    }
}

impl AsyncWrite for Pipe {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.input.as_mut().poll_write(cx, buf)
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.input.as_mut().poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.input.as_mut().poll_shutdown(cx)
    }
}
