//! What a sidecar serves and calls, out of a `Workload` manifest or a `--health` flag.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use tombolo_model::names::{Namespace, ServiceKey};
use tombolo_model::protocol::Protocol;
use tombolo_model::resource::workload::{
    CommandCheck, HealthCheck as Check, HttpCheck, TcpCheck, WorkloadBackend, WorkloadPort, WorkloadService,
    WorkloadSpec, WorkloadUpstream,
};
use tombolo_model::resource::{Object, Spec};
use tombolo_sidecar::agentless::Backend;
use tombolo_sidecar::config::{LocalPort, ServiceConfig, UpstreamConfig};
use tombolo_sidecar::health::{HealthCheck, Probe};

use crate::failure::Failure;
use crate::manifest;

/// Two that fail and a report: out of rotation within the promised 3 s.
const COMMAND_INTERVAL: Duration = Duration::from_secs(1);

/// `NAMESPACE/NAME=tcp|http:/path|none`, for a service that a `--service` flag names.
pub fn health_flag(text: &str, services: &mut [ServiceConfig]) -> Result<(), Failure> {
    let wrong = |reason: &str| {
        let shown: String = text.chars().take(200).collect();
        Failure::usage(format_args!("--health {shown:?}: {reason}"))
            .remedy("write NAMESPACE/NAME=tcp, NAMESPACE/NAME=http:/path or NAMESPACE/NAME=none")
    };
    let (service, check) = text.split_once('=').ok_or_else(|| wrong("there is no '='"))?;
    let service: ServiceKey = service.parse().map_err(|_| wrong("the service is not NAMESPACE/NAME"))?;
    let probe = match check {
        "tcp" => Probe::Tcp,
        "none" => Probe::None,
        _ => match check.strip_prefix("http:") {
            Some(path) if is_path(path) => Probe::Http { path: path.to_owned() },
            _ => return Err(wrong("the check is not known")),
        },
    };
    let known = services.iter_mut().find(|known| known.service == service);
    let known = known.ok_or_else(|| wrong("no --service has this name"))?;
    if probe != Probe::None && known.ports.iter().all(|port| port.protocol == Protocol::Udp) {
        return Err(wrong("the service has UDP ports alone, which are not checked"));
    }
    known.health.probe = probe;
    Ok(())
}

/// A path that can stand in a request line.
fn is_path(path: &str) -> bool {
    path.starts_with('/') && path.bytes().all(|b| b.is_ascii_graphic())
}

/// The services and upstreams of the one `Workload` in a file.
pub fn read(path: &Path, name: &str) -> Result<(Vec<ServiceConfig>, Vec<UpstreamConfig>), Failure> {
    let manifests = manifest::read(&[path.to_owned()])?;
    let [only] = manifests.as_slice() else {
        return Err(Failure::usage(format_args!("{} objects; one Workload is expected", manifests.len()))
            .at(path.display()));
    };
    let object = Object::from_json(only.object.clone()).map_err(|e| Failure::usage(e).at(&only.place))?;
    let Spec::Workload(spec) = object.spec else {
        return Err(Failure::usage(format_args!("a {}; a Workload is expected", only.kind())).at(&only.place));
    };
    let namespace: Namespace = only.namespace().parse().map_err(|e| Failure::usage(e).at(&only.place))?;
    convert(spec, name, &namespace).map_err(|failure| failure.at(&only.place))
}

fn convert(
    spec: WorkloadSpec,
    name: &str,
    namespace: &Namespace,
) -> Result<(Vec<ServiceConfig>, Vec<UpstreamConfig>), Failure> {
    // Which sidecar serves it matters to the federator; this is that sidecar.
    let WorkloadSpec { sidecar: _, via, services, upstreams } = spec;
    if let Some(via) = via.filter(|via| via != name) {
        return Err(Failure::usage(format_args!("spec.via names the sidecar {via}; this one is {name}"))
            .remedy(format_args!("give the manifest to {via}, or change spec.via")));
    }
    let services = services.into_iter().map(|s| service(s, namespace)).collect::<Result<_, _>>()?;
    let upstreams = upstreams.iter().map(|u| upstream(u, namespace)).collect::<Result<_, _>>()?;
    Ok((services, upstreams))
}

