//! `tombolo link`: ties this cluster to another with a one-use token.

use clap::{Args, Subcommand};
use serde_json::json;
use tombolo_proto::v1::{AcceptLinkRequest, CreateLinkTokenRequest, GetRequest, LinkJoinRequest};
use tombolo_runtime::clock;

use super::get::parse;
use super::token;
use crate::admin_client::Admin;
use crate::args::{Connect, Format, Output, duration};
use crate::failure::{Exit, Failure};
use crate::output::{self, objects};

/// Tie this cluster to another, with a one-use token
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  tombolo link token west --context east > token      on east: for the operator of west
  tombolo link join \"$(cat token)\" --context west      on west, within 15 minutes
  tombolo link list")]
pub struct LinkArgs {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Make a one-use token that lets the named cluster link to this one
    #[command(after_help = "\
The token is printed on standard output, the firewall rules that this side needs on standard error.

Examples:
  tombolo link token west
  tombolo link token west --ttl 5m -o json")]
    Token {
        /// Name of the cluster that may use it
        peer: String,
        /// How long it is good for, at most a day
        #[arg(long, default_value = "15m", value_parser = duration)]
        ttl: std::time::Duration,
        #[command(flatten)]
        output: Output,
    },
    /// Link to the cluster that made the token
    #[command(after_help = "\
Examples:
  tombolo link join tombolo-join-1.AbC...
  tombolo link join - < token")]
    Join {
        /// The token, or `-` to read it from standard input
        token: String,
        #[command(flatten)]
        output: Output,
    },
    /// List the links of this cluster
    #[command(after_help = "\
Examples:
  tombolo link list
  tombolo link list -o json")]
    List {
        #[command(flatten)]
        output: Output,
    },
    /// Accept that the named peer was created anew (its tag changed); everything known of the old one is dropped
    #[command(after_help = "\
Examples:
  tombolo link accept west")]
    Accept {
        /// Name of the cluster
        peer: String,
    },
}

pub async fn run(args: LinkArgs, connect: Connect) -> Result<Exit, Failure> {
    let LinkArgs { verb } = args;
    match verb {
        Verb::Token { peer, ttl, output } => {
            let mut admin = Admin::connect(&connect).await?;
            let ttl_seconds = token::ttl_seconds(ttl)?;
            let request = admin.request(CreateLinkTokenRequest { peer, ttl_seconds });
            let response =
                admin.client.create_link_token(request).await.map_err(|status| admin.failed(status))?;
            token::print(response.into_inner(), output.format)?;
        }
        Verb::Join { token, output } => join(token, output, connect).await?,
        Verb::List { output } => list(output, connect).await?,
        Verb::Accept { peer } => {
            let mut admin = Admin::connect(&connect).await?;
            let request = admin.request(AcceptLinkRequest { peer: peer.clone() });
            let accepted =
                admin.client.accept_link(request).await.map_err(|status| admin.failed(status))?.into_inner();
            output::line(format_args!("link to {peer} accepted, with tag {}", accepted.tag))?;
        }
    }
    Ok(Exit::Done)
}

async fn join(token: String, output: Output, connect: Connect) -> Result<(), Failure> {
    let token = token::given(token)?;
    let mut admin = Admin::connect(&connect).await?;
    let request = admin.request(LinkJoinRequest { token });
    let joined = admin.client.join_link(request).await.map_err(|status| admin.failed(status))?.into_inner();
    if output.format == Format::Json {
        return output::json(&json!({
            "version": 1, "peer": joined.peer, "tag": joined.tag, "firewall": joined.firewall,
        }));
    }
    output::line(format_args!("linked to {}", output::printable(&joined.peer)))?;
    token::firewall(&joined.firewall);
    Ok(())
}

async fn list(output: Output, connect: Connect) -> Result<(), Failure> {
    let mut admin = Admin::connect(&connect).await?;
    let request = admin.request(GetRequest {
        kind: "ClusterLink".to_owned(),
        namespace: String::new(),
        name: String::new(),
        all_namespaces: true,
    });
    let response = admin.client.get(request).await.map_err(|status| admin.failed(status))?;
    let links = parse(response.into_inner())?;
    match output.format {
        Format::Json => output::json(&json!({ "apiVersion": "v1", "kind": "List", "items": links })),
        Format::Yaml => output::yaml(&json!({ "apiVersion": "v1", "kind": "List", "items": links })),
        Format::Name => links.iter().try_for_each(|link| output::line(objects::short_name(link))),
        Format::Table | Format::Wide if links.is_empty() => {
            eprintln!("no links: make one with `tombolo link token PEER`");
            Ok(())
        }
        format => output::line(objects::list(&links, false, format == Format::Wide, clock::now().into())),
    }
}
