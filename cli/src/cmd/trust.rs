//! `tombolo trust`: the offline root of the federation and the intermediates of its clusters.

mod deliver;
mod rotate;

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use serde_json::json;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tombolo_identity::TrustDomain;
use tombolo_identity::authority::{Existing, RegistryEntry, RootAuthority};
use tombolo_model::names::ClusterName;
use tombolo_runtime::clock;
use tombolo_runtime::dirs::{self, Dirs};

use super::operate;
use crate::args::{Connect, Format, Output};
use crate::failure::{Exit, Failure};
use crate::output;

/// Make the federation's offline root and the intermediates of its clusters
#[derive(Debug, Args)]
#[command(after_help = "\
The root key stays where it is made and is needed only to add or renew clusters: keep it offline. What
`trust cluster` writes is what the federator of that cluster needs.

Examples:
  tombolo trust init --trust-domain acme.example
  tombolo trust cluster east
  tombolo trust show")]
pub struct TrustArgs {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Make the root of a new federation
    #[command(after_help = "\
Examples:
  tombolo trust init --trust-domain acme.example
  tombolo trust init --trust-domain acme.example --dir /media/offline/acme")]
    Init {
        /// The federation's SPIFFE trust domain
        #[arg(long, env = "TOMBOLO_TRUST_DOMAIN")]
        trust_domain: String,
        #[command(flatten)]
        place: Place,
    },
    /// Make the intermediate of a cluster
    #[command(after_help = "\
Give the directory it writes to the cluster's federator (--trust-dir).

Examples:
  tombolo trust cluster east
  tombolo trust cluster west --out /media/west
  tombolo trust cluster west --renew         a further intermediate, with the same tag
  tombolo trust cluster west --recreate      the cluster was lost: a new tag")]
    Cluster {
        /// Name of the cluster
        name: String,
        /// Directory to write to [default: <dir>/clusters/<name>]
        #[arg(long, value_name = "DIR")]
        out: Option<PathBuf>,
        /// A further intermediate of a known cluster, with its tag
        #[arg(long, conflicts_with = "recreate")]
        renew: bool,
        /// The cluster was lost: sign a new one by its name, with a new tag; peers must `link accept` it
        #[arg(long)]
        recreate: bool,
        #[command(flatten)]
        place: Place,
    },
    /// Show the root and the clusters it has signed
    #[command(after_help = "\
Examples:
  tombolo trust show
  tombolo trust show -o json")]
    Show {
        #[command(flatten)]
        place: Place,
        #[command(flatten)]
        output: Output,
    },
    /// Exchange the root while everything runs: stage a new one, reissue, retire the old one
    #[command(after_help = "\
Each step is given to one federator, which passes it on to every linked cluster, and waits until every sidecar, gateway and
federator has acknowledged it. A run that was ended anywhere is continued by the next.

Examples:
  tombolo trust rotate --wait --timeout 10m
  tombolo trust rotate --status
  tombolo trust rotate --dry-run
  tombolo trust rotate --wait --timeout 1h --force     cuts off whoever has not acknowledged; asks first")]
    Rotate(rotate::RotateArgs),
    /// Give a federator the trust updates that it has missed
    #[command(after_help = "\
For a cluster that is not linked, that was left out of a rotation, or whose store was lost.

Examples:
  tombolo trust deliver --context west")]
    Deliver(deliver::DeliverArgs),
    /// Have a running federator read its trust directory again: a further intermediate, without a restart
    #[command(after_help = "\
Copy what `tombolo trust cluster NAME --renew` wrote over the federator's --trust-dir first. Certificates of the
intermediate before stay good until their end.

Examples:
  tombolo trust reload --context east --wait
  tombolo trust reload --renew-leaves --wait --timeout 2m")]
    Reload(deliver::ReloadArgs),
}

#[derive(Debug, Args)]
struct Place {
    /// Directory of the root [default: <state directory>/trust]
    #[arg(long, env = "TOMBOLO_TRUST_ROOT", value_name = "DIR")]
    dir: Option<PathBuf>,
}

impl Place {
    fn resolve(self) -> Result<PathBuf, Failure> {
        match self.dir {
            Some(dir) => Ok(dir),
            None => Ok(Dirs::from_environment().map_err(Failure::new)?.trust()),
        }
    }
}

/// Where a cluster's material lies unless `--out` says otherwise; the federator looks there too.
pub fn cluster_dir(root: &Path, cluster: &str) -> PathBuf {
    root.join("clusters").join(cluster)
}

pub fn run(args: TrustArgs, connect: Connect) -> Result<Exit, Failure> {
    match args.verb {
        Verb::Init { trust_domain, place } => init(&trust_domain, &place.resolve()?),
        Verb::Cluster { name, out, renew, recreate, place } => {
            let existing = match (renew, recreate) {
                (true, _) => Existing::Renew,
                (_, true) => Existing::Recreate,
                _ => Existing::Refuse,
            };
            cluster(&name, out, existing, &place.resolve()?)
        }
        Verb::Show { place, output } => show(&place.resolve()?, output.format),
        Verb::Rotate(args) => operate(rotate::run(args, connect)),
        Verb::Deliver(args) => operate(deliver::deliver(args, connect)),
        Verb::Reload(args) => operate(deliver::reload(args, connect)),
    }
}

