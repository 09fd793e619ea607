//! One-use tokens: made for operators, redeemed by joiners (protocol.md section 4).
//!
//! The secret is hashed at rest and compared in constant time; five wrong guesses void a token. A request that was
//! answered may be repeated, byte for byte, because its answer may have been lost; any other second use is refused.

use std::time::Duration;

use sha2::{Digest, Sha256};
use tombolo_identity::SpiffeId;
use tombolo_model::audit::{Action, Event};
use tombolo_model::ids::Block;
use tombolo_model::names::{ClusterName, Namespace, ObjectName};
use tombolo_model::resource::join_policy::{self, Attested};
use tombolo_proto::{token, v1};

use super::allot::block_key;
use super::leases::{Issued, LEASE_LIFE};
use super::{Core, CoreError, Moment};
use crate::facts::{LeaseRecord, Role, TokenPurpose, TokenRecord};
use crate::joining;
use crate::registry::Presence;
use crate::store::{Table, Transaction, record};
use crate::view::rfc3339_seconds;

/// Long enough to carry a token to another machine by hand.
const DEFAULT_TTL: Duration = Duration::from_secs(15 * 60);
const MAX_TTL: Duration = Duration::from_secs(24 * 3600);
/// 32 random bytes need no more to be beyond guessing; this bounds what guessing can cost.
const WRONG_SECRETS: u32 = 5;
/// Ended tokens are kept this long, so that a late joiner is told what happened.
const ENDED_KEPT: Duration = Duration::from_secs(24 * 3600);
/// The lease of a token from outside outlives it: whoever comes too late is told so, and not left without an answer.
const REFUSED_FOR: Duration = Duration::from_secs(15 * 60);
/// Tokens that may be open at a time.
const MAX_TOKENS: usize = 10_000;

/// A token and what its maker is told besides.
#[derive(Clone, Debug)]
pub struct MadeToken {
    pub text: String,
    /// Unix seconds.
    pub not_after: u64,
}

