//! The API's calls (SPIFFE Workload API, sections 5 and 6): who asks is checked first, then each stream says what holds
//! now, and again whenever that has changed.

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::Stream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tombolo_identity::jwt::check_audience;
use tombolo_overlay::Overlay;
use tombolo_overlay::member::Member;
use tombolo_overlay::member::renewal::RenewError;
use tombolo_overlay::member::workload::WorkloadSvid;
use tombolo_proto::spiffe;
use tombolo_proto::spiffe::spiffe_workload_api_server::SpiffeWorkloadApi;
use tombolo_runtime::clock;
use tombolo_runtime::tasks::TaskGroup;
use tonic::{Code, Request, Response, Status};

use super::answers::Known;
use super::listener::{Peer, Policy};
use super::metrics::Metrics;
use super::tokens::Tokens;
use crate::tables::Tables;

/// Three streams for each of the connections that may be open, and calls in between.
const MAX_OPEN: usize = 256;
/// An SVID that has ended, or an identity that the federator refuses, is found out by then.
const LOOK: Duration = Duration::from_secs(2);
const METADATA: &str = "workload.spiffe.io";

/// Judges every call: the metadata that no browser or proxy can be made to send, then the user who asks.
pub(super) fn admit(
    policy: Policy,
    metrics: Metrics,
) -> impl FnMut(Request<()>) -> Result<Request<()>, Status> + Clone {
    move |request| {
        let admitted = check(&request, &policy);
        match admitted {
            Ok(()) => Ok(request),
            Err(status) => metrics.called("any", Err(status)),
        }
    }
}

fn check(request: &Request<()>, policy: &Policy) -> Result<(), Status> {
    if request.metadata().get(METADATA).is_none_or(|value| value != "true") {
        return Err(Status::invalid_argument(format!("the metadata {METADATA}: true is missing")));
    }
    match request.extensions().get::<Peer>().and_then(|peer| peer.uid) {
        Some(uid) if policy.admits(uid) => Ok(()),
        Some(uid) => Err(Status::permission_denied(format!(
            "user {uid} may not ask here: start the sidecar with --workload-api-uid {uid} to let it"
        ))),
        None => Err(Status::permission_denied("the caller's user is not known")),
    }
}

/// Where what is known comes from.
#[derive(Clone)]
pub(super) struct Sources {
    pub member: Member,
    pub overlay: Overlay,
    pub tables: watch::Receiver<Option<Arc<Tables>>>,
    pub issued: watch::Receiver<Option<Arc<WorkloadSvid>>>,
}

impl Sources {
    /// What is known now. Whatever changes after this wakes [`Self::changed`].
    fn known(&mut self) -> Known {
        let tables = self.tables.borrow_and_update().clone();
        let svid = self.issued.borrow_and_update().clone();
        let identity = self.member.svid().load();
        Known {
            own: identity.spiffe_id.clone(),
            bundles: identity.bundles.clone(),
            authorities: tables.as_ref().map(|t| Arc::clone(&t.jwt_authorities)).unwrap_or_default(),
            federated: tables.as_ref().map(|t| Arc::clone(&t.federated)).unwrap_or_default(),
            upstream_roots: tables.as_ref().map(|t| Arc::clone(&t.upstream_roots)).unwrap_or_default(),
            access: tables.map(|tables| Arc::clone(&tables.access)),
            svid,
            refused: self.member.is_refused(),
            unix: clock::unix_seconds(),
        }
    }

    /// False when the sidecar is ending.
    async fn changed(&mut self) -> bool {
        tokio::select! {
            changed = self.tables.changed() => changed.is_ok(),
            changed = self.issued.changed() => changed.is_ok(),
            () = tokio::time::sleep(LOOK) => true,
        }
    }
}

pub(super) struct Service {
    sources: Sources,
    tokens: Mutex<Tokens>,
    places: Arc<Semaphore>,
    metrics: Metrics,
    tasks: TaskGroup,
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// One open call, until it is dropped.
struct Open {
    metrics: Metrics,
    _place: OwnedSemaphorePermit,
}

impl Drop for Open {
    fn drop(&mut self) {
        self.metrics.open.dec();
    }
}

impl Service {
    pub fn new(sources: Sources, metrics: Metrics, tasks: TaskGroup) -> Self {
        let places = Arc::new(Semaphore::new(MAX_OPEN));
        Self { sources, tokens: Mutex::default(), places, metrics, tasks }
    }

    fn open(&self) -> Result<Open, Status> {
        let place = Arc::clone(&self.places).try_acquire_owned();
        let place = place.map_err(|_| {
            Status::resource_exhausted(format!("{MAX_OPEN} calls are open already: close some streams"))
        })?;
        self.metrics.open.inc();
        Ok(Open { metrics: self.metrics.clone(), _place: place })
    }

