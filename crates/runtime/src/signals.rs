//! SIGTERM and SIGINT: the first starts the drain, the second forces it.
//!
//! Listening starts in `build`, so that a signal that comes while a role still starts is not lost.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::drain::{Drain, DrainTrigger};

/// Registered signal handlers of this process.
#[derive(Debug)]
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    /// Registers the handlers. Needs a runtime.
    pub fn listen() -> io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    /// Name of the next signal. Cancel safe.
    pub async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }

    /// First signal: start the drain. Second: force it. Ends after the second, or when the drain is over.
    pub async fn drive(mut self, trigger: DrainTrigger) {
        let first = self.next().await;
        tracing::info!(signal = first, "draining; a second signal ends at once");
        trigger.start();
        tokio::select! {
            () = trigger.drained() => {}
            second = self.next() => {
                tracing::warn!(signal = second, "ending at once");
                trigger.force();
            }
        }
    }
}

/// The drain of a whole process: started by SIGTERM or SIGINT, forced by the second.
pub fn process_drain(tasks: &crate::tasks::TaskGroup) -> io::Result<Drain> {
    let signals = Signals::listen()?;
    let (trigger, drain) = crate::drain::channel();
    tasks.spawn("signals", signals.drive(trigger));
    Ok(drain)
}
