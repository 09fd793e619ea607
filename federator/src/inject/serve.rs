//! HTTPS for the API server: so many connections ([`Places`]), each handshake and request of bounded size and time.
//!
//! Whoever reaches the port may ask: an answer holds nothing that a pod may not know, and a request changes nothing here. Nobody
//! waits for what somebody else sends: connections are accepted at once, bodies are collected side by side, and only large ones
//! take turns.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use k8s_openapi::api::core::v1::Namespace;
use kube::core::PartialObjectMeta;
use kube::{Api, Client};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, SemaphorePermit, oneshot};
use tokio_rustls::TlsAcceptor;
use tombolo_proto::v1;
use tombolo_runtime::tasks::TaskGroup;

use super::metrics::Metrics;
use super::places::{Place, Places};
use super::pod::Given;
use super::review::{self, Asked, Decision, Unread, decide};
use super::settings::InjectSettings;
use super::wishes::NamespaceLabels;
use crate::core::{Core, CoreHandle, Moment};
use crate::token_review::audience;

const PATH: &str = "/inject";
/// The API server takes no object of more than 3 MB; a request holds one, and what is around it.
const MAX_BODY_BYTES: usize = 4 * 1024 * 1024;
/// Pods have a few kilobytes, with what is around them. As many as there are connections are 32 MB.
const SMALL_BODY_BYTES: usize = 128 * 1024;
/// Larger bodies that are held at a time, so that strangers can't fill the memory: read, 4 MB of JSON may be 100. A pod's takes
/// a millisecond.
const LARGE_AT_ONCE: usize = 2;
/// The rest of a large body that comes more slowly holds up others of that size.
const BODY: Duration = Duration::from_secs(1);
/// Two round trips and a signature.
const HANDSHAKE: Duration = Duration::from_secs(3);
/// The API server gives up by itself after the configuration's 5 s.
const LONGEST: Duration = Duration::from_secs(5);
/// Go's clients close an idle connection after 90 s: the server must not be faster, or a request would meet the close.
const IDLE: Duration = Duration::from_secs(120);
/// After accept fails for want of descriptors: time for others to close some.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What answers take.
pub(super) struct Webhook {
    pub core: CoreHandle,
    pub client: Arc<ArcSwapOption<Client>>,
    pub own_namespace: String,
    pub settings: InjectSettings,
    pub metrics: Metrics,
}

/// Everybody's connections.
#[derive(Clone, Debug, Default)]
struct Open(Arc<Mutex<Connections>>);

/// Places, and what ends a connection that has lost its own.
#[derive(Debug, Default)]
struct Connections {
    places: Places,
    ends: BTreeMap<Place, oneshot::Sender<()>>,
}

/// A connection's place; whoever drops it leaves.
#[derive(Debug)]
struct Seat {
    open: Open,
    place: Place,
}

