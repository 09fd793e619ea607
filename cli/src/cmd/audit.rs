//! `tombolo audit`: what was issued, refused, revoked and linked, by whom; and whether the log's hash chain holds.

use std::io::{BufRead, Read as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, Subcommand};
use serde_json::json;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tombolo_model::audit::{Action, Entry, Link, Outcome, Verifier};
use tombolo_proto::v1::{AuditRequest, AuditResponse};
use tombolo_runtime::clock;
use tonic::Streaming;

use crate::admin_client::Admin;
use crate::args::{Connect, Format, Output, duration};
use crate::failure::{Exit, Failure};
use crate::output;

/// An entry has at most some kilobytes; a longer line is no export.
const MAX_LINE: usize = 64 * 1024;

/// Show what was issued, refused, revoked and linked, and check that nothing of it was changed
#[derive(Debug, Args)]
#[command(
    args_conflicts_with_subcommands = true,
    after_help = "\
Every entry carries the hash of the one before it: `tombolo audit verify` computes the chain again. Note its head
elsewhere from time to time; `--from-head` says later whether that head is still part of it.

Actions: join, renew, own-svid, token, link-token, link, unlink, link-ended, link-accept, revoke, unrevoke, rotation,
federation.
Refusals that repeat each other within a minute are one entry with a count.

Examples:
  tombolo audit
  tombolo audit --since 24h --outcome refused
  tombolo audit --identity ns/shop/sa/cart --action join --action renew
  tombolo audit -f -o json                          one line of JSON per entry, as they come
  tombolo audit --limit 0 -o json > east.jsonl      the whole log, for `tombolo audit verify --file`"
)]
pub struct AuditArgs {
    #[command(subcommand)]
    verb: Option<Verb>,
    #[command(flatten)]
    show: ShowArgs,
}

#[derive(Debug, Args)]
struct ShowArgs {
    /// Only entries since then: a span such as 24h or 7d, or a time in RFC 3339
    #[arg(long, value_name = "SPAN|TIME", value_parser = since)]
    since: Option<Since>,
    /// Only this action; may be repeated
    #[arg(long = "action", value_name = "ACTION", value_parser = action)]
    actions: Vec<Action>,
    /// Only entries whose subject or requester contains this
    #[arg(long, value_name = "TEXT")]
    identity: Option<String>,
    /// Only done or refused
    #[arg(long, value_name = "OUTCOME", value_parser = outcome)]
    outcome: Option<Outcome>,
    /// The newest so many, at most 10000; 0 for all
    #[arg(long, default_value_t = 50, value_name = "NUMBER")]
    limit: u32,
    /// Stay, and print entries as they come
    #[arg(short, long)]
    follow: bool,
    #[command(flatten)]
    output: Output,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Compute the log's hash chain again, and say where it breaks
    #[command(after_help = "\
Ends with 3 when the chain does not hold or does not contain the noted head.

Examples:
  tombolo audit verify
  tombolo audit verify --from-head 3f1c0a2b...
  tombolo audit verify --file east.jsonl            no federator is asked
  ssh east tombolo audit --limit 0 -o json | tombolo audit verify --file -")]
    Verify {
        /// An exported log, one entry of JSON per line, or `-` for standard input [default: ask the federator]
        #[arg(long, value_name = "FILE")]
        file: Option<PathBuf>,
        /// A head that was noted before: it must still be part of the chain
        #[arg(long, value_name = "HASH", value_parser = hash)]
        from_head: Option<String>,
        #[command(flatten)]
        output: Output,
    },
}

/// Since when.
#[derive(Clone, Copy, Debug)]
enum Since {
    Ago(Duration),
    At(i64),
}

fn since(text: &str) -> Result<Since, String> {
    if let Ok(span) = duration(text) {
        return Ok(Since::Ago(span));
    }
    let time = OffsetDateTime::parse(text, &Rfc3339).map_err(|_| {
        format!("{text:?} is neither a span such as 24h or 7d nor a time such as 2026-11-24T02:00:00Z")
    })?;
    i64::try_from(time.unix_timestamp_nanos() / 1_000_000).map(Since::At).map_err(|e| e.to_string())
}

impl Since {
    fn unix_ms(self, now: Duration) -> i64 {
        match self {
            Self::At(ms) => ms,
            Self::Ago(span) => i64::try_from(now.saturating_sub(span).as_millis()).unwrap_or(i64::MAX),
        }
    }
}

