//! `tombolo sidecar capture`: the machine's rules that hand applications' connections to the sidecar.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use serde::Serialize;
use serde_json::Value;

use self::kernel::Nft;
use self::plan::{Outbound, Plan};
use self::rules::{COUNTERS, FIXED_SETS, Inventory};
use self::settings::Settings;
use crate::args::{Format, Output};
use crate::cmd::role;
use crate::failure::{Exit, Failure};

mod kernel;
mod plan;
mod rules;
mod settings;
mod values;

/// Hand applications' connections to the sidecar, without a change in any application
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  tombolo sidecar capture apply --dry-run                  what would be done
  tombolo sidecar capture apply                            virtual addresses of the mesh's services
  tombolo sidecar capture apply --address 10.0.0.7:5432    and a database's old address
  tombolo sidecar capture apply --address 10.0.0.7:53/udp  and a name server's, over UDP
  tombolo sidecar capture show
  tombolo sidecar capture remove")]
pub struct CaptureArgs {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Put the rules in place, in one transaction; whatever an earlier call left, whole or not, is replaced
    #[command(after_help = "\
Examples:
  tombolo sidecar capture apply
  tombolo sidecar capture apply --exclude-uid tombolo      a sidecar that may not mark its own connections
  tombolo sidecar capture apply --address 10.0.0.7:5432 --away refuse
  tombolo sidecar capture apply --inbound permissive --inbound-port 8080 --inbound-allow 10.0.0.0/24=8080
  tombolo sidecar capture apply --outbound all --exclude-cidr 10.0.0.0/8 --exclude-port 22

The sidecar listens with --capture-listen 127.0.0.1:7447 (and [::1]:7447), for connections from outside with
--inbound-listen 127.0.0.1:7448.")]
    Apply {
        #[command(flatten)]
        settings: Box<Settings>,
        /// YAML file with settings, named as the flags are but in camelCase; unknown keys are errors
        #[arg(long, env = "TOMBOLO_CAPTURE_CONFIG", value_name = "FILE")]
        config: Option<PathBuf>,
        /// Print the rules, and change nothing; needs neither nft nor privileges
        #[arg(long)]
        dry_run: bool,
    },
    /// Take the rules away; what was captured and is still open ends with its sidecar
    #[command(after_help = "\
Examples:
  tombolo sidecar capture remove
  tombolo sidecar capture remove --dry-run")]
    Remove {
        /// The program [default: nft in PATH]
        #[arg(long, env = "TOMBOLO_NFT", value_name = "FILE")]
        nft: Option<PathBuf>,
        /// Print what would be run, and change nothing
        #[arg(long)]
        dry_run: bool,
    },
    /// Say whether the rules are in place and whole, and what they have counted; ends with 3 if they are not
    #[command(after_help = "\
Examples:
  tombolo sidecar capture show
  tombolo sidecar capture show -o json")]
    Show {
        /// The program [default: nft in PATH]
        #[arg(long, env = "TOMBOLO_NFT", value_name = "FILE")]
        nft: Option<PathBuf>,
        #[command(flatten)]
        output: Output,
    },
}

pub fn run(args: CaptureArgs) -> Result<Exit, Failure> {
    match args.verb {
        Verb::Apply { settings, config, dry_run } => {
            let (plan, nft) = settings.over(role::file(config.as_deref())?).plan()?;
            let prepared = Prepared { plan, nft };
            if dry_run {
                print!("{}", prepared.rules());
                return Ok(Exit::Done);
            }
            println!("captured: {}", prepared.apply()?);
            Ok(Exit::Done)
        }
        Verb::Remove { nft, dry_run } => {
            if dry_run {
                print!("{}", rules::removal());
                return Ok(Exit::Done);
            }
            let there = take_away(nft)?;
            println!("{}", if there { "removed" } else { "nothing was there" });
            Ok(Exit::Done)
        }
        Verb::Show { nft, output } => show(&Nft::find(nft)?, output.format),
    }
}

/// Rules that are ready to be put in place.
#[derive(Debug)]
pub struct Prepared {
    plan: Plan,
    nft: Option<PathBuf>,
}

impl Prepared {
    /// By a settings file alone.
    pub fn read(text: &str) -> Result<Self, Failure> {
        let settings: Settings = serde_saphyr::from_str(text).map_err(Failure::usage)?;
        let (plan, nft) = settings.plan()?;
        Ok(Self { plan, nft })
    }

    pub fn rules(&self) -> String {
        self.plan.rules()
    }

    /// Whether there are rules already, of whomever; fails where they can't be made.
    pub fn are_there(&self) -> Result<bool, Failure> {
        Ok(Nft::find(self.nft.clone())?.list(false)?.is_some())
    }

    /// Puts them in place, and says what they are.
    pub fn apply(&self) -> Result<String, Failure> {
        let nft = Nft::find(self.nft.clone())?;
        let plan = &self.plan;
        // Before the rules: a captured connection needs a route first, and a route alone catches nothing.
        let ranges = if plan.outbound == Outbound::None { &[][..] } else { &plan.virtual_ranges };
        if kernel::route(ranges)? {
            eprintln!("IPv6 is off on this machine: its virtual addresses are left out");
        }
        kernel::route_datagrams(plan.outbound != Outbound::None)?;
        nft.apply(&plan.rules())?;
        Ok(plan.comment())
    }
}

