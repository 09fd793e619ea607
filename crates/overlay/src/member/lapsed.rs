//! Coming back after the identity has ended: a machine that was off over the holidays (protocol.md section 4).
//!
//! For [`RENEWABLE_FOR`] after its end an SVID is renewed by possession of its key: mTLS with the leaf as it is, on the renewal
//! handle and its ALPN alone, towards a federator that is judged as ever. The way there is the member's own overlay. Where its
//! hourly keys have run out too, a machine's IDs are made with the renewal key of its lease, which gateways know it by;
//! who dials a federator's address needs none. Gateways are looked for where they were last, where the member joined, and
//! at the names it was started with, resolved anew each time.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tombolo_identity::issuer::KeyAndCsr;
use tombolo_identity::verify::RENEWABLE_FOR;
use tombolo_identity::{ExpectedPeer, SpiffeId, tls};
use tombolo_model::ids::Handle;
use tombolo_proto::convert::FieldError;
use tombolo_proto::v1;
use tombolo_proto::v1::renewal_client::RenewalClient;
use tombolo_runtime::clock;

use super::join::{DIALS, log_rejected, parse_control, refusal};
use super::{Member, MemberError, gateway_hops};
use crate::cid::Kind;
use crate::connection::{PeerConnection, close_code};
use crate::dial::{DialError, DialTarget};
use crate::endpoint::Overlay;
use crate::grpc;
use crate::keys::{CidKey, KeyRing};
use crate::lease::EndpointLease;
use crate::routes::GatewayHop;

const CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// Names are few, and a resolver that does not answer must not hold up what is known by address.
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(2);
const DAY: u64 = 24 * 3600;

/// Names or addresses (`host:port`) of gateways, resolved when they are needed.
#[derive(Clone, Debug, Default)]
pub struct EntryPoints(pub Vec<String>);

impl EntryPoints {
    async fn resolve(&self) -> Vec<SocketAddr> {
        let mut found = Vec::new();
        for entry in &self.0 {
            match tokio::time::timeout(RESOLVE_TIMEOUT, tokio::net::lookup_host(entry)).await {
                Ok(Ok(addresses)) => found.extend(addresses),
                Ok(Err(error)) => {
                    tracing::warn!(gateway = entry, %error, "a gateway's name does not resolve")
                }
                Err(_) => tracing::warn!(gateway = entry, "a gateway's name is not resolved in time"),
            }
        }
        found
    }
}

/// Why an identity that has ended was not renewed.
#[derive(Debug, thiserror::Error)]
pub enum LapsedError {
    #[error(transparent)]
    Member(#[from] MemberError),
    #[error(
        "no federator of cluster {cluster} answers at {places} ({source}): {}",
        where_else(*direct)
    )]
    Unreachable { cluster: String, places: String, direct: bool, source: DialError },
    #[error("the federator refused to renew: {reason}. {remedy}")]
    Refused { reason: String, remedy: String },
    #[error("the federator did not answer within {}s", CALL_TIMEOUT.as_secs())]
    Late,
    #[error("the TLS configuration can't be made: {0}")]
    Tls(#[from] rustls::Error),
    #[error("the federator's answer can't be used: {0}")]
    Answer(#[from] FieldError),
}

fn where_else(direct: bool) -> &'static str {
    if direct {
        "is one running there?"
    } else {
        "if the cluster's gateways have moved, say where one is with --gateway HOST:PORT"
    }
}

/// What an operator does for a member that can't renew any more. Pure.
fn remedy(id: &SpiffeId) -> String {
    let parts: Vec<&str> = id.within_cluster().unwrap_or_default().split('/').skip(1).collect();
    let token = match parts.as_slice() {
        ["vm", name] => format!("tombolo vm token {name}"),
        ["gateway", name] => format!("tombolo token create --role gateway --name {name}"),
        ["ns", namespace, "sa", name] => {
            format!("tombolo token create --role sidecar --name {name} -n {namespace}")
        }
        _ => "tombolo token create".to_owned(),
    };
    format!(
        "make a new token where the federator runs (`{token}`), move the state directory away, and start with --join-token-file"
    )
}

/// How long ago, for people.
fn ago(seconds: u64) -> String {
    match seconds / DAY {
        0 => format!("{} h", seconds / 3600),
        days => format!("{days} days"),
    }
}

impl Member {
    /// Whether the ordinary way to renew is closed: the identity has ended, or the keys that lead to a federator have.
    pub fn has_lapsed(&self, now: Duration) -> bool {
        let ended = now.as_secs() > self.svid().load().not_after;
        ended || self.lease().keys.current(now).is_none() || self.control().keys.current(now).is_none()
    }

    /// An error that says what to do once no federator will renew the identity any more.
    pub fn check_renewable(&self, now: Duration) -> Result<(), MemberError> {
        let ended = now.as_secs().saturating_sub(self.svid().load().not_after);
        if ended <= RENEWABLE_FOR.as_secs() {
            return Ok(());
        }
        let id = self.spiffe_id();
        Err(MemberError::TooLate(format!(
            "the identity {id} in {} ended {} ago, and is renewed for {} days: {}",
            self.dir().display(),
            ago(ended),
            RENEWABLE_FOR.as_secs() / DAY,
            remedy(&id),
        )))
    }

    /// One attempt: a new key and CSR, a new SVID, lease, and way to the federators. `overlay` is the member's own; its keys
    /// and gateways are made such that answers find it.
    pub async fn renew_lapsed(&self, overlay: &Overlay, entries: &EntryPoints) -> Result<(), LapsedError> {
        let now = clock::since_unix_epoch();
        self.check_renewable(now)?;
        overlay.set_keys(self.lease().keys_at(now));
        if self.control().federators.iter().all(|(_, address)| address.is_none()) {
            overlay.add_gateways(self.gateways_to_try(entries).await);
        }
        let peer = self.dial_renewal(overlay).await?;
        let renewed = self.ask_lapsed(&peer).await;
        peer.close(close_code::DONE, "renewed");
        renewed
    }