fn action(text: &str) -> Result<Action, String> {
    text.parse()
}

fn outcome(text: &str) -> Result<Outcome, String> {
    text.parse()
}

fn hash(text: &str) -> Result<String, String> {
    match hex::decode(text) {
        Ok(bytes) if bytes.len() == 32 => Ok(text.to_ascii_lowercase()),
        _ => Err(format!("{text:?} is no head: give the 64 hexadecimal digits that `verify` printed")),
    }
}

pub fn run(args: AuditArgs, connect: Connect) -> Result<Exit, Failure> {
    let AuditArgs { verb, show } = args;
    match verb {
        None => super::operate(self::show(show, connect)),
        Some(Verb::Verify { file: Some(file), from_head, output }) => {
            let checked = check_file(&file, from_head.clone())?;
            report(&checked, from_head.as_deref(), output.format)
        }
        Some(Verb::Verify { file: None, from_head, output }) => super::operate(async move {
            let checked = check_live(connect, from_head.clone()).await?;
            report(&checked, from_head.as_deref(), output.format)
        }),
    }
}

async fn open(admin: &mut Admin, request: AuditRequest) -> Result<Streaming<AuditResponse>, Failure> {
    // A reader may stay for days: no deadline for the whole stream.
    let request = tonic::Request::new(request);
    let opened = admin.client.audit(request).await.map_err(|status| admin.failed(status))?;
    Ok(opened.into_inner())
}

fn entry(json: &str) -> Result<Entry, Failure> {
    serde_json::from_str(json).map_err(|e| {
        Failure::new(format_args!("the federator sent an entry that does not read: {e}"))
            .remedy("use the `tombolo` of the federator's version")
    })
}

async fn show(args: ShowArgs, connect: Connect) -> Result<Exit, Failure> {
    let ShowArgs { since, actions, identity, outcome, limit, follow, output: Output { format } } = args;
    let mut admin = Admin::connect(&connect).await?;
    let request = AuditRequest {
        after: 0,
        since_unix_ms: since.map_or(0, |since| since.unix_ms(clock::since_unix_epoch())),
        actions: actions.iter().map(ToString::to_string).collect(),
        identity: identity.unwrap_or_default(),
        outcome: outcome.map(|outcome| outcome.as_str().to_owned()).unwrap_or_default(),
        limit,
        follow,
    };
    let mut stream = open(&mut admin, request).await?;
    let mut first = true;
    while let Some(response) = stream.message().await.map_err(|status| admin.failed(status))? {
        let entries: Vec<Entry> =
            response.entries_json.iter().map(|json| entry(json)).collect::<Result<_, _>>()?;
        match format {
            Format::Table | Format::Wide => {
                if !entries.is_empty() {
                    output::line(table(&entries, format == Format::Wide, first))?;
                    first = false;
                }
            }
            // A line each: that is what `verify --file` reads.
            Format::Json => entries.iter().try_for_each(output::json_line)?,
            Format::Yaml => entries.iter().try_for_each(|entry| {
                output::line("---")?;
                output::yaml(&json!(entry))
            })?,
            Format::Name => {
                entries
                    .iter()
                    .try_for_each(|entry| output::line(format_args!("audit/{}", entry.sequence)))?;
            }
        }
    }
    Ok(Exit::Done)
}

/// Who asked, in one word.
fn requester(entry: &Entry) -> String {
    match (entry.requester.identity.as_str(), entry.requester.uid, entry.token.as_str()) {
        ("", Some(uid), _) => format!("uid {uid}"),
        ("", None, "") => "-".to_owned(),
        ("", None, token) => format!("token {}", token.chars().take(8).collect::<String>()),
        (identity, _, _) => within(identity).to_owned(),
    }
}

/// A SPIFFE ID without what all of one federation have in common.
fn within(id: &str) -> &str {
    id.strip_prefix("spiffe://").and_then(|rest| rest.split_once("/cluster/")).map_or(id, |(_, rest)| rest)
}

