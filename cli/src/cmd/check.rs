//! `tombolo check`: what an operator should do something about, and what. Ends with 3 when there is anything.

use clap::Args;
use serde_json::json;
use tombolo_model::status::Finding;

use super::status;
use crate::admin_client::Admin;
use crate::args::{Connect, Format, Output};
use crate::failure::{Exit, Failure};
use crate::output::{self, printable};

/// Look for what needs attention, and say what to do about it
#[derive(Debug, Args)]
#[command(after_help = "\
Looks at CAs that end within 30 days (critical within one), at a store that can't be written, at pods that hear no gateway
(NetworkPolicies have to let UDP out to ports 7441, 7442 and 7443, and in to 7442), and at pods that were not let in within the
last ten minutes. Ends with 3 when something was found, so that it fits into a cron job.

Examples:
  tombolo check
  tombolo check --context east -o json")]
pub struct CheckArgs {
    #[command(flatten)]
    output: Output,
}

pub async fn run(args: CheckArgs, connect: Connect) -> Result<Exit, Failure> {
    let CheckArgs { output: Output { format } } = args;
    let mut admin = Admin::connect(&connect).await?;
    let status = status::parsed(status::fetch(&mut admin).await?)?;
    let document = json!({ "version": 1, "cluster": status.cluster, "findings": status.findings });
    match format {
        Format::Json => output::json(&document)?,
        Format::Yaml => output::yaml(&document)?,
        Format::Name => status.findings.iter().try_for_each(|f| output::line(printable(&f.reason)))?,
        Format::Table | Format::Wide => output::line(page(&status.cluster, &status.findings))?,
    }
    Ok(if status.findings.is_empty() { Exit::Done } else { Exit::ProblemsFound })
}

fn page(cluster: &str, findings: &[Finding]) -> String {
    if findings.is_empty() {
        return format!("cluster {}: nothing found", printable(cluster));
    }
    let lines = findings.iter().map(|finding| {
        let Finding { severity, reason, about: _, message, remedy } = finding;
        format!("{severity}: {} ({reason})\n  what to do: {}", printable(message), printable(remedy))
    });
    lines.collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_finding_says_what_and_what_to_do() {
        let finding = Finding {
            severity: "critical".into(),
            reason: "CaExpiresSoon".into(),
            about: "intermediate of east".into(),
            message: "the intermediate of east expires in 20 hours".into(),
            remedy: "renew it".into(),
        };
        let text = page("east", &[finding]);
        assert!(text.contains("critical: the intermediate of east") && text.contains("what to do: renew it"));
        assert_eq!(page("east", &[]), "cluster east: nothing found");
    }
}
