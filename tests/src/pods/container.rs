//! A container's task: starts its process, probes it, and starts it again as its pod says, until it is to end.
//!
//! It tells its pod's task what happens; it ends when it is told to ([`Handle::stop`]) or when its process is not to run
//! again. Dropping its future kills its process with its thread.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use super::enter::Inside;
use super::launch::{self, Launch, Started, exit_code};
use super::plan::ContainerPlan;
use super::probe::{Probe, Streak};
use super::status::{Ended, Happened, Run, What};
use super::timestamp;

/// Between a run that has failed and the next: a kubelet's 10 s to 5 min, shortened because nobody else shares the node.
const BACK_OFF: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(15));
/// A run that has lasted so long starts the back-off anew.
const GOOD_RUN: Duration = Duration::from_secs(30);

/// Everything that a container needs, prepared.
pub struct Container {
    pub init: bool,
    pub index: usize,
    pub plan: ContainerPlan,
    pub launch: Launch,
    /// The file that its process is started by, its log, and the file that says that it runs.
    pub files: [PathBuf; 3],
    /// Words that run a command in it.
    pub enter: Vec<String>,
    /// Where it is probed.
    pub address: IpAddr,
    pub events: mpsc::Sender<Happened>,
    /// Time from SIGTERM to SIGKILL, once it is to end.
    pub stop: watch::Receiver<Option<Duration>>,
    /// Of one that its own liveness ends.
    pub grace: Duration,
}

/// A container's task, for its pod's.
pub struct Handle {
    pub sidecar: bool,
    stop: watch::Sender<Option<Duration>>,
    done: JoinHandle<()>,
}

impl Handle {
    pub fn new(sidecar: bool, stop: watch::Sender<Option<Duration>>, done: JoinHandle<()>) -> Self {
        Self { sidecar, stop, done }
    }

    /// Ends it within `grace` and waits until it has.
    pub async fn stop(&mut self, grace: Duration) {
        self.stop.send_replace(Some(grace));
        let _ = (&mut self.done).await;
    }
}

impl Container {
    async fn tell(&self, what: What) {
        let _ = self.events.send(Happened { init: self.init, index: self.index, what }).await;
    }

    /// Runs until it is over.
    pub async fn run(mut self) {
        let mut pause = BACK_OFF.0;
        loop {
            let begun = tokio::time::Instant::now();
            let [plan, log, marker] = &self.files;
            let ended = match launch::start(&self.launch, plan, log) {
                Ok(started) => {
                    let inside = Inside { pid: started.pid, launch: self.launch.clone() };
                    let written = serde_json::to_vec(&inside).map(|text| std::fs::write(marker, text));
                    if !matches!(written, Ok(Ok(()))) {
                        tracing::warn!(container = %self.plan.name, "exec will not find it");
                    }
                    let since = timestamp();
                    self.tell(What::Run(Run::Running { since: since.clone() })).await;
                    let (code, reason) = self.live(started).await;
                    let _ = std::fs::remove_file(&self.files[2]);
                    self.tell(What::Run(Run::Terminated(Ended {
                        code,
                        reason,
                        from: since,
                        to: timestamp(),
                        message: self.last_words(code),
                    })))
                    .await;
                    Some(code)
                }
                Err(error) => {
                    let message = format!("{error:#}");
                    self.tell(What::Run(Run::Waiting { reason: "RunContainerError".into(), message })).await;
                    None
                }
            };
            let again = ended.is_none_or(|code| self.plan.restart.after(code));
            if !again || self.stop.borrow().is_some() {
                return;
            }
            if begun.elapsed() > GOOD_RUN {
                pause = BACK_OFF.0;
            }
            if let Some(code) = ended {
                let (reason, message) =
                    ("CrashLoopBackOff".to_owned(), format!("ended with {code}; again in {pause:?}"));
                self.tell(What::Run(Run::Waiting { reason, message })).await;
            }
            tokio::select! {
                () = tokio::time::sleep(pause) => pause = (pause * 2).min(BACK_OFF.1),
                _ = self.stop.wait_for(Option::is_some) => return,
            }
        }
    }

