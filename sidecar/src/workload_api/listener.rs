//! The socket: who may connect, and how many at a time.
//!
//! The kernel says which user is behind a connection. Root, the sidecar's own user and the configured ones are admitted;
//! everybody else gets an answer too (PermissionDenied, as the specification asks), out of a few places of their own.

use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::Stream;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tombolo_runtime::dirs::{self, DirsError};
use tonic::transport::server::Connected;

use super::WorkloadApiConfig;

/// Processes of one workload, each with a connection or two.
const MAX_CONNECTIONS: usize = 64;
/// Of users who may not ask: enough to be told so.
const MAX_STRANGERS: usize = 8;
/// After accept fails for want of descriptors: time for others to close some.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Why the socket can't be had.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    #[error("--workload-api {path}: longer than {most} bytes, more than a Unix socket can have: choose a shorter one", path = path.display(), most = dirs::MAX_SOCKET_PATH_BYTES)]
    TooLong { path: PathBuf },
    #[error("--workload-api {path}: {source}; whoever can write there could pose as the Workload API", path = path.display())]
    Directory { path: PathBuf, source: DirsError },
    #[error("--workload-api {path}: something that is no socket is there: remove it, or choose another path", path = path.display())]
    NoSocket { path: PathBuf },
    #[error("--workload-api {path}: another process answers there: end it, or choose another path", path = path.display())]
    InUse { path: PathBuf },
    #[error("--workload-api {path}: {source}: choose a path that this user may write", path = path.display())]
    Io { path: PathBuf, source: io::Error },
}

/// Which users may ask.
#[derive(Clone, Debug)]
pub struct Policy(Arc<[u32]>);

impl Policy {
    /// `own`: the sidecar's user.
    pub fn new(own: u32, uids: &[u32]) -> Self {
        Self([0, own].iter().chain(uids).copied().collect())
    }
    pub fn admits(&self, uid: u32) -> bool {
        self.0.contains(&uid)
    }
}

/// A bound socket.
#[derive(Debug)]
pub struct Listener {
    listener: UnixListener,
    path: PathBuf,
    policy: Policy,
}

impl Listener {
    pub(super) async fn bind(config: &WorkloadApiConfig) -> Result<Self, BindError> {
        let WorkloadApiConfig { path, uids } = config;
        let failed = |source| BindError::Io { path: path.clone(), source };
        dirs::check_socket_path(path).map_err(|_| BindError::TooLong { path: path.clone() })?;
        if let Some(parent) = path.parent() {
            directory(path, parent, !uids.is_empty())?;
        }
        // One that nobody answers on is left over from a process that was killed.
        match std::fs::symlink_metadata(path) {
            Ok(found) if !found.file_type().is_socket() => {
                return Err(BindError::NoSocket { path: path.clone() });
            }
            Ok(_) if UnixStream::connect(path).await.is_ok() => {
                return Err(BindError::InUse { path: path.clone() });
            }
            Ok(_) => std::fs::remove_file(path).map_err(failed)?,
            Err(_) => {}
        }
        let listener = UnixListener::bind(path).map_err(failed)?;
        // Where other users may ask, all may connect: who they are is asked for every call.
        let mode = if uids.is_empty() { 0o600 } else { 0o666 };
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).map_err(failed)?;
        let policy = Policy::new(nix::unistd::geteuid().as_raw(), uids);
        Ok(Self { listener, path: path.clone(), policy })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }
    pub(super) fn policy(&self) -> Policy {
        self.policy.clone()
    }

    /// Connections, as many at a time as may be.
    pub(super) fn incoming(self) -> impl Stream<Item = io::Result<Connection>> {
        let places = (Arc::new(Semaphore::new(MAX_CONNECTIONS)), Arc::new(Semaphore::new(MAX_STRANGERS)));
        futures::stream::unfold((self, places), |(this, places)| async move {
            let connection = this.accept(&places.0, &places.1).await;
            Some((Ok(connection), (this, places)))
        })
    }

    async fn accept(&self, places: &Arc<Semaphore>, strangers: &Arc<Semaphore>) -> Connection {
        loop {
            let stream = match self.listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "the Workload API's socket: accept failed");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let uid = stream.peer_cred().ok().map(|cred| cred.uid());
            let admitted = uid.is_some_and(|uid| self.policy.admits(uid));
            let places = if admitted { places } else { strangers };
            // Without a place it is closed: its library tries again.
            match Arc::clone(places).try_acquire_owned() {
                Ok(place) => return Connection { stream, uid, _place: place },
                Err(_) => tracing::warn!(?uid, "too many connections to the Workload API: one is closed"),
            }
        }
    }
}

/// Makes the socket's directory, or checks that nobody else could put a socket of theirs into it.
fn directory(path: &Path, parent: &Path, for_others: bool) -> Result<(), BindError> {
    let made = !parent.exists();
    dirs::ensure_private(parent).map_err(|source| BindError::Directory { path: path.to_owned(), source })?;
    if made && for_others {
        let passable = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(parent, passable)
            .map_err(|source| BindError::Io { path: path.to_owned(), source })?;
    }
    Ok(())
}

/// The user behind a call; in every request's extensions.
#[derive(Clone, Copy, Debug)]
pub struct Peer {
    pub uid: Option<u32>,
}

/// A connection, which gives its place back when dropped.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    uid: Option<u32>,
    _place: OwnedSemaphorePermit,
}

impl Connected for Connection {
    type ConnectInfo = Peer;
    fn connect_info(&self) -> Peer {
        Peer { uid: self.uid }
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, data)
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
