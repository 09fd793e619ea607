//! `tombolo completion`: completion scripts for shells.

use clap::{Args, CommandFactory, ValueEnum};

use crate::args::Cli;
use crate::failure::{Exit, Failure};
use crate::output;

/// Print a completion script for a shell
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  source <(tombolo completion bash)
  tombolo completion zsh > \"${fpath[1]}/_tombolo\"
  tombolo completion fish > ~/.config/fish/completions/tombolo.fish")]
pub struct CompletionArgs {
    #[arg(value_enum)]
    shell: Shell,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Shell {
    Bash,
    Zsh,
    Fish,
}

pub fn run(args: CompletionArgs) -> Result<Exit, Failure> {
    output::line(script(args.shell).trim_end())?;
    Ok(Exit::Done)
}

fn script(shell: Shell) -> String {
    let shell = match shell {
        Shell::Bash => clap_complete::Shell::Bash,
        Shell::Zsh => clap_complete::Shell::Zsh,
        Shell::Fish => clap_complete::Shell::Fish,
    };
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "tombolo", &mut script);
    String::from_utf8_lossy(&script).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_shell_gets_a_script_that_knows_the_verbs() {
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            let script = script(shell);
            assert!(script.contains("federator") && script.contains("unlink"), "{shell:?}");
        }
    }
}
