//! What the machine lets a test do, and the counted list of tests that could not run.
//!
//! A skip is one line `SKIPPED <test>: <reason>` written straight to standard error (the test runner's capture does
//! not swallow it) and, when `TOMBOLO_SKIP_LIST` names a file, appended there. The test command counts those lines;
//! with `TOMBOLO_REQUIRE_ALL=1` a missing capability fails the test instead.

use std::io::Write as _;
use std::path::Path;
use std::sync::OnceLock;

/// Proof that namespaces can be made here. It can only be had from [`require_netns`].
#[derive(Debug, Clone, Copy)]
pub struct NetnsCapable(());

/// `None` after listing `test` as skipped: return from the test then.
///
/// # Panics
/// When the capability is missing and `TOMBOLO_REQUIRE_ALL` is set: a machine that promised everything must not skip.
pub fn require_netns(test: &str) -> Option<NetnsCapable> {
    match netns() {
        Ok(capable) => Some(capable),
        Err(reason) => {
            skipped(test, &reason);
            None
        }
    }
}

/// Lists `test` as skipped unless every one of `programs` is installed.
pub fn require_programs(test: &str, programs: &[&str]) -> Option<()> {
    let missing: Vec<&str> =
        programs.iter().copied().filter(|program| find_program(program).is_none()).collect();
    if missing.is_empty() {
        return Some(());
    }
    skipped(test, &format!("not installed: {} (tests/setup.sh installs them)", missing.join(", ")));
    None
}

/// How much of something a scenario does: `default`, or what the environment variable says. Figures want more rounds and
/// load than a test has time for: `docs/benchmarks.md` names the command of each.
///
/// # Panics
/// When the variable is no number: a figure must not be of something else than was asked for.
pub fn amount(variable: &str, default: u32) -> u32 {
    std::env::var_os(variable).map_or(default, |value| {
        let number = value.to_str().and_then(|text| text.parse().ok());
        number.unwrap_or_else(|| panic!("{variable} is {}, expected a number", value.display()))
    })
}

/// Whether namespaces, veth pairs and TUN devices work here; asked once per process.
pub fn netns() -> Result<NetnsCapable, String> {
    static ANSWER: OnceLock<Result<(), String>> = OnceLock::new();
    ANSWER.get_or_init(probe).clone().map(NetnsCapable)
}

fn probe() -> Result<(), String> {
    if !nix::unistd::geteuid().is_root() {
        return Err("network namespaces need root".to_owned());
    }
    for program in ["ip", "nft"] {
        if find_program(program).is_none() {
            return Err(format!("`{program}` is not installed (tests/setup.sh installs it)"));
        }
    }
    if !Path::new("/dev/net/tun").exists() {
        return Err("/dev/net/tun is missing".to_owned());
    }
    crate::netns::Namespace::create("probe").map(drop).map_err(|error| format!("{error:#}"))
}

/// The full path of an installed program; `/usr/sbin` is searched too, because Debian keeps `nginx` and `nft` there.
pub fn find_program(program: &str) -> Option<std::path::PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/local/sbin"].map(Into::into))
        .map(|dir| dir.join(program))
        .find(|candidate| candidate.is_file())
}

/// Lists `test` as skipped, for a reason of its own.
pub fn skipped(test: &str, reason: &str) {
    let line = format!("SKIPPED {test}: {reason}\n");
    assert!(
        std::env::var_os("TOMBOLO_REQUIRE_ALL").is_none(),
        "TOMBOLO_REQUIRE_ALL is set, but {test} cannot run here: {reason}"
    );
    // The list is best effort twice over; losing both standard error and the file would need a broken machine.
    let _ = std::io::stderr().write_all(line.as_bytes());
    if let Some(list) = std::env::var_os("TOMBOLO_SKIP_LIST")
        && let Ok(mut file) = std::fs::OpenOptions::new().create(true).append(true).open(list)
    {
        let _ = file.write_all(line.as_bytes());
    }
}
/// Where a tool that the tests build themselves is kept, by its name and version.
pub fn tool_dir(name: &str) -> std::path::PathBuf {
    #[allow(clippy::disallowed_methods)] // the harness's own settings
    let variable = |name: &str| std::env::var_os(name).map(std::path::PathBuf::from);
    let cache = variable("XDG_CACHE_HOME").or_else(|| Some(variable("HOME")?.join(".cache")));
    cache.unwrap_or_default().join("tombolo-test").join(name)
}
