//! `tombolo sidecar dns install|remove`: this machine's resolver, pointed at a sidecar's names and back.
//!
//! What was there is remembered in a file before anything is changed; files are replaced whole. Nothing is changed before
//! the sidecar has answered, and the machine's other resolvers stay behind ours, so that it is never without one. Doing
//! it twice is doing it once; what others have written since is theirs and stays.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use serde::{Deserialize, Serialize};
use tombolo_identity::files;
use tombolo_names::exchange;
use tombolo_names::host;

use crate::cmd::names::address;
use crate::failure::{Exit, Failure};

/// As large as anybody's is.
const MAX_BYTES: u64 = 64 * 1024;
const DNS: u16 = 53;
const RESOLVED_DIR: &str = "/etc/systemd/resolved.conf.d";
const RECORD: &str = "host-dns.json";
/// A sidecar answers within a millisecond.
const PATIENCE: Duration = Duration::from_secs(2);

/// Point this machine's resolver at a sidecar's names, or back
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  tombolo sidecar dns install --resolver 127.0.0.54 --dry-run
  tombolo sidecar dns install --resolver 127.0.0.1:7453 --method resolved
  tombolo sidecar dns remove")]
pub struct DnsArgs {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Install(InstallArgs),
    Remove(RemoveArgs),
}

/// Have names asked of a sidecar first
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  tombolo sidecar dns install --resolver 127.0.0.54
  tombolo sidecar dns install --resolver 127.0.0.54 --search shop.svc.clusterset.local
  tombolo sidecar dns install --resolver 127.0.0.1:7453 --method resolved")]
struct InstallArgs {
    /// Where the sidecar serves names, as its --dns-listen has it; a resolv.conf can only name port 53
    #[arg(long, value_name = "ADDRESS[:PORT]")]
    resolver: String,
    /// systemd-resolved's drop-in, or /etc/resolv.conf; auto: the former where it runs
    #[arg(long, value_enum, default_value_t)]
    method: Method,
    /// A domain in which short names are looked up, before those that are there; may be repeated (resolv.conf only)
    #[arg(long, value_name = "DOMAIN")]
    search: Vec<String>,
    /// Don't ask whether it answers first
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    place: Place,
}

/// Put back what was there
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  tombolo sidecar dns remove
  tombolo sidecar dns remove --dry-run")]
