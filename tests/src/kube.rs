//! Real Kubernetes control planes (etcd, kube-apiserver, kube-controller-manager; built by `tests/setup.sh`), one in each
//! cluster's namespace of a [`Mesh`], and a federator that works with it as a service account of least privilege.
//!
//! No kubelet: what pods would be is written by the tests as `EndpointSlice`s, or pretended by kwok
//! ([`ControlPlane::crowd`]). Everything lies in the mesh's directory and
//! ends with it; [`ControlPlane::stop`] ends it in order, because an API server whose etcd went first hangs.

mod api;
mod crowd;
pub mod exporting;
mod tools;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use serde_json::{Value, json};

pub use api::{Api, MCS, Object, condition, documents};
pub use tools::{Tools, require_tools};

use crate::capability::skipped;
use crate::mesh::Mesh;
use crate::process::ProcessSpec;

/// As `setup.sh` builds it; the last number counts changes of what is built with it.
const VERSION: &str = "1.37.2-1";
pub(crate) const ADMIN_TOKEN: &str = "the.admins.token";
const NAMESPACE: &str = "tombolo-system";
const ACCOUNT: &str = "tombolo-federator";
/// An API server on a busy machine.
const READY: Duration = Duration::from_secs(60);
const RBAC: &str = include_str!("../../deploy/kubernetes/rbac.yaml");

/// The programs.
#[derive(Clone, Debug)]
pub struct Binaries(pub(crate) PathBuf);

impl Binaries {
    pub fn etcd(&self) -> PathBuf {
        self.0.join("etcd")
    }
}

/// `None` after listing `test` as skipped where they have not been built.
pub fn require_control_plane(test: &str) -> Option<Binaries> {
    #[allow(clippy::disallowed_methods)] // the harness's own settings
    let variable = |name: &str| std::env::var_os(name).map(PathBuf::from);
    let cache = variable("XDG_CACHE_HOME").or_else(|| Some(variable("HOME")?.join(".cache")));
    let dir = cache.unwrap_or_default().join(format!("tombolo-test/kubernetes-{VERSION}"));
    let programs = ["etcd", "kube-apiserver", "kube-controller-manager"];
    if programs.iter().all(|program| dir.join(program).is_file()) {
        return Some(Binaries(dir));
    }
    let reason =
        format!("Kubernetes {VERSION} is not built (tests/setup.sh builds it where Go is new enough)");
    skipped(test, &reason);
    None
}

/// A cluster's etcd alone, for a federator's store: where it is. Its process is `CLUSTER/etcd`.
pub fn store(bin: &Binaries, mesh: &mut Mesh, cluster: &str) -> Result<SocketAddr> {
    let dir = mesh.path(&format!("{cluster}/store"));
    std::fs::create_dir_all(&dir)?;
    let address = mesh.cluster(cluster)?.address(2, 2379);
    spawn_etcd(bin, mesh, cluster, &dir, address)?;
    mesh.eventually("etcd answers", READY, |mesh| {
        let namespace = &mesh.cluster(cluster)?.namespace;
        Ok(namespace.run(|| std::net::TcpStream::connect(address).map(drop))??)
    })?;
    Ok(address)
}

