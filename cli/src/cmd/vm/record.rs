//! What `vm join` has made, kept so that it can be undone: each entry is on the disk before what it names is made.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use tombolo_identity::files;

use super::place::Place;
use crate::failure::{self, Failure};

const VERSION: u32 = 1;
/// A dozen paths.
const MAX_BYTES: u64 = 64 * 1024;

/// One thing that was made, in the order of making.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Made {
    File(PathBuf),
    /// Left empty, it goes.
    Directory(PathBuf),
    /// The state directory of a sidecar.
    Identity(PathBuf),
    CaptureRules,
    /// A unit that was enabled and started.
    Unit(String),
    /// The machine's resolver points at the sidecar.
    Names,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Record {
    version: u32,
    pub name: String,
    pub cluster: String,
    /// Everything was done.
    pub complete: bool,
    /// systemd runs the sidecar.
    pub systemd: bool,
    /// Where the sidecar answers whether it is ready.
    pub admin: std::net::SocketAddr,
    pub made: Vec<Made>,
}

impl Record {
    pub fn new(name: &str, cluster: &str, systemd: bool, admin: std::net::SocketAddr) -> Self {
        let (name, cluster) = (name.to_owned(), cluster.to_owned());
        Self { version: VERSION, name, cluster, complete: false, systemd, admin, made: Vec::new() }
    }

    pub fn load(place: &Place) -> Result<Option<Self>, Failure> {
        let path = place.record();
        if !path.exists() {
            return Ok(None);
        }
        let damaged = |reason: String| {
            Failure::new(format_args!("does not read ({reason})"))
                .at(path.display())
                .remedy("take away by hand what is there: units, capture rules, resolver, state directory; then this file")
        };
        let bytes = files::read(&path, MAX_BYTES).map_err(|e| Failure::new(failure::chain(&e)))?;
        let record: Self = serde_json::from_slice(&bytes).map_err(|e| damaged(e.to_string()))?;
        if record.version != VERSION {
            return Err(damaged(format!("version {}", record.version)));
        }
        Ok(Some(record))
    }

    pub fn save(&self, place: &Place) -> Result<(), Failure> {
        let bytes = serde_json::to_vec_pretty(self).map_err(Failure::new)?;
        let written = files::write_atomic(&place.record(), &bytes, 0o600);
        written.map_err(|e| super::undo::failed("can't write", &place.record(), &e.source))
    }

    /// Notes what is about to be made.
    pub fn note(&mut self, place: &Place, made: Made) -> Result<(), Failure> {
        self.made.push(made);
        self.save(place)
    }
}
