//! `tombolo token`: one-use tokens by which gateways, sidecars and machines join this cluster; also how every token is
//! printed.

use std::io::Read;
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use serde_json::json;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tombolo_proto::v1::{CreateJoinTokenRequest, TokenResponse};

use crate::admin_client::Admin;
use crate::args::{Connect, Format, Output, duration};
use crate::failure::{Exit, Failure};
use crate::output;

/// No token needs to outlive a working day, and a forgotten one is a risk.
const MAX_TTL: Duration = Duration::from_secs(24 * 3600);
/// A token is a few hundred bytes of addresses and secrets; this is a wrong file.
const MAX_TOKEN_BYTES: u64 = 64 * 1024;

/// Make one-use tokens by which gateways and sidecars join this cluster
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  tombolo token create --role gateway --name gw-1
  tombolo token create --role sidecar --name web -n shop")]
pub struct TokenArgs {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Make a token for one gateway, sidecar or machine
    #[command(after_help = "\
Gateways and sidecars inside the cluster dial the federator directly. For a machine outside, which reaches the
cluster through its gateways, use `tombolo vm token`, or --role vm.

Examples:
  tombolo token create --role gateway --name gw-1
  tombolo token create --role sidecar --name web -n shop --ttl 5m
  tombolo token create --role vm --name db-1 -o json")]
    Create {
        /// What joins
        #[arg(long, value_enum)]
        role: Role,
        /// Its name: of the replica, the service account, or the machine
        #[arg(long)]
        name: String,
        /// Namespace of a sidecar: its identity is ns/<namespace>/sa/<name>
        #[arg(short, long, env = "TOMBOLO_NAMESPACE", default_value = "default")]
        namespace: String,
        /// Group of a machine, which `JoinPolicy` objects may ask for
        #[arg(long, default_value = "")]
        group: String,
        /// How long the token is good for, at most a day
        #[arg(long, default_value = "15m", value_parser = duration)]
        ttl: Duration,
        #[command(flatten)]
        output: Output,
    },
    /// Print what pods need to know to join as their service account: no secret, for a ConfigMap
    #[command(after_help = "\
It names this cluster, its root and its federators, and does not end: print it anew after `trust rotate`. Who a pod is says
its own projected token, with the audience tombolo.dev/<trust domain>; the federator must run with --kubernetes.

Examples:
  tombolo token pods --federator federator.tombolo.svc:7443 > pods.token
  kubectl create configmap tombolo --from-file pods.token")]
    Pods {
        /// Where pods reach a federator, HOST:PORT, resolved when a pod joins; may be repeated [default: its own address]
        #[arg(long = "federator", value_name = "HOST:PORT")]
        federators: Vec<String>,
        #[command(flatten)]
        output: Output,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Role {
    Gateway,
    Sidecar,
    Vm,
}

impl Role {
    fn as_str(self) -> &'static str {
        match self {
            Self::Gateway => "gateway",
            Self::Sidecar => "sidecar",
            Self::Vm => "vm",
        }
    }
}

pub async fn run(args: TokenArgs, connect: Connect) -> Result<Exit, Failure> {
    match args.verb {
        Verb::Create { role, name, namespace, group, ttl, output } => {
            print(create(role, name, namespace, group, ttl, &connect).await?, output.format)?;
        }
        Verb::Pods { federators, output } => print(pods(federators, &connect).await?, output.format)?,
    }
    Ok(Exit::Done)
}

/// Asks the federator for a join token.
pub async fn create(
    role: Role,
    name: String,
    namespace: String,
    group: String,
    ttl: Duration,
    connect: &Connect,
) -> Result<TokenResponse, Failure> {
    let mut admin = Admin::connect(connect).await?;
    let request = admin.request(CreateJoinTokenRequest {
        role: role.as_str().to_owned(),
        name,
        namespace: if role == Role::Sidecar { namespace } else { String::new() },
        ttl_seconds: ttl_seconds(ttl)?,
        via_gateways: role == Role::Vm,
        federator_names: Vec::new(),
        group,
    });
    Ok(admin.client.create_join_token(request).await.map_err(|status| admin.failed(status))?.into_inner())
}

async fn pods(federators: Vec<String>, connect: &Connect) -> Result<TokenResponse, Failure> {
    let mut admin = Admin::connect(connect).await?;
    let request = admin.request(CreateJoinTokenRequest {
        role: "pod".to_owned(),
        federator_names: federators,
        ..CreateJoinTokenRequest::default()
    });
    Ok(admin.client.create_join_token(request).await.map_err(|status| admin.failed(status))?.into_inner())
}

/// A token's life in the unit of the wire.
pub fn ttl_seconds(ttl: Duration) -> Result<u32, Failure> {
    if ttl < Duration::from_secs(1) || ttl > MAX_TTL {
        return Err(Failure::usage(format_args!("--ttl {ttl:?} is not between 1s and 24h"))
            .remedy("give it as 5m or 2h"));
    }
    Ok(u32::try_from(ttl.as_secs()).unwrap_or(u32::MAX))
}

/// The token alone on standard output, so that it can be piped; what people need besides on standard error.
pub fn print(response: TokenResponse, format: Format) -> Result<(), Failure> {
    let TokenResponse { token, not_after_unix, firewall: rules } = response;
    let ends = not_after_unix > 0;
    let not_after = OffsetDateTime::from_unix_timestamp(not_after_unix).ok().filter(|_| ends);
    let not_after = not_after.and_then(|time| time.format(&Rfc3339).ok());
    let document = json!({ "version": 1, "token": token, "notAfter": not_after, "firewall": rules });
    match format {
        Format::Json => output::json(&document),
        Format::Yaml => output::yaml(&document),
        Format::Table | Format::Wide | Format::Name => {
            output::line(token)?;
            match not_after {
                Some(time) => eprintln!("good for one use until {time}"),
                None if ends => eprintln!("good for one use until an unknown time"),
                None => eprintln!("holds no secret, and does not end"),
            }
            firewall(&rules);
            Ok(())
        }
    }
}

/// The firewall rules a side needs, on standard error.
pub fn firewall(rules: &[String]) {
    if !rules.is_empty() {
        eprintln!("firewall rules that this side needs:");
        rules.iter().for_each(|rule| eprintln!("  {}", output::printable(rule)));
    }
}

/// A token given as an argument, or on standard input for `-` so that it need not show in a process list.
pub fn given(argument: String) -> Result<String, Failure> {
    if argument != "-" {
        return Ok(argument);
    }
    let mut token = String::new();
    let read = std::io::stdin().lock().take(MAX_TOKEN_BYTES).read_to_string(&mut token);
    read.map_err(|e| Failure::new(e).at("standard input"))?;
    let token = token.trim();
    if token.is_empty() {
        return Err(Failure::usage("standard input holds no token")
            .remedy("pipe the output of `tombolo link token` in"));
    }
    Ok(token.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tokens_life_is_bounded() {
        assert_eq!(ttl_seconds(Duration::from_secs(900)).unwrap(), 900);
        for bad in [0, 86_401] {
            assert!(ttl_seconds(Duration::from_secs(bad)).unwrap_err().to_string().contains("24h"));
        }
    }
}
