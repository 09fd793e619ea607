//! The verbs. Each file owns the arguments of its verb and what the verb does; this one only dispatches.

use std::future::Future;

use crate::args::{Cli, Command};
use crate::failure::{Exit, Failure};

pub mod admin_pipe;
pub mod apply;
pub mod audit;
pub mod check;
pub mod completion;
pub mod confirm;
pub mod delete;
pub mod demo;
pub mod demo_app;
pub mod describe;
pub mod federator;
pub mod gateway;
pub mod get;
pub mod install;
pub mod kube;
pub mod link;
pub mod names;
pub mod revoke;
pub mod role;
pub mod sidecar;
pub mod status;
pub mod token;
pub mod trust;
pub mod uninstall;
pub mod unlink;
pub mod vm;

pub fn run(cli: Cli) -> Result<Exit, Failure> {
    let Cli { connect, command } = cli;
    match command {
        // Roles set up logging and runtimes of their own.
        Command::Federator(args) => federator::run(*args, connect.socket),
        Command::Gateway(args) => gateway::run(*args),
        Command::Sidecar(args) => sidecar::run(*args),
        Command::Demo(args) => demo::run(args),
        Command::DemoApp(args) => demo_app::run(args),
        Command::Trust(args) => trust::run(args, connect),
        Command::Completion(args) => completion::run(args),
        Command::Install(args) => install::install(*args, connect),
        Command::Upgrade(args) => operate(install::upgrade(*args, connect)),
        Command::Uninstall(args) => operate(uninstall::run(args, connect)),
        Command::AdminPipe(args) => admin_pipe::run(args, connect),
        Command::Kube(args) => operate(kube::run(args, connect.timeout)),
        Command::Link(args) => operate(link::run(args, connect)),
        Command::Unlink(args) => operate(unlink::run(args, connect)),
        Command::Token(args) => operate(token::run(args, connect)),
        Command::Vm(args) => vm::run(args, connect),
        Command::Apply(args) => operate(apply::run(args, connect)),
        Command::Get(args) => operate(get::run(args, connect)),
        Command::Describe(args) => operate(describe::run(args, connect)),
        Command::Delete(args) => operate(delete::run(args, connect)),
        Command::Check(args) => operate(check::run(args, connect)),
        Command::Status(args) => operate(status::run(args, connect)),
        Command::Audit(args) => audit::run(args, connect),
        Command::Revoke(args) => operate(revoke::revoke(args, connect)),
        Command::Unrevoke(args) => operate(revoke::unrevoke(args, connect)),
    }
}

/// Runs an operator's command to its end.
fn operate(command: impl Future<Output = Result<Exit, Failure>>) -> Result<Exit, Failure> {
    operate_for(command)
}

/// Runs a part of one.
fn operate_for<T>(command: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    let runtime =
        tombolo_runtime::rt::one_thread().map_err(|e| Failure::new(format_args!("cannot start: {e}")))?;
    runtime.block_on(command)
}

#[cfg(test)]
mod tests;
