//! A machine with a real systemd as its first process: this machine's own files behind an overlay that forgets what is
//! written, namespaces of its own for processes, mounts and names, the network namespace of a test's machine.
//!
//! ```text
//!  unshare --mount: tmpfs, overlay          for as long as the value lives: a reboot finds what was written before
//!    `- unshare --pid --cgroup ...: systemd  one boot; killed without a word by [`Systemd::power_off`]
//! ```
//! Nothing that this machine's systemd runs is started, and nothing that sets up the kernel: the units that would are out of
//! sight. It has a cgroup of its own below the one of the test, which goes with it.

use std::io::{Read as _, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use crate::capability::{find_program, skipped};
use crate::captured::Ended;
use crate::netns::Namespace;

const INIT: &str = "/usr/lib/systemd/systemd";
/// Of a hierarchy that has no controllers (cgroup v1), or the only one (v2).
const CGROUPS: [&str; 2] = ["/sys/fs/cgroup/systemd", "/sys/fs/cgroup"];
const BOOT: Duration = Duration::from_secs(60);

/// `$1`: an empty directory. Each line of the standard input is a boot.
const MACHINE: &str = r#"set -e
mount --make-rprivate /
mount -t tmpfs tmpfs "$1"
mkdir "$1/upper" "$1/work" "$1/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$1/upper,workdir=$1/work" "$1/root"
cd "$1/root"
units=usr/lib/systemd/system
rm -rf etc/systemd/system etc/systemd/system.conf.d "$units"/*.target.wants
mkdir -p etc/systemd/system "$units/sockets.target.wants" "$units/sysinit.target.wants"
for socket in systemd-journald.socket systemd-journald-dev-log.socket; do
    ln -s "../$socket" "$units/sockets.target.wants/$socket"
done
ln -s ../systemd-journald.service "$units/sysinit.target.wants/systemd-journald.service"
for unit in systemd-remount-fs.service systemd-udevd.service systemd-journald-audit.socket tmp.mount; do
    ln -s /dev/null "etc/systemd/system/$unit"
done
printf '0123456789abcdef0123456789abcdef\n' >etc/machine-id
# Here-documents and commands below would read the boots.
exec 3<&0 </dev/null
while read -r _ <&3; do
    unshare --pid --fork --mount --uts --ipc --cgroup --kill-child bash -c "$BOOT" boot || true
done
"#;

/// In the machine's root.
const BOOT_SCRIPT: &str = r#"set -e
mount -t proc proc proc
mount --bind proc/sys proc/sys
mount -o remount,bind,ro proc/sys
mount --rbind /sys sys
mount -t tmpfs tmpfs sys/fs/cgroup
if [ -d /sys/fs/cgroup/systemd ]; then
    mkdir sys/fs/cgroup/systemd
    mount -t cgroup -o none,name=systemd cgroup sys/fs/cgroup/systemd
else
    mount -t cgroup2 cgroup sys/fs/cgroup
fi
mount -t tmpfs tmpfs run
mount -t tmpfs tmpfs dev
for device in null zero full random urandom tty; do touch "dev/$device"; mount --bind "/dev/$device" "dev/$device"; done
mkdir -p dev/shm dev/pts
ln -s /proc/self/fd dev/fd
exec env -i container=tombolo-test PATH=/usr/sbin:/usr/bin:/sbin:/bin chroot . INIT --system --unit=multi-user.target \
    --log-target=journal --show-status=no </dev/null
"#;

/// Lists `test` as skipped unless a systemd can be started here.
pub fn require_systemd(test: &str) -> Option<()> {
    let missing = [
        (!Path::new(INIT).exists(), "systemd is not installed"),
        (
            !CGROUPS.iter().any(|dir| Path::new(dir).join("cgroup.procs").exists()),
            "no cgroup hierarchy for it",
        ),
        (
            find_program("unshare").is_none() || find_program("nsenter").is_none(),
            "unshare and nsenter are not",
        ),
    ];
    match missing.into_iter().find(|(missing, _)| *missing) {
        Some((_, reason)) => {
            skipped(test, reason);
            None
        }
        None => Some(()),
    }
}

pub struct Systemd {
    machine: Child,
    boots: ChildStdin,
    init: Option<u32>,
    cgroup: PathBuf,
    _dir: tempfile::TempDir,
}

impl Systemd {
    /// Boots in the network of `namespace`.
    pub fn boot(namespace: &Namespace) -> Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let parent = CGROUPS.iter().map(Path::new).find(|dir| dir.join("cgroup.procs").exists());
        let name = format!("tb-{}-{}", std::process::id(), NUMBER.fetch_add(1, Relaxed));
        let cgroup = parent.context("no cgroup hierarchy")?.join(name);
        std::fs::create_dir(&cgroup)?;
        let dir = tempfile::tempdir()?;
        let (procs, handle) = (cgroup.join("cgroup.procs"), namespace.handle());
        let mut command = Command::new("unshare");
        command.args(["--mount", "bash", "-c", MACHINE, "machine"]).arg(dir.path());
        command.env("BOOT", BOOT_SCRIPT.replace("INIT", INIT));
        // Its own group, so that all of it can be ended. What it says is for whoever looks for why it does not start.
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped()).process_group(0);
        // Both are the thread's that starts it: entered there, not here.
        let spawned = std::thread::scope(|scope| {
            let start = || -> Result<Child> {
                handle.enter()?;
                let child = command.spawn().context("unshare")?;
                std::fs::write(&procs, child.id().to_string()).context("a cgroup of its own")?;
                Ok(child)
            };
            scope.spawn(start).join().map_err(|_| anyhow::anyhow!("the start panicked"))?
        });
        let mut machine = spawned?;
        let boots = machine.stdin.take().context("no standard input")?;
        let mut systemd = Self { machine, boots, init: None, cgroup, _dir: dir };
        systemd.power_on()?;
        Ok(systemd)
    }

    /// Boots again after [`power_off`](Self::power_off), and waits until all that is enabled has been started.
    pub fn power_on(&mut self) -> Result<()> {
        self.boots.write_all(b"on\n")?;
        let deadline = Instant::now() + BOOT;
        loop {
            if let Some(status) = self.machine.try_wait()? {
                let mut said = String::new();
                let _ = self.machine.stderr.take().map(|mut stderr| stderr.read_to_string(&mut said));
                bail!("the machine ended with {status}: {said}");
            }
            self.init = self.find_init();
            if self.init.is_some() {
                let state = self.run("systemctl", &["is-system-running"])?;
                match state.out.trim() {
                    "running" => return Ok(()),
                    "degraded" => {
                        let failed = self.run("systemctl", &["list-units", "--failed", "--no-pager"])?;
                        bail!("units have failed: {}", failed.out);
                    }
                    _ => {}
                }
            }
            ensure!(Instant::now() < deadline, "systemd does not come up within {BOOT:?}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// All of its processes end at once, as when the plug is pulled.
    pub fn power_off(&mut self) -> Result<()> {
        let init = self.init.take().context("it is off")?;
        let pid = nix::unistd::Pid::from_raw(i32::try_from(init)?);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL)?;
        while Path::new(&format!("/proc/{init}")).exists() {
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// The only process of the machine that is called so and is the first of its namespace.
    fn find_init(&self) -> Option<u32> {
        let booting = children(self.machine.id()).into_iter().next()?;
        let init = children(booting).into_iter().next()?;
        let name = std::fs::read_to_string(format!("/proc/{init}/comm")).ok()?;
        (name.trim() == "systemd").then_some(init)
    }

    /// Runs a program on the machine to its end.
    pub fn run(&self, program: &str, args: &[&str]) -> Result<Ended> {
        self.run_with(program, args, "")
    }

    pub fn run_with(&self, program: &str, args: &[&str], stdin: &str) -> Result<Ended> {
        let init = self.init.context("the machine is off")?.to_string();
        let mut command = Command::new("nsenter");
        command
            .args(["-t", &init, "-m", "-p", "-u", "-i", "-n", "-C", "-r", "-w", "--", program])
            .args(args)
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
        crate::captured::ended(command, stdin)
    }

    /// Writes a file on the machine.
    pub fn write(&self, path: &str, text: &str) -> Result<()> {
        self.run_with("sh", &["-c", "umask 077; cat >\"$0\"", path], text)?.ok().map(drop)
    }

    /// What a unit has logged since it was first started.
    pub fn journal(&self, unit: &str) -> String {
        let log = self.run("journalctl", &["-u", unit, "--no-pager", "-n", "60", "-o", "cat"]);
        log.map(|log| log.out).unwrap_or_default()
    }
}

fn children(pid: u32) -> Vec<u32> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    text.split_whitespace().filter_map(|pid| pid.parse().ok()).collect()
}

impl Drop for Systemd {
    fn drop(&mut self) {
        let _ = self.power_off();
        if let Ok(pid) = i32::try_from(self.machine.id()) {
            let pid = nix::unistd::Pid::from_raw(pid);
            let _ = nix::sys::signal::killpg(pid, nix::sys::signal::Signal::SIGKILL);
        }
        let _ = self.machine.wait();
        remove_cgroup(&self.cgroup);
    }
}

/// The innermost first; what still runs there holds its directory.
fn remove_cgroup(dir: &Path) {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).filter(|path| path.is_dir()).for_each(|path| remove_cgroup(&path));
    let _ = std::fs::remove_dir(dir);
}