fn table(entries: &[Entry], wide: bool, header: bool) -> String {
    let mut headers = vec!["sequence", "time", "action", "outcome", "subject", "by", "reason"];
    if wide {
        headers.extend(["serial", "token", "key", "hash"]);
    }
    let mut table = output::table(&headers);
    for entry in entries {
        let subject = match (within(&entry.subject), entry.serial.as_str()) {
            ("", "") => "-".to_owned(),
            ("", serial) => format!("serial:{serial}"),
            (subject, _) => subject.to_owned(),
        };
        let times = if entry.count > 1 { format!(" ({} times)", entry.count) } else { String::new() };
        let mut row = vec![
            entry.sequence.to_string(),
            entry.time.clone(),
            entry.action.to_string(),
            entry.outcome.as_str().to_owned(),
            subject,
            requester(entry),
            format!("{}{times}", entry.reason),
        ];
        if wide {
            row.extend([&entry.serial, &entry.token, &entry.spki_sha256, &entry.hash].map(Clone::clone));
        }
        table.add_row(row.iter().map(|cell| output::printable(cell)));
    }
    let text = output::table_text(&table);
    if header { text } else { text.lines().skip(1).collect::<Vec<_>>().join("\n") }
}

/// How a check ended.
struct Checked {
    verifier: Verifier,
    broken: Option<String>,
}

async fn check_live(connect: Connect, noted: Option<String>) -> Result<Checked, Failure> {
    let mut admin = Admin::connect(&connect).await?;
    let mut stream = open(&mut admin, AuditRequest::default()).await?;
    let mut verifier = Verifier::new(None, noted.clone());
    while let Some(response) = stream.message().await.map_err(|status| admin.failed(status))? {
        let AuditResponse { entries_json, anchor_sequence, anchor_hash } = response;
        if !anchor_hash.is_empty() {
            let anchor = Link { sequence: anchor_sequence, hash: anchor_hash };
            verifier.continue_at(anchor);
        }
        for json in &entries_json {
            if let Err(broken) = verifier.push(&entry(json)?) {
                return Ok(Checked { verifier, broken: Some(broken.to_string()) });
            }
        }
    }
    Ok(Checked { verifier, broken: None })
}

fn check_file(path: &Path, noted: Option<String>) -> Result<Checked, Failure> {
    if path == Path::new("-") {
        return check_lines(std::io::stdin().lock(), "standard input", noted);
    }
    let file = std::fs::File::open(path)
        .map_err(|e| Failure::new(e).at(path.display()).remedy("give a file of `tombolo audit -o json`"))?;
    check_lines(std::io::BufReader::new(file), &path.display().to_string(), noted)
}

fn check_lines(mut reader: impl BufRead, name: &str, noted: Option<String>) -> Result<Checked, Failure> {
    let mut verifier = Verifier::new(None, noted);
    // No more than one line is held, whatever the file is.
    let most = u64::try_from(MAX_LINE).unwrap_or(u64::MAX).saturating_add(1);
    for number in 1.. {
        let place = format!("{name}:{number}");
        let mut line = String::new();
        let read = (&mut reader).take(most).read_line(&mut line).map_err(|e| Failure::new(e).at(&place))?;
        if read == 0 {
            break;
        }
        if line.trim().is_empty() {
            continue;
        }
        if line.len() > MAX_LINE {
            return Err(Failure::new("the line is too long for an entry").at(place));
        }
        // What does not read has been changed as well.
        let broken = match serde_json::from_str::<Entry>(&line) {
            Ok(entry) => verifier.push(&entry).err().map(|broken| broken.to_string()),
            Err(error) => Some(format!("no entry of an audit log: {error}")),
        };
        if let Some(broken) = broken {
            return Ok(Checked { verifier, broken: Some(format!("{place}: {broken}")) });
        }
    }
    Ok(Checked { verifier, broken: None })
}

