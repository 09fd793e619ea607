//! Re-attestation: a peer's renewed identity on a connection that lives on (protocol.md section 5).
//!
//! QUIC forbids TLS post-handshake authentication (RFC 9001 section 4.4). Instead, whoever has a new chain shows it on
//! its control stream, with a signature by the new leaf's key over the connection's own TLS exporter (RFC 5705), as
//! exported authenticators do (RFC 9261). One frame of the control stream ([`tombolo_proto::stream_header`]):
//!
//! ```text
//! u16 length | ControlMessage { reattest (2): Reattest {
//!                  sequence (1): u64, above every accepted one of this stream
//!                  chain_der (2): leaf first, 2 to 4 certificates
//!                  signature (3): by the leaf's key; the scheme follows from the key } }
//!
//! signed:
//!  0                64                              89     90     91               99           131         163
//!  +----------------+-------------------------------+------+------+----------------+------------+-----------+
//!  | 64 times 0x20  | "tombolo re-attestation v1"   | 0x00 | role | sequence (u64) | chain hash | exporter  |
//!  +----------------+-------------------------------+------+------+----------------+------------+-----------+
//! ```
//! Role: the signer's side of TLS, 1 client, 2 server, so that nothing can be reflected. The layout up to 0x00 is that of
//! TLS 1.3's CertificateVerify (RFC 8446 section 4.4.3) with another label, so that neither can be taken for the other.
//! The exporter ties it to this one connection. There is no answer: a message that is refused is said again ([`Sender`]).
//! Who does not know the message ignores it, and its connections are drained at the end of its leaf as before.
//!
//! Pure: time, bundles and randomness are passed in. [`Sender`] says when to show, [`Receiver`] what to believe,
//! [`Expiry`] when a peer has been waited for long enough. [`task`] is the driver.

pub(crate) mod task;
#[cfg(test)]
mod tests;

use std::time::{Duration, Instant};

use rustls::pki_types::CertificateDer;
use tombolo_identity::tls::SvidError;
use tombolo_identity::verify::{self, MAX_CHAIN, Usage, chain_hash, signed_by_leaf};
use tombolo_identity::{BundleSet, IdentityError, PeerIdentity, SpiffeId, Svid};
use tombolo_model::ids::ClusterTag;
use tombolo_proto::v1::Reattest;

const LABEL: &[u8] = b"tombolo re-attestation v1";
/// RFC 5705 section 4: labels that begin so need no registration.
pub const EXPORTER_LABEL: &[u8] = b"EXPERIMENTAL tombolo re-attestation";
pub const EXPORTER_BYTES: usize = 32;

/// A refused message is said again after this, then after four times as long, and so on: five times in half a day. What
/// cures a refusal is a bundle on its way, which takes seconds, or hours where a federator is away.
const FIRST_REPEAT: Duration = Duration::from_secs(60);
const REPEAT_FACTOR: u32 = 4;
/// Verifying one costs 0.3 ms: eight at once (renewal, intermediate and root in a row, each twice) and one each 10 s
/// after that are more than an honest peer sends, and bound a hostile one to 0.003 % of a core.
const BURST: u32 = 8;
const REFILL: Duration = Duration::from_secs(10);

/// Both clocks: wall time judges certificates, monotonic time judges patience.
#[derive(Clone, Copy, Debug)]
pub struct Moment {
    /// Since the Unix epoch.
    pub unix: Duration,
    pub at: Instant,
}

/// Why a re-attestation was refused; the identity stays what it was.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("the message can't be used: {0}")]
    Malformed(&'static str),
    #[error("more re-attestations than any honest peer sends")]
    TooOften,
    #[error("the old identity has ended already")]
    Late,
    #[error("sequence {found} is not above {last}")]
    Sequence { last: u64, found: u64 },
    #[error(transparent)]
    Chain(IdentityError),
    #[error("the chain is {found}'s")]
    OtherIdentity { found: SpiffeId },
    #[error("the chain is of cluster tag {found}")]
    OtherTag { found: ClusterTag },
    #[error("the signature is not by the leaf's key over this connection, role and sequence")]
    Signature,
}

