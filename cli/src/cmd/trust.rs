//! `tombolo trust`: the offline root of the federation and the intermediates of its clusters.

mod adopt;
mod csr;
mod deliver;
pub mod keys;
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

use keys::{CurrentPassphrase, Encryption, KeyArgs};

use super::operate;
use crate::args::{Connect, Format, Output};
use crate::failure::{Exit, Failure};
use crate::output;

/// Make the federation's offline root and the intermediates of its clusters
#[derive(Debug, Args)]
#[command(after_help = "\
The root key stays where it is made and is needed only to add or renew clusters: keep it offline, and under a
passphrase or behind a program that signs (a PKCS#11 tool, a KMS). What `trust cluster` writes is what the federator of
that cluster needs; with `trust csr` and `trust sign` its key never leaves the federator's machine.

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
At a terminal it asks for a passphrase for the root's key, and an empty one leaves the key in a plain file; elsewhere the
key is encrypted when a passphrase is given. --encrypt insists, --no-encrypt asks nothing.

With --signer-command the key lies elsewhere and no root.key is written. The program is started with one more argument:
`public-key` (it prints the public key as PEM) or `sign` (it reads the bytes to sign, not their hash, and prints an
ECDSA signature in DER or base64). `openssl pkey -pubout` and `openssl dgst -sha256 -sign` answer like that.

Examples:
  tombolo trust init --trust-domain acme.example
  tombolo trust init --trust-domain acme.example --encrypt --passphrase-file /run/secrets/root
  tombolo trust init --trust-domain acme.example --signer-command '/usr/local/bin/hsm-sign --slot 3'
  tombolo trust init --trust-domain acme.example --dir /media/offline/acme")]
    Init {
        /// The federation's SPIFFE trust domain
        #[arg(long, env = "TOMBOLO_TRUST_DOMAIN")]
        trust_domain: String,
        #[command(flatten)]
        encryption: Encryption,
        #[command(flatten)]
        place: Place,
        #[command(flatten)]
        key: KeyArgs,
    },
    /// Make the intermediate of a cluster
    #[command(after_help = "\
Give the directory it writes to the cluster's federator (--trust-dir).

Examples:
  tombolo trust cluster east
  tombolo trust cluster west --out /media/west
  tombolo trust cluster west --csr west.csr  for a key that was made there with `tombolo trust csr`
  tombolo trust cluster west --renew         a further intermediate, with the same tag
  tombolo trust cluster west --recreate      the cluster was lost: a new tag")]
    Cluster {
        /// Name of the cluster
        name: String,
        /// Directory to write to [default: <dir>/clusters/<name>]
        #[arg(long, value_name = "DIR")]
        out: Option<PathBuf>,
        /// Sign this certificate request instead of making a key
        #[arg(long, value_name = "FILE")]
        csr: Option<PathBuf>,
        #[command(flatten)]
        known: Known,
        #[command(flatten)]
        place: Place,
        #[command(flatten)]
        key: KeyArgs,
    },
    /// Make a cluster's key and certificate request where its federator runs
    #[command(after_help = "\
Writes ca.key, which stays there, and ca.csr for `tombolo trust sign`. A ca.key that is there already is kept.

Examples:
  tombolo trust csr east --out /etc/tombolo/east
  tombolo trust csr east")]
    Csr(csr::CsrArgs),
    /// Sign a cluster's certificate request, where the root is
    #[command(after_help = "\
Checks that whoever made the request holds its key, and writes ca.crt, bundle.json and cluster.json. Each federator replica
may have a key of its own: sign further ones with --renew.

Examples:
  tombolo trust sign /media/usb/ca.csr --out /media/usb/east
  tombolo trust sign east-2.csr --renew --out /media/usb/east-2")]
    Sign(csr::SignArgs),
    /// Bind a cluster's key that another CA (SPIRE, a company's PKI) has certified, where the root is
    #[command(after_help = "\
The other CA signs the request of `tombolo trust csr` as a CA certificate; for SPIRE that is NewDownstreamX509CA, asked by a
workload with a -downstream entry. The mesh believes what the root signs here for the same key, bound to the cluster, and
nothing else that the other CA signs. Applications get both certificates by the Workload API, so whoever knows that CA alone
believes them.

Examples:
  tombolo trust adopt east --certificate signed.pem --authority spire-roots.pem --out /media/usb/east
  tombolo trust adopt east --certificate signed.pem --authority spire-roots.pem --renew")]
    Adopt(adopt::AdoptArgs),
    /// Encrypt the root's key, change its passphrase, or take it away
    #[command(after_help = "\
The current passphrase comes from --passphrase-file or TOMBOLO_TRUST_PASSPHRASE, the new one from --new-passphrase-file or
TOMBOLO_TRUST_NEW_PASSPHRASE; a terminal is asked for what is missing. The file is PKCS#8 (PBES2, scrypt, AES-256), which
`openssl pkey` reads too.

Examples:
  tombolo trust passphrase
  tombolo trust passphrase --passphrase-file old --new-passphrase-file new
  tombolo trust passphrase --remove")]
    Passphrase {
        /// File with the new passphrase
        #[arg(
            long,
            env = "TOMBOLO_TRUST_NEW_PASSPHRASE_FILE",
            value_name = "FILE",
            conflicts_with = "remove"
        )]
        new_passphrase_file: Option<PathBuf>,
        /// Keep the key in a plain file from now on
        #[arg(long)]
        remove: bool,
        #[command(flatten)]
        place: Place,
        #[command(flatten)]
        passphrase: CurrentPassphrase,
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