/// Takes rules and routes away; whether there were rules.
pub fn take_away(nft: Option<PathBuf>) -> Result<bool, Failure> {
    let nft = Nft::find(nft)?;
    let there = nft.list(false)?.is_some();
    nft.apply(&rules::removal())?;
    kernel::route(&[])?;
    kernel::route_datagrams(false)?;
    Ok(there)
}

/// What `show` says.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Shown {
    version: &'static str,
    /// `in place`, `damaged`, `absent`, or `other version`.
    state: &'static str,
    reason: String,
    counters: Vec<Counted>,
}

#[derive(Debug, Serialize)]
struct Counted {
    name: &'static str,
    meaning: &'static str,
    count: u64,
}

fn show(nft: &Nft, format: Format) -> Result<Exit, Failure> {
    let shown = match (nft.list(false)?, nft.list(true)?) {
        (Some(text), Some(json)) => {
            let mut shown = read(&text, &json)?;
            if shown.state == "in place" && text.contains("chain udp_output") && !kernel::routes_datagrams()?
            {
                shown.state = "damaged";
                shown.reason = "the rule that routes captured datagrams is gone: `tombolo sidecar capture apply` repairs it".to_owned();
            }
            shown
        }
        _ => Shown::new("absent", "nothing is captured: `tombolo sidecar capture apply`".to_owned()),
    };
    match format {
        Format::Json => println!("{}", serde_json::to_string_pretty(&shown).map_err(Failure::new)?),
        Format::Yaml => print!("{}", serde_saphyr::to_string(&shown).map_err(Failure::new)?),
        Format::Table | Format::Wide | Format::Name => {
            println!("{}: {}", shown.state, shown.reason);
            for Counted { name, meaning, count } in &shown.counters {
                println!("{count:>12}  {name:<16} {meaning}");
            }
        }
    }
    Ok(if shown.state == "in place" { Exit::Done } else { Exit::ProblemsFound })
}

impl Shown {
    fn new(state: &'static str, reason: String) -> Self {
        Self { version: "tombolo.dev/capture/v1", state, reason, counters: Vec::new() }
    }
}

/// Compares what is there with what the table's comment says was written.
fn read(text: &str, json: &str) -> Result<Shown, Failure> {
    let unreadable = |error| Failure::new(format_args!("what nft lists can't be read: {error}"));
    let listed: Value = serde_json::from_str(json).map_err(unreadable)?;
    let items = listed.get("nftables").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let of = |kind: &'static str| items.iter().filter_map(move |item| item.get(kind));
    let named = |item: &Value, names: &[&str]| {
        item.get("name").and_then(Value::as_str).is_some_and(|name| names.contains(&name))
    };
    let elements = |set: &Value| set.get("elem").and_then(Value::as_array).map_or(0, Vec::len);
    let found = Inventory {
        rules: of("rule").count(),
        addresses: of("set").filter(|set| named(set, &FIXED_SETS)).map(elements).sum(),
    };
    let comment = text.lines().find_map(|line| line.trim().strip_prefix("comment \"")?.strip_suffix('"'));
    let mut shown = match comment.and_then(rules::parse_comment) {
        None => {
            Shown::new("other version", "the table was not written by this tombolo: apply anew".to_owned())
        }
        Some(written) if written == found => {
            Shown::new("in place", format!("{} rules, {} addresses", found.rules, found.addresses))
        }
        Some(written) => Shown::new(
            "damaged",
            format!(
                "{} of {} rules and {} of {} addresses are there: `tombolo sidecar capture apply` repairs it",
                found.rules, written.rules, found.addresses, written.addresses
            ),
        ),
    };
    let count = |name: &str| {
        let counter = of("counter").find(|counter| named(counter, &[name]))?;
        counter.get("packets")?.as_u64()
    };
    shown.counters = COUNTERS
        .iter()
        .filter_map(|&(name, meaning)| Some(Counted { name, meaning, count: count(name)? }))
        .collect();
    Ok(shown)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "table inet tombolo_capture {\n\tcomment \"tombolo 3: 1 rules, 2 addresses\"\n}\n";

    fn json(rules: usize, elements: &str) -> String {
        let rule = r#"{"rule": {"chain": "output"}}"#;
        let rules = vec![rule; rules].join(",");
        format!(
            r#"{{"nftables": [{{"counter": {{"name": "virtual", "packets": 7}}}},
            {{"set": {{"name": "taken4", "elem": [{elements}]}}}}, {{"set": {{"name": "away", "elem": [1]}}}}, {rules}]}}"#
        )
    }

    #[test]
    fn what_is_whole_is_in_place_and_counts() {
        let shown = read(TEXT, &json(1, "1, 2")).unwrap();
        assert_eq!(shown.state, "in place");
        assert_eq!((shown.counters[0].name, shown.counters[0].count), ("virtual", 7));
    }

    #[test]
    fn a_half_removed_table_is_seen_and_says_what_is_missing() {
        let shown = read(TEXT, &json(1, "")).unwrap();
        assert!(shown.state == "damaged" && shown.reason.contains("0 of 2 addresses"), "{}", shown.reason);
        assert_eq!(read("table inet x {\n}", &json(1, "1")).unwrap().state, "other version");
    }
}