/// Prints what was found.
fn report(checked: &Checked, noted: Option<&str>, format: Format) -> Result<Exit, Failure> {
    let Checked { verifier, broken } = checked;
    let noted_at = verifier.noted_at();
    let lost = noted.is_some() && noted_at.is_none();
    let holds = broken.is_none() && !lost;
    let head = verifier.head();
    let document = json!({
        "version": 1,
        "holds": holds,
        "entries": verifier.entries(),
        "first": verifier.first(),
        "head": head.map(|head| json!({ "sequence": head.sequence, "hash": head.hash })),
        "broken": broken,
        "fromHead": noted.map(|hash| json!({ "hash": hash, "sequence": noted_at })),
    });
    match format {
        Format::Json => output::json(&document)?,
        Format::Yaml => output::yaml(&document)?,
        Format::Name => output::line(head.map(|head| head.hash.as_str()).unwrap_or_default())?,
        Format::Table | Format::Wide => {
            let (first, last) = (verifier.first().unwrap_or_default(), head.map_or(0, |head| head.sequence));
            match broken {
                Some(broken) => {
                    output::line(format_args!("the chain breaks: {}", output::printable(broken)))?
                }
                None if verifier.entries() == 0 => output::line("the log is empty")?,
                None => output::line(format_args!(
                    "the chain holds: {} entries, {first} to {last}",
                    verifier.entries()
                ))?,
            }
            match (noted, noted_at) {
                (Some(_), Some(sequence)) => {
                    output::line(format_args!("the noted head is entry {sequence}"))?;
                }
                (Some(noted), None) if broken.is_none() => output::line(format_args!(
                    "the noted head {noted} is not in the chain: entries were replaced, or are older than what is kept (from {first} on)"
                ))?,
                _ => {}
            }
            if let (None, Some(head)) = (broken, head) {
                output::line(format_args!("head {}", head.hash))?;
            }
        }
    }
    Ok(if holds { Exit::Done } else { Exit::ProblemsFound })
}

#[cfg(test)]
mod tests {
    use tombolo_model::audit::{Event, Requester};

    use super::*;

    fn chain(length: u64) -> Vec<Entry> {
        let mut head = Link::genesis();
        (0..length)
            .map(|n| {
                let event = Event {
                    requester: Requester::operator(Some(0)),
                    ..Event::refused(
                        Action::Join,
                        "spiffe://acme.example/cluster/east/vm/db",
                        format!("no {n}"),
                    )
                };
                let entry = Entry::after(&head, "east", "2026-11-24T02:15:05.000Z".into(), event);
                head = entry.link();
                entry
            })
            .collect()
    }

    fn lines(entries: &[Entry]) -> String {
        entries.iter().map(|entry| serde_json::to_string(entry).unwrap() + "\n").collect()
    }

    fn check(text: &str, noted: Option<String>) -> Checked {
        check_lines(text.as_bytes(), "east.jsonl", noted).unwrap()
    }

    #[test]
    fn an_exported_file_is_checked_and_what_was_changed_is_named_with_its_line() {
        let entries = chain(5);
        let good = lines(&entries);
        let whole = check(&good, Some(entries[1].hash.clone()));
        assert!(whole.broken.is_none() && whole.verifier.noted_at() == Some(2));
        let changed = check(&good.replace("no 2", "yes"), None).broken.unwrap();
        assert!(
            changed.contains("east.jsonl:3") && changed.contains("entry 3 is not as it was"),
            "{changed}"
        );
        let cut: String = good.lines().filter(|l| !l.contains("no 3")).map(|l| format!("{l}\n")).collect();
        assert!(check(&cut, None).broken.unwrap().contains("entry 5 follows entry 3"));
        let added = good.replacen("\"cluster\"", "\"by\":\"me\",\"cluster\"", 1);
        assert!(check(&added, None).broken.unwrap().contains("unknown field"));
        let other = check(&good, Some("ab".repeat(32)));
        assert!(other.broken.is_none() && other.verifier.noted_at().is_none());
        assert_eq!(report(&other, Some("ab"), Format::Name).unwrap(), Exit::ProblemsFound);
    }

    #[test]
    fn a_row_says_who_what_and_how_often() {
        let mut entry = chain(1).remove(0);
        entry.count = 12;
        let text = table(&[entry.clone()], false, true);
        assert!(
            text.contains("east/vm/db") && text.contains("uid 0") && text.contains("(12 times)"),
            "{text}"
        );
        assert!(!text.contains(&entry.hash) && table(&[entry.clone()], true, true).contains(&entry.hash));
        assert_eq!(table(&[entry], false, false).lines().count(), 1);
    }

    #[test]
    fn spans_and_times_are_read_and_anything_else_says_what_would_be() {
        let now = Duration::from_secs(1_795_486_505);
        assert_eq!(since("24h").unwrap().unix_ms(now), 1_795_400_105_000);
        assert_eq!(since("2026-11-24T02:15:05Z").unwrap().unix_ms(now), 1_795_486_505_000);
        assert!(since("yesterday").unwrap_err().contains("24h"));
        assert!(hash("3f1c").unwrap_err().contains("64"));
    }
}