    /// Its termination message: as the kubelet has it, the last 80 lines or 2048 bytes of a failed one's log.
    fn last_words(&self, code: i32) -> String {
        if code == 0 || !self.plan.message_from_logs {
            return String::new();
        }
        let log = std::fs::read(&self.files[1]).unwrap_or_default();
        let end = log.get(log.len().saturating_sub(2048)..).unwrap_or_default();
        let text = String::from_utf8_lossy(end);
        let lines: Vec<&str> = text.lines().collect();
        lines.get(lines.len().saturating_sub(80)..).unwrap_or_default().join("\n")
    }

    /// One run: its exit code, and why it ended.
    async fn live(&mut self, mut started: Started) -> (i32, &'static str) {
        let mut stop = self.stop.clone();
        let (failed, grace) = tokio::select! {
            status = &mut started.ended => {
                let code = status.map_or(137, exit_code);
                return (code, if code == 0 { "Completed" } else { "Error" });
            }
            why = self.probe() => {
                tracing::info!(container = %self.plan.name, "its probe ends it: {why}");
                (true, self.grace)
            }
            grace = stop.wait_for(Option::is_some) => (false, grace.ok().and_then(|grace| *grace).unwrap_or_default()),
        };
        if !failed {
            self.tell(What::Ready(false)).await;
        }
        let deadline = tokio::time::Instant::now() + grace;
        if let Some(hook) = &self.plan.pre_stop
            && let Err(error) = hook.ask(self.address, &self.enter, grace).await
        {
            tracing::info!(container = %self.plan.name, "its preStop hook: {error}");
        }
        let pid = Pid::from_raw(started.pid);
        let _ = kill(pid, Signal::SIGTERM);
        if let Ok(status) = tokio::time::timeout_at(deadline, &mut started.ended).await {
            return (status.map_or(137, exit_code), if failed { "Error" } else { "Completed" });
        }
        let _ = kill(pid, Signal::SIGKILL);
        (started.ended.await.map_or(137, exit_code), "Error")
    }

    /// Probes for as long as it is well: what was wrong.
    async fn probe(&self) -> String {
        if let Some(hook) = &self.plan.post_start
            && let Err(error) = hook.ask(self.address, &self.enter, Duration::from_secs(60)).await
        {
            return format!("postStart: {error}");
        }
        if let Some(startup) = &self.plan.startup
            && let (false, error) = self.until(startup, None, startup.delay).await
        {
            return format!("startup: {error}");
        }
        self.tell(What::Started(true)).await;
        let readiness = async {
            let Some(probe) = &self.plan.readiness else {
                self.tell(What::Ready(true)).await;
                return std::future::pending::<()>().await;
            };
            let mut pause = probe.delay;
            loop {
                for ready in [true, false] {
                    self.until(probe, Some(ready), pause).await;
                    self.tell(What::Ready(ready)).await;
                    pause = probe.period;
                }
            }
        };
        let liveness = async {
            match &self.plan.liveness {
                None => std::future::pending::<String>().await,
                Some(probe) => format!("liveness: {}", self.until(probe, Some(false), probe.delay).await.1),
            }
        };
        tokio::select! {
            why = liveness => why,
            () = readiness => String::new(),
        }
    }

    /// Asks again and again until there is a verdict, that one if one is wanted; what was last wrong.
    async fn until(&self, probe: &Probe, wanted: Option<bool>, first: Duration) -> (bool, String) {
        let (mut streak, mut pause) = (Streak::default(), first);
        loop {
            tokio::time::sleep(pause).await;
            pause = probe.period;
            let asked = probe.action.ask(self.address, &self.enter, probe.timeout).await;
            let verdict = streak.answered(asked.is_ok(), probe);
            if let Some(verdict) = verdict.filter(|verdict| wanted.is_none_or(|wanted| wanted == *verdict)) {
                return (verdict, asked.err().unwrap_or_default());
            }
        }
    }
}
