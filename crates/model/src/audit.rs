//! The audit log: what was issued, refused, revoked, linked, and on whose behalf. Entries, their hash chain, its check.
//!
//! Each entry carries the hash of the one before it and its own: SHA-256 over
//!
//! ```text
//! "tombolo audit 1" NUL | hash of the entry before (32 bytes; zeros before the first) | fields
//! fields: sequence, time, cluster, action, outcome, subject, serial, SPKI hash, requester's identity, requester's uid,
//!         token, reason, count, each as u32 big-endian length and UTF-8 (numbers in decimal, nothing as length 0)
//! ```
//!
//! So nobody can change, remove or insert one without changing every later hash: whoever has noted a head elsewhere sees
//! it. The federator's core is the one writer; anybody may check ([`Verifier`]), also an exported file. Pure.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// What stands for the hash before the first entry.
pub const GENESIS: &str = "0000000000000000000000000000000000000000000000000000000000000000";
const LABEL: &[u8] = b"tombolo audit 1\0";
/// Characters of a reason or a name in an entry: whoever is refused chooses some of them.
const MAX_TEXT: usize = 500;

/// What happened.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Action {
    /// A first identity, by token.
    Join,
    Renew,
    /// A machine has left for good.
    Leave,
    /// A process came with an identity whose holder lives.
    Clone,
    /// The federator's own identity, at each start and at half its life.
    OwnSvid,
    /// A join token was made.
    Token,
    /// A link token was made.
    LinkToken,
    Link,
    Unlink,
    /// A peer has said that it is linked no more.
    LinkEnded,
    /// A peer that was created anew is accepted.
    LinkAccept,
    Revoke,
    Unrevoke,
    /// A step of a rotation of the trust root.
    Rotation,
    /// What a foreign trust domain is known by has changed.
    Federation,
}

impl Action {
    pub const ALL: [Self; 15] = [
        Self::Join,
        Self::Renew,
        Self::Leave,
        Self::Clone,
        Self::OwnSvid,
        Self::Token,
        Self::LinkToken,
        Self::Link,
        Self::Unlink,
        Self::LinkEnded,
        Self::LinkAccept,
        Self::Revoke,
        Self::Unrevoke,
        Self::Rotation,
        Self::Federation,
    ];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Join => "join",
            Self::Renew => "renew",
            Self::Leave => "leave",
            Self::Clone => "clone",
            Self::OwnSvid => "own-svid",
            Self::Token => "token",
            Self::LinkToken => "link-token",
            Self::Link => "link",
            Self::Unlink => "unlink",
            Self::LinkEnded => "link-ended",
            Self::LinkAccept => "link-accept",
            Self::Revoke => "revoke",
            Self::Unrevoke => "unrevoke",
            Self::Rotation => "rotation",
            Self::Federation => "federation",
        }
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for Action {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|action| action.as_str() == text).ok_or_else(|| {
            let known: Vec<_> = Self::ALL.iter().map(|action| action.as_str()).collect();
            format!("{text:?} is no action: give one of {}", known.join(", "))
        })
    }
}

/// How it ended.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    #[default]
    Done,
    Refused,
}

impl Outcome {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Done => "done",
            Self::Refused => "refused",
        }
    }
}

impl FromStr for Outcome {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "done" => Ok(Self::Done),
            "refused" => Ok(Self::Refused),
            _ => Err(format!("{text:?} is no outcome: give done or refused")),
        }
    }
}

/// On whose behalf: a proven identity, or the Unix user of an operator.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Requester {
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub identity: String,
    /// By the peer credentials of the operators' socket.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uid: Option<u32>,
}

impl Requester {
    pub fn operator(uid: Option<u32>) -> Self {
        Self { identity: String::new(), uid }
    }
    pub fn identity(identity: impl Into<String>) -> Self {
        Self { identity: identity.into(), uid: None }
    }
    fn is_nobody(&self) -> bool {
        *self == Self::default()
    }
}