impl Open {
    fn with<T>(&self, work: impl FnOnce(&mut Connections) -> T) -> T {
        work(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// A seat, and what comes when it is wanted by somebody else; `None`: there is none.
    fn take(&self, source: IpAddr, metrics: &Metrics) -> Option<(Seat, oneshot::Receiver<()>)> {
        let (end, ended) = oneshot::channel();
        let taken = self.with(|Connections { places, ends }| {
            let (place, victim) = places.take(source)?;
            if let Some(victim) = victim.and_then(|victim| ends.remove(&victim)) {
                metrics.turned_away("ended");
                let _ = victim.send(());
            }
            ends.insert(place, end);
            Some(place)
        });
        if taken.is_none() {
            metrics.turned_away("refused");
        }
        taken.map(|place| (Seat { open: self.clone(), place }, ended))
    }
}

impl Seat {
    fn answering(&self, answering: bool) {
        self.open.with(|open| open.places.answering(self.place, answering));
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.open.with(|Connections { places, ends }| {
            places.leave(self.place);
            ends.remove(&self.place);
        });
    }
}

/// Until the group ends.
pub(super) async fn accept(
    listener: TcpListener,
    tls: Arc<rustls::ServerConfig>,
    webhook: Arc<Webhook>,
    tasks: TaskGroup,
) {
    let acceptor = TlsAcceptor::from(tls);
    let open = Open::default();
    let large = Arc::new(Semaphore::new(LARGE_AT_ONCE));
    loop {
        match listener.accept().await {
            Ok((stream, from)) => {
                let Some((seat, ended)) = open.take(from.ip(), &webhook.metrics) else { continue };
                let (acceptor, webhook, large) = (acceptor.clone(), Arc::clone(&webhook), Arc::clone(&large));
                tasks.spawn("injection webhook connection", async move {
                    let served = async {
                        tokio::select! {
                            served = serve(stream, acceptor, webhook, large, Arc::new(seat)) => served,
                            _ = ended => Err("others want its place".to_owned()),
                        }
                    };
                    if let Err(error) = served.await {
                        tracing::debug!(%from, error, "a connection to the injection webhook ended badly");
                    }
                });
            }
            Err(error) => {
                tracing::warn!(%error, "injection webhook: accept failed");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn serve(
    stream: TcpStream,
    acceptor: TlsAcceptor,
    webhook: Arc<Webhook>,
    large: Arc<Semaphore>,
    seat: Arc<Seat>,
) -> Result<(), String> {
    let _ = stream.set_nodelay(true);
    let handshake = tokio::time::timeout(HANDSHAKE, acceptor.accept(stream));
    let stream = handshake.await.map_err(|e| e.to_string())?.map_err(|e| e.to_string())?;
    let service = service_fn(move |request: Request<Incoming>| {
        let (webhook, large, seat) = (Arc::clone(&webhook), Arc::clone(&large), Arc::clone(&seat));
        async move {
            let answered = tokio::time::timeout(LONGEST, webhook.answer(request, &large, &seat));
            let answer = answered.await.unwrap_or_else(|_| {
                webhook.metrics.reviewed("failed");
                said(StatusCode::SERVICE_UNAVAILABLE, "not answered in time")
            });
            seat.answering(false);
            Ok::<_, Infallible>(answer)
        }
    });
    let served = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(IDLE)
        .serve_connection(TokioIo::new(stream), service);
    served.await.map_err(|e| e.to_string())
}

/// A body: whole, with its turn if it is a large one, or why not. What it has when it turns out to be large waits with it.
async fn collect<'a>(
    mut body: Incoming,
    large: &'a Semaphore,
) -> Result<(Vec<u8>, Option<SemaphorePermit<'a>>), (StatusCode, String)> {
    let mut bytes = Vec::new();
    let mut turn = None;
    let late = |_| (StatusCode::REQUEST_TIMEOUT, "the body did not come within a second".to_owned());
    let mut deadline = tokio::time::Instant::now() + BODY;
    loop {
        let frame = tokio::time::timeout_at(deadline, body.frame()).await.map_err(late)?;
        let Some(frame) = frame else { return Ok((bytes, turn)) };
        let frame = frame.map_err(|e| (StatusCode::BAD_REQUEST, format!("the body can't be read: {e}")))?;
        let data = frame.data_ref().map(|data| data.as_ref()).unwrap_or_default();
        if bytes.len() + data.len() > MAX_BODY_BYTES {
            let text = format!("the body has more than {MAX_BODY_BYTES} bytes");
            return Err((StatusCode::PAYLOAD_TOO_LARGE, text));
        }
        if turn.is_none() && bytes.len() + data.len() > SMALL_BODY_BYTES {
            turn = large.acquire().await.ok();
            deadline = tokio::time::Instant::now() + BODY;
        }
        bytes.extend_from_slice(data);
    }
}

fn said(status: StatusCode, text: &str) -> Response<Full<Bytes>> {
    respond(status, "text/plain; charset=utf-8", format!("{text}\n"))
}

fn respond(status: StatusCode, kind: &'static str, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(kind));
    response
}

impl Webhook {
    async fn answer(
        &self,
        request: Request<Incoming>,
        large: &Semaphore,
        seat: &Seat,
    ) -> Response<Full<Bytes>> {
        let bad = |status, text: &str| {
            self.metrics.reviewed("bad_request");
            said(status, text)
        };
        if request.uri().path() != PATH {
            return bad(StatusCode::NOT_FOUND, "there is /inject, and nothing else");
        }
        if request.method() != Method::POST {
            return bad(StatusCode::METHOD_NOT_ALLOWED, "POST an AdmissionReview");
        }
        let (body, turn) = match collect(request.into_body(), large).await {
            Ok(body) => body,
            Err((status, text)) => return bad(status, &text),
        };
        // From here on it is a question that is whole: others wait for its answer.
        seat.answering(true);
        let asked = match review::read(&body) {
            Ok(asked) => asked,
            Err(unread) => {
                tracing::debug!(%unread, "an admission request is not about a new pod");
                let Some(answer) = unread.answer() else {
                    return bad(StatusCode::BAD_REQUEST, &unread.to_string());
                };
                let result = if matches!(unread, Unread::Other { .. }) { "other" } else { "bad_request" };
                self.metrics.reviewed(result);
                return respond(StatusCode::OK, "application/json", answer.to_string());
            }
        };
        drop((body, turn));
        match self.review(&asked).await {
            Ok(decision) => {
                self.metrics.reviewed(decision.kind());
                if let Decision::Refused { message } = &decision {
                    tracing::info!(
                        namespace = asked.namespace,
                        pod = name(&asked),
                        message,
                        "a pod is refused"
                    );
                }
                respond(StatusCode::OK, "application/json", decision.answer(&asked.uid).to_string())
            }
            // Not a refusal: what becomes of the pod is what the configuration's failurePolicy says.
            Err(reason) => {
                self.metrics.reviewed("failed");
                tracing::warn!(
                    namespace = asked.namespace,
                    reason,
                    "the API server's question can't be answered now"
                );
                said(StatusCode::SERVICE_UNAVAILABLE, &reason)
            }
        }
    }

    async fn review(&self, asked: &Asked) -> Result<Decision, String> {
        // Whoever gives out identities must not wait for one.
        if asked.namespace == self.own_namespace {
            return Ok(Decision::Unchanged { warnings: Vec::new() });
        }
        let client = self.client.load_full().ok_or("there is no connection to the API server yet")?;
        let namespaces: Api<PartialObjectMeta<Namespace>> = Api::all((*client).clone());
        let namespace = namespaces.get(&asked.namespace).await;
        let namespace = namespace.map_err(|e| format!("namespace {}: {e}", asked.namespace))?;
        let labels = NamespaceLabels::of(&namespace.metadata.labels.unwrap_or_default());
        let request = v1::CreateJoinTokenRequest {
            role: "pod".to_owned(),
            federator_names: vec![self.settings.federator.clone()],
            ..v1::CreateJoinTokenRequest::default()
        };
        let made = self
            .core
            .attempt(move |core: &mut Core, moment: Moment| core.create_join_token(&request, moment));
        let facts = self.core.facts();
        let ranges = &facts.addresses.ranges;
        let given = Given {
            settings: &self.settings,
            join_token: made.await.map_err(|e| e.to_string())?.text,
            audience: audience(&facts.cluster.trust_domain),
            virtual_ranges: std::iter::once(ranges.v4().to_string())
                .chain(ranges.v6().map(|v6| v6.to_string()))
                .collect(),
            ipv6: ranges.v6().is_some(),
        };
        Ok(decide(asked, &labels, &given))
    }
}

fn name(asked: &Asked) -> &str {
    let metadata = asked.pod.get("metadata");
    let field =
        |field: &str| metadata.and_then(|metadata| metadata.get(field)).and_then(serde_json::Value::as_str);
    field("name").or_else(|| field("generateName")).unwrap_or_default()
}