fn init(trust_domain: &str, dir: &Path) -> Result<Exit, Failure> {
    let trust_domain: TrustDomain = trust_domain
        .parse()
        .map_err(|e| Failure::usage(e).at("--trust-domain").remedy("give a name such as acme.example"))?;
    dirs::ensure_private(dir).map_err(Failure::new)?;
    let root = RootAuthority::init(dir, trust_domain, clock::since_unix_epoch()).map_err(Failure::new)?;
    output::line(format_args!("root of {} made in {}", root.trust_domain, dir.display()))?;
    output::line(format_args!("fingerprint {}", root.fingerprint()))?;
    eprintln!("keep {} offline and backed up; next: tombolo trust cluster NAME", dir.display());
    Ok(Exit::Done)
}

fn load(dir: &Path) -> Result<RootAuthority, Failure> {
    RootAuthority::load(dir).map_err(|e| {
        Failure::new(crate::failure::chain(&e))
            .remedy("make a root with `tombolo trust init`, or name its directory with --dir")
    })
}

fn cluster(name: &str, out: Option<PathBuf>, existing: Existing, dir: &Path) -> Result<Exit, Failure> {
    let name: ClusterName = name.parse().map_err(Failure::usage)?;
    rotate::refuse_while_under_way(dir)?;
    let mut root = load(dir)?;
    let out = out.unwrap_or_else(|| cluster_dir(dir, name.as_str()));
    let made = !out.exists();
    // Before signing: a name is not used up by a directory that can't be written.
    dirs::ensure_private(&out).map_err(Failure::new)?;
    let material = root.sign_cluster(&name, existing, clock::since_unix_epoch()).map_err(|refusal| {
        if made {
            let _ = std::fs::remove_dir(&out);
        }
        Failure::new(refusal)
    })?;
    material.save(&out).map_err(Failure::new)?;
    output::line(format_args!("intermediate of {name} (tag {}) written to {}", material.tag, out.display()))?;
    eprintln!("next, where {name} runs: tombolo federator --cluster {name} --trust-dir {}", out.display());
    Ok(Exit::Done)
}

fn show(dir: &Path, format: Format) -> Result<Exit, Failure> {
    let root = load(dir)?;
    let document = json!({
        "version": 1,
        "trustDomain": root.trust_domain.as_str(),
        "fingerprint": root.fingerprint(),
        "directory": dir,
        "clusters": root.registry().iter().map(|entry| json!({
            "name": entry.name, "tag": entry.tag.to_string(), "issuedAt": time_text(entry.issued_at),
            "spkiSha256": entry.spki_sha256, "superseded": entry.superseded,
        })).collect::<Vec<_>>(),
    });
    match format {
        Format::Json => output::json(&document)?,
        Format::Yaml => output::yaml(&document)?,
        Format::Name => root.registry().iter().try_for_each(|entry| output::line(&entry.name))?,
        Format::Table | Format::Wide => {
            output::line(format_args!("trust domain {}", root.trust_domain))?;
            output::line(format_args!("fingerprint  {}\n", root.fingerprint()))?;
            output::line(registry(root.registry(), format == Format::Wide))?;
        }
    }
    Ok(Exit::Done)
}

fn registry(entries: &[RegistryEntry], wide: bool) -> String {
    let mut headers = vec!["cluster", "tag", "issued", "state"];
    if wide {
        headers.push("key");
    }
    let mut table = output::table(&headers);
    for RegistryEntry { name, tag, spki_sha256, issued_at, superseded } in entries {
        let state = if *superseded { "superseded" } else { "current" };
        let mut row = vec![name.to_string(), tag.to_string(), time_text(*issued_at), state.to_owned()];
        if wide {
            row.push(spki_sha256.clone());
        }
        table.add_row(row);
    }
    output::table_text(&table)
}

fn time_text(unix: u64) -> String {
    let time = i64::try_from(unix).ok().and_then(|unix| OffsetDateTime::from_unix_timestamp(unix).ok());
    time.and_then(|time| time.format(&Rfc3339).ok()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_root_a_cluster_and_what_goes_wrong_with_them() {
        let dir = std::env::temp_dir().join(format!("tombolo-trust-{}", std::process::id()));
        init("acme.example", &dir).unwrap();
        assert!(init("acme.example", &dir).unwrap_err().to_string().contains("exists already"));
        cluster("east", None, Existing::Refuse, &dir).unwrap();
        assert!(cluster_dir(&dir, "east").join("cluster.json").exists());
        let again = cluster("east", None, Existing::Refuse, &dir).unwrap_err().to_string();
        assert!(again.contains("--renew") && again.contains("--recreate"), "{again}");
        let bad = cluster("East!", None, Existing::Refuse, &dir).unwrap_err();
        assert!(bad.exit == Exit::Usage && bad.to_string().contains("East!"), "{bad}");
        cluster("east", None, Existing::Recreate, &dir).unwrap();
        let table = registry(load(&dir).unwrap().registry(), false);
        std::fs::remove_dir_all(&dir).unwrap();
        assert!(table.contains("superseded") && table.contains("current"), "{table}");
    }

    #[test]
    fn a_wrong_trust_domain_is_named() {
        let error = init("Acme Example", Path::new("/nonexistent")).unwrap_err();
        assert!(error.exit == Exit::Usage && error.to_string().contains("--trust-domain"), "{error}");
    }

    #[test]
    fn a_missing_root_says_how_to_make_one() {
        let text = load(Path::new("/nonexistent/root")).err().unwrap().to_string();
        assert!(text.contains("/nonexistent/root") && text.contains("trust init"), "{text}");
    }
}
