//! A pod's status from what its containers do. Pure; times are passed in.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde_json::{Value, json};

use super::plan::{ContainerPlan, PodPlan, Restart};

/// Where a container is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Run {
    Waiting { reason: String, message: String },
    Running { since: String },
    Terminated(Ended),
}

/// A run that is over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ended {
    pub code: i32,
    pub reason: &'static str,
    pub from: String,
    pub to: String,
    /// What it said last, where its status is to have that.
    pub message: String,
}

/// What has happened to a container.
#[derive(Clone, Debug)]
pub struct Happened {
    /// `init` or main, and its number there.
    pub init: bool,
    pub index: usize,
    pub what: What,
}

#[derive(Clone, Debug)]
pub enum What {
    Run(Run),
    Started(bool),
    Ready(bool),
}

/// A container so far.
#[derive(Clone, Debug)]
pub struct Container {
    name: String,
    image: String,
    sidecar: bool,
    restart: Restart,
    pub run: Run,
    last: Option<Ended>,
    restarts: u32,
    pub started: bool,
    pub ready: bool,
}

impl Container {
    fn new(plan: &ContainerPlan, reason: &str) -> Self {
        Self {
            name: plan.name.clone(),
            image: plan.image.clone(),
            sidecar: plan.sidecar,
            restart: plan.restart,
            run: Run::Waiting { reason: reason.to_owned(), message: String::new() },
            last: None,
            restarts: 0,
            started: false,
            ready: false,
        }
    }

    /// It has ended for good.
    pub fn over(&self) -> Option<i32> {
        match &self.run {
            Run::Terminated(ended) if !self.restart.after(ended.code) => Some(ended.code),
            _ => None,
        }
    }

    fn value(&self) -> Value {
        let run = match &self.run {
            Run::Waiting { reason, message } => {
                json!({ "waiting": { "reason": reason, "message": message } })
            }
            Run::Running { since } => json!({ "running": { "startedAt": since } }),
            Run::Terminated(ended) => terminated(ended),
        };
        json!({
            "name": self.name, "image": self.image, "imageID": self.image, "containerID": format!("testbed://{}", self.name),
            "state": run, "lastState": self.last.as_ref().map_or(json!({}), terminated),
            "ready": self.ready, "started": self.started, "restartCount": self.restarts,
        })
    }
}

fn terminated(ended: &Ended) -> Value {
    json!({ "terminated": {
        "exitCode": ended.code, "reason": ended.reason, "startedAt": ended.from, "finishedAt": ended.to,
        "message": ended.message,
    } })
}

/// A pod so far.
#[derive(Clone, Debug)]
pub struct PodState {
    pub node_ips: Vec<IpAddr>,
    pub ips: Vec<IpAddr>,
    since: String,
    pub init: Vec<Container>,
    pub main: Vec<Container>,
    /// Status of a condition, and since when.
    conditions: BTreeMap<&'static str, (bool, String)>,
}

impl PodState {
    pub fn new(plan: &PodPlan, node_ips: Vec<IpAddr>, now: String) -> Self {
        let all =
            |plans: &[ContainerPlan]| plans.iter().map(|of| Container::new(of, "PodInitializing")).collect();
        let (init, main) = (all(&plan.init), all(&plan.main));
        Self { node_ips, ips: Vec::new(), since: now, init, main, conditions: BTreeMap::new() }
    }

    /// Takes in what has happened.
    pub fn apply(&mut self, happened: Happened) {
        let list = if happened.init { &mut self.init } else { &mut self.main };
        let Some(container) = list.get_mut(happened.index) else { return };
        match happened.what {
            What::Run(run) => {
                if let Run::Terminated(ended) = &container.run {
                    container.last = Some(ended.clone());
                    container.restarts += u32::from(matches!(run, Run::Running { .. }));
                } else if let (Run::Waiting { .. }, Run::Running { .. }, Some(_)) =
                    (&container.run, &run, &container.last)
                {
                    container.restarts += 1;
                }
                if !matches!(run, Run::Running { .. }) {
                    container.started = false;
                    // One that was to end has done so.
                    container.ready = happened.init
                        && !container.sidecar
                        && matches!(&run, Run::Terminated(Ended { code: 0, .. }));
                }
                container.run = run;
            }
            What::Started(started) => container.started = started,
            What::Ready(ready) => container.ready = ready,
        }
    }

    /// Every init container has done its part.
    pub fn initialized(&self) -> bool {
        self.init.iter().all(|of| if of.sidecar { of.started } else { of.over() == Some(0) })
    }

    /// Nothing will run any more.
    pub fn over(&self) -> bool {
        let failed = self.init.iter().any(|of| of.over().is_some_and(|code| code != 0));
        failed || self.main.iter().all(|of| of.over().is_some())
    }