/// One cluster's.
pub struct ControlPlane {
    cluster: String,
    dir: PathBuf,
    address: SocketAddr,
    /// As its administrator.
    pub api: Api,
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

impl ControlPlane {
    /// Starts one, without a federator.
    pub fn start(bin: &Binaries, mesh: &mut Mesh, cluster: &str) -> Result<Self> {
        let dir = mesh.path(&format!("{cluster}/kubernetes"));
        std::fs::create_dir_all(&dir)?;
        let (address, etcd) = {
            let cluster = mesh.cluster(cluster)?;
            (cluster.address(2, 6443), cluster.address(2, 2379))
        };
        secrets(&dir, &[address.ip().to_string()])?;
        let kubeconfig = dir.join("admin.kubeconfig");
        std::fs::write(&kubeconfig, self::kubeconfig(&dir, address, ADMIN_TOKEN)?)?;
        spawn_etcd(bin, mesh, cluster, &dir, etcd)?;
        spawn_api_server(bin, mesh, cluster, &dir, (address, etcd))?;
        let api = Api::connect(&mesh.cluster(cluster)?.namespace, &kubeconfig)?;
        let plane = Self { cluster: cluster.to_owned(), dir, address, api };
        plane.ready(mesh)?;
        let spec = plane.spec(mesh, bin, "kube-controller-manager")?.args([
            "--kubeconfig",
            &text(&kubeconfig),
            "--leader-elect=false",
            "--use-service-account-credentials=false",
            "--kube-api-qps=1000",
            "--kube-api-burst=1000",
            &format!("--service-account-private-key-file={}", text(&plane.dir.join("sa.key"))),
            &format!("--root-ca-file={}", text(&plane.dir.join("ca.crt"))),
            &format!("--bind-address={}", address.ip()),
            "--controllers=namespace-controller,garbage-collector-controller,serviceaccount-controller,deployment-controller,replicaset-controller,endpointslice-controller",
        ]);
        mesh.spawn(&format!("{cluster}/controller-manager"), spec)?;
        Ok(plane)
    }

    fn spec(&self, mesh: &Mesh, bin: &Binaries, program: &str) -> Result<ProcessSpec> {
        spec(bin, mesh, &self.cluster, program)
    }

    /// Waits until the API server answers.
    pub fn ready(&self, mesh: &Mesh) -> Result<Duration> {
        let name = format!("{}/apiserver", self.cluster);
        mesh.eventually("the API server answers", READY, |mesh| {
            let process = mesh.process(&name)?;
            ensure!(!process.has_exited(), "{}", process.tail());
            // Its own objects are there a moment after it answers.
            self.api.get(&Object::new("v1", "Namespace", "", "default"))?.context("no namespace yet")?;
            Ok(())
        })
    }

    /// Prepares the cluster by the product's own means, and starts its federator with nothing but its service account.
    pub fn federate(&self, mesh: &mut Mesh) -> Result<()> {
        self.federate_with(mesh, &[])
    }

    /// Starts its federator as the service account that is there, with more flags.
    pub fn federate_as(&self, mesh: &mut Mesh, more: &[&str]) -> Result<()> {
        self.federate_known(mesh, &[&["--kubernetes-services"], more].concat())
    }

    /// Prepares the cluster as [`Self::federate`] does, and starts its federator with more flags.
    pub fn federate_with(&self, mesh: &mut Mesh, more: &[&str]) -> Result<()> {
        self.install_crds(mesh)?;
        self.federate_bare(mesh, &[&["--kubernetes-services"], more].concat())
    }

    /// The same without the definitions, which may be there already, or come late; `flags` say what the federator does.
    pub fn federate_bare(&self, mesh: &mut Mesh, flags: &[&str]) -> Result<()> {
        for document in documents(RBAC)? {
            self.api.apply(&document)?;
        }
        self.federate_known(mesh, flags)
    }

    fn federate_known(&self, mesh: &mut Mesh, flags: &[&str]) -> Result<()> {
        let kubeconfig = text(&self.kubeconfig_of(ACCOUNT)?);
        let flags = [&["--kubernetes", &kubeconfig][..], flags].concat();
        mesh.federator_with(&self.cluster, &flags)
    }

    /// A kubeconfig with a token of one of the product's service accounts, and nothing else.
    pub fn kubeconfig_of(&self, account: &str) -> Result<PathBuf> {
        let token = self.api.token(&Object::new("v1", "ServiceAccount", NAMESPACE, account))?;
        let path = self.dir.join(format!("{account}.kubeconfig"));
        std::fs::write(&path, kubeconfig(&self.dir, self.address, &token)?)?;
        Ok(path)
    }

    /// A token of its issuer with any claims: what an API server makes, but for what it would not make.
    pub fn sign(&self, claims: &Value) -> Result<String> {
        signed(claims, &std::fs::read_to_string(self.dir.join("sa.key"))?)
    }

