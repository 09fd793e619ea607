//! A port of the machine's loopback that leads into a namespace: how kubectl reaches an API server without the machine's
//! own network knowing anything of the testbed's.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};

use anyhow::Result;
use tokio::runtime::Runtime;
use tokio::task::JoinSet;

use crate::netns::Namespace;

/// Until dropped.
pub struct Forward {
    pub address: SocketAddr,
    _runtime: Runtime,
}

impl Forward {
    pub fn start(namespace: &Namespace, to: SocketAddr) -> Result<Self> {
        // Made here, in the machine's namespace, where it stays; what connects onwards is made inside.
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let runtime = namespace.runtime(1)?;
        runtime.spawn(async move {
            let listener = match tokio::net::TcpListener::from_std(listener) {
                Ok(listener) => listener,
                Err(error) => return tracing::error!("forward {address}: {error}"),
            };
            let mut connections = JoinSet::new();
            loop {
                tokio::select! {
                    accepted = listener.accept() => {
                        let Ok((mut near, _)) = accepted else { continue };
                        connections.spawn(async move {
                            let mut far = tokio::net::TcpStream::connect(to).await?;
                            tokio::io::copy_bidirectional(&mut near, &mut far).await
                        });
                    }
                    Some(_) = connections.join_next() => {}
                }
            }
        });
        Ok(Self { address, _runtime: runtime })
    }
}
