//! Tombolo's own kinds in a real Kubernetes API server, kept by a federator of least privilege: what is refused at admission,
//! what goes the way of `tombolo apply`, what is written back, and links by objects on both sides (one in Kubernetes, one
//! applied from a file). One test runs every case and names all that fail, because clusters are expensive to start.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};
use tombolo_tests::capability::require_netns;
use tombolo_tests::kube::{ControlPlane, Object, condition, require_control_plane};
use tombolo_tests::mesh::{Layout, Mesh};
use tombolo_tests::scenario::metric;

mod admission;
mod inventory;
mod links;

pub const OWN: &str = "tombolo.dev/v1alpha1";
/// On a busy machine; most of it is there within a second.
pub const SOON: Duration = Duration::from_secs(15);

pub struct World {
    pub mesh: Mesh,
    pub east: ControlPlane,
}

pub fn object(kind: &str, namespace: &str, name: &str) -> Object {
    Object::new(OWN, kind, namespace, name)
}

pub fn document(kind: &str, namespace: &str, name: &str, spec: Value) -> Value {
    let mut metadata = json!({ "name": name });
    if !namespace.is_empty() {
        metadata["namespace"] = namespace.into();
    }
    json!({ "apiVersion": OWN, "kind": kind, "metadata": metadata, "spec": spec })
}

fn failover(name: &str, tier: &str) -> Value {
    let spec = json!({ "targetRef": { "kind": "Service", "name": name }, "tiers": [{ "clusters": [tier] }] });
    document("FailoverPolicy", "shop", name, spec)
}

