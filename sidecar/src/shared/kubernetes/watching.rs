//! Keeps the watches of an API server going, whatever happens to it, and tells what they bring.
//!
//! One task. It makes a client with the credentials as they are now, and again when they are refused; a watch that breaks
//! begins anew by itself, ever more slowly. Watches are silent while nothing changes, so the server is asked for its version
//! once it has failed, until it answers.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::future::BoxFuture;
use futures::stream::{BoxStream, SelectAll};
use kube::api::ListParams;
use kube::core::{ApiResource, DynamicObject, GroupVersionKind};
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Client};
use prometheus_client::metrics::counter::Counter;
use tokio::sync::{mpsc, watch};
use tombolo_kubernetes::pauses::Pauses;

use super::picture::Kind;

/// Without an answer, and without the CRDs, it is tried again.
const AGAIN: Duration = Duration::from_secs(2);
/// Objects of one page of a list: a pod has 10 KB.
const PAGE: u32 = 100;

/// An API server that is known how to be asked.
#[derive(Clone)]
pub struct Session {
    pub client: Client,
    /// Of `ServiceExport`, as this API server serves it: `multicluster.x-k8s.io/v1beta1`.
    pub mcs: String,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Session({})", self.mcs)
    }
}

/// Makes a session with the credentials as they are now, or says why there is none.
pub type Connect = Arc<dyn Fn() -> BoxFuture<'static, Result<Session, String>> + Send + Sync>;

/// What is told.
#[derive(Debug)]
pub(super) enum News {
    /// Of the scope's watch of a kind.
    Event { scope: usize, kind: Kind, event: Box<Event<DynamicObject>> },
    /// The API server can't be watched now.
    Away,
    /// It answers again.
    Back,
}

type Watched = (usize, Kind, Result<Event<DynamicObject>, watcher::Error>);

pub(super) struct WatchTask {
    pub namespaces: Vec<String>,
    pub connect: Connect,
    pub news: mpsc::Sender<News>,
    pub session: watch::Sender<Option<Session>>,
    pub errors: Counter,
}

/// Nobody listens any more.
struct Unheard;

/// Why a session ended.
enum End {
    Unheard,
    Unauthenticated,
}

impl From<Unheard> for End {
    fn from(_: Unheard) -> Self {
        Self::Unheard
    }
}

impl WatchTask {
    /// Until nobody listens any more.
    pub async fn run(self) {
        let mut said = String::new();
        loop {
            match (self.connect)().await {
                Ok(session) => {
                    said.clear();
                    self.session.send_replace(Some(session.clone()));
                    tracing::info!(mcs = session.mcs, "pods and services of Kubernetes are followed");
                    match self.follow(&session).await {
                        Ok(never) => match never {},
                        Err(End::Unheard) => return,
                        Err(End::Unauthenticated) => {
                            tracing::warn!(
                                "the API server does not know this shared sidecar: it is asked anew with the credentials as they are now"
                            );
                        }
                    }
                }
                Err(error) => {
                    self.errors.inc();
                    if error != said {
                        tracing::warn!(
                            error,
                            "Kubernetes can't be used now; tried again every {} s",
                            AGAIN.as_secs()
                        );
                        said = error;
                    }
                }
            }
            if self.tell(News::Away).await.is_err() {
                return;
            }
            tokio::time::sleep(AGAIN).await;
        }
    }

    async fn tell(&self, news: News) -> Result<(), Unheard> {
        self.news.send(news).await.map_err(|_| Unheard)
    }

