//! A server that speaks Kubernetes' TokenReview over HTTPS as an API server does: it knows a few service account tokens,
//! what each is good for, and one client that may ask.
//!
//! Not an API server: it judges tokens from a table instead of signatures. A real one answers in the same form
//! (authentication.k8s.io/v1), which is what the federator reads.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use serde_json::{Value, json};

use crate::netns::{Namespace, NamespaceHandle};

/// Who may ask.
const REVIEWER: &str = "the.federators.token";

/// A service account token, as the API server has made it.
#[derive(Clone, Debug)]
pub struct Issued {
    /// `namespace:name`.
    pub account: &'static str,
    pub audience: String,
    pub expired: bool,
    /// UID of the pod that it is bound to; empty: none.
    pub pod: &'static str,
}

type Tokens = Arc<Mutex<HashMap<String, Issued>>>;

/// Runs until dropped.
pub struct TokenReviewServer {
    address: SocketAddr,
    namespace: NamespaceHandle,
    stop: Arc<AtomicBool>,
    asked: Arc<AtomicUsize>,
    tokens: Tokens,
    ca_pem: String,
}

impl TokenReviewServer {
    pub fn start(namespace: &Namespace, address: SocketAddr) -> Result<Self> {
        let (ca_pem, tls) = certificates(address)?;
        let listener = namespace.run(|| TcpListener::bind(address))??;
        let (stop, asked, tokens) =
            (Arc::<AtomicBool>::default(), Arc::<AtomicUsize>::default(), Tokens::default());
        let (stopped, counter, known) = (Arc::clone(&stop), Arc::clone(&asked), Arc::clone(&tokens));
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                if stopped.load(Relaxed) {
                    return;
                }
                let (tls, known, counter) = (Arc::clone(&tls), Arc::clone(&known), Arc::clone(&counter));
                std::thread::spawn(move || {
                    if let Err(error) = serve(stream, tls, &known, &counter) {
                        eprintln!("token review: {error:#}");
                    }
                });
            }
        });
        Ok(Self { address, namespace: namespace.handle(), stop, asked, tokens, ca_pem })
    }

    /// Reviews since the start.
    pub fn asked(&self) -> usize {
        self.asked.load(Relaxed)
    }

    /// Makes `token` known.
    pub fn issue(&self, token: &str, issued: Issued) {
        self.tokens.lock().unwrap_or_else(PoisonError::into_inner).insert(token.to_owned(), issued);
    }

    /// Writes a kubeconfig, with its files beside it, by which the server may be asked.
    pub fn kubeconfig(&self, dir: &Path) -> Result<PathBuf> {
        std::fs::create_dir_all(dir)?;
        std::fs::write(dir.join("ca.crt"), &self.ca_pem)?;
        std::fs::write(dir.join("token"), REVIEWER)?;
        let path = dir.join("kubeconfig");
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "here",
            "contexts": [{ "name": "here", "context": { "cluster": "this", "user": "federator" } }],
            "clusters": [{ "name": "this", "cluster": {
                "server": format!("https://{}", self.address), "certificate-authority": "ca.crt" } }],
            "users": [{ "name": "federator", "user": { "tokenFile": "token" } }],
        });
        std::fs::write(&path, config.to_string())?;
        Ok(path)
    }
}

impl Drop for TokenReviewServer {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        let (address, namespace) = (self.address, self.namespace.clone());
        // Wakes the accept loop; the thread may join the namespace because it does nothing else.
        let _ = std::thread::spawn(move || {
            namespace.enter().map(|()| TcpStream::connect_timeout(&address, Duration::from_millis(200)))
        })
        .join();
    }
}

fn certificates(address: SocketAddr) -> Result<(String, Arc<ServerConfig>)> {
    let (ca_key, key) = (KeyPair::generate()?, KeyPair::generate()?);
    let mut ca = CertificateParams::default();
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca_pem = ca.self_signed(&ca_key)?.pem();
    let leaf = CertificateParams::new([address.ip().to_string()])?;
    let leaf = leaf.signed_by(&key, &Issuer::from_params(&ca, &ca_key))?;
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let tls = ServerConfig::builder_with_provider(tombolo_identity::tls::provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_single_cert(vec![leaf.der().clone()], key)?;
    Ok((ca_pem, Arc::new(tls)))
}

/// One request.
fn serve(stream: TcpStream, tls: Arc<ServerConfig>, tokens: &Tokens, asked: &AtomicUsize) -> Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut stream = BufReader::new(StreamOwned::new(ServerConnection::new(tls)?, stream));
    let mut line = String::new();
    stream.read_line(&mut line)?;
    ensure!(line.starts_with("POST /apis/authentication.k8s.io/v1/tokenreviews HTTP/1.1"), "{line:?}");
    let (mut length, mut bearer) = (0, String::new());
    loop {
        let mut header = String::new();
        stream.read_line(&mut header)?;
        let Some((name, value)) = header.trim().split_once(':') else { break };
        match name.to_ascii_lowercase().as_str() {
            "content-length" => length = value.trim().parse()?,
            "authorization" => value.trim().clone_into(&mut bearer),
            _ => {}
        }
    }
    let mut body = Vec::new();
    stream.by_ref().take(length).read_to_end(&mut body)?;
    let (status, answer) = if bearer == format!("Bearer {REVIEWER}") {
        asked.fetch_add(1, Relaxed);
        ("201 Created", review(&serde_json::from_slice(&body)?, tokens)?)
    } else {
        ("401 Unauthorized", json!({ "kind": "Status", "status": "Failure", "code": 401 }))
    };
    let answer = answer.to_string();
    let stream = stream.get_mut();
    write!(
        stream,
        "HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{answer}",
        answer.len()
    )?;
    stream.conn.send_close_notify();
    Ok(stream.flush()?)
}

/// The status that an API server would give.
fn review(request: &Value, tokens: &Tokens) -> Result<Value> {
    ensure!(request["kind"] == "TokenReview", "{request}");
    let token = request["spec"]["token"].as_str().context("no token")?;
    let wanted = request["spec"]["audiences"].as_array().context("no audiences")?;
    let known = tokens.lock().unwrap_or_else(PoisonError::into_inner).get(token).cloned();
    let refused = |error: &str| json!({ "authenticated": false, "user": {}, "error": error });
    let status = match known {
        None => refused("invalid bearer token"),
        Some(issued) if issued.expired => {
            refused("[invalid bearer token, service account token has expired]")
        }
        Some(issued) if !wanted.contains(&json!(issued.audience)) => refused(&format!(
            "[invalid bearer token, token audiences [\"{}\"] is invalid for the target audiences]",
            issued.audience
        )),
        Some(Issued { account, audience, pod, .. }) => {
            let extra = match pod {
                "" => json!({}),
                uid => json!({
                    "authentication.kubernetes.io/pod-name": [format!("pod-{uid}")],
                    "authentication.kubernetes.io/pod-uid": [uid],
                }),
            };
            let username = format!("system:serviceaccount:{account}");
            json!({ "authenticated": true, "audiences": [audience], "user": { "username": username, "extra": extra } })
        }
    };
    Ok(json!({ "apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "status": status }))
}