impl World {
    /// Waits for a condition of an object; its message.
    pub fn says(&self, of: &Object, r#type: &str, expected: &str) -> Result<String> {
        self.east.api.until(of, SOON, |found| {
            let found = found.context("there is no such object")?;
            let (is, message) = condition(found, r#type);
            ensure!(is == expected, "{type} is {is:?}, not {expected:?}: {message}");
            Ok(message)
        })
    }

    /// What `tombolo get` shows of one object here.
    fn shown(&self, kind: &str, namespace: &str, name: &str) -> Result<Value> {
        let place = if namespace.is_empty() { vec![] } else { vec!["-n", namespace] };
        let args = [&["get", kind, name, "-o", "json"][..], &place].concat();
        Ok(serde_json::from_str(&self.mesh.operate("east", &args)?)?)
    }

    fn is_known(&self, kind: &str, namespace: &str, name: &str) -> bool {
        self.shown(kind, namespace, name).is_ok()
    }

    fn refused(&self, args: &[&str]) -> Result<String> {
        match self.mesh.operate("east", args) {
            Ok(said) => bail!("it was done: {said}"),
            Err(error) => Ok(format!("{error:#}")),
        }
    }

    fn namespace(&self, name: &str) -> Result<()> {
        self.east
            .api
            .apply(&json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": name } }))
            .map(drop)
    }

    fn definitions_that_come_late(&mut self) -> Result<()> {
        self.east.federate_bare(&mut self.mesh, &["--kubernetes-services", "--kubernetes-objects"])?;
        self.mesh.eventually("the federator says what is missing", SOON, |mesh| {
            let log = mesh.process("east/federator")?.tail();
            ensure!(log.contains("does not serve all of tombolo.dev/v1alpha1"), "{log}");
            Ok(())
        })?;
        self.east.install_crds(&self.mesh)?;
        self.namespace("shop")?;
        self.east.api.apply(&failover("early", "@self"))?;
        self.says(&object("FailoverPolicy", "shop", "early"), "Accepted", "False TargetNotFound").map(drop)
    }

    /// An object of Kubernetes is like an applied one, and only Kubernetes changes it.
    fn objects_go_the_way_of_apply(&self) -> Result<()> {
        let applied = failover("web", "@self");
        self.mesh.apply("east", &applied.to_string())?;
        self.east.api.apply(&failover("web", "*"))?;
        let of = object("FailoverPolicy", "shop", "web");
        self.says(&of, "Accepted", "False TargetNotFound")?;
        let there = self.east.api.get(&of)?.context("no object")?;
        let here = self.shown("failoverpolicy", "shop", "web")?;
        ensure!(here["spec"]["tiers"][0]["clusters"][0] == "*", "it is not taken over: {here}");
        for field in ["uid", "generation"] {
            ensure!(here["metadata"][field] == there["metadata"][field], "{field}: {here} {there}");
        }
        let conditions = |of: &Value| {
            let list = of["status"]["conditions"].as_array().cloned().unwrap_or_default();
            let of_one = |c: &Value| {
                json!([c["type"], c["status"], c["reason"], c["message"], c["observedGeneration"]])
            };
            list.iter().map(of_one).collect::<Vec<_>>()
        };
        ensure!(conditions(&here) == conditions(&there), "{here} {there}");
        for (args, what) in [
            (&["delete", "failoverpolicy", "web", "-n", "shop", "--yes"][..], "delete"),
            (&["apply", "-f", "-"], "apply"),
        ] {
            let said = match what {
                "apply" => match self.mesh.apply("east", &applied.to_string()) {
                    Ok(said) => bail!("{said}"),
                    Err(error) => format!("{error:#}"),
                },
                _ => self.refused(args)?,
            };
            ensure!(said.contains("kept by this cluster's Kubernetes"), "{what}: {said}");
        }
        self.east.api.apply(&failover("web", "west"))?;
        self.east.api.until(&of, SOON, |found| {
            let found = found.context("no object")?;
            let observed = &found["status"]["conditions"][0]["observedGeneration"];
            ensure!(*observed == 2 && found["metadata"]["generation"] == 2, "{found}");
            Ok(())
        })?;
        self.east.api.delete(&of)?;
        self.mesh.eventually("it is forgotten", SOON, |_| {
            ensure!(!self.is_known("failoverpolicy", "shop", "web"), "it is still there");
            Ok(())
        })?;
        Ok(())
    }

    /// What a schema can't say is said by a condition and an Event, and what was accepted before holds.
    fn what_admission_lets_through_is_refused_in_the_status(&self) -> Result<()> {
        let identities = |count: usize| {
            let id = |n| format!("spiffe://mesh.example/cluster/east/ns/shop/sa/{}{n}", "x".repeat(60));
            (0..count).map(id).collect::<Vec<String>>()
        };
        let policy = |count| {
            let spec =
                json!({ "action": "ALLOW", "rules": [{ "from": [{ "identities": identities(count) }] }] });
            document("AccessPolicy", "shop", "big", spec)
        };
        let of = object("AccessPolicy", "shop", "big");
        self.east.api.apply(&policy(250))?;
        let message = self.says(&of, "Accepted", "False Invalid")?;
        ensure!(message.contains("spec: has") && message.contains("at most 16384"), "{message}");
        ensure!(!self.is_known("accesspolicy", "shop", "big"), "it is stored");
        self.east.api.apply(&policy(2))?;
        self.says(&of, "Accepted", "True Accepted")?;
        self.east.api.apply(&policy(250))?;
        let message = self.says(&of, "Accepted", "False Invalid")?;
        ensure!(message.contains("What was accepted before still holds"), "{message}");
        let kept = self.shown("accesspolicy", "shop", "big")?;
        let sources = &kept["spec"]["rules"][0]["from"][0]["identities"];
        ensure!(sources.as_array().map(Vec::len) == Some(2), "{kept}");
        self.event("Warning", "Invalid", "big")?;
        let metrics = self.mesh.metrics("east", 1)?;
        let refused = metric(&metrics, "tombolo_federator_kubernetes_refused_objects", &[]);
        ensure!(refused == 1.0, "refused_objects is {refused}");
        // A template's empty value must not widen a policy: it is stored, and refused by its name.
        let empty =
            json!({ "action": "ALLOW", "ports": null, "rules": [{ "from": [{ "clusters": ["@self"] }] }] });
        self.east.api.create(&document("AccessPolicy", "shop", "empty", empty))?;
        let empty = object("AccessPolicy", "shop", "empty");
        let message = self.says(&empty, "Accepted", "False Invalid")?;
        ensure!(message.contains("spec.ports"), "{message}");
        self.east.api.delete(&empty)?;
        self.east.api.delete(&of)
    }

    fn event(&self, r#type: &str, reason: &str, about: &str) -> Result<()> {
        let events = Object::new("events.k8s.io/v1", "Event", "", "");
        let start = Instant::now();
        loop {
            let found = self.east.api.list(&events)?;
            let is =
                |e: &&Value| e["type"] == r#type && e["reason"] == reason && e["regarding"]["name"] == about;
            if found.iter().any(|e| is(&e)) {
                return Ok(());
            }
            ensure!(start.elapsed() < SOON, "no Event {type} {reason} about {about}: {found:?}");
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Cluster-scoped, with an effect, in the audit log, and taken back.
    fn a_revocation_is_enforced_and_taken_back(&self) -> Result<()> {
        self.east.api.apply(&document(
            "Revocation",
            "",
            "old-db",
            json!({ "node": "db-9", "reason": "sold" }),
        ))?;
        let of = object("Revocation", "", "old-db");
        self.says(&of, "Enforced", "True Enforced")?;
        let metadata = &self.shown("revocation", "", "old-db")?["metadata"];
        ensure!(metadata.get("namespace").is_none(), "{metadata}");
        let audit = self.mesh.operate("east", &["audit", "-o", "json"])?;
        let entry = audit.lines().find(|line| line.contains("revocation/old-db"));
        let entry = entry.with_context(|| format!("not in the audit log: {audit}"))?;
        ensure!(entry.contains("kubernetes"), "{entry}");
        self.event("Normal", "Enforced", "old-db")?;
        self.east.api.delete(&of)?;
        self.mesh.eventually("it is taken back", SOON, |_| {
            ensure!(!self.is_known("revocation", "", "old-db"), "it is still in force");
            Ok(())
        })?;
        Ok(())
    }

    fn a_namespace_goes_with_what_is_in_it(&self) -> Result<()> {
        self.namespace("passing")?;
        let spec = json!({ "action": "DENY", "rules": [{ "from": [{ "clusters": ["north"] }] }] });
        self.east.api.apply(&document("AccessPolicy", "passing", "closed", spec))?;
        self.mesh.eventually("it is known", SOON, |_| {
            ensure!(self.is_known("accesspolicy", "passing", "closed"), "it is not");
            Ok(())
        })?;
        let namespace = Object::new("v1", "Namespace", "", "passing");
        self.east.api.delete(&namespace)?;
        self.mesh.eventually("it is forgotten", SOON, |_| {
            ensure!(!self.is_known("accesspolicy", "passing", "closed"), "it is still there");
            Ok(())
        })?;
        self.east.api.until(&namespace, Duration::from_secs(30), |found| {
            ensure!(found.is_none(), "the namespace can't be deleted: {found:?}");
            Ok(())
        })
    }

    /// The API server goes, and the federator too; what changes meanwhile is followed.
    fn the_api_server_restarts(&mut self) -> Result<()> {
        self.east.api.apply(&failover("stays", "@self"))?;
        self.says(&object("FailoverPolicy", "shop", "stays"), "Accepted", "False TargetNotFound")?;
        // What is deleted while nobody watches is forgotten.
        self.east.api.apply(&failover("goes", "@self"))?;
        self.says(&object("FailoverPolicy", "shop", "goes"), "Accepted", "False TargetNotFound")?;
        self.mesh.process_mut("east/federator")?.kill()?;
        self.east.api.delete(&object("FailoverPolicy", "shop", "goes"))?;
        self.mesh.process_mut("east/apiserver")?.kill()?;
        self.mesh.restart("east/federator")?;
        self.mesh.ready("east", 1, "federator")?;
        std::thread::sleep(Duration::from_secs(3));
        for name in ["stays", "goes"] {
            ensure!(
                self.is_known("failoverpolicy", "shop", name),
                "{name} is lost while the API server is away"
            );
        }
        self.mesh.restart("east/apiserver")?;
        self.east.ready(&self.mesh)?;
        self.mesh.eventually("what was deleted meanwhile is forgotten", Duration::from_secs(60), |_| {
            ensure!(!self.is_known("failoverpolicy", "shop", "goes"), "it is still there");
            Ok(())
        })?;
        ensure!(self.is_known("failoverpolicy", "shop", "stays"), "it is lost");
        self.east.api.apply(&failover("after", "@self"))?;
        self.east.api.until(&object("FailoverPolicy", "shop", "after"), Duration::from_secs(60), |found| {
            let (is, message) = condition(found.context("no object")?, "Accepted");
            ensure!(is == "False TargetNotFound", "{is}: {message}");
            Ok(())
        })
    }

    fn definitions_are_never_downgraded(&self) -> Result<()> {
        let name = "clusterlinks.tombolo.dev";
        let crd = Object::new("apiextensions.k8s.io/v1", "CustomResourceDefinition", "", name);
        let release =
            |version: &str| json!({ "metadata": { "labels": { "tombolo.dev/release-version": version } } });
        self.east.api.merge(&crd, release("1000.0.0"))?;
        let said = self.east.install_crds(&self.mesh)?;
        ensure!(said.contains(&format!("{name} left as it is")), "{said}");
        self.east.api.merge(&crd, release("0.0.1"))?;
        let said = self.east.install_crds(&self.mesh)?;
        ensure!(said.contains(&format!("{name} applied")), "{said}");
        Ok(())
    }

    fn an_idle_federator_leaves_the_api_server_alone(&self) -> Result<()> {
        const WINDOW: Duration = Duration::from_secs(20);
        std::thread::sleep(Duration::from_secs(2));
        let before = self.east.requests_of_federator()?.len();
        std::thread::sleep(WINDOW);
        let requests = self.east.requests_of_federator()?;
        let during = requests.get(before..).unwrap_or_default();
        let rate = during.len() as f64 / WINDOW.as_secs_f64();
        let rss = self.mesh.process("east/federator")?.usage().context("it has ended")?.rss_bytes;
        println!(
            "FIGURE idle federator with services and objects: {rate:.2} API requests/s, {} MB",
            rss / 1_000_000
        );
        ensure!(rate <= 0.5, "{during:?}");
        Ok(())
    }
}

type Case = fn(&mut World) -> Result<()>;

#[test]
fn own_kinds_of_kubernetes_are_admitted_kept_and_answered() -> Result<()> {
    let test = "own_kinds_of_kubernetes_are_admitted_kept_and_answered";
    let Some(_) = require_netns(test) else { return Ok(()) };
    let Some(bin) = require_control_plane(test) else { return Ok(()) };
    let begun = Instant::now();
    let clusters = &["east", "west", "north"];
    let mut mesh = Mesh::unlinked(&Layout { clusters, gateways: 1, ..Layout::default() })?;
    let east = ControlPlane::start(&bin, &mut mesh, "east")?;
    let mut world = World { mesh, east };
    println!("the cluster is ready after {:?}", begun.elapsed());
    let cases: &[(&str, Case)] = &[
        ("definitions that come late are waited for", World::definitions_that_come_late),
        ("every example of the documentation is admitted", |w| admission::examples(w)),
        ("invalid objects are refused at admission, with the field", |w| admission::invalid(w)),
        ("objects go the way of apply, and Kubernetes owns them", |w| w.objects_go_the_way_of_apply()),
        ("what admission lets through is refused in the status", |w| {
            w.what_admission_lets_through_is_refused_in_the_status()
        }),
        ("a revocation is enforced and taken back", |w| w.a_revocation_is_enforced_and_taken_back()),
        ("a namespace goes with what is in it", |w| w.a_namespace_goes_with_what_is_in_it()),
        ("objects on both sides link, and one alone does not", links::by_objects),
        ("properties come from Kubernetes, and linked clusters have profiles there", inventory::inventory),
        ("definitions are never downgraded", |w| w.definitions_are_never_downgraded()),
        ("an idle federator leaves the API server alone", |w| {
            w.an_idle_federator_leaves_the_api_server_alone()
        }),
        ("the federator asks for nothing that it may not", |w| {
            match w.east.forbidden_to_federator()?.as_slice() {
                [] => Ok(()),
                some => bail!("{some:?}"),
            }
        }),
        ("the API server and the federator restart", World::the_api_server_restarts),
    ];
    let mut failed = Vec::new();
    for (name, case) in cases {
        let start = Instant::now();
        match case(&mut world) {
            Ok(()) => println!("ok   {name} ({:?})", start.elapsed()),
            Err(error) => {
                println!("FAIL {name}: {error:#}");
                failed.push((*name).to_owned());
            }
        }
    }
    let World { mut mesh, east } = world;
    if !failed.is_empty() {
        for cluster in clusters {
            println!("{cluster}: {}", mesh.process(&format!("{cluster}/federator"))?.tail());
        }
    }
    east.stop(&mut mesh)?;
    println!("all of it took {:?}", begun.elapsed());
    if failed.is_empty() { Ok(()) } else { bail!("{} cases failed: {}", failed.len(), failed.join("; ")) }
}
