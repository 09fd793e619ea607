//! Where the Kubernetes API server is and how the federator shows who it is: in-cluster files, or a kubeconfig.
//!
//! Files are read again for every review: tokens and certificates are rotated under us. What a kubeconfig may say and we
//! don't do (plugins, passwords, no verification) is refused by its field.

use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::Uri;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, RootCertStore};
use serde::Deserialize;
use tombolo_identity::{files, tls};
use zeroize::Zeroizing;

/// Where Kubernetes puts a pod's credentials.
pub const IN_CLUSTER_DIR: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
const MAX_FILE_BYTES: u64 = 1024 * 1024;

/// How the API server is found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KubernetesAccess {
    /// `https://host:port`, and the directory with `ca.crt` and `token`.
    InCluster {
        server: String,
        dir: PathBuf,
    },
    Kubeconfig(PathBuf),
}

/// Why the API server can't be asked.
#[derive(Debug, thiserror::Error)]
pub enum AccessError {
    #[error(transparent)]
    File(#[from] files::FileError),
    #[error("{path}: {reason}", path = path.display())]
    Kubeconfig { path: PathBuf, reason: String },
    #[error("{server:?} is not https://HOST:PORT")]
    Server { server: String },
    #[error("the API server's CA certificate can't be used: {0}")]
    Ca(String),
    #[error("the client certificate can't be used: {0}")]
    ClientCertificate(String),
    #[error(transparent)]
    Tls(#[from] rustls::Error),
}

/// What one review is made with.
pub struct Credentials {
    pub host: String,
    pub port: u16,
    pub tls: ClientConfig,
    /// `None`: a client certificate speaks.
    pub bearer: Option<Zeroizing<String>>,
}

impl KubernetesAccess {
    /// Reads everything anew.
    pub fn read(&self) -> Result<Credentials, AccessError> {
        match self {
            Self::InCluster { server, dir } => {
                let ca = files::read(&dir.join("ca.crt"), MAX_FILE_BYTES)?;
                let bearer = Some(text(&dir.join("token"))?);
                credentials(server, &ca, bearer, None)
            }
            Self::Kubeconfig(path) => from_kubeconfig(path),
        }
    }
}

fn text(path: &Path) -> Result<Zeroizing<String>, AccessError> {
    // Its mode is the kubelet's or the operator's business: projected files are often for everybody in the pod.
    let bytes = Zeroizing::new(files::read(path, MAX_FILE_BYTES)?);
    Ok(Zeroizing::new(String::from_utf8_lossy(&bytes).trim().to_owned()))
}

fn credentials(
    server: &str,
    ca_pem: &[u8],
    bearer: Option<Zeroizing<String>>,
    certificate: Option<(Vec<u8>, Zeroizing<Vec<u8>>)>,
) -> Result<Credentials, AccessError> {
    let wrong = || AccessError::Server { server: server.to_owned() };
    let uri: Uri = server.parse().map_err(|_| wrong())?;
    let host = uri.host().filter(|_| uri.scheme_str() == Some("https")).ok_or_else(wrong)?;
    let mut roots = RootCertStore::empty();
    for ca in CertificateDer::pem_slice_iter(ca_pem) {
        let ca = ca.map_err(|e| AccessError::Ca(format!("not PEM: {e:?}")))?;
        roots.add(ca).map_err(|e| AccessError::Ca(e.to_string()))?;
    }
    if roots.is_empty() {
        return Err(AccessError::Ca("there is none".to_owned()));
    }
    let builder = ClientConfig::builder_with_provider(tls::provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(roots);
    let mut tls = match certificate {
        None => builder.with_no_client_auth(),
        Some((chain, key)) => {
            let failed = |e: String| AccessError::ClientCertificate(e);
            let chain = CertificateDer::pem_slice_iter(&chain).collect::<Result<Vec<_>, _>>();
            let chain = chain.map_err(|e| failed(format!("not PEM: {e:?}")))?;
            let key = PrivateKeyDer::from_pem_slice(&key).map_err(|e| failed(format!("its key: {e:?}")))?;
            builder.with_client_auth_cert(chain, key).map_err(|e| failed(e.to_string()))?
        }
    };
    tls.alpn_protocols = vec![b"http/1.1".to_vec()];
    // Brackets are of URIs, not of addresses.
    let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
    Ok(Credentials { host, port: uri.port_u16().unwrap_or(443), tls, bearer })
}

#[derive(Deserialize)]
struct Config {
    #[serde(rename = "current-context", default)]
    current_context: String,
    #[serde(default)]
    contexts: Vec<Named<ContextEntry>>,
    #[serde(default)]
    clusters: Vec<Named<ClusterEntry>>,
    #[serde(default)]
    users: Vec<Named<UserEntry>>,
}

#[derive(Deserialize)]
struct Named<T> {
    name: String,
    #[serde(alias = "context", alias = "cluster", alias = "user")]
    entry: T,
}

#[derive(Deserialize)]
struct ContextEntry {
    cluster: String,
    user: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct ClusterEntry {
    server: String,
    certificate_authority: Option<PathBuf>,
    certificate_authority_data: Option<String>,
    #[serde(default)]
    insecure_skip_tls_verify: bool,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct UserEntry {
    token: Option<String>,
    #[serde(rename = "tokenFile")]
    token_file: Option<PathBuf>,
    client_certificate: Option<PathBuf>,
    client_certificate_data: Option<String>,
    client_key: Option<PathBuf>,
    client_key_data: Option<String>,
    exec: Option<serde_json::Value>,
    auth_provider: Option<serde_json::Value>,
    username: Option<String>,
}

fn from_kubeconfig(path: &Path) -> Result<Credentials, AccessError> {
    let wrong = |reason: String| AccessError::Kubeconfig { path: path.to_owned(), reason };
    let written = text(path)?;
    let config: Config = serde_saphyr::from_str(&written).map_err(|e| wrong(e.to_string()))?;
    let context = find("contexts", config.contexts, &config.current_context).map_err(wrong)?;
    let cluster = find("clusters", config.clusters, &context.cluster).map_err(wrong)?;
    let user = find("users", config.users, &context.user).map_err(wrong)?;
    if cluster.insecure_skip_tls_verify {
        let reason =
            "insecure-skip-tls-verify: a federator asks no API server that it can't tell from another";
        return Err(wrong(format!("{reason}: give certificate-authority")));
    }
    for (field, given) in [
        ("exec", user.exec.is_some()),
        ("auth-provider", user.auth_provider.is_some()),
        ("username", user.username.is_some()),
    ] {
        if given {
            let remedy = "give the user a token, a tokenFile or a client certificate";
            return Err(wrong(format!("users.{field} is not supported: {remedy}")));
        }
    }
    // Paths in a kubeconfig are relative to it.
    let base = path.parent().unwrap_or(Path::new("."));
    let bytes_of = |field: &str, file: Option<PathBuf>, data: Option<String>| match (file, data) {
        (_, Some(data)) => {
            STANDARD.decode(data.trim()).map(Some).map_err(|e| wrong(format!("{field}-data: {e}")))
        }
        (Some(file), None) => Ok(Some(files::read(&base.join(file), MAX_FILE_BYTES)?)),
        (None, None) => Ok(None),
    };
    let ca =
        bytes_of("certificate-authority", cluster.certificate_authority, cluster.certificate_authority_data)?;
    let ca = ca.ok_or_else(|| wrong("clusters.certificate-authority is missing".to_owned()))?;
    let chain = bytes_of("client-certificate", user.client_certificate, user.client_certificate_data)?;
    let key = bytes_of("client-key", user.client_key, user.client_key_data)?.map(Zeroizing::new);
    let certificate = match (chain, key) {
        (Some(chain), Some(key)) => Some((chain, key)),
        (None, None) => None,
        _ => return Err(wrong("client-certificate and client-key go together".to_owned())),
    };
    let bearer = match (user.token_file, user.token) {
        (Some(file), _) => Some(text(&base.join(file))?),
        (None, token) => token.map(Zeroizing::new),
    };
    if bearer.is_none() && certificate.is_none() {
        return Err(wrong("the user has neither a token nor a client certificate".to_owned()));
    }
    credentials(&cluster.server, &ca, bearer, certificate)
}

fn find<T>(field: &str, entries: Vec<Named<T>>, name: &str) -> Result<T, String> {
    let found = entries.into_iter().find(|entry| entry.name == name).map(|entry| entry.entry);
    found.ok_or_else(|| format!("{field} has no {name:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ca() -> String {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::default();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        params.self_signed(&key).unwrap().pem()
    }

    fn kubeconfig(cluster: &str, user: &str) -> Result<Credentials, AccessError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config");
        let secret = |path: &Path, text: &str| files::write_atomic(path, text.as_bytes(), 0o600).unwrap();
        secret(&dir.path().join("ca.crt"), &ca());
        secret(&dir.path().join("token"), "from-a-file\n");
        secret(
            &path,
            &format!(
                "apiVersion: v1
kind: Config
current-context: here
preferences: {{}}
contexts: [{{ name: here, context: {{ cluster: east, user: federator, namespace: tombolo }} }}]
clusters: [{{ name: east, cluster: {{ {cluster} }} }}]
users: [{{ name: federator, user: {{ {user} }} }}]
"
            ),
        );
        KubernetesAccess::Kubeconfig(path).read()
    }

    const CLUSTER: &str = "server: \"https://[::1]:6443\", certificate-authority: ca.crt";

    #[test]
    fn a_kubeconfig_is_read_with_its_files_beside_it() {
        let found = kubeconfig(CLUSTER, "tokenFile: token").unwrap();
        assert_eq!((found.host.as_str(), found.port), ("::1", 6443));
        assert_eq!(found.bearer.unwrap().as_str(), "from-a-file");
        let inline = kubeconfig(CLUSTER, "token: inline").unwrap();
        assert_eq!(inline.bearer.unwrap().as_str(), "inline");
    }

    #[test]
    fn what_is_not_done_is_refused_by_its_field() {
        let insecure = "server: \"https://a:1\", insecure-skip-tls-verify: true";
        for (cluster, user, said) in [
            (insecure, "token: x", "insecure-skip-tls-verify"),
            (CLUSTER, "exec: { command: aws }", "users.exec"),
            (CLUSTER, "username: admin, password: x", "users.username"),
            (CLUSTER, "client-certificate-data: AAAA", "go together"),
            (CLUSTER, "token-file: token", "neither a token nor"),
            ("server: \"http://a:1\", certificate-authority: ca.crt", "token: x", "https://HOST:PORT"),
            ("server: \"https://a:1\"", "token: x", "certificate-authority is missing"),
            ("server: \"https://a:1\", certificate-authority: token", "token: x", "CA certificate"),
        ] {
            let error = kubeconfig(cluster, user).map(drop).expect_err(said).to_string();
            assert!(error.contains(said), "{error}");
        }
    }
}
