//! The thread that talks to etcd: with a runtime of its own, so that whoever needs an answer may wait for it without a
//! runtime. It connects, waits for ownership, reads the store, then does what it is asked and keeps the lease.

use std::sync::Arc;
use std::sync::mpsc as answers;
use std::time::Duration;

use etcd_client::{Certificate, Client, ConnectOptions, Error, Identity, TlsOptions};
use futures::StreamExt as _;
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use tokio::sync::{mpsc, oneshot};
use tombolo_runtime::rt;

use super::keys::Layout;
use super::load::{self, Loaded};
use super::owner::{self, Ownership};
use super::{EtcdConfig, OpenError};
use crate::store::StoreError;

/// Each caller waits for its answer: there are no more than threads.
const QUEUE: usize = 64;
const CONNECT: Duration = Duration::from_secs(2);
/// A connection that is silent for so long is dropped, and another member is tried.
const ALIVE: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(2));
const RETRY: Duration = Duration::from_secs(1);

type Job = Box<dyn FnOnce(Client) -> BoxFuture<'static, ()> + Send>;

/// A way to the thread.
pub(super) struct Link {
    jobs: mpsc::Sender<Job>,
    endpoints: String,
}

/// Everything that the thread hands over once.
type Opened = Result<(Arc<Ownership>, Loaded), OpenError>;

impl Link {
    pub(super) async fn open(
        config: EtcdConfig,
        layout: Arc<Layout>,
    ) -> Result<(Self, Arc<Ownership>, Loaded), OpenError> {
        let options = options(&config)?;
        let endpoints = config.endpoints.join(",");
        let (jobs, receiver) = mpsc::channel(QUEUE);
        let (opened, result) = oneshot::channel();
        let work = move || run(config, options, layout, opened, receiver);
        rt::spawn_thread("etcd".to_owned(), work).map_err(OpenError::Thread)?;
        let link = Self { jobs, endpoints };
        let (ownership, loaded) =
            result.await.map_err(|_| link.unreachable("its thread has ended".to_owned()))??;
        Ok((link, ownership, loaded))
    }

    pub(super) fn unreachable(&self, reason: String) -> StoreError {
        StoreError::Unreachable { endpoints: self.endpoints.clone(), reason }
    }

    /// Has `work` done and waits for the answer. Without one in time, what it asked for may still happen.
    pub(super) fn call<R, F, Work>(&self, patience: Duration, work: F) -> Result<R, StoreError>
    where
        R: Send + 'static,
        F: FnOnce(Client) -> Work + Send + 'static,
        Work: Future<Output = Result<R, Error>> + Send + 'static,
    {
        let (answer, result) = answers::sync_channel(1);
        let job: Job = Box::new(move |client| {
            let work = work(client);
            Box::pin(async move {
                // A caller that has given up does not want it any more.
                let _ = answer.try_send(tokio::time::timeout(patience, work).await);
            })
        });
        self.jobs.try_send(job).map_err(|error| self.unreachable(error.to_string()))?;
        match result.recv_timeout(patience * 2) {
            Ok(Ok(Ok(result))) => Ok(result),
            Ok(Ok(Err(error))) => Err(self.unreachable(error.to_string())),
            Ok(Err(_)) | Err(_) => {
                Err(self.unreachable(format!("no answer within {} s", patience.as_secs())))
            }
        }
    }
}

async fn run(
    config: EtcdConfig,
    options: ConnectOptions,
    layout: Arc<Layout>,
    opened: oneshot::Sender<Opened>,
    mut jobs: mpsc::Receiver<Job>,
) {
    let (client, ownership) = match open(&config, options, &layout).await {
        Ok((client, ownership, loaded)) => {
            if opened.send(Ok((Arc::clone(&ownership), loaded))).is_err() {
                ownership.release(client).await;
                return;
            }
            (client, ownership)
        }
        Err(error) => {
            let _ = opened.send(Err(error));
            return;
        }
    };
    let mut running = FuturesUnordered::new();
    let keeping = owner::keep(client.clone(), Arc::clone(&ownership), &layout);
    tokio::pin!(keeping);
    let mut kept = false;
    loop {
        tokio::select! {
            job = jobs.recv() => match job {
                Some(job) => running.push(job(client.clone())),
                None => break,
            },
            Some(()) = running.next() => {}
            () = &mut keeping, if !kept => kept = true,
        }
    }
    ownership.release(client).await;
}