    fn phase(&self) -> &'static str {
        if self.over() {
            let code = |of: &Container| of.over().unwrap_or(0);
            return if self.init.iter().chain(&self.main).all(|of| code(of) == 0) {
                "Succeeded"
            } else {
                "Failed"
            };
        }
        let begun = |of: &Container| of.last.is_some() || !matches!(of.run, Run::Waiting { .. });
        if self.initialized() && self.main.iter().any(begun) { "Running" } else { "Pending" }
    }

    /// The status for the API.
    pub fn value(&mut self, now: &str) -> Value {
        let ready = self.initialized()
            && self.main.iter().all(|of| of.ready)
            && self.init.iter().all(|of| of.ready || !of.sidecar);
        // Which containers are not: only here, so that it changes with the conditions.
        let waiting: Vec<&str> = self.main.iter().filter(|of| !of.ready).map(|of| of.name.as_str()).collect();
        let message = if ready { String::new() } else { format!("not ready: {}", waiting.join(", ")) };
        let mut conditions = Vec::new();
        for (name, status) in [
            ("PodReadyToStartContainers", !self.ips.is_empty()),
            ("Initialized", self.initialized()),
            ("ContainersReady", ready),
            ("Ready", ready),
        ] {
            let entry = self.conditions.entry(name).or_insert_with(|| (status, now.to_owned()));
            if entry.0 != status {
                *entry = (status, now.to_owned());
            }
            let mut condition = json!({
                "type": name, "status": if status { "True" } else { "False" }, "lastTransitionTime": entry.1,
                "lastProbeTime": null, "reason": null, "message": null,
            });
            if !status && name.ends_with("Ready") {
                condition["reason"] = json!("ContainersNotReady");
                condition["message"] = json!(message);
            }
            conditions.push(condition);
        }
        let list = |ips: &[IpAddr]| ips.iter().map(|ip| json!({ "ip": ip.to_string() })).collect::<Vec<_>>();
        let all = |containers: &[Container]| containers.iter().map(Container::value).collect::<Vec<_>>();
        let mut status = json!({
            "phase": self.phase(), "startTime": self.since, "conditions": conditions,
            "hostIP": self.node_ips.first().map(IpAddr::to_string), "hostIPs": list(&self.node_ips),
            "initContainerStatuses": all(&self.init), "containerStatuses": all(&self.main),
        });
        if let Some(first) = self.ips.first() {
            status["podIP"] = json!(first.to_string());
            status["podIPs"] = json!(list(&self.ips));
        }
        status
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> PodState {
        let pod = json!({ "metadata": { "name": "a" }, "spec": {
            "initContainers": [{ "name": "i", "image": "busybox" }, { "name": "s", "image": "tombolo", "restartPolicy": "Always" }],
            "containers": [{ "name": "c", "image": "nginx" }],
        } });
        let plan = super::super::plan::plan(&serde_json::from_value(pod).unwrap()).unwrap();
        PodState::new(&plan, vec!["172.20.1.11".parse().unwrap()], "t0".into())
    }

    fn happened(init: bool, index: usize, what: What) -> Happened {
        Happened { init, index, what }
    }

    fn running() -> What {
        What::Run(Run::Running { since: "t1".into() })
    }

    fn ended(code: i32) -> What {
        What::Run(Run::Terminated(Ended {
            code,
            reason: "x",
            from: "t1".into(),
            to: "t2".into(),
            message: String::new(),
        }))
    }

    fn condition(status: &Value, name: &str) -> (String, String) {
        let all = status["conditions"].as_array().unwrap();
        let found = all.iter().find(|of| of["type"] == name).unwrap();
        (found["status"].as_str().unwrap().into(), found["lastTransitionTime"].as_str().unwrap().into())
    }

    #[test]
    fn a_pod_is_ready_when_its_init_containers_are_done_and_sidecars_and_main_ones_are_ready() {
        let mut state = state();
        assert_eq!(state.value("t0")["phase"], "Pending");
        for event in [
            happened(true, 0, running()),
            happened(true, 0, ended(0)),
            happened(true, 1, running()),
            happened(true, 1, What::Started(true)),
            happened(true, 1, What::Ready(true)),
        ] {
            assert_eq!(condition(&state.value("t1"), "Ready").0, "False");
            state.apply(event);
        }
        // Since the sidecar has started, which it did before it was ready.
        assert_eq!(condition(&state.value("t2"), "Initialized"), ("True".into(), "t1".into()));
        assert_eq!(state.value("t2")["phase"], "Pending");
        state.apply(happened(false, 0, running()));
        assert_eq!(state.value("t3")["phase"], "Running");
        state.apply(happened(false, 0, What::Ready(true)));
        assert_eq!(condition(&state.value("t4"), "Ready"), ("True".into(), "t4".into()));
        state.apply(happened(true, 1, ended(1)));
        assert_eq!(condition(&state.value("t5"), "Ready"), ("False".into(), "t5".into()));
        assert!(!state.over());
    }

    #[test]
    fn a_container_that_runs_again_counts_it_and_remembers_its_end() {
        let mut state = state();
        for what in [
            running(),
            ended(3),
            What::Run(Run::Waiting { reason: "CrashLoopBackOff".into(), message: String::new() }),
            running(),
        ] {
            state.apply(happened(false, 0, what));
        }
        let status = &state.value("t9")["containerStatuses"][0];
        assert_eq!(status["restartCount"], 1);
        assert_eq!(status["lastState"]["terminated"]["exitCode"], 3);
    }
}
