//! Strict inbound: what comes in plain, and what does not.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use tombolo_tests::kube::{Object, condition};
use tombolo_tests::scenario::metric;

use super::World;
use super::mesh::{CLIENT, NGINX};
use super::pods::{INJECT, addresses, answered, curl, exposition, imported, namespace, pod, serve, started};

/// Says its port and path, and which paths beginning with `/bye` it was asked for: at 8080 (with a slow `/slow`) and 9090 by
/// HTTP, and accepts at 8081.
pub const SERVER: &str = "
import http.server as h, socket, threading, time
seen = []
class Handler(h.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path.startswith('/bye'): seen.append(self.path)
        if self.path == '/slow': time.sleep(6)
        body = f'{self.server.server_port} {self.path} {seen}'.encode()
        self.send_response(200)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *words): pass
def accept():
    s = socket.create_server(('', 8081))
    while True: s.accept()[0].close()
threading.Thread(target=accept, daemon=True).start()
for port in [9090, 8080]:
    server = h.ThreadingHTTPServer(('', port), Handler)
    threading.Thread(target=server.serve_forever).start()
";

pub fn probes_and_scrapes_come_in_and_strangers_do_not(world: &World) -> Result<()> {
    let (east, west) = (world.east()?, world.west()?);
    namespace(west, "inj-strict", json!({ INJECT: "enabled" }), &["app"])?;
    namespace(east, "inj-strict", json!({}), &[])?;
    namespace(west, "inj-plain", json!({}), &["app"])?;
    let annotations = json!({
        "tombolo.dev/inbound": "strict", "prometheus.io/scrape": "true", "prometheus.io/port": "9090",
    });
    let http =
        json!({ "httpGet": { "path": "/healthz", "port": 8080 }, "periodSeconds": 1, "failureThreshold": 2 });
    let tcp = json!({ "tcpSocket": { "port": 8081 }, "periodSeconds": 1, "failureThreshold": 2 });
    let container = json!({
        "image": "python:3", "command": ["python3", "-c", SERVER],
        "ports": [{ "name": "http", "containerPort": 8080 }, { "containerPort": 8081 }, { "name": "metrics", "containerPort": 9090 }],
        "readinessProbe": http, "livenessProbe": tcp,
    });
    serve(west, &pod("inj-strict", "strict", "app", annotations, container), 1)?;
    imported(east, "inj-strict", "strict")?;
    started(west, &pod("inj-plain", "stranger", "app", json!({}), json!({})))?;
    let stranger = ("inj-plain", "stranger");
    let pods = addresses(west, "inj-strict", "app=strict")?;
    let [(name, ip)] = pods.as_slice() else { anyhow::bail!("{pods:?}") };
    for port in [8080, 8081] {
        let answer = curl(west, stranger, &format!("http://{ip}:{port}/plain"));
        let words =
            answer.err().with_context(|| format!("a stranger was let in at port {port}"))?.to_string();
        ensure!(!words.contains("timed out"), "it is not refused but left to wait: {words}");
    }
    answered(west, stranger, &format!("http://{ip}:9090/metrics"), "9090 /metrics")?;
    let metrics = exposition(west, ip)?;
    let refused = metric(&metrics, "tombolo_sidecar_captured_total", &["result=\"plain_refused\""]);
    ensure!(refused >= 2.0, "{metrics}");
    // Where nothing is strict the same pod comes in: the refusals above are the setting's.
    let open = addresses(west, "shop", "app=web")?;
    let (_, open) = open.first().context("no web")?;
    answered(west, stranger, &format!("http://{open}/"), NGINX)?;
    // The mesh comes in, from another cluster and from the own one.
    answered(east, CLIENT, "http://strict.inj-strict.svc.clusterset.local/mesh", "8080 /mesh")?;
    // A few rounds of probes later it is ready still and was never started anew.
    std::thread::sleep(Duration::from_secs(4));
    let found = west.api.get(&Object::new("v1", "Pod", "inj-strict", name))?.context("the pod is gone")?;
    let (ready, why) = condition(&found, "Ready");
    ensure!(ready.starts_with("True"), "{ready}: {why}");
    let statuses = found["status"]["containerStatuses"].as_array().context("no status")?;
    ensure!(statuses.iter().all(|status| status["restartCount"] == 0), "{statuses:?}");
    println!("     plain calls refused {refused} times; probed, scraped, and called by the mesh");
    Ok(())
}
