//! HTTPS for the API server: so many connections, each request of bounded size and time.
//!
//! Whoever reaches the port may ask: an answer holds nothing that a pod may not know, and a request changes nothing here.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwapOption;
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use k8s_openapi::api::core::v1::Namespace;
use kube::core::PartialObjectMeta;
use kube::{Api, Client};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;
use tombolo_proto::v1;
use tombolo_runtime::tasks::TaskGroup;

use super::metrics::Metrics;
use super::pod::Given;
use super::review::{self, Asked, Decision, Unread, decide};
use super::settings::InjectSettings;
use super::wishes::NamespaceLabels;
use crate::core::{Core, CoreHandle, Moment};
use crate::token_review::audience;

const PATH: &str = "/inject";
/// API servers keep a few connections each, some 10 of the largest clusters' a few dozens.
const MAX_CONNECTIONS: usize = 256;
/// The API server takes no object of more than 3 MB; a request holds one, and what is around it.
const MAX_BODY_BYTES: usize = 4 * 1024 * 1024;
/// Bodies that are held at a time, so that strangers can't fill the memory: read, 4 MB of JSON may be 100. A pod's takes a
/// millisecond.
const AT_ONCE: usize = 2;
/// A body that comes more slowly holds up others.
const BODY: Duration = Duration::from_secs(1);
const HANDSHAKE: Duration = Duration::from_secs(5);
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

/// Until the group ends.
pub(super) async fn accept(
    listener: TcpListener,
    tls: Arc<rustls::ServerConfig>,
    webhook: Arc<Webhook>,
    tasks: TaskGroup,
) {
    let acceptor = TlsAcceptor::from(tls);
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let bodies = Arc::new(Semaphore::new(AT_ONCE));
    loop {
        // Never closed; further connections wait in the kernel.
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, from)) => {
                let (acceptor, webhook, bodies) =
                    (acceptor.clone(), Arc::clone(&webhook), Arc::clone(&bodies));
                tasks.spawn("injection webhook connection", async move {
                    let _place = place;
                    if let Err(error) = serve(stream, acceptor, webhook, bodies).await {
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
    bodies: Arc<Semaphore>,
) -> Result<(), String> {
    let _ = stream.set_nodelay(true);
    let handshake = tokio::time::timeout(HANDSHAKE, acceptor.accept(stream));
    let stream = handshake.await.map_err(|e| e.to_string())?.map_err(|e| e.to_string())?;
    let service = service_fn(move |request: Request<Incoming>| {
        let (webhook, bodies) = (Arc::clone(&webhook), Arc::clone(&bodies));
        async move {
            let answered = tokio::time::timeout(LONGEST, webhook.answer(request, &bodies));
            Ok::<_, Infallible>(answered.await.unwrap_or_else(|_| {
                webhook.metrics.reviewed("failed");
                said(StatusCode::SERVICE_UNAVAILABLE, "not answered in time")
            }))
        }
    });
    let served = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(IDLE)
        .serve_connection(TokioIo::new(stream), service);
    served.await.map_err(|e| e.to_string())
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
    async fn answer(&self, request: Request<Incoming>, bodies: &Semaphore) -> Response<Full<Bytes>> {
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
        let Ok(held) = bodies.acquire().await else {
            return bad(StatusCode::SERVICE_UNAVAILABLE, "ending");
        };
        let collected = Limited::new(request.into_body(), MAX_BODY_BYTES).collect();
        let body = match tokio::time::timeout(BODY, collected).await {
            Ok(Ok(body)) => body.to_bytes(),
            Err(_) => return bad(StatusCode::REQUEST_TIMEOUT, "the body did not come within a second"),
            Ok(Err(error)) => {
                let text =
                    format!("the body can't be read, or has more than {MAX_BODY_BYTES} bytes: {error}");
                return bad(StatusCode::PAYLOAD_TOO_LARGE, &text);
            }
        };
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
        drop((body, held));
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
