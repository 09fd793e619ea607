//! `tombolo vm leave`: what `vm join` has made is taken away, and the federator told.

use std::time::Duration;

use clap::Args;

use super::place::Root;
use super::record::{Made, Record};
use super::{deregister, undo};
use crate::cmd::confirm::{self, Consent};
use crate::failure::{Exit, Failure};

/// Take away what `vm join` has made: service, rules, names and identity
#[derive(Debug, Args)]
#[command(after_help = "\
The federator is told, so that nobody is sent here any more; where none can be reached, it is out of rotation by its
silence. What was there before joining is as it was. Nothing of the identity is kept: to come back takes a new token.

Examples:
  tombolo vm leave
  tombolo vm leave --dry-run
  tombolo vm leave --yes")]
pub struct LeaveArgs {
    #[command(flatten)]
    consent: Consent,
    #[command(flatten)]
    root: Root,
}

pub fn run(args: &LeaveArgs, patience: Duration) -> Result<Exit, Failure> {
    let place = args.root.place()?;
    let Some(mut record) = Record::load(&place)? else {
        println!("nothing to leave: `tombolo vm join` has made nothing here");
        return Ok(Exit::Done);
    };
    if args.consent.dry_run {
        record.made.iter().rev().for_each(|made| println!("{}", undo::describe(made)));
        return Ok(Exit::Done);
    }
    if !record.systemd && record.made.iter().any(|made| matches!(made, Made::Identity(_))) {
        still_running(&record)?;
    }
    let question = format!(
        "Leave cluster {} as {}? What is open is cut, and the identity deleted.",
        record.cluster, record.name
    );
    if !confirm::ask(&question, args.consent)? {
        println!("nothing was changed");
        return Ok(Exit::Done);
    }
    let (cluster, name) = (record.cluster.clone(), record.name.clone());
    let problems = undo::everything(&place, &mut record, patience, &mut |said| println!("{said}"));
    if problems.is_empty() {
        println!("this machine has left cluster {cluster}, where it was {name}");
        return Ok(Exit::Done);
    }
    Err(Failure::new(format_args!("not everything could be taken away:\n{}", problems.join("\n")))
        .remedy("put that right, and run `tombolo vm leave` again: it goes on with what is left"))
}

/// Whoever started the sidecar stops it: its streams are drained then, and not cut under it.
fn still_running(record: &Record) -> Result<(), Failure> {
    if deregister::runs(record.admin) {
        return Err(Failure::new(format_args!(
            "the sidecar still runs: it answers at {}; nothing was changed",
            record.admin
        ))
        .remedy("stop it, so that it drains, then run `tombolo vm leave` again"));
    }
    Ok(())
}
