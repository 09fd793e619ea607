//! `tombolo demo --scenario`: breaks things on purpose, under load, and measures what callers notice.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use tombolo_runtime::tasks::TaskGroup;

use super::expect::{Report, StepReport};
use super::http;
use super::load::{self, Load, Samples};
use super::progress::Progress;
use super::stage::Stage;
use crate::failure::Failure;

/// The promises of the design (section 1).
const STALL_LIMIT: Duration = Duration::from_secs(1);
const FAILOVER_LIMIT: Duration = Duration::from_secs(3);
const FAILED_PERCENT_LIMIT: f64 = 1.0;
/// The demo's policy fails back after 3 s of health; health checks and reports come on top.
const FAILBACK_LIMIT: Duration = Duration::from_secs(12);
/// What the policy holds back at least.
const FAILBACK_HOLD: Duration = Duration::from_secs(3);
/// Configuration travels within milliseconds; a loaded machine gets more before the first call counts.
const FIRST_CALL_LIMIT: Duration = Duration::from_secs(20);

const WORKERS: usize = 8;
const PAUSE: Duration = Duration::from_millis(20);
/// Load before something breaks, to compare with.
const LEAD: Duration = Duration::from_secs(2);
/// Requests of the first step.
const CALLS: usize = 200;
/// Downloads while gateways die: enough that both replicas carry some.
const DOWNLOADS: usize = 4;
const STREAM: &str = "/stream?chunks=200&bytes=16384&pause_ms=50";
const STREAM_BYTES: u64 = 200 * 16384;

/// Runs every step. Each step's result goes to standard output as it ends; with `json` to standard error, since the
/// document is the result then.
pub async fn run(stage: &mut Stage, progress: &Progress, json: bool) -> Result<Report, Failure> {
    let address = stage.plan.upstream("east");
    let mut steps = Vec::new();
    for step in [Step::Call, Step::Gateways, Step::Application, Step::Service, Step::Return] {
        progress.doing(step.name());
        let mut report = StepReport::new(step.name());
        match step {
            Step::Call => call(address, &mut report).await,
            Step::Gateways => gateways(stage, address, progress, &mut report).await?,
            Step::Application => application(stage, address, &mut report).await?,
            Step::Service => service(stage, address, &mut report).await?,
            Step::Return => come_back(stage, address, progress, &mut report).await?,
        }
        if json {
            progress.line(report.text().trim_end());
        } else {
            progress.result(report.text().trim_end())?;
        }
        steps.push(report);
    }
    Ok(Report::new(steps))
}

#[derive(Clone, Copy)]
enum Step {
    Call,
    Gateways,
    Application,
    Service,
    Return,
}

impl Step {
    fn name(self) -> &'static str {
        match self {
            Self::Call => "east calls shop/web, which lives in west and on a machine",
            Self::Gateways => "kill -9 each gateway of west in turn, under downloads and requests",
            Self::Application => "kill -9 the application in west: the machine takes over",
            Self::Service => "kill -9 the application on the machine too: east serves itself",
            Self::Return => "bring both back: traffic returns after the policy's hold",
        }
    }
}

/// Nothing is broken yet: every call is answered from the other side.
async fn call(address: SocketAddr, report: &mut StepReport) {
    let begun = Instant::now();
    let mut first = load::one(address).await;
    while first.outcome.is_err() && begun.elapsed() < FIRST_CALL_LIMIT {
        tokio::time::sleep(PAUSE).await;
        first = load::one(address).await;
    }
    if let Err(reason) = &first.outcome {
        report.expect("first call", "an answer", reason, false);
        return;
    }
    // Both servers have to be known before the spread over them means anything.
    let mut seen = Samples::default();
    while !["west", "vm"].iter().all(|name| seen.by_server().contains_key(name))
        && begun.elapsed() < FIRST_CALL_LIMIT
    {
        seen.0.push(load::one(address).await);
    }
    let mut samples = Samples::default();
    for _ in 0..CALLS {
        samples.0.push(load::one(address).await);
    }
    failures(&samples, 0.0, report);
    let servers = samples.by_server();
    let across = servers.keys().all(|name| *name != "east")
        && servers.contains_key("west")
        && servers.contains_key("vm");
    report.expect("answered by", "west and vm, never east", format!("{servers:?}"), across);
    report.note(format!("p50 {}, p99 {}", ms(samples.quantile(0.5)), ms(samples.quantile(0.99))));
}