/// What is recorded, before it has a place in the chain.
#[derive(Clone, PartialEq, Debug)]
pub struct Event {
    pub action: Action,
    pub outcome: Outcome,
    /// Whom it is about: a SPIFFE ID, `cluster:NAME` for links, the target of a revocation.
    pub subject: String,
    /// Of the certificate, hex.
    pub serial: String,
    pub spki_sha256: String,
    pub requester: Requester,
    /// Id of the token that was made or shown.
    pub token: String,
    pub reason: String,
    /// Refusals of one kind that came together; 1 for everything else.
    pub count: u64,
}

impl Event {
    pub fn done(action: Action, subject: impl Into<String>) -> Self {
        Self {
            action,
            outcome: Outcome::Done,
            subject: subject.into(),
            serial: String::new(),
            spki_sha256: String::new(),
            requester: Requester::default(),
            token: String::new(),
            reason: String::new(),
            count: 1,
        }
    }

    pub fn refused(action: Action, subject: impl Into<String>, reason: impl Into<String>) -> Self {
        Self { outcome: Outcome::Refused, reason: reason.into(), ..Self::done(action, subject) }
    }
}

/// One entry, as it is stored, shown and exported.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Entry {
    /// From 1, without gaps.
    pub sequence: u64,
    /// RFC 3339 in UTC with milliseconds, so that texts sort as times do.
    pub time: String,
    pub cluster: String,
    pub action: Action,
    pub outcome: Outcome,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub subject: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub serial: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub spki_sha256: String,
    #[serde(default, skip_serializing_if = "Requester::is_nobody")]
    pub requester: Requester,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub token: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub count: u64,
    /// Hash of the entry before.
    pub previous: String,
    pub hash: String,
}

fn one() -> u64 {
    1
}
fn is_one(count: &u64) -> bool {
    *count == 1
}

fn short(text: String) -> String {
    if text.len() <= MAX_TEXT { text } else { text.chars().take(MAX_TEXT).collect() }
}

/// A place in the chain: the entry of this sequence has this hash.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Link {
    pub sequence: u64,
    pub hash: String,
}

impl Link {
    /// Before the first entry.
    pub fn genesis() -> Self {
        Self { sequence: 0, hash: GENESIS.to_owned() }
    }
}

impl Entry {
    /// The entry after `head`.
    pub fn after(head: &Link, cluster: &str, time: String, event: Event) -> Self {
        let Event { action, outcome, subject, serial, spki_sha256, requester, token, reason, count } = event;
        let mut entry = Self {
            sequence: head.sequence + 1,
            time,
            cluster: cluster.to_owned(),
            action,
            outcome,
            subject: short(subject),
            serial,
            spki_sha256,
            requester: Requester { identity: short(requester.identity), uid: requester.uid },
            token: short(token),
            reason: short(reason),
            count,
            previous: head.hash.clone(),
            hash: String::new(),
        };
        entry.hash = entry.digest();
        entry
    }

    /// The hash that this entry should have.
    pub fn digest(&self) -> String {
        let Self {
            sequence,
            time,
            cluster,
            action,
            outcome,
            subject,
            serial,
            spki_sha256,
            requester: Requester { identity, uid },
            token,
            reason,
            count,
            previous,
            hash: _,
        } = self;
        let mut hasher = Sha256::new();
        hasher.update(LABEL);
        // What is no hash stands for itself: it can't be taken for one of 32 bytes.
        hasher.update(hex::decode(previous).unwrap_or_else(|_| previous.as_bytes().to_vec()));
        let uid = uid.map(|uid| uid.to_string()).unwrap_or_default();
        let (sequence, count) = (sequence.to_string(), count.to_string());
        let fields: [&str; 13] = [
            &sequence,
            time,
            cluster,
            action.as_str(),
            outcome.as_str(),
            subject,
            serial,
            spki_sha256,
            identity,
            &uid,
            token,
            reason,
            &count,
        ];
        for field in fields {
            hasher.update(u32::try_from(field.len()).unwrap_or(u32::MAX).to_be_bytes());
            hasher.update(field.as_bytes());
        }
        hex::encode(hasher.finalize())
    }

