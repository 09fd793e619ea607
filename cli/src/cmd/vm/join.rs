//! `tombolo vm join`: one command that makes a machine a member and says what it did. All of it, or nothing: what was
//! done before something failed is undone.

use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Args;
use tombolo_identity::files;
use tombolo_overlay::member::{JoinPlan, Member};
use tombolo_runtime::clock;

use super::place::{Place, Root};
use super::plan::{self, Step};
use super::record::{Made, Record};
use super::settings::{Chosen, Wishes};
use super::{deregister, systemd, undo};
use crate::cmd::sidecar::dns;
use crate::cmd::{role, token};
use crate::failure::{self, Exit, Failure};

const POLL: Duration = Duration::from_millis(50);

/// Make this machine a member: identity, service, capture rules and names
#[derive(Debug, Args)]
#[command(after_help = "\
Everything is checked before the token is used, and what was done is undone if a step fails. Joining twice is joining
once. `tombolo vm leave` takes everything away.

Examples:
  tombolo vm join --token-file token --workload db.yaml
  tombolo vm join --token - --workload db.yaml < token
  tombolo vm join --token-file token --workload db.yaml --dry-run
  tombolo vm join --token-file token --capture-address 10.0.0.7:5432=shop/db
  tombolo vm join --token-file token --workload db.yaml --no-capture --no-dns --no-systemd")]
pub struct JoinArgs {
    /// The token of `tombolo vm token`; - reads it from standard input, so that it shows in no process list
    #[arg(long, value_name = "TOKEN", conflicts_with = "token_file")]
    token: Option<String>,
    /// File with the token
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// Insist on this name: a token for another is refused [default: the token's]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    #[command(flatten)]
    wishes: Wishes,
    /// Something else than systemd runs the sidecar; so it is where systemd does not run
    #[arg(long)]
    no_systemd: bool,
    /// Print every step, and change nothing
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    root: Root,
}

pub fn run(args: JoinArgs, patience: Duration) -> Result<Exit, Failure> {
    let place = args.root.place()?;
    let given = args.text()?;
    if let Some(record) = Record::load(&place)? {
        return joined_before(&record, given.as_deref());
    }
    let text = given.ok_or_else(|| {
        Failure::usage("no token: this machine has not joined").remedy(
            "make one where the federator runs (`tombolo vm token NAME`), and give it with --token-file",
        )
    })?;
    let (token, name) = JoinPlan::from_token(&text, args.name.as_deref(), clock::since_unix_epoch())
        .map_err(|error| Failure::new(failure::chain(&error)))?;
    let chosen = args.wishes.choose(&name, &place)?;
    let systemd = !args.no_systemd && place.has_systemd();
    let binary = std::env::current_exe().map_err(Failure::new)?;
    let steps = plan::steps(&place, &chosen, &token, &binary, systemd);
    if args.dry_run {
        steps.iter().for_each(|step| print!("{step}"));
        if !systemd {
            print!("{}", plan::by_hand(&place, &chosen, &binary));
        }
        return Ok(Exit::Done);
    }
    check(&place, &chosen, &steps)?;
    let record = Record::new(&name, token.cluster.as_str(), systemd, chosen.config.admin);
    let mut work = Work { place: &place, chosen: &chosen, text: &text, patience, record, used: false };
    match steps.iter().try_for_each(|step| work.step(step)).and_then(|()| work.finish()) {
        Ok(()) => {
            if !systemd {
                print!("{}", plan::by_hand(&place, &chosen, &binary));
            }
            Ok(Exit::Done)
        }
        Err(failure) => Err(work.undo(failure)),
    }
}

impl JoinArgs {
    fn text(&self) -> Result<Option<String>, Failure> {
        match (&self.token, &self.token_file) {
            (Some(text), _) => token::given(text.clone()).map(Some),
            (None, Some(path)) => {
                let read = role::join_token(path)?;
                let absent =
                    || Failure::usage("is not there").at(format_args!("--token-file {}", path.display()));
                read.map(Some).ok_or_else(absent)
            }
            (None, None) => Ok(None),
        }
    }
}

/// The second time changes nothing; with another machine's token it is a mistake.
fn joined_before(record: &Record, given: Option<&str>) -> Result<Exit, Failure> {
    let Record { name, cluster, complete, .. } = record;
    if !complete {
        return Err(Failure::new(format_args!(
            "joining cluster {cluster} as {name} was begun and did not end"
        ))
        .remedy("run `tombolo vm leave`, which takes away what is there, and join again with a new token"));
    }
    // Used up or ended: it says for whom it was all the same.
    let token = given.map(|text| JoinPlan::from_token(text, None, Duration::ZERO)).transpose();
    let token = token.map_err(|error| Failure::new(failure::chain(&error)))?;
    if let Some((plan, other)) = token
        && (other != *name || plan.cluster.as_str() != cluster)
    {
        return Err(Failure::new(format_args!(
            "this machine has joined cluster {cluster} as {name}; the token is for {other} of cluster {}",
            plan.cluster
        ))
        .remedy("run `tombolo vm leave` first"));
    }
    println!("this machine has joined cluster {cluster} as {name} already; nothing was changed");
    Ok(Exit::Done)
}