/// Gateways hold no state: streams go on through the other replica.
async fn gateways(
    stage: &mut Stage,
    address: SocketAddr,
    progress: &Progress,
    report: &mut StepReport,
) -> Result<(), Failure> {
    let tasks = TaskGroup::new();
    let downloads: Vec<_> = (0..DOWNLOADS)
        .map(|_| tasks.spawn("download", async move { http::download(address, STREAM, STREAM_BYTES).await }))
        .collect();
    let load = Load::start(address, WORKERS, PAUSE);
    tokio::time::sleep(LEAD).await;
    for gateway in ["west/gw-1", "west/gw-2"] {
        stage.supervisor.kill(gateway).await?;
        tokio::time::sleep(LEAD).await;
        stage.restart(gateway, progress).await?;
        // The replica that is back has to be found alive before the other one goes.
        tokio::time::sleep(LEAD).await;
    }
    let samples = load.finish().await;
    let (mut broken, mut longest) = (Vec::new(), Duration::ZERO);
    for download in downloads {
        match download.await {
            Ok(Ok(seen)) => longest = longest.max(seen.longest_gap),
            Ok(Err(reason)) => broken.push(reason),
            Err(error) => broken.push(error.to_string()),
        }
    }
    report.expect("broken downloads", "0", format!("{} of {DOWNLOADS}", broken.len()), broken.is_empty());
    report.expect(
        "longest stall of a download",
        format!("at most {}", ms(STALL_LIMIT)),
        ms(longest),
        longest <= STALL_LIMIT,
    );
    failures(&samples, FAILED_PERCENT_LIMIT, report);
    let slowest = samples.quantile(1.0);
    report.expect(
        "slowest request",
        format!("at most {}", ms(FAILOVER_LIMIT)),
        ms(slowest),
        slowest <= FAILOVER_LIMIT,
    );
    broken.iter().for_each(|reason| report.note(format!("broken: {reason}")));
    Ok(())
}

/// One of two endpoints of the tier dies: the other carries on.
async fn application(stage: &mut Stage, address: SocketAddr, report: &mut StepReport) -> Result<(), Failure> {
    let (samples, killed) = kill_under_load(stage, address, "west/web-app").await?;
    let settled = samples.settled(killed, &["west"]);
    report.expect(
        "out of rotation",
        format!("at most {}", ms(FAILOVER_LIMIT)),
        ms(settled),
        settled <= FAILOVER_LIMIT,
    );
    failures(&samples, FAILED_PERCENT_LIMIT, report);
    Ok(())
}

/// The tier is gone: the next one serves.
async fn service(stage: &mut Stage, address: SocketAddr, report: &mut StepReport) -> Result<(), Failure> {
    let (samples, killed) = kill_under_load(stage, address, "vm/web-app").await?;
    let first = samples.first_answer(killed, &["east"]);
    let settled = samples.settled(killed, &["west", "vm"]);
    let limit = format!("at most {}", ms(FAILOVER_LIMIT));
    report.expect(
        "first answer by east",
        &limit,
        first.map_or("never".to_owned(), ms),
        first.is_some_and(|t| t <= FAILOVER_LIMIT),
    );
    report.expect("last failed request began", &limit, ms(settled), settled <= FAILOVER_LIMIT);
    failures(&samples, FAILED_PERCENT_LIMIT, report);
    Ok(())
}

/// Back to the preferred tier, not before it has been healthy for the policy's hold.
async fn come_back(
    stage: &mut Stage,
    address: SocketAddr,
    progress: &Progress,
    report: &mut StepReport,
) -> Result<(), Failure> {
    let load = Load::start(address, WORKERS, PAUSE);
    tokio::time::sleep(LEAD).await;
    let back = Instant::now();
    for application in ["west/web-app", "vm/web-app"] {
        stage.restart(application, progress).await?;
    }
    let far = ["west", "vm"];
    while load.so_far().first_answer(back, &far).is_none() && back.elapsed() < FAILBACK_LIMIT {
        tokio::time::sleep(PAUSE).await;
    }
    tokio::time::sleep(LEAD).await;
    let samples = load.finish().await;
    let first = samples.first_answer(back, &far);
    let expected = format!("{} to {}", ms(FAILBACK_HOLD), ms(FAILBACK_LIMIT));
    let held = first.is_some_and(|t| (FAILBACK_HOLD..=FAILBACK_LIMIT).contains(&t));
    report.expect("first answer from west again", expected, first.map_or("never".to_owned(), ms), held);
    failures(&samples, FAILED_PERCENT_LIMIT, report);
    Ok(())
}

async fn kill_under_load(
    stage: &mut Stage,
    address: SocketAddr,
    name: &str,
) -> Result<(Samples, Instant), Failure> {
    let load = Load::start(address, WORKERS, PAUSE);
    tokio::time::sleep(LEAD).await;
    let killed = Instant::now();
    stage.supervisor.kill(name).await?;
    tokio::time::sleep(FAILOVER_LIMIT + LEAD).await;
    Ok((load.finish().await, killed))
}

fn failures(samples: &Samples, limit_percent: f64, report: &mut StepReport) {
    let expected =
        if limit_percent == 0.0 { "none".to_owned() } else { format!("at most {limit_percent} %") };
    let measured = format!("{} of {} ({:.2} %)", samples.failed(), samples.len(), samples.failed_percent());
    report.expect("failed requests", expected, measured, samples.failed_percent() <= limit_percent);
    for (reason, count) in samples.failures() {
        report.note(format!("{count} failed: {reason}"));
    }
}

fn ms(time: Duration) -> String {
    format!("{} ms", time.as_millis())
}