fn sha256(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

fn constant_time_eq(a: &str, b: &str) -> bool {
    aws_lc_rs::constant_time::verify_slices_are_equal(a.as_bytes(), b.as_bytes()).is_ok()
}

fn life(ttl_seconds: u32) -> Result<Duration, CoreError> {
    let life = match ttl_seconds {
        0 => DEFAULT_TTL,
        seconds => Duration::from_secs(seconds.into()),
    };
    if life > MAX_TTL {
        return Err(CoreError::Invalid(format!("ttl {}s: a token lives at most 24 h", life.as_secs())));
    }
    Ok(life)
}

impl Core {
    /// A token for one gateway, sidecar or machine.
    pub fn create_join_token(
        &mut self,
        request: &v1::CreateJoinTokenRequest,
        moment: Moment,
    ) -> Result<MadeToken, CoreError> {
        if request.role == "pod" {
            return self.pods_token(request);
        }
        let role = match request.role.as_str() {
            "gateway" => Role::Gateway,
            "sidecar" => Role::Sidecar,
            "vm" => Role::Vm,
            other => {
                return Err(CoreError::Invalid(format!(
                    "field role: {other:?} is not gateway, sidecar, vm or pod"
                )));
            }
        };
        let invalid = |e: tombolo_model::names::NameError| CoreError::Invalid(e.to_string());
        request.name.parse::<ObjectName>().map_err(invalid)?;
        let namespace = if role == Role::Sidecar {
            request.namespace.parse::<Namespace>().map_err(invalid)?.to_string()
        } else {
            String::new()
        };
        if role == Role::Vm {
            if !request.group.is_empty() {
                join_policy::check_group(&request.group).map_err(|e| CoreError::Invalid(e.to_string()))?;
            }
            // Said here already, where somebody reads it.
            let machine = Attested::Machine { name: &request.name, group: &request.group };
            joining::may_join(&self.facts, machine).map_err(CoreError::Precondition)?;
        } else if !request.group.is_empty() {
            return Err(CoreError::Invalid("field group: only machines have one (role vm)".to_owned()));
        }
        let purpose = TokenPurpose::Workload {
            role,
            name: request.name.clone(),
            namespace: namespace.clone(),
            group: request.group.clone(),
        };
        let mut token = v1::Token {
            kind: v1::TokenKind::Workload.into(),
            role: role.as_str().to_owned(),
            name: request.name.clone(),
            namespace,
            ..v1::Token::default()
        };
        if !request.via_gateways {
            token.federators = self.federators(true);
            if token.federators.is_empty() {
                return Err(CoreError::Precondition("the federator is not listening yet".to_owned()));
            }
        }
        self.make_token(token, purpose, life(request.ttl_seconds)?, moment)
    }

    /// A token by which the named cluster may link.
    pub fn create_link_token(
        &mut self,
        request: &v1::CreateLinkTokenRequest,
        moment: Moment,
    ) -> Result<MadeToken, CoreError> {
        let peer: ClusterName = request
            .peer
            .parse()
            .map_err(|e: tombolo_model::names::NameError| CoreError::Invalid(e.to_string()))?;
        if peer == self.facts.cluster.name {
            return Err(CoreError::Invalid(format!(
                "peer {peer} is this cluster itself: name the other one"
            )));
        }
        self.check_not_linked(&peer)?;
        let token =
            v1::Token { kind: v1::TokenKind::Link.into(), name: peer.to_string(), ..v1::Token::default() };
        self.make_token(token, TokenPurpose::Link { peer }, life(request.ttl_seconds)?, moment)
    }

    fn make_token(
        &mut self,
        mut token: v1::Token,
        kind: TokenPurpose,
        life: Duration,
        moment: Moment,
    ) -> Result<MadeToken, CoreError> {
        if self.store.list(Table::Tokens).len() >= MAX_TOKENS {
            return Err(CoreError::Exhausted(format!(
                "{MAX_TOKENS} tokens are open; wait until some have ended"
            )));
        }
        let unix = moment.unix.as_secs();
        let not_after = unix + life.as_secs();
        let (id, secret) = (hex::encode(rand::random::<[u8; 12]>()), rand::random::<[u8; 32]>());
        let mut transaction = Transaction::new();
        let mut provisional = None;
        if token.federators.is_empty() {
            token.gateways = self.gateways_for(Role::Vm);
            if token.gateways.is_empty() {
                return Err(CoreError::Precondition(
                    "no gateway is connected, and whoever joins from outside comes through one: start `tombolo gateway` first"
                        .to_owned(),
                ));
            }
            // Its holder is nobody yet: an identity that no certificate has.
            let holder = format!("{}/token/{id}", self.facts.cluster.federator_id);
            let lease = self.new_lease(&holder, Role::Provisional, not_after + REFUSED_FOR.as_secs())?;
            token.provisional = Some(self.lease_to_wire(&lease, moment)?);
            transaction =
                transaction.absent(Table::Leases, block_key(lease.block)).put(block_key(lease.block), &lease);
            provisional = Some(lease);
        }
        let record = TokenRecord {
            kind,
            secret_sha256: sha256(&secret),
            not_after,
            provisional: provisional.as_ref().map(|lease| lease.block),
            used_by: None,
            lease: None,
            wrong_secrets: 0,
        };
        let event = self.made(&record, &id);
        let transaction = transaction.absent(Table::Tokens, id.as_str()).put(id.as_str(), &record);
        self.commit_audited(transaction, event, moment)?;
        if let Some(lease) = provisional {
            self.install_lease(lease);
        }
        let cluster = &self.facts.cluster;
        token.cluster = cluster.name.to_string();
        token.tag = cluster.tag.value();
        token.root_fingerprint.clone_from(&self.facts.trust.root_fingerprint);
        token.token_id = id;
        token.secret = secret.to_vec();
        token.not_after_unix = i64::try_from(not_after).unwrap_or(i64::MAX);
        token.join_keys = Some(self.join_keys(moment));
        Ok(MadeToken { text: token::encode(&token), not_after })
    }

    /// What the audit log says of a new token: for whom, until when.
    fn made(&self, record: &TokenRecord, id: &str) -> Event {
        let (action, subject) = match &record.kind {
            TokenPurpose::Link { peer } => (Action::LinkToken, format!("cluster:{peer}")),
            TokenPurpose::Workload { role, name, namespace, .. } => {
                let identity = self.identity_of(*role, name, namespace);
                (Action::Token, identity.map_or_else(|_| name.clone(), |id| id.to_string()))
            }
        };
        let mut reason = format!("good until {}", rfc3339_seconds(record.not_after));
        if let TokenPurpose::Workload { group, .. } = &record.kind
            && !group.is_empty()
        {
            reason = format!("group {group}; {reason}");
        }
        Event { token: id.to_owned(), reason, ..Event::done(action, subject) }
    }

    /// Checks a token; the record is not changed but for wrong guesses. `request_hash` is of the whole request.
    pub(super) fn check_token(
        &mut self,
        id: &str,
        secret: &[u8],
        request_hash: &str,
        moment: Moment,
    ) -> Result<TokenRecord, CoreError> {
        let unknown = || CoreError::Denied("the token is not known here, or its secret is wrong".to_owned());
        if id.len() > 64 {
            return Err(unknown());
        }
        let record = record::get::<TokenRecord>(&*self.store, id)?.ok_or_else(unknown)?;
        if record.wrong_secrets >= WRONG_SECRETS {
            return Err(CoreError::Denied(
                "the token is void after too many wrong secrets: make a new one".to_owned(),
            ));
        }
        if !constant_time_eq(&record.secret_sha256, &sha256(secret)) {
            let guessed = TokenRecord { wrong_secrets: record.wrong_secrets + 1, ..record };
            self.store.commit(&Transaction::new().put(id, &guessed))?;
            return Err(unknown());
        }
        if moment.unix.as_secs() > record.not_after {
            let ago = moment.unix.as_secs() - record.not_after;
            return Err(CoreError::Denied(format!("the token expired {ago} s ago: make a new one")));
        }
        match &record.used_by {
            Some(hash) if hash != request_hash => {
                Err(CoreError::Denied("the token has been used already: make a new one".to_owned()))
            }
            _ => Ok(record),
        }
    }

    /// Marks a checked token as used, within `transaction`; `lease` is what the request is given.
    pub(super) fn use_token(
        transaction: Transaction,
        id: &str,
        record: &TokenRecord,
        request_hash: &str,
        lease: Option<Block>,
    ) -> Transaction {
        let used = TokenRecord { used_by: Some(request_hash.to_owned()), lease, ..record.clone() };
        transaction.unchanged(Table::Tokens, id, record::encode(record)).put(id, &used)
    }

    /// A joiner's request: an identity, a lease, and the way to this federator.
    pub fn join_workload(
        &mut self,
        request: &v1::JoinWorkloadRequest,
        moment: Moment,
    ) -> Result<v1::JoinWorkloadResponse, CoreError> {
        let joined = self.redeem(request, moment);
        if let Err(error) = &joined {
            let token = request.token_id.chars().take(64).collect();
            let subject = self.meant_by(&request.token_id).unwrap_or_default();
            let event = Event { token, ..Event::refused(Action::Join, subject, "") };
            self.refused(event, error, moment);
        }
        joined
    }

    /// Whom a token of this cluster is for.
    pub(super) fn meant_by(&self, token_id: &str) -> Option<String> {
        if token_id.len() > 64 {
            return None;
        }
        let record = record::get::<TokenRecord>(&*self.store, token_id).ok()??;
        Some(self.made(&record, token_id).subject)
    }

    fn redeem(
        &mut self,
        request: &v1::JoinWorkloadRequest,
        moment: Moment,
    ) -> Result<v1::JoinWorkloadResponse, CoreError> {
        let hash = request_hash(request);
        let record = self.check_token(&request.token_id, &request.secret, &hash, moment)?;
        let TokenPurpose::Workload { role, name, namespace, group } = &record.kind else {
            return Err(CoreError::Denied(
                "this is a link token: use it with `tombolo link join`".to_owned(),
            ));
        };
        if request.name != *name {
            let given: String = request.name.chars().take(64).collect();
            return Err(CoreError::Denied(format!("the token is for {name:?}, not for {given:?}")));
        }
        if *role == Role::Vm {
            // Policies may have changed since the token was made.
            joining::may_join(&self.facts, Attested::Machine { name, group }).map_err(CoreError::Denied)?;
        }
        let id = self.identity_of(*role, name, namespace)?;
        let issued = self.issue(&request.csr_der, &id, *role, moment, Transaction::new())?;
        let event = Event { token: request.token_id.clone(), ..issued.event(Action::Join) };
        let Issued { svid, transaction, record: identity, .. } = issued;
        let given = record.lease.and_then(|block| self.facts.leases.get(&block));
        let (lease, transaction) = match given.filter(|lease| lease.spiffe_id == id.as_str()) {
            // The same request again: whoever sends it a thousand times holds one block.
            Some(lease) => ((**lease).clone(), transaction),
            None => {
                let end = moment.unix.as_secs() + LEASE_LIFE.as_secs();
                let lease = LeaseRecord { group: group.clone(), ..self.new_lease(id.as_str(), *role, end)? };
                let key = block_key(lease.block);
                let transaction = transaction.absent(Table::Leases, key.as_str()).put(key, &lease);
                (lease, transaction)
            }
        };
        let answer = self.membership(svid, &lease, moment)?;
        let (transaction, replaced) = self.replace_leases(&id, *role, &lease, transaction);
        let transaction = Self::use_token(transaction, &request.token_id, &record, &hash, Some(lease.block));
        self.commit_audited(transaction, event, moment)?;
        self.install_identity(identity);
        tracing::info!(spiffe_id = %id, block = %lease.block, "joined");
        replaced.into_iter().chain([lease]).for_each(|lease| self.install_lease(lease));
        Ok(answer)
    }

    fn identity_of(&self, role: Role, name: &str, namespace: &str) -> Result<SpiffeId, CoreError> {
        let cluster = &self.facts.cluster;
        let (domain, cluster) = (&cluster.trust_domain, &cluster.name);
        let id = match role {
            Role::Gateway => SpiffeId::gateway(domain, cluster, name),
            Role::Vm => SpiffeId::vm(domain, cluster, name),
            _ => SpiffeId::workload(domain, cluster, namespace, name),
        };
        id.map_err(|e| CoreError::Invalid(e.to_string()))
    }

    /// This cluster's federators, with addresses for those that can send to them.
    pub(super) fn federators(&self, direct: bool) -> Vec<v1::ControlTarget> {
        let target = |federator: &crate::facts::FederatorEndpoint| v1::ControlTarget {
            endpoint: federator.endpoint.value(),
            address: if direct { federator.address.to_string() } else { String::new() },
        };
        self.facts.federator.iter().map(target).collect()
    }

    /// The gateways as members of this role reach them.
    pub(super) fn gateways_for(&self, role: Role) -> Vec<v1::GatewayReplica> {
        crate::snapshot::gateways_for(&self.facts, role)
    }

    /// Tokens that ended a day ago.
    pub(super) fn forget_tokens(&self, unix: u64, transaction: Transaction) -> Transaction {
        let Ok(tokens) = record::list::<TokenRecord>(&*self.store) else { return transaction };
        tokens
            .into_iter()
            .filter(|(_, token)| token.not_after.saturating_add(ENDED_KEPT.as_secs()) < unix)
            .fold(transaction, |transaction, (id, _)| transaction.delete(Table::Tokens, id))
    }

    /// Whether any gateway can carry packets now.
    pub fn has_gateway(&self) -> bool {
        self.facts.registry.gateways.values().any(|g| g.presence == Presence::Live)
    }
}

/// What tells a repeated request from another one.
pub(super) fn request_hash<M: prost::Message>(request: &M) -> String {
    sha256(&request.encode_to_vec())
}

/// Whether a lease belongs to a token whose joiner still gets an answer.
pub fn is_open_provisional(lease: &LeaseRecord, unix: u64) -> bool {
    lease.role == Role::Provisional && lease.not_after >= unix
}
