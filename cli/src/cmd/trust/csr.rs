//! `tombolo trust csr` and `tombolo trust sign`: an intermediate whose key never leaves the federator's machine.

use std::path::{Path, PathBuf};

use clap::Args;
use tombolo_identity::authority::Existing;
use tombolo_identity::authority::csr::{self, ClusterCsr};
use tombolo_identity::files;
use tombolo_identity::signer::file::FileSigner;
use tombolo_model::names::ClusterName;
use tombolo_runtime::clock;

use super::keys::KeyArgs;
use super::{Known, Place, cluster_dir, dirs, rotate};
use crate::failure::{Exit, Failure, chain};
use crate::output;

const MAX_KEY: u64 = 64 * 1024;

#[derive(Debug, Args)]
pub struct CsrArgs {
    /// Name of the cluster
    name: String,
    /// Directory to write to [default: <dir>/clusters/<name>]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    #[command(flatten)]
    place: Place,
}

#[derive(Debug, Args)]
pub struct SignArgs {
    /// The certificate request that `tombolo trust csr` wrote
    file: PathBuf,
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

pub fn make(args: CsrArgs) -> Result<Exit, Failure> {
    let CsrArgs { name, out, place } = args;
    let cluster: ClusterName = name.parse().map_err(Failure::usage)?;
    let out = match out {
        Some(out) => out,
        None => cluster_dir(&place.resolve()?, cluster.as_str()),
    };
    csr::make(&out, &cluster).map_err(|e| Failure::new(chain(&e)))?;
    output::line(format_args!(
        "certificate request of {cluster} written to {}",
        out.join("ca.csr").display()
    ))?;
    eprintln!("ca.key stays there; next, where the root is: tombolo trust sign ca.csr --out DIR");
    eprintln!("then put what that writes beside ca.key");
    Ok(Exit::Done)
}

pub fn sign(args: SignArgs) -> Result<Exit, Failure> {
    let SignArgs { file, out, known, place, key } = args;
    let csr = read(&file)?;
    let name = csr.cluster.clone().ok_or_else(|| {
        Failure::new("the certificate request names no cluster")
            .at(file.display())
            .remedy("name it: `tombolo trust cluster NAME --csr FILE`")
    })?;
    signed(&name, &csr, out, known.existing(), &place.resolve()?, &key)
}

pub fn read(file: &Path) -> Result<ClusterCsr, Failure> {
    ClusterCsr::read(file).map_err(|e| Failure::new(chain(&e)))
}

/// Signs, and writes what goes back.
pub fn signed(
    name: &ClusterName,
    csr: &ClusterCsr,
    out: Option<PathBuf>,
    existing: Existing,
    dir: &Path,
    key: &KeyArgs,
) -> Result<Exit, Failure> {
    rotate::refuse_while_under_way(dir)?;
    let out = out.unwrap_or_else(|| cluster_dir(dir, name.as_str()));
    refuse_beside_another_key(&out, csr)?;
    let mut root = key.open(dir)?;
    // Before signing: a name is not used up by a directory that can't be written.
    dirs::ensure_private(&out).map_err(Failure::new)?;
    let signed = root.sign_csr(name, csr, existing, clock::since_unix_epoch());
    let signed = signed.map_err(|e| Failure::new(chain(&e)))?;
    signed.save(&out).map_err(|e| Failure::new(chain(&e)))?;
    output::line(format_args!("intermediate of {name} (tag {}) written to {}", signed.tag, out.display()))?;
    eprintln!("next: put ca.crt, bundle.json and cluster.json from there beside ca.key, where {name} runs");
    Ok(Exit::Done)
}

/// A certificate beside the key of another one would be of no use, and the one that fits would be lost.
fn refuse_beside_another_key(out: &Path, csr: &ClusterCsr) -> Result<(), Failure> {
    let path = out.join("ca.key");
    if !path.exists() {
        return Ok(());
    }
    let pem = files::read_secret(&path, MAX_KEY).map_err(|e| Failure::new(chain(&e)))?;
    let signer = FileSigner::from_pem(&pem, &path).map_err(|e| Failure::new(chain(&e)))?;
    if csr.is_of(&signer) {
        return Ok(());
    }
    Err(Failure::usage(format_args!(
        "{} is another key than that of the certificate request",
        path.display()
    ))
    .remedy("give another directory with --out"))
}