impl Refusal {
    /// Every [`Self::kind`].
    pub const KINDS: [&'static str; 9] = [
        "malformed",
        "too_often",
        "late",
        "sequence",
        "chain",
        "wrong_cluster",
        "other_identity",
        "other_tag",
        "signature",
    ];

    /// A metric label.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Malformed(_) => "malformed",
            Self::TooOften => "too_often",
            Self::Late => "late",
            Self::Sequence { .. } => "sequence",
            Self::Chain(IdentityError::WrongCluster { .. }) => "wrong_cluster",
            Self::Chain(_) => "chain",
            Self::OtherIdentity { .. } => "other_identity",
            Self::OtherTag { .. } => "other_tag",
            Self::Signature => "signature",
        }
    }
}

/// What the leaf's key signs.
pub fn signed_bytes(
    role: Usage,
    sequence: u64,
    chain_hash: &[u8; 32],
    exporter: &[u8; EXPORTER_BYTES],
) -> Vec<u8> {
    let mut message = vec![b' '; 64];
    message.extend_from_slice(LABEL);
    message.push(0);
    message.push(match role {
        Usage::Client => 1,
        Usage::Server => 2,
    });
    message.extend_from_slice(&sequence.to_be_bytes());
    message.extend_from_slice(chain_hash);
    message.extend_from_slice(exporter);
    message
}

/// The message that shows `svid` as `role` of the connection whose exporter is given.
pub fn message(
    svid: &Svid,
    role: Usage,
    sequence: u64,
    exporter: &[u8; EXPORTER_BYTES],
) -> Result<Reattest, SvidError> {
    let signature = svid.sign(&signed_bytes(role, sequence, svid.chain_hash(), exporter))?;
    let chain_der = svid.chain().iter().map(|certificate| certificate.to_vec()).collect();
    Ok(Reattest { sequence, chain_der, signature })
}

/// When to show the own chain on one connection.
#[derive(Debug)]
pub struct Sender {
    /// Hash of the chain that the peer was shown last, and the end of its leaf (unix seconds).
    shown: [u8; 32],
    shown_not_after: u64,
    sequence: u64,
    repeat: Option<Repeat>,
}

#[derive(Debug)]
struct Repeat {
    at: Instant,
    wait: Duration,
    /// The end of the leaf before: whoever has not believed us by then drains the connection. Unix seconds.
    until: u64,
}

impl Sender {
    /// `svid`: what the handshake showed. One that is older than that costs a needless message.
    pub fn new(svid: &Svid) -> Self {
        Self { shown: *svid.chain_hash(), shown_not_after: svid.not_after, sequence: 0, repeat: None }
    }

    /// Whether `svid`, the current one, is to be shown now.
    pub fn is_due(&self, svid: &Svid, now: Moment) -> bool {
        let repeat = |r: &Repeat| now.at >= r.at && now.unix.as_secs() <= r.until;
        *svid.chain_hash() != self.shown || self.repeat.as_ref().is_some_and(repeat)
    }

    /// `svid` is being shown; its sequence.
    pub fn shown(&mut self, svid: &Svid, now: Moment) -> u64 {
        let (wait, until) = match self.repeat.take() {
            Some(repeat) if *svid.chain_hash() == self.shown => {
                (repeat.wait.saturating_mul(REPEAT_FACTOR), repeat.until)
            }
            _ => (FIRST_REPEAT, self.shown_not_after),
        };
        self.repeat = Some(Repeat { at: now.at + wait, wait, until });
        (self.shown, self.shown_not_after) = (*svid.chain_hash(), svid.not_after);
        self.sequence += 1;
        self.sequence
    }
}

