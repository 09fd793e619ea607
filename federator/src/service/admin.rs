//! `Admin`: the operator's API on a Unix socket. Whoever may open the socket must also be the federator's user or root.

use std::net::IpAddr;
use std::path::PathBuf;
use std::pin::Pin;
use std::time::Duration;

use futures::Stream;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tombolo_identity::SvidHandle;
use tombolo_identity::authority::adopt::Upstream;
use tombolo_identity::authority::{AuthorityError, ClusterMaterial};
use tombolo_model::audit::{Action, Event, Requester};
use tombolo_model::names::{ClusterName, NameError};
use tombolo_model::resource::{KindInfo, MAX_OBJECT_BYTES, MAX_OBJECTS, Object, ObjectKey};
use tombolo_proto::v1;
use tombolo_proto::v1::admin_server::Admin;
use tombolo_runtime::tasks::TaskGroup;
use tonic::transport::server::UdsConnectInfo;
use tonic::{Request, Response, Status};

use crate::core::tokens::MadeToken;
use crate::core::{Core, CoreError, CoreHandle, Moment};
use crate::facts::Facts;
use crate::linking;
use crate::service::audit;
use crate::service::join::chain_with_root;
use crate::snapshot::usable_gateways;
use crate::view;

/// Changes that come within this are printed together.
const WATCH_PACE: Duration = Duration::from_millis(100);

pub struct AdminService {
    pub core: CoreHandle,
    pub svid: SvidHandle,
    /// Where linking sends from.
    pub bind: IpAddr,
    /// Where a further intermediate is looked for.
    pub trust_dir: PathBuf,
    pub tasks: TaskGroup,
}

/// Refuses everybody but the federator's own user and root.
pub fn check_operator(request: Request<()>) -> Result<Request<()>, Status> {
    let cred = request.extensions().get::<UdsConnectInfo>().and_then(|info| info.peer_cred);
    let me = nix::unistd::geteuid().as_raw();
    match cred.map(|cred| cred.uid()) {
        Some(uid) if uid == 0 || uid == me => Ok(request),
        Some(uid) => {
            Err(Status::permission_denied(format!("user {uid} is neither the federator's user nor root")))
        }
        None => Err(Status::permission_denied("the caller's user is not known")),
    }
}

impl AdminService {
    /// The newest facts, with what every earlier call has changed.
    async fn newest(&self) -> Result<(Facts, crate::core::Moment), Status> {
        self.core.call(|core, moment| (core.facts.clone(), moment)).await.map_err(|_| CoreError::Gone.into())
    }

    /// A job on behalf of the operator who calls.
    async fn attempt<R, F>(&self, operator: Requester, job: F) -> Result<R, CoreError>
    where
        R: Send + 'static,
        F: FnOnce(&mut Core, Moment) -> Result<R, CoreError> + Send + 'static,
    {
        let job = move |core: &mut Core, moment| core.on_behalf(operator, move |core| job(core, moment));
        self.core.attempt(job).await
    }

    fn token(&self, made: MadeToken, firewall: Vec<String>) -> Response<v1::TokenResponse> {
        let not_after_unix = i64::try_from(made.not_after).unwrap_or(i64::MAX);
        Response::new(v1::TokenResponse { token: made.text, not_after_unix, firewall })
    }
}

/// Who calls, by the socket's peer credentials.
fn operator<T>(request: &Request<T>) -> Requester {
    let cred = request.extensions().get::<UdsConnectInfo>().and_then(|info| info.peer_cred);
    Requester::operator(cred.map(|cred| cred.uid()))
}

fn cluster(text: &str) -> Result<ClusterName, Status> {
    text.parse().map_err(|e: NameError| Status::invalid_argument(e.to_string()))
}

fn kind(text: &str) -> Result<&'static KindInfo, Status> {
    KindInfo::find(text).ok_or_else(|| Status::invalid_argument(format!("{text:?} is not a known kind")))
}

fn query(request: v1::GetRequest) -> Result<view::Query, Status> {
    let v1::GetRequest { kind: name, namespace, name: object, all_namespaces } = request;
    let info = kind(&name)?;
    let all = all_namespaces || !info.namespaced;
    Ok(view::Query {
        kind: info,
        namespace: (!all).then(|| if namespace.is_empty() { "default".to_owned() } else { namespace }),
        name: (!object.is_empty()).then_some(object),
    })
}

fn object(json: &str) -> Result<Object, CoreError> {
    if json.len() > MAX_OBJECT_BYTES {
        return Err(CoreError::Invalid(format!(
            "an object of {} bytes, at most {MAX_OBJECT_BYTES}",
            json.len()
        )));
    }
    let value = serde_json::from_str(json).map_err(|e| CoreError::Invalid(format!("not JSON: {e}")))?;
    Ok(Object::from_json(value)?)
}

fn gateways_text(facts: &Facts) -> String {
    let borders: Vec<_> = usable_gateways(facts).map(|gateway| gateway.border.to_string()).collect();
    borders.join(", ")
}