    /// `tombolo kube crds --install`; what it said.
    pub fn install_crds(&self, mesh: &Mesh) -> Result<String> {
        let kubeconfig = text(&self.dir.join("admin.kubeconfig"));
        let spec = mesh.spec(&self.cluster, "crds", &["kube", "crds", "--install", &kubeconfig])?;
        let said = spec.run(&mesh.logs()?, Duration::from_secs(30))?;
        // They are served a moment after they were made.
        mesh.eventually("the CRDs are served", READY, |_| {
            self.api.list(&Object::new(api::MCS, "ServiceImport", "default", "")).map(drop)
        })?;
        Ok(said)
    }

    /// Requests of the federator since the API server's first start; a watch is one when it begins.
    pub fn requests_of_federator(&self) -> Result<Vec<String>> {
        Ok(self.audit()?.iter().map(shown).collect())
    }

    /// Those that it has no rights for.
    pub fn forbidden_to_federator(&self) -> Result<Vec<String>> {
        let message = |event: &Value| event["responseStatus"]["message"].to_string();
        // Nobody may make anything in a namespace that ends.
        let forbidden = |event: &&Value| {
            event["responseStatus"]["code"] == 403 && !message(event).contains("being terminated")
        };
        Ok(self.audit()?.iter().filter(forbidden).map(shown).collect())
    }

    fn audit(&self) -> Result<Vec<Value>> {
        let log = std::fs::read_to_string(self.dir.join("audit.log"))?;
        // The last line may be half written.
        Ok(log.lines().filter_map(|line| serde_json::from_str(line).ok()).collect())
    }