    /// A stream of what `answer` makes of what is known. One that has nothing to say at first is refused.
    fn stream<T>(
        &self,
        call: &'static str,
        answer: fn(&Known) -> Result<T, Status>,
    ) -> Result<Response<Answers<T>>, Status>
    where
        T: PartialEq + Clone + Send + Sync + 'static,
    {
        let open = self.metrics.called(call, self.open())?;
        let mut sources = self.sources.clone();
        let first = self.metrics.called(call, answer(&sources.known()))?;
        let (sender, receiver) = mpsc::channel(1);
        self.tasks.spawn("workload API stream", async move {
            let _open = open;
            let mut last = first.clone();
            if sender.send(Ok(first)).await.is_err() {
                return;
            }
            loop {
                tokio::select! {
                    going = sources.changed() => if !going { return },
                    () = sender.closed() => return,
                }
                match answer(&sources.known()) {
                    Ok(now) if now == last => {}
                    Ok(now) => {
                        last = now.clone();
                        if sender.send(Ok(now)).await.is_err() {
                            return;
                        }
                    }
                    // What was said holds no more; the library asks again.
                    Err(status) => {
                        let _ = sender.send(Err(status)).await;
                        return;
                    }
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn jwt_svid(&self, request: spiffe::JwtsvidRequest) -> Result<spiffe::JwtsvidResponse, Status> {
        let _open = self.open()?;
        let spiffe::JwtsvidRequest { audience, spiffe_id } = request;
        check_audience(&audience).map_err(|e| Status::invalid_argument(e.to_string()))?;
        let known = self.sources.clone().known();
        known.check_entitled()?;
        if !spiffe_id.is_empty() && spiffe_id != known.own.as_str() {
            let text = format!("{spiffe_id} is not an identity of this workload, which is {}", known.own);
            return Err(Status::permission_denied(text));
        }
        let svid = self.token(audience).await?;
        let svid = spiffe::Jwtsvid { spiffe_id: known.own.to_string(), svid, hint: String::new() };
        Ok(spiffe::JwtsvidResponse { svids: vec![svid] })
    }

    /// A token that was had before, or a new one.
    async fn token(&self, audience: Vec<String>) -> Result<String, Status> {
        if let Some(token) = self.tokens().get(&audience, clock::unix_seconds()) {
            return Ok(token);
        }
        let Sources { member, overlay, .. } = &self.sources;
        let (token, not_after) = member.workload_jwt(overlay, audience.clone()).await.map_err(refusal)?;
        self.tokens().put(audience, token.clone(), not_after, clock::unix_seconds());
        Ok(token)
    }

    fn tokens(&self) -> std::sync::MutexGuard<'_, Tokens> {
        self.tokens.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The federator's refusal is the caller's answer; anything else may work later.
fn refusal(error: RenewError) -> Status {
    match &error {
        RenewError::Refused(status)
            if matches!(status.code(), Code::InvalidArgument | Code::PermissionDenied) =>
        {
            Status::new(status.code(), status.message())
        }
        error => Status::unavailable(error.to_string()),
    }
}

#[tonic::async_trait]
impl SpiffeWorkloadApi for Service {
    type FetchX509SVIDStream = Answers<spiffe::X509svidResponse>;
    type FetchX509BundlesStream = Answers<spiffe::X509BundlesResponse>;
    type FetchJWTBundlesStream = Answers<spiffe::JwtBundlesResponse>;

    async fn fetch_x509svid(
        &self,
        request: Request<spiffe::X509svidRequest>,
    ) -> Result<Response<Self::FetchX509SVIDStream>, Status> {
        let stream = self.stream("fetch_x509_svid", Known::x509_svid)?;
        let uid = request.extensions().get::<Peer>().and_then(|peer| peer.uid);
        tracing::info!(uid, "an application gets its X509-SVID");
        Ok(stream)
    }

    async fn fetch_x509_bundles(
        &self,
        _: Request<spiffe::X509BundlesRequest>,
    ) -> Result<Response<Self::FetchX509BundlesStream>, Status> {
        self.stream("fetch_x509_bundles", Known::x509_bundles)
    }

    async fn fetch_jwtsvid(
        &self,
        request: Request<spiffe::JwtsvidRequest>,
    ) -> Result<Response<spiffe::JwtsvidResponse>, Status> {
        let answer = self.jwt_svid(request.into_inner()).await;
        self.metrics.called("fetch_jwt_svid", answer).map(Response::new)
    }

    async fn fetch_jwt_bundles(
        &self,
        _: Request<spiffe::JwtBundlesRequest>,
    ) -> Result<Response<Self::FetchJWTBundlesStream>, Status> {
        self.stream("fetch_jwt_bundles", Known::jwt_bundles)
    }

    async fn validate_jwtsvid(
        &self,
        request: Request<spiffe::ValidateJwtsvidRequest>,
    ) -> Result<Response<spiffe::ValidateJwtsvidResponse>, Status> {
        let spiffe::ValidateJwtsvidRequest { audience, svid } = request.into_inner();
        let judged = self.open().and_then(|_open| {
            self.sources.clone().known().validate(&svid, &audience, clock::since_unix_epoch())
        });
        self.metrics.called("validate_jwt_svid", judged).map(Response::new)
    }
}