/// How a name that is registered already is treated.
#[derive(Clone, Copy, Debug, Args)]
struct Known {
    /// A further intermediate of a known cluster, with its tag
    #[arg(long, conflicts_with = "recreate")]
    renew: bool,
    /// The cluster was lost: sign a new one by its name, with a new tag; peers must `link accept` it
    #[arg(long)]
    recreate: bool,
}

impl Known {
    fn existing(self) -> Existing {
        match (self.renew, self.recreate) {
            (true, _) => Existing::Renew,
            (_, true) => Existing::Recreate,
            _ => Existing::Refuse,
        }
    }
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
        Verb::Init { trust_domain, encryption, place, key } => {
            init(&trust_domain, encryption, &key, &place.resolve()?)
        }
        Verb::Cluster { name, out, csr: Some(file), known, place, key } => {
            let name: ClusterName = name.parse().map_err(Failure::usage)?;
            let existing = known.existing();
            csr::signed(&name, &csr::read(&file)?, out, existing, &place.resolve()?, &key)
        }
        Verb::Cluster { name, out, csr: None, known, place, key } => {
            let out = cluster(&name, out, known.existing(), &place.resolve()?, &key)?;
            eprintln!(
                "next, where {name} runs: tombolo federator --cluster {name} --trust-dir {}",
                out.display()
            );
            Ok(Exit::Done)
        }
        Verb::Csr(args) => csr::make(args),
        Verb::Sign(args) => csr::sign(args),
        Verb::Adopt(args) => adopt::adopt(args),
        Verb::Passphrase { new_passphrase_file, remove, place, passphrase } => {
            keys::change(&passphrase, new_passphrase_file.as_deref(), remove, &place.resolve()?)
        }
        Verb::Show { place, output } => show(&place.resolve()?, output.format),
        Verb::Rotate(args) => operate(rotate::run(args, connect)),
        Verb::Deliver(args) => operate(deliver::deliver(args, connect)),
        Verb::Reload(args) => operate(deliver::reload(args, connect)),
    }
}

