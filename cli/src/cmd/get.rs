//! `tombolo get`: lists objects, once or as they change.

use clap::Args;
use serde_json::{Value, json};
use tombolo_proto::v1::{GetRequest, GetResponse};
use tombolo_runtime::clock;

use crate::admin_client::Admin;
use crate::args::{Connect, Format, Output};
use crate::failure::{Exit, Failure};
use crate::kinds;
use crate::output::{self, objects};

/// List objects, once or as they change
#[derive(Debug, Args)]
#[command(after_help = "\
Kinds (short names): workloads (wl), serviceexports (svcex), serviceimports (svcim), failoverpolicies (fop),
accesspolicies (ap), clusterlinks (clink).

Examples:
  tombolo get serviceimports -n shop
  tombolo get svcex -A -o wide
  tombolo get failoverpolicy checkout -n shop -o yaml
  tombolo get accesspolicies -A -o wide
  tombolo get svcim -A -w")]
pub struct GetArgs {
    /// Kind: singular, plural or short name
    kind: String,
    /// Only this object
    name: Option<String>,
    #[command(flatten)]
    scope: Scope,
    /// Stay, and print again whenever something changes
    #[arg(short, long)]
    watch: bool,
    #[command(flatten)]
    output: Output,
}

/// Where to look for namespaced objects.
#[derive(Clone, Debug, Args)]
pub struct Scope {
    /// Namespace
    #[arg(short, long, env = "TOMBOLO_NAMESPACE", default_value = "default")]
    pub namespace: String,
    /// All namespaces
    #[arg(short = 'A', long, conflicts_with = "name")]
    pub all_namespaces: bool,
}

impl Scope {
    /// The request for one kind.
    pub fn request(self, kind: &tombolo_model::resource::KindInfo, name: Option<String>) -> GetRequest {
        let Self { namespace, all_namespaces } = self;
        GetRequest {
            kind: kind.kind.to_owned(),
            namespace: if kind.namespaced && !all_namespaces { namespace } else { String::new() },
            name: name.unwrap_or_default(),
            all_namespaces: all_namespaces || !kind.namespaced,
        }
    }
}

pub async fn run(args: GetArgs, connect: Connect) -> Result<Exit, Failure> {
    let GetArgs { kind, name, scope, watch, output: Output { format } } = args;
    let kind = kinds::parse(&kind)?;
    let namespaces = scope.all_namespaces && kind.namespaced;
    let named = name.is_some();
    let request = scope.request(kind, name);
    let mut admin = Admin::connect(&connect).await?;
    if watch {
        // No deadline: it ends when the operator or the federator ends it.
        let mut stream =
            admin.client.watch(request).await.map_err(|status| admin.failed(status))?.into_inner();
        while let Some(response) = stream.message().await.map_err(|status| admin.failed(status))? {
            print(&parse(response)?, format, namespaces, false)?;
        }
        return Err(Failure::new("the federator ended the watch").remedy("run the command again"));
    }
    let what = format!("{} {:?}", kind.kind, request.name);
    let request = admin.request(request);
    let response = admin.client.get(request).await.map_err(|status| admin.failed(status))?;
    let objects = parse(response.into_inner())?;
    if named && objects.is_empty() {
        return Err(Failure::new(format_args!("{what} not found")).remedy("look in all namespaces with -A"));
    }
    print(&objects, format, namespaces, named)?;
    Ok(Exit::Done)
}

/// The objects of an answer.
pub fn parse(response: GetResponse) -> Result<Vec<Value>, Failure> {
    let parsed: Result<Vec<Value>, _> =
        response.objects_json.iter().map(|text| serde_json::from_str(text)).collect();
    parsed.map_err(|e| Failure::new(format_args!("the federator sent an object that is no JSON: {e}")))
}

fn print(objects: &[Value], format: Format, namespaces: bool, single: bool) -> Result<(), Failure> {
    // One object asked for by name is printed as itself, several as a list: kubectl's way, so that pipes carry over.
    let document = || match objects {
        [one] if single => one.clone(),
        _ => json!({ "apiVersion": "v1", "kind": "List", "items": objects }),
    };
    match format {
        Format::Json => output::json(&document()),
        Format::Yaml => output::yaml(&document()),
        Format::Name => objects
            .iter()
            .try_for_each(|object| output::line(output::printable(&objects::short_name(object)))),
        Format::Table | Format::Wide if objects.is_empty() => {
            eprintln!("nothing found");
            Ok(())
        }
        Format::Table | Format::Wide => {
            output::line(objects::list(objects, namespaces, format == Format::Wide, clock::now().into()))
        }
    }
}