fn service(service: WorkloadService, namespace: &Namespace) -> Result<ServiceConfig, Failure> {
    let WorkloadService { name, ports, backends, health_check, weight } = service;
    let service = ServiceKey::new(namespace.clone(), name.parse().map_err(Failure::usage)?);
    let mut ports = ports.into_iter().map(local_port).collect::<Result<Vec<_>, _>>()?;
    let mut health = HealthCheck::default();
    if let Some(check) = health_check {
        let Check { tcp, http, command, interval, timeout, healthy_threshold, unhealthy_threshold } = check;
        let checked = match (tcp, http) {
            (_, Some(HttpCheck { path, port, expected_status })) => {
                if expected_status.is_some() {
                    return Err(Failure::usage(
                        "healthCheck.http.expectedStatus is not supported yet: leave it out (200 to 399)",
                    ));
                }
                if !is_path(&path) {
                    return Err(Failure::usage(format_args!(
                        "healthCheck.http.path: {path:?} is no path: give one such as /healthz"
                    )));
                }
                health.probe = Probe::Http { path };
                Some(port)
            }
            (Some(TcpCheck { port }), None) => Some(port),
            (None, None) => {
                if let Some(check) = command {
                    health = command_check(&check, health)?;
                }
                None
            }
        };
        // The first port is the one that is checked. A service of UDP ports alone is checked at another of its host.
        if let Some(checked) = checked {
            let named = |port: &LocalPort| {
                port.protocol == Protocol::Tcp && (port.target.port() == checked || port.port == checked)
            };
            match (ports.iter().position(named), ports.first()) {
                (Some(at), _) => ports.swap(0, at),
                (None, Some(first)) if ports.iter().all(|port| port.protocol == Protocol::Udp) => {
                    health.target = Some(SocketAddr::new(first.target.ip(), checked));
                }
                _ => {
                    return Err(Failure::usage(format_args!(
                        "healthCheck names port {checked}, which {service} does not have over TCP"
                    )));
                }
            }
        }
        health.interval = interval.map_or(health.interval, |text| text.0);
        health.timeout = timeout.map_or(health.timeout, |text| text.0);
        health.healthy_after = healthy_threshold.unwrap_or(health.healthy_after);
        health.unhealthy_after = unhealthy_threshold.unwrap_or(health.unhealthy_after);
    }
    let backends = backends.into_iter().map(backend).collect::<Result<_, _>>()?;
    Ok(ServiceConfig { service, ports, backends, health, weight: weight.unwrap_or(100) })
}

fn backend(backend: WorkloadBackend) -> Result<Backend, Failure> {
    let WorkloadBackend { address, weight } = backend;
    let parsed: Backend = address.parse().map_err(|expected| {
        Failure::usage(format_args!("backends.address: {address:?} is not {expected}"))
    })?;
    Ok(Backend { weight: weight.unwrap_or(parsed.weight), ..parsed })
}

/// A check that starts a program: not as often as one that opens a connection.
fn command_check(check: &CommandCheck, usual: HealthCheck) -> Result<HealthCheck, Failure> {
    let wrong = |expected| Failure::usage(format_args!("healthCheck.command: give {expected}"));
    let command = check.command().map_err(wrong)?;
    Ok(HealthCheck { probe: Probe::Command { command }, interval: COMMAND_INTERVAL, ..usual })
}