    /// Ends everything in order.
    pub fn stop(self, mesh: &mut Mesh) -> Result<()> {
        let Self { cluster, api, .. } = self;
        drop(api);
        for name in ["federator", "controller-manager", "apiserver", "etcd"] {
            mesh.process_mut(&format!("{cluster}/{name}"))?.stop()?;
        }
        Ok(())
    }
}

fn shown(event: &Value) -> String {
    let text = |field: &str| event[field].as_str().unwrap_or_default().to_owned();
    format!("{} {}", text("verb"), text("requestURI"))
}

fn spec(bin: &Binaries, mesh: &Mesh, cluster: &str, program: &str) -> Result<ProcessSpec> {
    let namespace = &mesh.cluster(cluster)?.namespace;
    Ok(ProcessSpec::new(format!("{cluster}-{program}"), bin.0.join(program)).within(namespace))
}

fn spawn_etcd(bin: &Binaries, mesh: &mut Mesh, cluster: &str, dir: &Path, client: SocketAddr) -> Result<()> {
    let peer = format!("http://{}:2380", client.ip());
    let client = format!("http://{client}");
    let spec = spec(bin, mesh, cluster, "etcd")?.args(etcd_args(&dir.join("etcd"), &client, &peer));
    mesh.spawn(&format!("{cluster}/etcd"), spec)
}

/// An etcd of one member, which forgets with its machine.
pub fn etcd_args(data: &Path, client: &str, peer: &str) -> Vec<String> {
    let args = [
        ("data-dir", text(data)),
        ("listen-client-urls", client.to_owned()),
        ("advertise-client-urls", client.to_owned()),
        ("listen-peer-urls", peer.to_owned()),
        ("initial-advertise-peer-urls", peer.to_owned()),
        ("initial-cluster", format!("default={peer}")),
        ("auto-compaction-retention", "1".to_owned()),
    ];
    let args = args.into_iter().map(|(name, value)| format!("--{name}={value}"));
    args.chain(["--unsafe-no-fsync".to_owned()]).collect()
}

fn spawn_api_server(
    bin: &Binaries,
    mesh: &mut Mesh,
    cluster: &str,
    dir: &Path,
    (address, etcd): (SocketAddr, SocketAddr),
) -> Result<()> {
    let file = |name: &str| text(&dir.join(name));
    let spec = spec(bin, mesh, cluster, "kube-apiserver")?.args([
        &format!("--etcd-servers=http://{etcd}"),
        &format!("--bind-address={}", address.ip()),
        &format!("--advertise-address={}", address.ip()),
        &format!("--secure-port={}", address.port()),
        "--endpoint-reconciler-type=none",
        // Webhooks are called at their endpoints' addresses: there is no kube-proxy that would lead a Service's there.
        "--enable-aggregator-routing=true",
        "--service-cluster-ip-range=10.96.0.0/16,fd00:96::/108",
        "--authorization-mode=RBAC",
        &format!("--token-auth-file={}", file("tokens.csv")),
        &format!("--client-ca-file={}", file("ca.crt")),
        &format!("--tls-cert-file={}", file("server.crt")),
        &format!("--tls-private-key-file={}", file("server.key")),
        "--service-account-issuer=https://kubernetes.default.svc",
        &format!("--service-account-key-file={}", file("sa.pub")),
        &format!("--service-account-signing-key-file={}", file("sa.key")),
        &format!("--audit-policy-file={}", file("audit.yaml")),
        &format!("--audit-log-path={}", file("audit.log")),
        "--audit-log-mode=blocking",
    ]);
    mesh.spawn(&format!("{cluster}/apiserver"), spec)
}

/// CA, server certificate, signing key of tokens, the administrator's token, and what is logged of whom.
pub(crate) fn secrets(dir: &Path, names: &[String]) -> Result<()> {
    let ca_key = KeyPair::generate()?;
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca = params.self_signed(&ca_key)?;
    let issuer = Issuer::from_params(&params, &ca_key);
    let key = KeyPair::generate()?;
    let mut server = CertificateParams::new(names)?;
    // OpenSSL takes a leaf with its issuer's name for a self-signed one.
    server.distinguished_name.push(DnType::CommonName, "kube-apiserver");
    let server = server.signed_by(&key, &issuer)?;
    let tokens = KeyPair::generate()?;
    let user = format!("system:serviceaccount:{NAMESPACE}:{ACCOUNT}");
    // Watches are logged when they begin, everything else when it has ended.
    let policy = json!({
        "apiVersion": "audit.k8s.io/v1", "kind": "Policy", "omitStages": ["RequestReceived"],
        "rules": [
            { "level": "Metadata", "users": [user], "verbs": ["watch"], "omitStages": ["ResponseComplete"] },
            { "level": "Metadata", "users": [user], "omitStages": ["ResponseStarted"] },
            { "level": "None" },
        ],
    });
    for (name, content) in [
        ("ca.crt", ca.pem()),
        ("server.crt", server.pem()),
        ("server.key", key.serialize_pem()),
        ("sa.key", tokens.serialize_pem()),
        ("sa.pub", tokens.public_key_pem()),
        ("tokens.csv", format!("{ADMIN_TOKEN},admin,admin,system:masters\n")),
        ("audit.yaml", policy.to_string()),
    ] {
        std::fs::write(dir.join(name), content)?;
    }
    Ok(())
}

/// A JWT (ES256) by a PKCS#8 key.
pub fn signed(claims: &Value, key_pem: &str) -> Result<String> {
    use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair};
    use base64::Engine as _;
    use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64;
    let key = KeyPair::from_pem(key_pem)?.serialize_der();
    let key = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &key)
        .map_err(|e| anyhow::anyhow!("{e}"))?;
    let part = |value: &Value| BASE64.encode(value.to_string());
    let signed = format!("{}.{}", part(&json!({ "alg": "ES256", "typ": "JWT" })), part(claims));
    let random = aws_lc_rs::rand::SystemRandom::new();
    let signature = key.sign(&random, signed.as_bytes()).map_err(|e| anyhow::anyhow!("{e}"))?;
    Ok(format!("{signed}.{}", BASE64.encode(signature.as_ref())))
}

pub(crate) fn kubeconfig(dir: &Path, address: SocketAddr, token: &str) -> Result<String> {
    let config = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "here",
        "contexts": [{ "name": "here", "context": { "cluster": "here", "user": "here" } }],
        "clusters": [{
            "name": "here",
            "cluster": { "server": format!("https://{address}"), "certificate-authority": text(&dir.join("ca.crt")) },
        }],
        "users": [{ "name": "here", "user": { "token": token } }],
    });
    Ok(serde_json::to_string_pretty(&config)?)
}
