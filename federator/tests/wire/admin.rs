//! The operators' socket: what it answers, and whom.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::Command;

use serde_json::{Value, json};
use tonic::Code;

use super::*;

fn export(name: &str, to: &str) -> Value {
    json!({
        "apiVersion": "multicluster.x-k8s.io/v1beta1", "kind": "ServiceExport",
        "metadata": { "name": name, "namespace": "shop", "annotations": { "tombolo.dev/export-to": to } },
    })
}

fn apply(objects: &[Value], dry_run: bool) -> v1::ApplyRequest {
    v1::ApplyRequest { objects_json: objects.iter().map(ToString::to_string).collect(), dry_run }
}

fn get(kind: &str, namespace: &str, name: &str) -> v1::GetRequest {
    v1::GetRequest {
        kind: kind.into(),
        namespace: namespace.into(),
        name: name.into(),
        all_namespaces: false,
    }
}

#[tokio::test]
async fn objects_are_applied_shown_and_deleted() {
    let home = Home::new("east");
    let federator = home.start();
    let mut admin = federator.admin().await;
    let outcomes = |response: tonic::Response<v1::ApplyResponse>| {
        let results = response.into_inner().results.into_iter();
        results.map(|r| format!("{}/{}/{} {}", r.kind, r.namespace, r.name, r.outcome)).collect::<Vec<_>>()
    };
    let both = [export("web", "*"), export("api", "west")];
    let dry = admin.apply(apply(&both, true)).await.unwrap();
    assert_eq!(outcomes(dry)[0], "ServiceExport/shop/web created");
    let none = admin.get(get("ServiceExport", "shop", "")).await.unwrap().into_inner();
    assert!(none.objects_json.is_empty(), "a dry run changes nothing");
    admin.apply(apply(&both, false)).await.unwrap();
    let again = admin.apply(apply(&[export("web", "*"), export("api", "north")], false)).await.unwrap();
    assert_eq!(outcomes(again), ["ServiceExport/shop/web unchanged", "ServiceExport/shop/api configured"]);

    let shown = |response: tonic::Response<v1::GetResponse>| -> Vec<Value> {
        let objects = response.into_inner().objects_json;
        objects.iter().map(|json| serde_json::from_str(json).unwrap()).collect()
    };
    let found = shown(admin.get(get("ServiceExport", "shop", "")).await.unwrap());
    assert_eq!(found.len(), 2);
    assert!(found[0].pointer("/status/conditions").is_some(), "{}", found[0]);
    assert_eq!(shown(admin.get(get("ServiceExport", "shop", "web")).await.unwrap()).len(), 1);
    assert_eq!(shown(admin.get(get("ServiceExport", "", "")).await.unwrap()).len(), 0, "in `default`");
    let all = v1::GetRequest { all_namespaces: true, ..get("ServiceExport", "", "") };
    assert_eq!(shown(admin.get(all).await.unwrap()).len(), 2);

    let delete = |dry_run| v1::DeleteRequest {
        kind: "ServiceExport".into(),
        namespace: "shop".into(),
        name: "web".into(),
        dry_run,
    };
    assert!(admin.delete(delete(true)).await.unwrap().into_inner().existed);
    assert!(admin.delete(delete(false)).await.unwrap().into_inner().existed);
    assert!(!admin.delete(delete(false)).await.unwrap().into_inner().existed);
    federator.stop();
}

#[tokio::test]
async fn one_bad_object_among_good_ones_changes_nothing_and_is_named() {
    let home = Home::new("east");
    let federator = home.start();
    let mut admin = federator.admin().await;
    let mut typo = export("api", "west");
    typo["metadata"]["naem"] = "api".into();
    let unknown = json!({ "apiVersion": "v1", "kind": "ServiceExprot", "metadata": { "name": "x" } });
    let mut huge = export("api", "west");
    huge["metadata"]["labels"] = json!({ "note": "x".repeat(2_000_000) });
    let cases = [(typo, "naem"), (unknown, "ServiceExprot"), (huge, "bytes")];
    for (bad, words) in cases {
        let status = admin.apply(apply(&[export("web", "*"), bad], false)).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
        assert_says(status.message(), &[words]);
        assert!(status.message().len() < 2000, "{} bytes of error", status.message().len());
    }
    let garbage = v1::ApplyRequest { objects_json: vec!["{".into()], dry_run: false };
    assert_says(admin.apply(garbage).await.unwrap_err().message(), &["not JSON"]);
    assert!(federator.core.facts().objects.is_empty());
    federator.stop();
}