fn init(trust_domain: &str, encryption: Encryption, key: &KeyArgs, dir: &Path) -> Result<Exit, Failure> {
    let trust_domain: TrustDomain = trust_domain
        .parse()
        .map_err(|e| Failure::usage(e).at("--trust-domain").remedy("give a name such as acme.example"))?;
    dirs::ensure_private(dir).map_err(Failure::new)?;
    let root = key.protect(encryption, |protection| {
        RootAuthority::init_with(dir, trust_domain, protection, clock::since_unix_epoch())
            .map_err(|e| Failure::new(crate::failure::chain(&e)))
    })?;
    output::line(format_args!("root of {} made in {}", root.trust_domain, dir.display()))?;
    output::line(format_args!("fingerprint {}", root.fingerprint()))?;
    eprintln!("keep {} offline and backed up; next: tombolo trust cluster NAME", dir.display());
    Ok(Exit::Done)
}

fn load(dir: &Path) -> Result<RootAuthority, Failure> {
    RootAuthority::load(dir).map_err(|e| {
        let failure = Failure::new(crate::failure::chain(&e));
        if dir.join("root.crt").exists() {
            return failure;
        }
        failure.remedy("make a root with `tombolo trust init`, or name its directory with --dir")
    })
}

/// Signs a cluster: the directory with what it needs.
pub fn cluster(
    name: &str,
    out: Option<PathBuf>,
    existing: Existing,
    dir: &Path,
    key: &KeyArgs,
) -> Result<PathBuf, Failure> {
    let name: ClusterName = name.parse().map_err(Failure::usage)?;
    rotate::refuse_while_under_way(dir)?;
    let mut root = key.open(dir)?;
    let out = out.unwrap_or_else(|| cluster_dir(dir, name.as_str()));
    let made = !out.exists();
    // Before signing: a name is not used up by a directory that can't be written.
    dirs::ensure_private(&out).map_err(Failure::new)?;
    let material = root.sign_cluster(&name, existing, clock::since_unix_epoch()).map_err(|refusal| {
        if made {
            let _ = std::fs::remove_dir(&out);
        }
        Failure::new(crate::failure::chain(&refusal))
    })?;
    material.save(&out).map_err(Failure::new)?;
    output::line(format_args!("intermediate of {name} (tag {}) written to {}", material.tag, out.display()))?;
    Ok(out)
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
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        encryption: Encryption,
        #[command(flatten)]
        key: KeyArgs,
    }

    fn plain() -> Encryption {
        Line::parse_from(["trust", "--no-encrypt"]).encryption
    }
    fn plain_key() -> KeyArgs {
        Line::parse_from(["trust"]).key
    }

    #[test]
    fn a_root_a_cluster_and_what_goes_wrong_with_them() {
        let dir = std::env::temp_dir().join(format!("tombolo-trust-{}", std::process::id()));
        init("acme.example", plain(), &plain_key(), &dir).unwrap();
        assert!(
            init("acme.example", plain(), &plain_key(), &dir)
                .unwrap_err()
                .to_string()
                .contains("exists already")
        );
        cluster("east", None, Existing::Refuse, &dir, &plain_key()).unwrap();
        assert!(cluster_dir(&dir, "east").join("cluster.json").exists());
        let again = cluster("east", None, Existing::Refuse, &dir, &plain_key()).unwrap_err().to_string();
        assert!(again.contains("--renew") && again.contains("--recreate"), "{again}");
        let bad = cluster("East!", None, Existing::Refuse, &dir, &plain_key()).unwrap_err();
        assert!(bad.exit == Exit::Usage && bad.to_string().contains("East!"), "{bad}");
        cluster("east", None, Existing::Recreate, &dir, &plain_key()).unwrap();
        let table = registry(load(&dir).unwrap().registry(), false);
        std::fs::remove_dir_all(&dir).unwrap();
        assert!(table.contains("superseded") && table.contains("current"), "{table}");
    }

    #[test]
    fn a_wrong_trust_domain_is_named() {
        let error = init("Acme Example", plain(), &plain_key(), Path::new("/nonexistent")).unwrap_err();
        assert!(error.exit == Exit::Usage && error.to_string().contains("--trust-domain"), "{error}");
    }

    #[test]
    fn a_missing_root_says_how_to_make_one() {
        let text = load(Path::new("/nonexistent/root")).err().unwrap().to_string();
        assert!(text.contains("/nonexistent/root") && text.contains("trust init"), "{text}");
    }
}