/// What this side's firewall must let through for a peer's gateways, whose addresses may not be known yet.
fn link_rules(facts: &Facts, peer: &ClusterName) -> Vec<String> {
    let own = gateways_text(facts);
    let known = facts.links.get(peer).map(|link| facts.peer_gateways(link)).unwrap_or_default();
    let theirs: Vec<_> = known.iter().map(|gateway| gateway.address.to_string()).collect();
    let theirs = if theirs.is_empty() { format!("the gateways of {peer}") } else { theirs.join(", ") };
    vec![format!("inbound  UDP  from {theirs}  to {own}"), format!("outbound UDP  from {own}  to {theirs}")]
}

type Objects = Pin<Box<dyn Stream<Item = Result<v1::GetResponse, Status>> + Send>>;

#[tonic::async_trait]
impl Admin for AdminService {
    type WatchStream = Objects;
    type AuditStream = audit::Entries;

    async fn apply(&self, request: Request<v1::ApplyRequest>) -> Result<Response<v1::ApplyResponse>, Status> {
        let operator = operator(&request);
        let v1::ApplyRequest { objects_json, dry_run } = request.into_inner();
        if objects_json.len() > MAX_OBJECTS {
            let text = format!("{} objects at once, at most {MAX_OBJECTS}", objects_json.len());
            return Err(Status::invalid_argument(text));
        }
        // All are read before any is applied: a typing error in the last one changes nothing.
        let objects: Vec<Object> = objects_json.iter().map(|json| object(json)).collect::<Result<_, _>>()?;
        let mut results = Vec::with_capacity(objects.len());
        for object in objects {
            let (key, warning) = (object.key(), object.warnings().join("; "));
            let apply = move |core: &mut Core, moment| core.apply(object, dry_run, moment);
            let outcome = self.attempt(operator.clone(), apply).await?;
            results.push(v1::ApplyResult {
                kind: key.kind.to_owned(),
                namespace: key.namespace,
                name: key.name,
                outcome: outcome.as_str().to_owned(),
                warning,
            });
        }
        Ok(Response::new(v1::ApplyResponse { results }))
    }

    async fn get(&self, request: Request<v1::GetRequest>) -> Result<Response<v1::GetResponse>, Status> {
        let query = query(request.into_inner())?;
        let (facts, moment) = self.newest().await?;
        let objects = view::objects(&facts, &query, moment.monotonic, moment.unix);
        Ok(Response::new(v1::GetResponse { objects_json: objects.iter().map(ToString::to_string).collect() }))
    }