#[tokio::test]
async fn refusals_carry_a_code_and_say_what_to_do() {
    let home = Home::new("east");
    let federator = home.start();
    let mut admin = federator.admin().await;
    let status = admin.get(get("Servce", "", "")).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert_says(status.message(), &["Servce"]);
    let link = v1::CreateLinkTokenRequest { peer: "west".into(), ttl_seconds: 0 };
    let status = admin.create_link_token(link.clone()).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert_says(status.message(), &["no gateway is connected", "tombolo gateway"]);
    let status =
        admin.create_link_token(v1::CreateLinkTokenRequest { peer: "W!".into(), ..link }).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    let status = admin.accept_link(v1::AcceptLinkRequest { peer: "west".into() }).await.unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::NotFound, "there is no link to west"));
    let unlinked = admin.unlink(v1::UnlinkRequest { peer: "west".into() }).await.unwrap().into_inner();
    assert!(!unlinked.existed);
    for (token, words) in [("hello", "no tombolo token"), ("tombolo-join-1.AAAA", "cut or mistyped")] {
        let status = admin.join_link(v1::LinkJoinRequest { token: token.into() }).await.unwrap_err();
        assert_eq!(status.code(), Code::FailedPrecondition);
        assert_says(status.message(), &[words]);
    }
    let join = federator.token("sidecar", "web").await;
    let status = admin.join_link(v1::LinkJoinRequest { token: join }).await.unwrap_err();
    assert_says(status.message(), &["this is a join token", "link token"]);
    let request = v1::CreateJoinTokenRequest { role: "vm".into(), name: "db-1".into(), ..Default::default() };
    let long = v1::CreateJoinTokenRequest { ttl_seconds: 100_000, ..request.clone() };
    assert_eq!(admin.create_join_token(long).await.unwrap_err().code(), Code::InvalidArgument);
    let made = admin.create_join_token(request).await.unwrap().into_inner();
    let left = made.not_after_unix - i64::try_from(clock::unix_seconds()).unwrap();
    assert!((890..=900).contains(&left), "{left}");
    federator.stop();
}

#[tokio::test]
async fn a_watch_shows_changes_as_they_come() {
    let home = Home::new("east");
    let federator = home.start();
    let mut admin = federator.admin().await;
    let mut watch = admin.watch(get("ServiceExport", "shop", "")).await.unwrap().into_inner();
    next(&mut watch, "the present state", |seen| seen.objects_json.is_empty()).await;
    admin.apply(apply(&[export("web", "*")], false)).await.unwrap();
    let seen = next(&mut watch, "the export", |seen| seen.objects_json.len() == 1).await;
    assert_says(&seen.objects_json[0], &["\"web\""]);
    federator.stop();
}

#[tokio::test]
async fn the_socket_is_the_owners_alone() {
    let home = Home::new("east");
    let federator = home.start();
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&federator.socket), 0o600);
    assert_eq!(mode(federator.socket.parent().unwrap()), 0o700);
    assert_eq!(mode(&home.path("state")), 0o700);
    federator.stop();
    assert!(!home.path("run/federator.sock").exists(), "a clean end leaves no socket");
}

/// Asks for the status as whoever runs it; says how that went.
#[test]
#[ignore = "the other process of another_user_is_refused_even_where_the_socket_lets_it_in"]
fn status_child() {
    let socket = PathBuf::from(std::env::var_os("TOMBOLO_TEST_SOCKET").expect("run by another test only"));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let answer = runtime
        .block_on(async { AdminClient::new(connect(&socket).await).status(v1::StatusRequest {}).await });
    match answer {
        Ok(_) => println!("answered"),
        Err(status) => println!("refused {:?}: {}", status.code(), status.message()),
    }
}

#[tokio::test]
async fn another_user_is_refused_even_where_the_socket_lets_it_in() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("SKIPPED: only root can act as another user");
        return;
    }
    let home = Home::new("east");
    let federator = home.start();
    for (path, mode) in
        [(home.dir.path(), 0o711), (federator.socket.parent().unwrap(), 0o711), (&federator.socket, 0o666)]
    {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    }
    let ask = |uid: u32| {
        let mut command = Command::new("/proc/self/exe");
        command.args(["--exact", "--ignored", "--nocapture", "admin::status_child"]).uid(uid).gid(uid);
        let output = command.env("TOMBOLO_TEST_SOCKET", &federator.socket).output().unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let own = ask(0);
    assert_says(&own, &["answered"]);
    let others = ask(65_534);
    assert_says(
        &others,
        &["refused PermissionDenied", "user 65534 is neither the federator's user nor root"],
    );
    federator.stop();
}

#[tokio::test]
async fn the_audit_log_is_followed_as_it_grows_and_filtered() {
    let home = Home::new("east");
    let federator = home.start();
    let mut admin = federator.admin().await;
    let request = v1::AuditRequest { follow: true, actions: vec!["token".into()], ..Default::default() };
    let mut followed = admin.audit(request.clone()).await.unwrap().into_inner();
    let first = next(&mut followed, "the present state", |_| true).await;
    assert!(first.entries_json.is_empty() && first.anchor_hash.len() == 64, "{first:?}");
    for name in ["web", "api"] {
        federator.token("sidecar", name).await;
        let seen = next(&mut followed, "the new token", |seen| !seen.entries_json.is_empty()).await;
        assert_says(&seen.entries_json[0], &["\"action\":\"token\"", &format!("sa/{name}"), "\"uid\""]);
    }
    drop(followed);
    let newest = v1::AuditRequest { limit: 1, follow: false, ..request.clone() };
    let newest = admin.audit(newest).await.unwrap().into_inner().message().await.unwrap().unwrap();
    assert_eq!(newest.entries_json.len(), 1);
    assert_says(&newest.entries_json[0], &["sa/api"]);
    for (bad, words) in [
        (v1::AuditRequest { actions: vec!["issue".into()], ..request.clone() }, "own-svid"),
        (v1::AuditRequest { outcome: "maybe".into(), ..request.clone() }, "done or refused"),
        (v1::AuditRequest { limit: 20_000, ..request }, "at most 10000"),
    ] {
        let status = admin.audit(bad).await.err().unwrap();
        assert_eq!(status.code(), Code::InvalidArgument);
        assert_says(status.message(), &[words]);
    }
    federator.stop();
}