async fn open(
    config: &EtcdConfig,
    options: ConnectOptions,
    layout: &Layout,
) -> Result<(Client, Arc<Ownership>, Loaded), OpenError> {
    let endpoints = config.endpoints.join(",");
    let refused =
        |error: &Error| OpenError::Refused { endpoints: endpoints.clone(), reason: error.to_string() };
    let client = loop {
        match Client::connect(&config.endpoints, Some(options.clone())).await {
            Ok(client) => break client,
            Err(error) if is_final(&error) => return Err(refused(&error)),
            Err(error) => tracing::warn!(%error, %endpoints, "etcd can't be reached; tried again"),
        }
        tokio::time::sleep(RETRY).await;
    };
    let mut said = None;
    loop {
        let attempt = async {
            let ownership = owner::campaign(client.clone(), layout, config).await?;
            let loaded = tokio::select! {
                loaded = load::load(client.clone(), layout, &ownership) => loaded?,
                error = owner::refresh(client.clone(), &ownership) => return Err(error.into()),
            };
            Ok((Arc::new(ownership), loaded))
        };
        match attempt.await {
            Ok((ownership, loaded)) => return Ok((client, ownership, loaded)),
            Err(load::LoadError::Etcd(error)) if is_final(&error) => return Err(refused(&error)),
            Err(load::LoadError::Etcd(error)) => {
                let text = error.to_string();
                if said.as_ref() != Some(&text) {
                    tracing::warn!(error = %text, %endpoints, "etcd can't be used yet; tried again");
                    said = Some(text);
                }
            }
            // Too slow: stands by again.
            Err(load::LoadError::Store(StoreError::NotOwner { .. })) => {}
            Err(load::LoadError::Store(error)) => return Err(error.into()),
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// Whether trying again is of no use: wrong settings.
fn is_final(error: &Error) -> bool {
    use tonic::Code::{InvalidArgument, PermissionDenied, Unauthenticated};
    match error {
        Error::InvalidArgs(_) | Error::InvalidUri(_) | Error::InvalidMetadataValue(_) => true,
        Error::GRpcStatus(status) => {
            matches!(status.code(), InvalidArgument | PermissionDenied | Unauthenticated)
        }
        _ => false,
    }
}

fn options(config: &EtcdConfig) -> Result<ConnectOptions, OpenError> {
    let read = |flag, path: &std::path::PathBuf| {
        std::fs::read(path).map_err(|source| OpenError::File { flag, path: path.clone(), source })
    };
    let mut options = ConnectOptions::new()
        .with_connect_timeout(CONNECT)
        .with_keep_alive(ALIVE.0, ALIVE.1)
        .with_keep_alive_while_idle(true)
        .with_require_leader(true);
    if config.ca.is_some() || config.certificate.is_some() {
        let mut tls = TlsOptions::new();
        if let Some(ca) = &config.ca {
            tls = tls.ca_certificate(Certificate::from_pem(read("--etcd-ca", ca)?));
        }
        if let Some((certificate, key)) = &config.certificate {
            let identity =
                Identity::from_pem(read("--etcd-certificate", certificate)?, read("--etcd-key", key)?);
            tls = tls.identity(identity);
        }
        options = options.with_tls(tls);
    }
    if let Some((user, file)) = &config.user {
        let password = String::from_utf8_lossy(&read("--etcd-password-file", file)?).trim_end().to_owned();
        options = options.with_user(user, password).with_auto_token_refresh(true);
    }
    Ok(options)
}
