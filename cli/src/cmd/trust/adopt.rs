//! `tombolo trust adopt`: a foreign authority above a cluster's CA, bound by the root to that cluster.

use std::path::PathBuf;

use clap::Args;
use tombolo_identity::authority::adopt::Upstream;
use tombolo_model::names::ClusterName;
use tombolo_runtime::clock;

use super::keys::KeyArgs;
use super::{Known, Place, cluster_dir, dirs, rotate};
use crate::failure::{Exit, Failure, chain};
use crate::output;

#[derive(Debug, Args)]
pub struct AdoptArgs {
    /// Name of the cluster
    name: String,
    /// What the other CA signed for `ca.csr`, with what is between it and its root (PEM)
    #[arg(long, value_name = "FILE")]
    certificate: PathBuf,
    /// The other CA's roots (PEM)
    #[arg(long, value_name = "FILE")]
    authority: PathBuf,
    /// Directory to write to [default: <dir>/clusters/<name>]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    #[command(flatten)]
    known: Known,
    #[command(flatten)]
    place: Place,
    #[command(flatten)]
    key: KeyArgs,
}

pub fn adopt(args: AdoptArgs) -> Result<Exit, Failure> {
    let AdoptArgs { name, certificate, authority, out, known, place, key } = args;
    let cluster: ClusterName = name.parse().map_err(Failure::usage)?;
    let dir = place.resolve()?;
    rotate::refuse_while_under_way(&dir)?;
    let failed = |e| Failure::new(chain(&e));
    let upstream = Upstream::read(&certificate, &authority).map_err(failed)?;
    let out = out.unwrap_or_else(|| cluster_dir(&dir, cluster.as_str()));
    let mut root = key.open(&dir)?;
    // Before signing: a name is not used up by a directory that can't be written.
    dirs::ensure_private(&out).map_err(Failure::new)?;
    let adopted =
        root.adopt(&cluster, &upstream, known.existing(), clock::since_unix_epoch()).map_err(failed)?;
    adopted.save(&out).map_err(failed)?;
    output::line(format_args!(
        "the key of {cluster} (tag {}) is adopted; certificates written to {}",
        adopted.tag,
        out.display()
    ))?;
    eprintln!(
        "next: put all files from there beside ca.key, where {cluster} runs; then `tombolo trust reload` if it runs"
    );
    Ok(Exit::Done)
}
