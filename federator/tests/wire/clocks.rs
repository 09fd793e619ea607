//! A federator whose clock is off, in a process of its own.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use super::*;

/// Serves until its standard input closes; says its token.
#[test]
#[ignore = "the other process of a_federator_whose_clock_is_nine_minutes_off_is_joined"]
fn federator_child() {
    let dir = PathBuf::from(std::env::var_os("TOMBOLO_TEST_DIR").expect("run by another test only"));
    let federator = Running::start(config(&dir, "east", local())).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    println!("token {}", runtime.block_on(federator.token("sidecar", "web")));
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).unwrap();
    federator.stop();
}

/// Joins a federator whose clock is so many seconds ahead, watches and reports.
async fn join_across(offset_seconds: i64) -> Result<(), String> {
    let home = Home::new("east");
    let mut child = Command::new("/proc/self/exe")
        .args(["--exact", "--ignored", "--nocapture", "clocks::federator_child"])
        .env("TOMBOLO_TEST_DIR", home.dir.path())
        .env("TOMBOLO_CLOCK_OFFSET_SECONDS", offset_seconds.to_string())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
    let token = lines.find_map(|line| Some(line.split_once("token ")?.1.to_owned())).unwrap();
    let result = async {
        let member = Member::join(&token, &home.path("web"), Some("web"), local()).await;
        let web = Sidecar::of(member.map_err(|error| error.to_string())?);
        let _snapshots = web.watch(&["shop/web"]).await;
        web.report("shop/web", true).await.map_err(|status| status.message().to_owned())?;
        web.member.renew(&web.overlay).await.map_err(|error| error.to_string())
    }
    .await;
    drop(child.stdin.take());
    // Read to its end: whoever prints into a closed pipe fails.
    lines.for_each(drop);
    assert!(child.wait().unwrap().success());
    result
}

#[tokio::test]
async fn a_federator_whose_clock_is_nine_minutes_off_is_joined() {
    for offset in [540, -540] {
        join_across(offset).await.unwrap_or_else(|error| panic!("{offset} s: {error}"));
    }
}

#[tokio::test]
async fn a_federator_whose_clock_is_a_day_off_is_refused_with_a_reason() {
    for offset in [86_400, -86_400] {
        let error = join_across(offset).await.unwrap_err();
        assert!(
            ["not valid", "expired", "not the federator"].iter().any(|w| error.contains(w)),
            "{offset}: {error}"
        );
    }
}
