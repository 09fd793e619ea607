//! What a newcomer is told once the demo runs: a few lines to paste.

use super::plan::{CLUSTERS, Plan};
use super::supervisor::Supervisor;

/// The text to print. `program` is how this binary is called.
pub fn text(plan: &Plan, supervisor: &Supervisor) -> String {
    let program = supervisor.program().display();
    let pid = |name: &str| supervisor.pid(name).map_or_else(|| "?".to_owned(), |pid| pid.to_string());
    let [east, west] = CLUSTERS.map(|cluster| plan.socket(cluster).display().to_string());
    let call = plan.upstream("east");
    format!(
        "
Two clusters, east and west, and a machine that is a member of west are running. shop/web lives in west and on the
machine (and in east, as a fallback). Paste these into another terminal:

  Call it from east. The answer says who served it:
    curl http://{call}/

  What is going on, as east and as west see it:
    {program} --socket {east} status
    {program} --socket {west} status

  Watch it while you break things:
    while sleep 0.2; do curl -s -m 5 http://{call}/ || echo failed; done

  Kill a gateway of west. Nothing breaks: the other one carries on:
    kill -9 {gateway}

  Kill the application in west: the machine takes over. Kill it there too: east serves itself:
    kill -9 {web}
    kill -9 {vm}
    {program} --socket {east} status

  Bring everything back that you have killed. Traffic returns once west has been healthy for 3 s:
    kill -HUP {me}

  Logs: {logs}
  Ctrl-C here ends everything and removes what it wrote (unless --keep).
",
        gateway = pid("west/gw-1"),
        web = pid("west/web-app"),
        vm = pid("vm/web-app"),
        logs = plan.root.join("logs").display(),
        me = std::process::id(),
    )
}