struct RemoveArgs {
    #[command(flatten)]
    place: Place,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum Method {
    #[default]
    Auto,
    Resolved,
    ResolvConf,
}

/// The files that it is about.
#[derive(Clone, Debug, Args)]
pub struct Place {
    /// Print what would be changed, and change nothing
    #[arg(long)]
    pub dry_run: bool,
    #[arg(long, value_name = "FILE", default_value = "/etc/resolv.conf")]
    pub resolv_conf: PathBuf,
    /// Where drop-ins of systemd-resolved are
    #[arg(long, value_name = "DIR", default_value = RESOLVED_DIR)]
    pub resolved_dir: PathBuf,
    /// Where it is remembered what was there
    #[arg(long, value_name = "DIR", default_value = "/var/lib/tombolo")]
    pub state_dir: PathBuf,
}

/// What was there before, and what we have made of it.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Record {
    version: u32,
    resolver: SocketAddr,
    path: PathBuf,
    before: Before,
    /// The text that we have written.
    ours: String,
    resolved: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
enum Before {
    Absent,
    Text(String),
    /// A symbolic link to this, and what was read through it.
    Link(PathBuf, String),
}

impl Before {
    fn text(&self) -> &str {
        match self {
            Self::Absent => "",
            Self::Text(text) | Self::Link(_, text) => text,
        }
    }
}

pub fn run(args: DnsArgs) -> Result<Exit, Failure> {
    match args.verb {
        Verb::Install(args) => install(&args),
        Verb::Remove(args) => remove(&args.place),
    }
}

/// Points a machine's resolver at a sidecar that serves there; `vm join` knows where.
pub fn point(resolver: SocketAddr, resolved: bool, search: &[String], place: Place) -> Result<(), Failure> {
    let method = if resolved { Method::Resolved } else { Method::ResolvConf };
    let (resolver, search) = (resolver.to_string(), search.to_vec());
    install(&InstallArgs { resolver, method, search, force: false, place }).map(drop)
}

/// Puts back what was there.
pub fn put_away(place: &Place) -> Result<(), Failure> {
    remove(place).map(drop)
}

fn install(args: &InstallArgs) -> Result<Exit, Failure> {
    let InstallArgs { resolver, method, search, force, place } = args;
    let resolver = address("--resolver", resolver, DNS)?;
    if resolver.ip().is_unspecified() || resolver.port() == 0 {
        return Err(Failure::usage(format_args!("--resolver {resolver} can't be asked"))
            .remedy("give the address at which the sidecar serves names"));
    }
    let resolved = match method {
        Method::Resolved => true,
        Method::ResolvConf => false,
        Method::Auto => Path::new("/run/systemd/resolve").is_dir(),
    };
    if resolved && !search.is_empty() {
        return Err(Failure::usage("--search is for --method resolv-conf")
            .remedy("leave it out: with systemd-resolved search domains are the network configuration's"));
    }
    if !resolved && resolver.port() != DNS {
        return Err(Failure::usage(format_args!(
            "--resolver {resolver}: a resolv.conf can only name port 53"
        ))
        .remedy(
            "serve names on port 53 of a free address (--dns-listen 127.0.0.54:53), or use --method resolved",
        ));
    }
    let known = record(place)?;
    if known.as_ref().is_some_and(|known| known.resolved != resolved) {
        return Err(Failure::new("this machine is set up by the other method")
            .remedy("run `tombolo sidecar dns remove` first"));
    }
    let path = match resolved {
        true => place.resolved_dir.join("tombolo.conf"),
        false => place.resolv_conf.clone(),
    };
    let now = read(&path)?;
    // What is still as we have left it has no news: then what was there before us counts.
    let before = match known {
        Some(known) if known.path == path && known.ours == now.text() => known.before,
        _ => now.clone(),
    };
    let ours = match resolved {
        true => host::drop_in(resolver),
        false => host::with_resolver(before.text(), resolver.ip(), search),
    };
    if now == Before::Text(ours.clone()) {
        println!("unchanged: {} has {resolver} asked already", path.display());
        return Ok(Exit::Done);
    }
    if place.dry_run {
        println!("would write {}:\n{ours}", path.display());
        return Ok(Exit::Done);
    }
    if !force {
        answers(resolver)?;
    }
    let record = Record { version: 1, resolver, path: path.clone(), before, ours: ours.clone(), resolved };
    keep(place, &record)?;
    if resolved {
        fs::create_dir_all(&place.resolved_dir)
            .map_err(|e| failed("can't create", &place.resolved_dir, &e))?;
    }
    write(&path, &ours)?;
    println!("{}: names are asked of {resolver} first", path.display());
    if resolved {
        reload(place);
    }
    Ok(Exit::Done)
}

fn remove(place: &Place) -> Result<Exit, Failure> {
    let Some(record) = record(place)? else {
        println!("nothing to remove: {} was not set up", place.resolv_conf.display());
        return Ok(Exit::Done);
    };
    let Record { path, before, ours, resolver, resolved, .. } = record;
    let now = read(&path)?;
    let back = match &now {
        Before::Text(text) if *text == ours => before,
        // Somebody has written it since: only our part goes, and never the last resolver.
        Before::Text(text) if !resolved && text.contains(&resolver.ip().to_string()) => {
            host::without_resolver(text, resolver.ip()).map_or(before, Before::Text)
        }
        _ => now.clone(),
    };
    if place.dry_run {
        match &back {
            _ if back == now => println!("would leave {}: it is not ours any more", path.display()),
            Before::Absent => println!("would delete {}", path.display()),
            Before::Link(target, _) => {
                println!("would make {} a link to {}", path.display(), target.display())
            }
            Before::Text(text) => println!("would write {}:\n{text}", path.display()),
        }
        return Ok(Exit::Done);
    }
    if back == now {
        println!("{} is left as it is: it is not ours any more", path.display());
    } else {
        put_back(&path, &back)?;
        println!("{} is as it was before", path.display());
    }
    let kept = place.state_dir.join(RECORD);
    fs::remove_file(&kept).map_err(|e| failed("can't remove", &kept, &e))?;
    if resolved {
        reload(place);
    }
    Ok(Exit::Done)
}

/// Whether it answers: a machine whose resolver is not there would not find its way.
pub fn answers(resolver: SocketAddr) -> Result<(), Failure> {
    let runtime =
        tombolo_runtime::rt::one_thread().map_err(|e| Failure::new(format_args!("cannot start: {e}")))?;
    runtime.block_on(exchange::check_version(resolver, PATIENCE)).map_err(|reason| {
        Failure::new(format_args!("{resolver} serves no names of the mesh ({reason}); nothing was changed"))
            .remedy("start the sidecar with --dns-listen there first, or insist with --force")
    })
}

fn reload(place: &Place) {
    // Somewhere else is some other machine's: an image that is prepared, a test.
    if place.resolved_dir != Path::new(RESOLVED_DIR) {
        return;
    }
    let reloaded = Command::new("systemctl").args(["try-reload-or-restart", "systemd-resolved"]).status();
    match reloaded {
        Ok(status) if status.success() => eprintln!("systemd-resolved has been reloaded"),
        _ => {
            eprintln!("warning: systemd-resolved was not reloaded; run `systemctl restart systemd-resolved`")
        }
    }
}

fn failed(action: &str, path: &Path, error: &io::Error) -> Failure {
    let failure = Failure::new(format_args!("{action} {}: {error}", path.display()));
    match error.kind() {
        io::ErrorKind::PermissionDenied => failure.remedy("run it as root"),
        _ => failure,
    }
}

fn read(path: &Path) -> Result<Before, Failure> {
    let text = || -> Result<String, Failure> {
        let bytes = files::read(path, MAX_BYTES).map_err(|e| Failure::new(crate::failure::chain(&e)))?;
        String::from_utf8(bytes).map_err(|_| Failure::new("is not text").at(path.display()))
    };
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Before::Absent),
        Err(error) => Err(failed("can't read", path, &error)),
        Ok(metadata) if metadata.is_symlink() => {
            let target = fs::read_link(path).map_err(|e| failed("can't read", path, &e))?;
            // A link to nowhere is what it is.
            Ok(Before::Link(target, if path.exists() { text()? } else { String::new() }))
        }
        Ok(_) => text().map(Before::Text),
    }
}