    pub fn link(&self) -> Link {
        Link { sequence: self.sequence, hash: self.hash.clone() }
    }
}

/// Where a chain does not hold.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Broken {
    #[error("entry {sequence} is not as it was written: its hash is {hash}, its content makes {digest}")]
    Altered { sequence: u64, hash: String, digest: String },
    #[error(
        "entry {sequence} does not continue entry {before}: it names {previous} as the hash before it, which is {hash}: one of the two was replaced"
    )]
    Unlinked { sequence: u64, before: u64, previous: String, hash: String },
    #[error(
        "entry {found} follows entry {before}: {} missing between them, removed or left out by a filter",
        missing(.before, .found)
    )]
    Gap { before: u64, found: u64 },
}

fn missing(before: &u64, found: &u64) -> String {
    match found.checked_sub(before + 1) {
        Some(1) => "one is".to_owned(),
        Some(count @ 2..) => format!("{count} are"),
        _ => "the order is wrong, what should come next is".to_owned(),
    }
}

/// Checks a chain, entry by entry in order.
#[derive(Clone, Debug)]
pub struct Verifier {
    last: Option<Link>,
    first: Option<u64>,
    entries: u64,
    noted: Option<String>,
    noted_at: Option<u64>,
}

impl Verifier {
    /// `anchor`: what the first entry has to continue; `None` takes a later entry as a start (an export of a part), the
    /// very first has to be the first. `noted`: a hash that must be found on the way.
    pub fn new(anchor: Option<Link>, noted: Option<String>) -> Self {
        let mut verifier = Self { last: None, first: None, entries: 0, noted, noted_at: None };
        if let Some(anchor) = anchor {
            verifier.continue_at(anchor);
        }
        verifier
    }

    /// Entries up to `anchor` were dropped: the next one has to continue it.
    pub fn continue_at(&mut self, anchor: Link) {
        self.meet(&anchor);
        self.last = Some(anchor);
    }

    fn meet(&mut self, link: &Link) {
        if self.noted.as_deref().is_some_and(|noted| noted.eq_ignore_ascii_case(&link.hash)) {
            self.noted_at = Some(link.sequence);
        }
    }

    pub fn push(&mut self, entry: &Entry) -> Result<(), Broken> {
        let start = || match entry.sequence {
            0 | 1 => Link::genesis(),
            sequence => Link { sequence: sequence - 1, hash: entry.previous.clone() },
        };
        let before = match &self.last {
            Some(last) => last.clone(),
            None => {
                let start = start();
                self.meet(&start);
                start
            }
        };
        if entry.sequence != before.sequence + 1 {
            return Err(Broken::Gap { before: before.sequence, found: entry.sequence });
        }
        let digest = entry.digest();
        if digest != entry.hash {
            let (sequence, hash) = (entry.sequence, entry.hash.clone());
            return Err(Broken::Altered { sequence, hash, digest });
        }
        if entry.previous != before.hash {
            return Err(Broken::Unlinked {
                sequence: entry.sequence,
                before: before.sequence,
                previous: entry.previous.clone(),
                hash: before.hash,
            });
        }
        self.first.get_or_insert(entry.sequence);
        self.entries += 1;
        let link = entry.link();
        self.meet(&link);
        self.last = Some(link);
        Ok(())
    }

    pub fn entries(&self) -> u64 {
        self.entries
    }
    /// Sequence of the first entry that was checked.
    pub fn first(&self) -> Option<u64> {
        self.first
    }
    /// The newest entry so far; what to note elsewhere.
    pub fn head(&self) -> Option<&Link> {
        self.last.as_ref()
    }
    /// Where the noted hash was met.
    pub fn noted_at(&self) -> Option<u64> {
        self.noted_at
    }
}

#[cfg(test)]
mod tests;