    async fn watch(&self, request: Request<v1::GetRequest>) -> Result<Response<Objects>, Status> {
        let query = query(request.into_inner())?;
        let (sender, receiver) = mpsc::channel(1);
        let core = self.core.clone();
        self.tasks.spawn("operator's watch", async move {
            let mut facts = core.watch();
            let mut last = None;
            loop {
                let current = facts.borrow_and_update().clone();
                let now = core.now();
                let objects = view::objects(&current, &query, now.monotonic, now.unix);
                if last.as_ref() != Some(&objects) {
                    let objects_json = objects.iter().map(ToString::to_string).collect();
                    if sender.send(Ok(v1::GetResponse { objects_json })).await.is_err() {
                        return;
                    }
                    last = Some(objects);
                }
                tokio::select! {
                    changed = facts.changed() => if changed.is_err() { return },
                    () = sender.closed() => return,
                }
                tokio::time::sleep(WATCH_PACE).await;
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn delete(
        &self,
        request: Request<v1::DeleteRequest>,
    ) -> Result<Response<v1::DeleteResponse>, Status> {
        let operator = operator(&request);
        let v1::DeleteRequest { kind: name, namespace, name: object, dry_run } = request.into_inner();
        let info = kind(&name)?;
        let namespace = match (info.namespaced, namespace.is_empty()) {
            (false, _) => String::new(),
            (true, true) => "default".to_owned(),
            (true, false) => namespace,
        };
        let key = ObjectKey { kind: info.kind, namespace, name: object };
        let existed = self.attempt(operator, move |core, moment| core.delete(&key, dry_run, moment)).await?;
        Ok(Response::new(v1::DeleteResponse { existed }))
    }

    async fn status(&self, _: Request<v1::StatusRequest>) -> Result<Response<v1::StatusResponse>, Status> {
        let (facts, moment) = self.newest().await?;
        let status = view::status(&facts, moment.monotonic, moment.unix);
        let status_json = serde_json::to_string(&status).map_err(|e| Status::internal(e.to_string()))?;
        Ok(Response::new(v1::StatusResponse { status_json }))
    }

    async fn create_link_token(
        &self,
        request: Request<v1::CreateLinkTokenRequest>,
    ) -> Result<Response<v1::TokenResponse>, Status> {
        let operator = operator(&request);
        let request = request.into_inner();
        let peer = cluster(&request.peer)?;
        let made =
            self.attempt(operator, move |core, moment| core.create_link_token(&request, moment)).await?;
        let rules = link_rules(&self.newest().await?.0, &peer);
        Ok(self.token(made, rules))
    }

    async fn join_link(
        &self,
        request: Request<v1::LinkJoinRequest>,
    ) -> Result<Response<v1::LinkJoinResponse>, Status> {
        let operator = operator(&request);
        let token = request.into_inner().token;
        let chain = chain_with_root(&self.svid);
        let unix = self.core.now().unix;
        let linked = linking::join(&self.core, &token, chain, self.bind, unix, &operator).await;
        if let Err(error) = &linked {
            let event = Event { requester: operator, ..Event::refused(Action::Link, "", error.to_string()) };
            let _ = self.core.call(move |core, moment| core.note_refusal(event, moment)).await;
        }
        let (peer, tag) = linked?;
        let firewall = link_rules(&self.newest().await?.0, &peer);
        Ok(Response::new(v1::LinkJoinResponse { peer: peer.to_string(), tag: tag.value(), firewall }))
    }

    async fn accept_link(
        &self,
        request: Request<v1::AcceptLinkRequest>,
    ) -> Result<Response<v1::AcceptLinkResponse>, Status> {
        let operator = operator(&request);
        let peer = cluster(&request.into_inner().peer)?;
        let tag = self.attempt(operator, move |core, moment| core.accept_link(&peer, moment)).await?;
        Ok(Response::new(v1::AcceptLinkResponse { tag: tag.value() }))
    }

    async fn unlink(
        &self,
        request: Request<v1::UnlinkRequest>,
    ) -> Result<Response<v1::UnlinkResponse>, Status> {
        let operator = operator(&request);
        let peer = cluster(&request.into_inner().peer)?;
        let unlinked = self.attempt(operator, move |core, moment| core.unlink(&peer, moment)).await?;
        Ok(Response::new(v1::UnlinkResponse { existed: unlinked.existed, removed: unlinked.removed }))
    }

    async fn create_join_token(
        &self,
        request: Request<v1::CreateJoinTokenRequest>,
    ) -> Result<Response<v1::TokenResponse>, Status> {
        let operator = operator(&request);
        let request = request.into_inner();
        let (via_gateways, name) = (request.via_gateways, request.name.clone());
        let made =
            self.attempt(operator, move |core, moment| core.create_join_token(&request, moment)).await?;
        let rules = if via_gateways {
            let own = gateways_text(&self.newest().await?.0);
            vec![format!("inbound  UDP  from {name}  to {own}; on {name} itself only outbound UDP to there")]
        } else {
            Vec::new()
        };
        Ok(self.token(made, rules))
    }

    async fn audit(&self, request: Request<v1::AuditRequest>) -> Result<Response<Self::AuditStream>, Status> {
        let query = audit::Query::from_wire(request.into_inner())?;
        Ok(Response::new(audit::stream(self.core.audit().clone(), query, &self.tasks)))
    }

    async fn update_trust(
        &self,
        request: Request<v1::UpdateTrustRequest>,
    ) -> Result<Response<v1::UpdateTrustResponse>, Status> {
        let operator = operator(&request);
        let update = request.into_inner().update;
        let changed = self.attempt(operator, move |core, moment| core.update_trust(&update, moment)).await?;
        let sequence = self.newest().await?.0.trust.bundle.sequence;
        Ok(Response::new(v1::UpdateTrustResponse { changed, sequence }))
    }

    async fn trust_status(
        &self,
        _: Request<v1::TrustStatusRequest>,
    ) -> Result<Response<v1::TrustStatusResponse>, Status> {
        let status = self.core.call(|core, moment| core.trust_status(moment)).await;
        Ok(Response::new(status.map_err(|_| CoreError::Gone)?))
    }

    async fn reload_trust(
        &self,
        request: Request<v1::ReloadTrustRequest>,
    ) -> Result<Response<v1::ReloadTrustResponse>, Status> {
        let operator = operator(&request);
        let renew_leaves = request.into_inner().renew_leaves;
        let dir = self.trust_dir.clone();
        let load = move || Ok::<_, AuthorityError>((ClusterMaterial::load(&dir)?, Upstream::load(&dir)?));
        let read = tokio::task::spawn_blocking(load).await;
        let read = read.map_err(|e| Status::internal(e.to_string()))?;
        let (material, upstream) = read.map_err(|e| Status::failed_precondition(e.to_string()))?;
        let changed = self
            .attempt(operator, move |core, moment| {
                let changed = core.reload_trust(material, renew_leaves, moment)?;
                Ok(core.set_upstream(upstream) | changed)
            })
            .await?;
        let trust = self.newest().await?.0.trust;
        Ok(Response::new(v1::ReloadTrustResponse {
            changed,
            issuer_sha256: trust.issuer_sha256.to_vec(),
            not_after_unix: i64::try_from(trust.intermediate_not_after).unwrap_or(i64::MAX),
        }))
    }
}
