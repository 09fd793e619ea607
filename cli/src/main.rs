//! The `tombolo` binary: every role and the operator's commands. This file is wiring: parse, run, exit code.

use std::process::ExitCode;

use clap::Parser;

mod admin_client;
mod args;
mod chart;
mod cmd;
mod context;
mod demo;
mod failure;
mod kinds;
mod kube_client;
mod manifest;
mod output;
mod tunnel;

/// The byte path allocates per stream and per datagram batch; mimalloc gives memory back sooner than the system's.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    // mimalloc asks for huge pages, which make 10 MB resident of the 2 MB that an idle sidecar uses; refused on kernels
    // without them, where there is nothing to switch off.
    let _ = nix::sys::prctl::set_thp_disable(true);
    // Before anything can touch TLS: one provider for the whole process. It fails only when one is installed already.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    match args::Cli::try_parse() {
        Ok(cli) => match cmd::run(cli) {
            Ok(exit) => exit.into(),
            Err(failure) => failure.report(),
        },
        Err(error) => {
            let code = error.exit_code();
            let _ = error.print();
            ExitCode::from(u8::try_from(code).unwrap_or(2))
        }
    }
}