/// Whole or not at all. In a container the file is a mount, which can't be replaced: then it is written in place.
fn write(path: &Path, text: &str) -> Result<(), Failure> {
    match files::write_atomic(path, text.as_bytes(), 0o644) {
        Ok(()) => Ok(()),
        Err(error) if error.source.kind() == io::ErrorKind::ResourceBusy => {
            fs::write(path, text).map_err(|e| failed("can't write", path, &e))
        }
        Err(error) => Err(failed("can't write", path, &error.source)),
    }
}

fn put_back(path: &Path, before: &Before) -> Result<(), Failure> {
    match before {
        Before::Text(text) => write(path, text),
        Before::Absent => fs::remove_file(path).map_err(|e| failed("can't remove", path, &e)),
        Before::Link(target, _) => {
            let temporary = path.with_extension("tombolo.tmp");
            let _ = fs::remove_file(&temporary);
            let linked = symlink(target, &temporary).and_then(|()| fs::rename(&temporary, path));
            linked.map_err(|e| failed("can't write", path, &e))
        }
    }
}

fn record(place: &Place) -> Result<Option<Record>, Failure> {
    let path = place.state_dir.join(RECORD);
    if !path.exists() {
        return Ok(None);
    }
    let bytes = files::read(&path, 4 * MAX_BYTES).map_err(|e| Failure::new(crate::failure::chain(&e)))?;
    let record = serde_json::from_slice(&bytes);
    record.map(Some).map_err(|error| {
        Failure::new(format_args!("does not read ({error})"))
            .at(path.display())
            .remedy("put /etc/resolv.conf right by hand, and delete that file")
    })
}

fn keep(place: &Place, record: &Record) -> Result<(), Failure> {
    let dir = &place.state_dir;
    fs::create_dir_all(dir).map_err(|e| failed("can't create", dir, &e))?;
    let bytes = serde_json::to_vec_pretty(record).map_err(Failure::new)?;
    let path = dir.join(RECORD);
    files::write_atomic(&path, &bytes, 0o600).map_err(|e| failed("can't write", &path, &e.source))
}

#[cfg(test)]
mod tests;