fn local_port(port: WorkloadPort) -> Result<LocalPort, Failure> {
    let protocol = port.protocol();
    let WorkloadPort { name, port, target_port, target_host, protocol: _, app_protocol } = port;
    let host: IpAddr = match target_host {
        None => Ipv4Addr::LOCALHOST.into(),
        Some(text) => text
            .parse()
            .map_err(|_| Failure::usage(format_args!("targetHost: {text:?} is not an IP address")))?,
    };
    Ok(LocalPort {
        name: name.unwrap_or_default(),
        port,
        protocol,
        target: SocketAddr::new(host, target_port.unwrap_or(port)),
        app_protocol: app_protocol.unwrap_or_default(),
    })
}

fn upstream(upstream: &WorkloadUpstream, namespace: &Namespace) -> Result<UpstreamConfig, Failure> {
    let service = upstream
        .key(namespace)
        .ok_or_else(|| Failure::usage(format_args!("{:?} is no service", upstream.service)))?;
    let protocol = upstream.protocol();
    let WorkloadUpstream { service: _, port, protocol: _, listen, warm } = upstream;
    let listen =
        listen.parse().map_err(|_| Failure::usage(format_args!("listen: {listen:?} is not an ip:port")))?;
    let warm = warm.map_or(0, |warm| usize::try_from(warm).unwrap_or(usize::MAX));
    Ok(UpstreamConfig { service, port: *port, protocol, listen, warm })
}

#[cfg(test)]
mod tests {
    use super::*;
    use tombolo_sidecar::config::{Mapping, services_from};

    #[test]
    fn a_health_flag_changes_the_check_of_its_service() {
        let mapping: Mapping = "shop/web:80=127.0.0.1:8080".parse().unwrap();
        let mut services = services_from([mapping]);
        health_flag("shop/web=http:/healthz", &mut services).unwrap();
        assert_eq!(services[0].health.probe, Probe::Http { path: "/healthz".into() });
        services.extend(services_from(["shop/dns:53/udp=127.0.0.1:53".parse::<Mapping>().unwrap()]));
        health_flag("shop/dns=none", &mut services).unwrap();
        for bad in [
            "shop/dns=tcp",
            "shop/web",
            "shop/web=ping",
            "web=tcp",
            "shop/other=tcp",
            "shop/web=http:healthz",
            "shop/web=http:/a b",
        ] {
            let error = health_flag(bad, &mut services).unwrap_err().to_string();
            assert!(error.contains("--health") && error.contains("=tcp"), "{error}");
        }
    }

    #[test]
    fn a_workload_manifest_says_what_is_served_called_and_checked() {
        let path = std::env::temp_dir().join(format!("tombolo-workload-{}.yaml", std::process::id()));
        std::fs::write(
            &path,
            "apiVersion: tombolo.dev/v1alpha1
kind: Workload
metadata: { name: db-1, namespace: shop }
spec:
  services:
    - name: db
      ports: [ { port: 5432 }, { port: 8008, targetPort: 18008 } ]
      healthCheck: { http: { path: /ready, port: 8008 }, interval: 250ms }
    - name: dns
      ports: [ { port: 53, protocol: UDP } ]
      healthCheck: { tcp: { port: 8053 } }
  upstreams:
    - { service: web, port: 80, listen: \"127.0.0.1:9080\", warm: 2 }
",
        )
        .unwrap();
        let read = read(&path, "db-1");
        std::fs::remove_file(&path).unwrap();
        let (services, upstreams) = read.unwrap();
        assert_eq!(
            services[0].ports[0].target,
            "127.0.0.1:18008".parse().unwrap(),
            "the checked port comes first"
        );
        assert_eq!(services[0].health.interval.as_millis(), 250);
        assert_eq!((upstreams[0].service.to_string().as_str(), upstreams[0].warm), ("shop/web", 2));
        assert_eq!(
            (services[1].ports[0].protocol, services[1].health.target),
            (Protocol::Udp, Some("127.0.0.1:8053".parse().unwrap())),
            "a UDP service is checked at another port"
        );
    }
}
