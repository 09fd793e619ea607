//! `tombolo demo`: see [`crate::demo`].

use std::time::Duration;

use clap::Args;
use tokio::signal::unix::{SignalKind, signal};
use tombolo_runtime::signals::Signals;

use crate::demo::plan::Plan;
use crate::demo::progress::Progress;
use crate::demo::stage::Stage;
use crate::demo::workspace::{Keep, Workspace};
use crate::demo::{guide, scenario};
use crate::failure::{Exit, Failure};
use crate::output;

/// Run two linked clusters and a machine on this computer, to look at and to break
#[derive(Debug, Args)]
#[command(after_help = "\
Everything runs as ordinary processes on loopback addresses, without privileges; Ctrl-C ends all of it.

Examples:
  tombolo demo
  tombolo demo --scenario
  tombolo demo --scenario --json
  tombolo demo --loopback 127.1 --keep")]
pub struct DemoArgs {
    /// Break things by itself, measure, say what happened; exit code 3 if an expectation did not hold
    #[arg(long)]
    scenario: bool,
    /// Print the scenario's result as JSON
    #[arg(long, requires = "scenario")]
    json: bool,
    /// Keep state and logs afterwards
    #[arg(long)]
    keep: bool,
    /// First two octets of the loopback addresses, so that several demos fit on one machine
    #[arg(long, env = "TOMBOLO_DEMO_LOOPBACK", default_value = "127.0", value_parser = loopback, value_name = "127.N")]
    loopback: [u8; 2],
}

fn loopback(text: &str) -> Result<[u8; 2], String> {
    let second = text.strip_prefix("127.").and_then(|rest| rest.parse().ok());
    second
        .map(|second| [127, second])
        .ok_or_else(|| format!("{text:?} is no loopback prefix: give 127.0 to 127.255"))
}

pub fn run(args: DemoArgs) -> Result<Exit, Failure> {
    // One thread, the main one: children die with the thread that started them.
    let runtime =
        tombolo_runtime::rt::one_thread().map_err(|e| Failure::new(format_args!("cannot start: {e}")))?;
    runtime.block_on(demo(args))
}

async fn demo(args: DemoArgs) -> Result<Exit, Failure> {
    let DemoArgs { scenario, json, keep, loopback } = args;
    let mut signals = Signals::listen().map_err(|e| Failure::new(e).at("signals"))?;
    let workspace = Workspace::create(if keep { Keep::Everything } else { Keep::Nothing })?;
    let plan = Plan::new(&workspace.path, loopback);
    let mut stage = Stage::new(plan, workspace)?;
    let progress = Progress::new(false);
    let result = tokio::select! {
        result = act(&mut stage, &progress, scenario, json) => result,
        // A scenario that was interrupted has shown nothing.
        _ = signals.next() => Ok(if scenario { Exit::Failed } else { Exit::Done }),
    };
    // Some failures are explained by logs only.
    if !matches!(result, Ok(Exit::Done)) {
        stage.workspace.keep_logs();
        progress.line(&format!("logs are kept in {}", stage.workspace.logs().display()));
    }
    progress.doing("stopping");
    // A second Ctrl-C does not wait for the graceful end: dropping the stage kills what is left.
    tokio::select! {
        () = stage.down() => {}
        _ = signals.next() => {}
    }
    progress.line("stopped");
    progress.finish();
    result
}

async fn act(stage: &mut Stage, progress: &Progress, scenario: bool, json: bool) -> Result<Exit, Failure> {
    stage.up(progress).await?;
    if !scenario {
        progress.line("ready");
        output::line(guide::text(&stage.plan, &stage.supervisor))?;
        return attend(stage, progress).await;
    }
    let report = scenario::run(stage, progress, json).await?;
    if json {
        output::json(&report)?;
    } else {
        let held = report.steps.iter().filter(|step| step.held()).count();
        output::line(format_args!("{held} of {} steps held", report.steps.len()))?;
    }
    Ok(if report.held { Exit::Done } else { Exit::ProblemsFound })
}

/// Says what dies, and brings it back on SIGHUP, until somebody ends the demo.
async fn attend(stage: &mut Stage, progress: &Progress) -> Result<Exit, Failure> {
    const LOOK: Duration = Duration::from_millis(250);
    let mut hangup = signal(SignalKind::hangup()).map_err(|e| Failure::new(e).at("signals"))?;
    progress.doing("running; Ctrl-C ends it");
    loop {
        tokio::select! {
            _ = hangup.recv() => {
                // Whoever breaks things on purpose may break them while they come back: say so, go on.
                if let Err(failure) = stage.bring_back(progress).await {
                    progress.line(&failure.to_string());
                }
            }
            () = tokio::time::sleep(LOOK) => {
                for dead in stage.supervisor.casualties() {
                    progress.line(dead.lines().next().unwrap_or_default().split(';').next().unwrap_or_default());
                }
            }
        }
        progress.doing("running; Ctrl-C ends it");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_loopback_prefixes_are_taken() {
        assert_eq!(loopback("127.9"), Ok([127, 9]));
        for bad in ["10.0", "127", "127.256", "127.0.0.1", ""] {
            assert!(loopback(bad).is_err(), "{bad}");
        }
    }
}