    async fn follow(&self, session: &Session) -> Result<Infallible, End> {
        let mut watched = self.watches(session);
        // Those that have not brought anything since they failed, or at all.
        let mut failing: Vec<(usize, Kind)> = self.all().collect();
        let mut away = false;
        loop {
            tokio::select! {
                Some((scope, kind, event)) = watched.next() => match event {
                    // It is said before anything was asked.
                    Ok(event @ Event::Init) => self.tell(News::Event { scope, kind, event: event.into() }).await?,
                    Ok(event) => {
                        if self.answers(&mut failing, (scope, kind)) {
                            self.back(&mut away).await?;
                        }
                        self.tell(News::Event { scope, kind, event: event.into() }).await?;
                    }
                    Err(error) => {
                        self.errors.inc();
                        if !failing.contains(&(scope, kind)) {
                            failing.push((scope, kind));
                        }
                        if !std::mem::replace(&mut away, true) {
                            tracing::warn!(kind = kind.as_str(), %error,
                                "the API server can't be watched now; what is known stays, and it is tried again");
                            self.tell(News::Away).await?;
                        }
                        if is_unauthenticated(&error) {
                            return Err(End::Unauthenticated);
                        }
                    }
                },
                () = tokio::time::sleep(AGAIN), if away => {
                    // A watch that goes on where it was says nothing: each is asked for what it is to bring.
                    for of in failing.clone() {
                        let api = self.api(session, of);
                        let one = ListParams::default().limit(1);
                        let asked = tokio::time::timeout(AGAIN, api.list(&one)).await;
                        if matches!(asked, Ok(Ok(_))) && self.answers(&mut failing, of) {
                            self.back(&mut away).await?;
                        }
                    }
                }
            }
        }
    }

    /// Whether it was the last that did not answer.
    fn answers(&self, failing: &mut Vec<(usize, Kind)>, of: (usize, Kind)) -> bool {
        let before = failing.len();
        failing.retain(|known| *known != of);
        before > 0 && failing.is_empty()
    }

    async fn back(&self, away: &mut bool) -> Result<(), Unheard> {
        if std::mem::take(away) {
            tracing::info!("the API server answers again");
        }
        self.tell(News::Back).await
    }

    /// Every watch: of everything, or of each namespace.
    fn all(&self) -> impl Iterator<Item = (usize, Kind)> {
        (0..self.namespaces.len().max(1)).flat_map(|scope| Kind::ALL.map(|kind| (scope, kind)))
    }

    fn api(&self, session: &Session, (scope, kind): (usize, Kind)) -> Api<DynamicObject> {
        let version = session.mcs.rsplit('/').next().unwrap_or_default();
        let group = session.mcs.split('/').next().unwrap_or_default();
        let (group, version, plural) = match kind {
            Kind::Pod => ("", "v1", "pods"),
            Kind::Service => ("", "v1", "services"),
            Kind::EndpointSlice => ("discovery.k8s.io", "v1", "endpointslices"),
            Kind::ServiceExport => (group, version, "serviceexports"),
        };
        let gvk = GroupVersionKind::gvk(group, version, kind.as_str());
        let resource = ApiResource::from_gvk_with_plural(&gvk, plural);
        match self.namespaces.get(scope) {
            Some(namespace) => Api::namespaced_with(session.client.clone(), namespace, &resource),
            None => Api::all_with(session.client.clone(), &resource),
        }
    }

    /// A stream per kind and namespace.
    fn watches(&self, session: &Session) -> SelectAll<BoxStream<'static, Watched>> {
        let stream = |(scope, kind): (usize, Kind)| {
            let api = self.api(session, (scope, kind));
            let config = watcher::Config::default().page_size(PAGE);
            // Those that have ended have given their addresses back.
            let config = match kind {
                Kind::Pod => config.fields("status.phase!=Succeeded,status.phase!=Failed"),
                _ => config,
            };
            let events = watcher(api, config).backoff(Pauses::default());
            events.map(move |event| (scope, kind, event)).boxed()
        };
        self.all().map(stream).collect()
    }
}

fn is_unauthenticated(error: &watcher::Error) -> bool {
    match error {
        watcher::Error::InitialListFailed(kube::Error::Api(status))
        | watcher::Error::WatchStartFailed(kube::Error::Api(status)) => status.code == 401,
        watcher::Error::WatchError(status) => status.code == 401,
        _ => false,
    }
}
