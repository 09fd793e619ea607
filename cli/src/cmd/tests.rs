//! The verbs' end of the admin API, over a real Unix socket, against a federator's part that is scripted here: what the
//! real one answers is tested with the real one.

use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;
use tokio_stream::wrappers::UnixListenerStream;
use tombolo_proto::v1::admin_server::{self, AdminServer};
use tombolo_proto::v1::*;
use tombolo_runtime::tasks::TaskGroup;
use tonic::{Request, Response, Status};

use crate::args::{Cli, Command};
use crate::failure::{Exit, Failure};

/// Refuses `bad` objects, loses calls for `slow` ones.
struct Scripted;

fn no<T>() -> Result<Response<T>, Status> {
    Err(Status::unimplemented("not part of this script"))
}

#[tonic::async_trait]
impl admin_server::Admin for Scripted {
    type WatchStream = tokio_stream::Empty<Result<GetResponse, Status>>;
    type AuditStream = tokio_stream::Empty<Result<AuditResponse, Status>>;

    async fn apply(&self, request: Request<ApplyRequest>) -> Result<Response<ApplyResponse>, Status> {
        let object: serde_json::Value = serde_json::from_str(&request.get_ref().objects_json[0]).unwrap();
        let text =
            |pointer: &str| object.pointer(pointer).and_then(|v| v.as_str()).unwrap_or_default().to_owned();
        match text("/metadata/name").as_str() {
            "bad" => Err(Status::invalid_argument("field spec.tiers: [] is empty: give at least one tier")),
            "slow" => std::future::pending().await,
            name => Ok(Response::new(ApplyResponse {
                results: vec![ApplyResult {
                    kind: text("/kind"),
                    name: name.to_owned(),
                    outcome: "created".to_owned(),
                    ..Default::default()
                }],
            })),
        }
    }
    async fn get(&self, request: Request<GetRequest>) -> Result<Response<GetResponse>, Status> {
        assert_eq!(request.get_ref().kind, "ServiceImport");
        Ok(Response::new(GetResponse::default()))
    }
    async fn watch(&self, _: Request<GetRequest>) -> Result<Response<Self::WatchStream>, Status> {
        no()
    }
    async fn audit(&self, _: Request<AuditRequest>) -> Result<Response<Self::AuditStream>, Status> {
        no()
    }
    async fn delete(&self, request: Request<DeleteRequest>) -> Result<Response<DeleteResponse>, Status> {
        Ok(Response::new(DeleteResponse { existed: request.get_ref().name == "web" }))
    }
    async fn status(&self, _: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        Err(Status::permission_denied("user 12 is not the federator's"))
    }
    async fn create_link_token(
        &self,
        _: Request<CreateLinkTokenRequest>,
    ) -> Result<Response<TokenResponse>, Status> {
        no()
    }
    async fn join_link(&self, _: Request<LinkJoinRequest>) -> Result<Response<LinkJoinResponse>, Status> {
        Err(Status::failed_precondition("link token is expired: ask for another with `tombolo link token`"))
    }
    async fn accept_link(
        &self,
        _: Request<AcceptLinkRequest>,
    ) -> Result<Response<AcceptLinkResponse>, Status> {
        no()
    }
    async fn unlink(&self, _: Request<UnlinkRequest>) -> Result<Response<UnlinkResponse>, Status> {
        Ok(Response::new(UnlinkResponse { existed: false, removed: Vec::new() }))
    }
    async fn create_join_token(
        &self,
        _: Request<CreateJoinTokenRequest>,
    ) -> Result<Response<TokenResponse>, Status> {
        no()
    }
    async fn update_trust(
        &self,
        _: Request<UpdateTrustRequest>,
    ) -> Result<Response<UpdateTrustResponse>, Status> {
        no()
    }
    async fn trust_status(
        &self,
        _: Request<TrustStatusRequest>,
    ) -> Result<Response<TrustStatusResponse>, Status> {
        no()
    }
    async fn reload_trust(
        &self,
        _: Request<ReloadTrustRequest>,
    ) -> Result<Response<ReloadTrustResponse>, Status> {
        no()
    }
}

/// A directory with the scripted federator's socket.
struct Fixture {
    dir: PathBuf,
    _tasks: TaskGroup,
}

