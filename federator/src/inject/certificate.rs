//! Which certificate the webhook shows, and which CAs the API server is to trust (pure, time passed in).
//!
//! A new certificate is there, and its CA trusted, before any replica shows it; the one before stays trusted after it: so that
//! neither an API server nor a replica that hears of it later fails a request. What is kept is a Secret:
//!
//! ```text
//! tls.crt  tls.key  ca.crt          what is shown
//! next.crt next.key next-ca.crt     what will be, once its CA is trusted everywhere
//! previous-ca.crt                   the CA of the one before
//! ```

use std::collections::BTreeMap;
use std::time::Duration;

use k8s_openapi::ByteString;
use tombolo_identity::issuer::IssueError;
use tombolo_identity::server_certificate::{self, Described, describe};
use zeroize::Zeroizing;

/// Rotated after two thirds: a month of an API server that is away does no harm.
pub const LIFE: Duration = Duration::from_secs(90 * 86_400);
/// From trusting a CA to showing what it has signed: API servers hear of changed configurations by a watch, in milliseconds;
/// a server that is restarted or cut off meanwhile reads them anew.
pub const SETTLES: Duration = Duration::from_secs(10);
/// Annotation of the Secret: another value than in [`ROTATED`] asks for a new certificate.
pub const ROTATE: &str = "tombolo.dev/rotate";
/// The value of [`ROTATE`] that the newest certificate was made for.
pub const ROTATED: &str = "tombolo.dev/rotated";
const CURRENT: [&str; 3] = ["tls.crt", "tls.key", "ca.crt"];
const NEXT: [&str; 3] = ["next.crt", "next.key", "next-ca.crt"];
const PREVIOUS_CA: &str = "previous-ca.crt";

/// A certificate with its key and CA; PEM.
#[derive(Clone, PartialEq)]
pub struct Generation {
    pub certificate: String,
    pub key: Zeroizing<String>,
    pub ca: String,
    pub described: Described,
}

impl Generation {
    fn issue(names: &[String], now: Duration) -> Result<Self, IssueError> {
        let made = server_certificate::issue(names, now, LIFE)?;
        let (certificate, key, ca) = (made.certificate_pem, made.key_pem, made.ca_pem);
        let described = describe(&certificate)
            .ok_or_else(|| IssueError::Sign("what was signed does not read".to_owned()))?;
        Ok(Self { certificate, key, ca, described })
    }

    fn read(data: &BTreeMap<String, ByteString>, keys: [&str; 3]) -> Option<Self> {
        let [certificate, key, ca] = keys.map(|key| text(data, key));
        let (certificate, key, ca) = (certificate?, Zeroizing::new(key?), ca?);
        let described = describe(&certificate)?;
        describe(&ca)?;
        Some(Self { certificate, key, ca, described })
    }

    fn write(&self, data: &mut BTreeMap<String, ByteString>, keys: [&str; 3]) {
        let values = [self.certificate.as_str(), self.key.as_str(), self.ca.as_str()];
        for (key, value) in keys.into_iter().zip(values) {
            data.insert(key.to_owned(), ByteString(value.as_bytes().to_vec()));
        }
    }

    fn fits(&self, names: &[String], unix: u64) -> bool {
        self.described.not_after > unix && names.iter().all(|name| self.described.names.contains(name))
    }

    fn due(&self) -> u64 {
        let Described { issued, not_after, .. } = self.described;
        issued.saturating_add(not_after.saturating_sub(issued) / 3 * 2)
    }
}

fn text(data: &BTreeMap<String, ByteString>, key: &str) -> Option<String> {
    data.get(key).and_then(|bytes| String::from_utf8(bytes.0.clone()).ok())
}

/// What the Secret holds.
#[derive(Clone, PartialEq, Default)]
pub struct Stored {
    pub current: Option<Generation>,
    pub next: Option<Generation>,
    previous_ca: Option<String>,
    /// What was asked for last, and what has been done about.
    rotate: String,
    rotated: String,
}

/// What is to be done now.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    /// Nothing before this time, Unix seconds.
    Wait { until: u64 },
    /// There is none that is of use: make one, and show it at once.
    Issue,
    /// Make the next one.
    Prepare,
    /// Show the next one.
    Promote,
}

impl Stored {
    pub fn read(data: &BTreeMap<String, ByteString>, annotations: &BTreeMap<String, String>) -> Self {
        let annotation = |key: &str| annotations.get(key).cloned().unwrap_or_default();
        Self {
            current: Generation::read(data, CURRENT),
            next: Generation::read(data, NEXT),
            previous_ca: text(data, PREVIOUS_CA).filter(|ca| describe(ca).is_some()),
            rotate: annotation(ROTATE),
            rotated: annotation(ROTATED),
        }
    }

    pub fn data(&self) -> BTreeMap<String, ByteString> {
        let mut data = BTreeMap::new();
        for (generation, keys) in [(&self.current, CURRENT), (&self.next, NEXT)] {
            generation.iter().for_each(|generation| generation.write(&mut data, keys));
        }
        let previous =
            self.previous_ca.iter().map(|ca| (PREVIOUS_CA.to_owned(), ByteString(ca.clone().into_bytes())));
        data.extend(previous);
        data
    }

    pub fn rotated(&self) -> &str {
        &self.rotated
    }

    /// The CAs to be trusted; PEM.
    pub fn bundle(&self) -> String {
        let of =
            |generation: &Option<Generation>| generation.as_ref().map(|generation| generation.ca.clone());
        [of(&self.current), of(&self.next), self.previous_ca.clone()].into_iter().flatten().collect()
    }

    /// `names`: of the webhook's Service. `trusted`: the API server has been told the whole bundle.
    pub fn step(&self, names: &[String], unix: u64, trusted: bool) -> Step {
        let next = self.next.as_ref().filter(|next| next.fits(names, unix));
        let Some(current) = self.current.as_ref().filter(|current| current.fits(names, unix)) else {
            // One that nobody trusts yet is better than one that nobody may trust.
            return if next.is_some() { Step::Promote } else { Step::Issue };
        };
        let asked = self.rotate != self.rotated;
        match next {
            None if asked || unix >= current.due() => Step::Prepare,
            None => Step::Wait { until: current.due() },
            Some(next) => match next.described.issued.saturating_add(SETTLES.as_secs()) {
                settled if settled > unix => Step::Wait { until: settled },
                _ if trusted => Step::Promote,
                // Looked at again when it is.
                _ => Step::Wait { until: unix.saturating_add(60) },
            },
        }
    }

    /// What is stored after a step.
    pub fn after(&self, step: Step, names: &[String], now: Duration) -> Result<Self, IssueError> {
        let done = self.rotate.clone();
        Ok(match step {
            Step::Wait { .. } => self.clone(),
            Step::Issue => Self {
                current: Some(Generation::issue(names, now)?),
                next: None,
                previous_ca: self.current.as_ref().map(|current| current.ca.clone()),
                rotated: done,
                ..self.clone()
            },
            Step::Prepare => {
                Self { next: Some(Generation::issue(names, now)?), rotated: done, ..self.clone() }
            }
            Step::Promote => Self {
                current: self.next.clone(),
                next: None,
                previous_ca: self.current.as_ref().map(|current| current.ca.clone()),
                ..self.clone()
            },
        })
    }
}

#[cfg(test)]
mod tests;
