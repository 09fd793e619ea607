//! The command line's grammar. Every verb has examples; the tests below hold that.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::cmd;

/// Ties clusters together: one UDP port per cluster, end-to-end mTLS between workloads, failover across regions.
#[derive(Debug, Parser)]
#[command(
    name = "tombolo",
    version,
    propagate_version = true,
    arg_required_else_help = true,
    after_help = "\
Examples:
  tombolo demo                                  two clusters and a VM on this machine
  tombolo trust init --trust-domain acme.example
  tombolo install --kube-context east           into a Kubernetes cluster
  tombolo federator --cluster east
  tombolo status

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 a check found problems, 4 timed out while waiting."
)]
pub struct Cli {
    #[command(flatten)]
    pub connect: Connect,
    #[command(subcommand)]
    pub command: Command,
}

/// Which federator the operator's commands talk to.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Connection")]
pub struct Connect {
    /// Cluster whose federator runs on this machine [default: the only one]
    #[arg(long, global = true, env = "TOMBOLO_CONTEXT", value_name = "CLUSTER")]
    pub context: Option<String>,
    /// Admin socket of the federator [default: <runtime directory>/<cluster>/admin.sock]
    #[arg(long, global = true, env = "TOMBOLO_SOCKET", value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// Context of the kubeconfig: the federator that runs in that Kubernetes cluster
    #[arg(long, global = true, env = "TOMBOLO_KUBE_CONTEXT", value_name = "NAME", conflicts_with_all = ["context", "socket"])]
    pub kube_context: Option<String>,
    /// Kubeconfig [default: KUBECONFIG, else ~/.kube/config]
    #[arg(long, global = true, env = "TOMBOLO_KUBECONFIG", value_name = "FILE", conflicts_with_all = ["context", "socket"])]
    pub kubeconfig: Option<PathBuf>,
    /// Namespace that tombolo is installed in
    #[arg(
        long,
        global = true,
        env = "TOMBOLO_KUBE_NAMESPACE",
        value_name = "NAMESPACE",
        default_value = "tombolo-system"
    )]
    pub kube_namespace: String,
    /// How long to wait for an answer
    #[arg(long, global = true, env = "TOMBOLO_TIMEOUT", value_name = "DURATION", default_value = "15s", value_parser = duration)]
    pub timeout: Duration,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    Demo(cmd::demo::DemoArgs),
    Trust(cmd::trust::TrustArgs),
    Federator(Box<cmd::federator::FederatorArgs>),
    Gateway(Box<cmd::gateway::GatewayArgs>),
    Sidecar(Box<cmd::sidecar::SidecarArgs>),
    Link(cmd::link::LinkArgs),
    Unlink(cmd::unlink::UnlinkArgs),
    Token(cmd::token::TokenArgs),
    Vm(cmd::vm::VmArgs),
    Apply(cmd::apply::ApplyArgs),
    Get(cmd::get::GetArgs),
    Describe(cmd::describe::DescribeArgs),
    Delete(cmd::delete::DeleteArgs),
    Status(cmd::status::StatusArgs),
    Check(cmd::check::CheckArgs),
    Audit(cmd::audit::AuditArgs),
    Kube(cmd::kube::KubeArgs),
    Install(Box<cmd::install::InstallArgs>),
    Upgrade(Box<cmd::install::UpgradeArgs>),
    Uninstall(cmd::uninstall::UninstallArgs),
    #[command(hide = true)]
    AdminPipe(cmd::admin_pipe::AdminPipeArgs),
    Revoke(cmd::revoke::RevokeArgs),
    Unrevoke(cmd::revoke::UnrevokeArgs),
    Completion(cmd::completion::CompletionArgs),
    #[command(hide = true)]
    DemoApp(cmd::demo_app::DemoAppArgs),
}

/// Shape of a result on standard output.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// Columns for people
    #[default]
    Table,
    /// More columns
    Wide,
    /// Versioned and stable
    Json,
    Yaml,
    /// kind/name, one per line
    Name,
}

#[derive(Clone, Copy, Debug, Args)]
pub struct Output {
    /// Shape of the result
    #[arg(
        short = 'o',
        long = "output",
        value_enum,
        default_value_t,
        env = "TOMBOLO_OUTPUT",
        value_name = "FORMAT"
    )]
    pub format: Format,
}

/// A duration with its unit: `500ms`, `30s`, `15m`, `24h`.
pub fn duration(text: &str) -> Result<Duration, String> {
    let wrong =
        || format!("{text:?} is not a duration: give a number and a unit, such as 500ms, 30s, 15m or 24h");
    let digits = text.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?;
    let (number, unit) = text.split_at_checked(digits).ok_or_else(wrong)?;
    let number: u64 = number.parse().map_err(|_| wrong())?;
    let milliseconds = match unit {
        "ms" => Some(number),
        "s" => number.checked_mul(1_000),
        "m" => number.checked_mul(60_000),
        "h" => number.checked_mul(3_600_000),
        "d" => number.checked_mul(86_400_000),
        _ => None,
    };
    milliseconds.map(Duration::from_millis).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn visit(command: &clap::Command, path: &str, check: &mut dyn FnMut(&clap::Command, &str)) {
        check(command, path);
        for sub in command.get_subcommands().filter(|sub| sub.get_name() != "help") {
            visit(sub, &format!("{path} {}", sub.get_name()), check);
        }
    }

    #[test]
    fn the_grammar_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_verb_has_an_example_of_itself_and_a_description() {
        let mut visited = 0;
        visit(&Cli::command(), "tombolo", &mut |command, path| {
            visited += 1;
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(help.contains("Example") && help.contains(path), "`{path}` has no example: {help}");
            assert!(command.get_about().is_some(), "`{path}` has no description");
        });
        assert!(visited > 20, "only {visited} commands were looked at");
    }

    #[test]
    fn every_flag_that_takes_a_value_has_an_environment_name_or_is_an_operators_choice() {
        for role in ["federator", "gateway", "sidecar"] {
            let root = Cli::command();
            let command = root.find_subcommand(role).unwrap();
            for argument in command.get_arguments().filter(|a| a.get_action().takes_values()) {
                assert!(argument.get_env().is_some(), "{role} --{} has no TOMBOLO_* name", argument.get_id());
            }
        }
    }

    #[test]
    fn a_mistyped_verb_gets_a_suggestion_and_is_wrong_usage() {
        let error = Cli::try_parse_from(["tombolo", "statsu"]).unwrap_err();
        assert!(error.to_string().contains("'status'"), "{error}");
        assert_eq!(error.exit_code(), 2);
    }

    #[test]
    fn the_socket_may_stand_before_or_after_the_verb() {
        for line in [["tombolo", "--socket", "/s", "status"], ["tombolo", "status", "--socket", "/s"]] {
            assert_eq!(Cli::try_parse_from(line).unwrap().connect.socket.unwrap(), PathBuf::from("/s"));
        }
    }

    #[test]
    fn durations_need_a_unit_and_never_overflow() {
        assert_eq!(duration("15m").unwrap(), Duration::from_secs(900));
        assert_eq!(duration("250ms").unwrap(), Duration::from_millis(250));
        for bad in ["15", "", "s", "-1s", "1.5s", "99999999999999999999s", "18446744073709551615d"] {
            assert!(duration(bad).unwrap_err().contains("30s"), "{bad}");
        }
    }
}