impl Drop for Fixture {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

impl Fixture {
    fn start(name: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("tombolo-verbs-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let listener = tokio::net::UnixListener::bind(dir.join("admin.sock")).unwrap();
        let server = tonic::transport::Server::builder().add_service(AdminServer::new(Scripted));
        let tasks = TaskGroup::new();
        tasks.spawn("scripted", server.serve_with_incoming(UnixListenerStream::new(listener)));
        Self { dir, _tasks: tasks }
    }

    fn manifest(&self, yaml: &str) -> String {
        let path = self.dir.join("objects.yaml");
        std::fs::write(&path, yaml).unwrap();
        path.display().to_string()
    }

    async fn run(&self, line: &[&str]) -> Result<Exit, Failure> {
        let socket = self.dir.join("admin.sock").display().to_string();
        let before = ["tombolo", "--socket", &socket, "--timeout", "500ms"];
        let cli = Cli::try_parse_from(before.iter().chain(line)).unwrap();
        let run = async {
            match cli.command {
                Command::Apply(args) => super::apply::run(args, cli.connect).await,
                Command::Get(args) => super::get::run(args, cli.connect).await,
                Command::Delete(args) => super::delete::run(args, cli.connect).await,
                Command::Status(args) => super::status::run(args, cli.connect).await,
                Command::Link(args) => super::link::run(args, cli.connect).await,
                Command::Unlink(args) => super::unlink::run(args, cli.connect).await,
                other => panic!("{other:?} is not run here"),
            }
        };
        tokio::time::timeout(Duration::from_secs(10), run).await.unwrap()
    }
}

fn object(name: &str) -> String {
    format!(
        "apiVersion: tombolo.dev/v1alpha1\nkind: FailoverPolicy\nmetadata: {{ name: {name}, namespace: shop }}\n\
         spec: {{ targetRef: {{ kind: Service, name: web }}, tiers: [ {{ clusters: [ west ] }} ] }}\n"
    )
}

#[tokio::test]
async fn what_one_object_gets_wrong_is_named_with_its_place_and_does_not_hold_back_the_others() {
    let fixture = Fixture::start("apply");
    let yaml = [object("bad"), object("good")].join("---\n");
    let file = fixture.manifest(&yaml);
    assert_eq!(fixture.run(&["apply", "-f", &file]).await.unwrap(), Exit::Failed);

    let manifests = crate::manifest::read(&[file.into()]).unwrap();
    let mut admin =
        crate::admin_client::Admin::at(fixture.dir.join("admin.sock"), Duration::from_secs(5)).await.unwrap();
    let refused = super::apply::one(&mut admin, &manifests[0], false).await.unwrap_err().to_string();
    assert!(refused.contains("FailoverPolicy bad: field spec.tiers"), "{refused}");
    assert_eq!(
        super::apply::one(&mut admin, &manifests[1], true).await.unwrap(),
        ["failoverpolicy/good created (dry run)"]
    );
}

#[tokio::test]
async fn a_federator_that_does_not_answer_ends_the_command_with_timed_out() {
    let fixture = Fixture::start("slow");
    let file = fixture.manifest(&object("slow"));
    let failure = fixture.run(&["apply", "-f", &file]).await.unwrap_err();
    assert!(failure.exit == Exit::TimedOut && failure.to_string().contains("--timeout"), "{failure}");
}

#[tokio::test]
async fn every_refusal_keeps_the_federators_reason_and_adds_what_to_do() {
    let fixture = Fixture::start("refusals");
    let cases: [(&[&str], &str, Exit); 5] = [
        (&["status"], "as the user that runs the federator", Exit::Failed),
        (&["link", "join", "tombolo-join-1.x"], "link token is expired", Exit::Failed),
        (&["get", "svcim", "web", "-n", "shop"], "\"web\" not found", Exit::Failed),
        (&["unlink", "west", "--yes"], "tombolo link list", Exit::Failed),
        (&["link", "accept", "west"], "federator's version", Exit::Failed),
    ];
    for (line, expected, exit) in cases {
        let failure = fixture.run(line).await.unwrap_err();
        assert!(failure.exit == exit && failure.to_string().contains(expected), "{line:?}: {failure}");
    }
}

#[tokio::test]
async fn deleting_what_is_not_there_fails() {
    let fixture = Fixture::start("delete");
    assert_eq!(fixture.run(&["delete", "svcex", "web", "-n", "shop", "--yes"]).await.unwrap(), Exit::Done);
    assert_eq!(fixture.run(&["delete", "svcex", "gone", "-n", "shop", "--yes"]).await.unwrap(), Exit::Failed);
}