    async fn gateways_to_try(&self, entries: &EntryPoints) -> Vec<GatewayHop> {
        let mut gateways = self.control().gateways.clone();
        gateways.extend(self.lock().origins.iter().copied().map(GatewayHop::at));
        gateways.extend(entries.resolve().await.into_iter().map(GatewayHop::at));
        gateways
    }

    async fn dial_renewal(&self, overlay: &Overlay) -> Result<PeerConnection, LapsedError> {
        let control = self.control();
        let expected = ExpectedPeer::OneOf(Arc::clone(&control.spiffe_ids));
        let tls = tls::renewal_client_config(self.svid(), expected)?;
        // A federator that is dialled at its own address asks for no MAC.
        let key = self.lease().renewal_key.clone().unwrap_or_else(|| CidKey::from_bytes(rand::random()));
        let mut dials = 0;
        loop {
            dials += 1;
            let keys = Arc::new(KeyRing::constant(clock::since_unix_epoch(), &key));
            let target = DialTarget { kind: Kind::Control, tag: self.tag(), handle: Handle::RENEW, keys };
            match overlay.dial(&target, Arc::clone(&tls)).await {
                Ok(connection) => return Ok(connection),
                // The registration at a gateway takes its time too.
                Err(error) if error.is_retryable() && dials < DIALS => {
                    tracing::debug!(%error, "no answer yet, trying again");
                }
                Err(source) => return Err(self.unreachable(overlay, source)),
            }
        }
    }

    fn unreachable(&self, overlay: &Overlay, source: DialError) -> LapsedError {
        let federators: Vec<SocketAddr> =
            self.control().federators.iter().filter_map(|(_, address)| *address).collect();
        let direct = !federators.is_empty();
        let tried = if direct { federators } else { overlay.hops().iter().map(|hop| hop.address).collect() };
        let places = match tried.as_slice() {
            [] => "no known place".to_owned(),
            tried => tried.iter().map(SocketAddr::to_string).collect::<Vec<_>>().join(", "),
        };
        LapsedError::Unreachable { cluster: self.cluster().to_string(), places, direct, source }
    }

    async fn ask_lapsed(&self, peer: &PeerConnection) -> Result<(), LapsedError> {
        let fresh = KeyAndCsr::generate().map_err(MemberError::from)?;
        // Shown, so that a federator whose store was lost adopts it.
        let lease = v1::EndpointLease { keys: None, renewal_key: Vec::new(), ..self.lease().to_wire() };
        let request = v1::RenewLapsedRequest { csr_der: fresh.csr_der.clone(), lease: Some(lease) };
        let mut client = RenewalClient::new(grpc::channel(peer.clone()));
        let answer = tokio::time::timeout(CALL_TIMEOUT, client.renew_lapsed(request)).await;
        let answer = answer.map_err(|_| LapsedError::Late)?.map_err(|status| self.refused(peer, &status))?;
        self.take_over(&fresh, answer.into_inner())
    }

    fn refused(&self, peer: &PeerConnection, status: &tonic::Status) -> LapsedError {
        // In TLS 1.3 the client is done before it is judged: what was wrong with its chain shows as a closed connection.
        let reason = match peer.quic().close_reason() {
            Some(closed) => format!("{closed}"),
            None => refusal(status),
        };
        let remedy = match status.code() {
            tonic::Code::ResourceExhausted | tonic::Code::Unavailable => "It is tried again".to_owned(),
            _ => format!("To join anew: {}", remedy(&self.spiffe_id())),
        };
        LapsedError::Refused { reason, remedy }
    }

    fn take_over(&self, key: &KeyAndCsr, answer: v1::JoinWorkloadResponse) -> Result<(), LapsedError> {
        let v1::JoinWorkloadResponse { svid, lease, control, gateways } = answer;
        let missing = |field| FieldError::new(field, "nothing", "present");
        let svid = svid.ok_or_else(|| missing("svid"))?;
        let lease = EndpointLease::from_wire(&lease.ok_or_else(|| missing("lease"))?)?;
        let control = control.ok_or_else(|| missing("control"))?;
        if (control.cluster.as_str(), control.tag) != (self.cluster().as_str(), self.tag().value()) {
            let found = format!("{} ({:06x})", control.cluster, control.tag);
            return Err(FieldError::new("control.cluster", found, self.cluster().to_string()).into());
        }
        let (mut hops, rejected) = gateway_hops(&gateways);
        log_rejected(&rejected);
        if hops.is_empty() {
            hops.clone_from(&self.control().gateways);
        }
        let control = parse_control(&control, hops)?;
        self.install(&key.key_der, &svid)?;
        self.renew_lease(lease)?;
        self.replace_control(control)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_of_member_is_told_the_token_that_it_needs() {
        let of = |path: &str| remedy(&format!("spiffe://a.example/cluster/east{path}").parse().unwrap());
        for (path, command) in [
            ("/vm/db-1", "`tombolo vm token db-1`"),
            ("/gateway/gw-1", "`tombolo token create --role gateway --name gw-1`"),
            ("/ns/shop/sa/web", "`tombolo token create --role sidecar --name web -n shop`"),
        ] {
            assert!(of(path).contains(command) && of(path).contains("--join-token-file"), "{}", of(path));
        }
        assert_eq!((ago(3 * 3600), ago(31 * DAY + 5)), ("3 h".to_owned(), "31 days".to_owned()));
    }
}
