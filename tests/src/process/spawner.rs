//! The one thread that starts children. It never ends while the test process lives, so the parent-death signal that
//! each child carries means "the test process is gone" and nothing else.

use std::fs::File;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Mutex, OnceLock, PoisonError};

use super::ProcessSpec;

struct Job {
    command: Command,
    reply: Sender<std::io::Result<Child>>,
}

pub(super) fn spawn(spec: &ProcessSpec, out: File) -> std::io::Result<Child> {
    static JOBS: OnceLock<Mutex<Sender<Job>>> = OnceLock::new();
    let mut command = Command::new(&spec.program);
    command.args(&spec.args).envs(spec.env.iter().map(|(key, value)| (key, value)));
    command.stdin(Stdio::null()).stdout(out.try_clone()?).stderr(out).process_group(0);
    if let Some(directory) = &spec.directory {
        command.current_dir(directory);
    }
    let namespace = spec.namespace.clone();
    let parent = std::process::id();
    let prepare = move || {
        if let Some(namespace) = &namespace {
            namespace.enter()?;
        }
        nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)?;
        // The parent may have died between fork and prctl; then no signal would ever come.
        if nix::unistd::getppid().as_raw() as u32 != parent {
            return Err(std::io::ErrorKind::Interrupted.into());
        }
        Ok(())
    };
    // SAFETY: between fork and exec the closure makes only async-signal-safe system calls (setns, prctl, getppid) and
    // allocates nothing.
    unsafe { command.pre_exec(prepare) };

    let (reply, answer) = channel();
    let jobs = JOBS.get_or_init(|| Mutex::new(start()));
    let gone = || std::io::Error::other("the spawner thread has ended");
    jobs.lock().unwrap_or_else(PoisonError::into_inner).send(Job { command, reply }).map_err(|_| gone())?;
    answer.recv().map_err(|_| gone())?
}

fn start() -> Sender<Job> {
    let (jobs, queue) = channel::<Job>();
    std::thread::spawn(move || {
        while let Ok(mut job) = queue.recv() {
            let _ = job.reply.send(job.command.spawn());
        }
    });
    jobs
}