/// What can be known to fail before anything is done.
fn check(place: &Place, chosen: &Chosen, steps: &[Step]) -> Result<(), Failure> {
    let own = place.root() == Path::new("/") || chosen.capture.is_some();
    if own && !nix::unistd::geteuid().is_root() {
        return Err(Failure::new("setting up a machine needs root")
            .remedy("run it with sudo; --dry-run shows what would be done"));
    }
    let written = steps.iter().filter_map(|step| match step {
        Step::Write { path, .. } => Some(path),
        _ => None,
    });
    for path in written {
        if path.symlink_metadata().is_ok() {
            return Err(Failure::new(format_args!(
                "{} is there already, and `vm join` has not made it",
                path.display()
            ))
            .remedy("this machine is set up by hand: go on like that, or move the file away first"));
        }
    }
    if let Some(dir) = chosen.config.state_dir.to_str().filter(|dir| Path::new(dir).exists()) {
        return Err(Failure::new(format_args!(
            "{dir} is there already: a sidecar of this name has joined here"
        ))
        .remedy("stop it, and move the directory away, or go on without `vm join`"));
    }
    if let Some((prepared, _)) = &chosen.capture
        && prepared.are_there()?
    {
        return Err(Failure::new("there are capture rules on this machine already")
            .remedy("run `tombolo sidecar capture remove`, or leave them as they are with --no-capture"));
    }
    chosen.ports_are_free()
}

/// A join under way.
struct Work<'a> {
    place: &'a Place,
    chosen: &'a Chosen,
    text: &'a str,
    patience: Duration,
    record: Record,
    /// The token can't be used again.
    used: bool,
}

impl Work<'_> {
    fn step(&mut self, step: &Step) -> Result<(), Failure> {
        match step {
            Step::Write { path, text } => {
                self.directories(path.parent().unwrap_or(path), 0o755)?;
                self.record.note(self.place, Made::File(path.clone()))?;
                files::write_atomic(path, text.as_bytes(), 0o644)
                    .map_err(|e| undo::failed("can't write", path, &e.source))?;
                println!("wrote {}", path.display());
            }
            Step::Capture { .. } => {
                let Some((prepared, _)) = &self.chosen.capture else { return Ok(()) };
                self.record.note(self.place, Made::CaptureRules)?;
                println!("captured: {}", prepared.apply()?);
            }
            Step::Join { dir, .. } => self.join(dir)?,
            Step::Enable(unit) => {
                systemd::systemctl(&["daemon-reload"])?;
                self.record.note(self.place, Made::Unit((*unit).to_owned()))?;
                systemd::systemctl(&["enable", "--now", unit])?;
                println!("{unit} is enabled and runs");
            }
            Step::Ready(admin) => {
                deregister::ready(*admin, self.patience)?;
                println!("the sidecar is ready");
            }
            Step::Names { resolver, .. } => {
                self.record.note(self.place, Made::Names)?;
                self.names(*resolver)?;
            }
        }
        Ok(())
    }

    fn join(&mut self, dir: &Path) -> Result<(), Failure> {
        self.directories(dir.parent().unwrap_or(dir), 0o700)?;
        self.record.note(self.place, Made::Identity(dir.to_owned()))?;
        let runtime =
            tombolo_runtime::rt::one_thread().map_err(|e| Failure::new(format_args!("cannot start: {e}")))?;
        let (name, bind) = (&self.chosen.config.name, self.chosen.config.bind);
        let member = runtime.block_on(Member::join(self.text, dir, Some(name), bind));
        let member = member.map_err(|error| Failure::new(failure::chain(&error)))?;
        self.used = true;
        println!("joined cluster {} as {}", member.cluster(), member.spiffe_id());
        println!("  the identity is in {}", dir.display());
        Ok(())
    }

    /// The sidecar serves names a moment after it is ready.
    fn names(&self, resolver: std::net::SocketAddr) -> Result<(), Failure> {
        let until = Instant::now() + self.patience;
        while let Err(failure) = dns::answers(resolver) {
            if Instant::now() >= until {
                return Err(failure);
            }
            std::thread::sleep(POLL);
        }
        let Chosen { resolved, search, .. } = self.chosen;
        dns::point(resolver, *resolved, search, undo::names(self.place, false))
    }

    /// Makes what is missing of a directory's path, noted from the top.
    fn directories(&mut self, dir: &Path, mode: u32) -> Result<(), Failure> {
        let missing: Vec<&Path> = dir.ancestors().take_while(|path| !path.exists()).collect();
        for path in missing.into_iter().rev() {
            self.record.made.push(Made::Directory(path.to_owned()));
            let made = fs::DirBuilder::new().mode(mode).create(path);
            made.map_err(|error| undo::failed("can't create", path, &error))?;
        }
        Ok(())
    }

    fn finish(&mut self) -> Result<(), Failure> {
        if !self.record.systemd && self.chosen.resolver.is_some() {
            // Whoever starts the sidecar points the resolver at it; leaving puts it back.
            self.record.made.push(Made::Names);
        }
        self.record.complete = true;
        self.record.save(self.place)
    }

    /// Undoes what was done, and says so beside what failed.
    fn undo(mut self, failure: Failure) -> Failure {
        let mut say = |_| {};
        let problems = undo::everything(self.place, &mut self.record, self.patience, &mut say);
        eprintln!(
            "joining failed; {}",
            match problems.as_slice() {
                [] => "what had been done is undone",
                _ => "not all that had been done could be undone:",
            }
        );
        problems.iter().for_each(|problem| eprintln!("  {problem}"));
        if !problems.is_empty() {
            eprintln!("  what is left is recorded: `tombolo vm leave` tries again");
        }
        if self.used {
            eprintln!("the token is used up: make a new one for the next attempt");
        }
        failure
    }
}