/// What to believe of one peer.
#[derive(Debug)]
pub struct Receiver {
    /// The peer's side of TLS.
    role: Usage,
    /// The last accepted one.
    sequence: u64,
    allowed: u32,
    refilled: Instant,
}

impl Receiver {
    /// `role`: the peer's side of TLS.
    pub fn new(role: Usage, at: Instant) -> Self {
        Self { role, sequence: 0, allowed: BURST, refilled: at }
    }

    /// The identity that replaces `pinned`. Cheap checks come first. `bundles`: the current ones.
    pub fn accept(
        &mut self,
        message: Reattest,
        pinned: &PeerIdentity,
        exporter: &[u8; EXPORTER_BYTES],
        bundles: &BundleSet,
        now: Moment,
    ) -> Result<PeerIdentity, Refusal> {
        self.spend(now.at)?;
        if has_ended(pinned.not_after, now.unix) {
            return Err(Refusal::Late);
        }
        let Reattest { sequence, chain_der, signature } = message;
        if sequence <= self.sequence {
            return Err(Refusal::Sequence { last: self.sequence, found: sequence });
        }
        if chain_der.len() > MAX_CHAIN {
            return Err(Refusal::Malformed("too many certificates"));
        }
        let chain: Vec<CertificateDer<'static>> = chain_der.into_iter().map(Into::into).collect();
        let Some(leaf) = chain.first() else { return Err(Refusal::Malformed("no certificate")) };
        let time = verify::unix_time(now.unix);
        let identity = verify::authenticate(&chain, bundles, self.role, time).map_err(Refusal::Chain)?;
        if (&identity.spiffe_id, &identity.cluster) != (&pinned.spiffe_id, &pinned.cluster) {
            return Err(Refusal::OtherIdentity { found: identity.spiffe_id });
        }
        if identity.tag != pinned.tag {
            return Err(Refusal::OtherTag { found: identity.tag });
        }
        let signed = signed_bytes(self.role, sequence, &chain_hash(&chain), exporter);
        if !signed_by_leaf(leaf, &signed, &signature) {
            return Err(Refusal::Signature);
        }
        self.sequence = sequence;
        Ok(identity)
    }

    fn spend(&mut self, at: Instant) -> Result<(), Refusal> {
        while self.allowed < BURST && at.saturating_duration_since(self.refilled) >= REFILL {
            self.allowed += 1;
            self.refilled += REFILL;
        }
        if self.allowed == BURST {
            self.refilled = at;
        }
        self.allowed = self.allowed.checked_sub(1).ok_or(Refusal::TooOften)?;
        Ok(())
    }
}

/// RFC 5280 section 4.1.2.5: the last second is valid still.
fn has_ended(not_after: i64, unix: Duration) -> bool {
    i64::try_from(unix.as_secs()).unwrap_or(i64::MAX) > not_after
}

/// What is to become of a connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    Live,
    /// Nothing new on it; what is open may end.
    Drain,
    Close,
}

/// When a peer that has not re-attested is drained, then closed. Draining is final.
#[derive(Debug)]
pub struct Expiry {
    wait: Duration,
    close_at: Option<Instant>,
}

impl Expiry {
    /// `patience`: the longest wait between the end of the leaf and the close. `random` in 0..1 spreads the closes over its
    /// second half, less a tenth for the task that looks at it ten times within it.
    pub fn new(patience: Duration, random: f64) -> Self {
        Self { wait: patience.mul_f64(0.5 + 0.4 * random.clamp(0.0, 1.0)), close_at: None }
    }

    /// `not_after`: of the pinned identity, unix seconds.
    pub fn step(&mut self, not_after: i64, now: Moment) -> Verdict {
        if self.close_at.is_none() && !has_ended(not_after, now.unix) {
            return Verdict::Live;
        }
        // From when it was noticed: a clock that jumps must not close everything at once.
        let close_at = *self.close_at.get_or_insert(now.at + self.wait);
        if now.at >= close_at { Verdict::Close } else { Verdict::Drain }
    }
}
