//! No proxy at all: what the load generator, the origin and the link can do by themselves.

use anyhow::Result;

use super::{Running, Topology};
use crate::site::Site;

pub(super) struct Direct {
    pub(super) kernel_congestion: &'static str,
}

impl Topology for Direct {
    fn name(&self) -> String {
        if self.kernel_congestion == "cubic" {
            "direct".to_owned()
        } else {
            format!("direct-{}", self.kernel_congestion)
        }
    }

    fn description(&self) -> String {
        format!("client -> origin, kernel {}", self.kernel_congestion)
    }

    fn kernel_congestion(&self) -> &'static str {
        self.kernel_congestion
    }

    fn start(&self, site: &Site) -> Result<Running> {
        Ok(Running {
            http: site.origin_http(),
            bulk: site.origin_bulk(),
            hops: Vec::new(),
            support: Vec::new(),
        })
    }
}
