//! `Renewal`: members of this cluster come back after their identity has ended (protocol.md section 4).
//!
//! The overlay has judged the caller's chain by everything but its leaf's end ([`verify::authenticate_lapsed`]); it gets
//! nothing on this connection but this one call, which is rate-limited for everybody together.
//!
//! [`verify::authenticate_lapsed`]: tombolo_identity::verify::authenticate_lapsed

use tombolo_identity::SvidHandle;
use tombolo_model::audit::Action;
use tombolo_overlay::HandleClass;
use tombolo_overlay::grpc::PeerInfo;
use tombolo_proto::v1;
use tombolo_proto::v1::renewal_server::Renewal;
use tonic::{Request, Response, Status};

use super::pace::Pace;
use crate::core::{Core, CoreHandle};
use crate::metrics::Metrics;

/// After a power cut everybody comes back at once: a thousand within 20 s.
const PER_SECOND: f64 = 50.0;
const BURST: f64 = 100.0;

pub struct RenewalService {
    core: CoreHandle,
    svid: SvidHandle,
    metrics: Metrics,
    pace: Pace,
}

impl RenewalService {
    pub fn new(core: CoreHandle, svid: SvidHandle, metrics: Metrics) -> Self {
        Self { core, svid, metrics, pace: Pace::new(PER_SECOND, BURST) }
    }
}

#[tonic::async_trait]
impl Renewal for RenewalService {
    async fn renew_lapsed(
        &self,
        request: Request<v1::RenewLapsedRequest>,
    ) -> Result<Response<v1::JoinWorkloadResponse>, Status> {
        let caller = request.extensions().get::<PeerInfo>();
        let caller = caller.filter(|info| info.class == HandleClass::Renewal).and_then(PeerInfo::identity);
        let caller = caller.ok_or_else(|| Status::unauthenticated("this call needs a renewal connection"))?;
        let turned_away = self.pace.admit();
        let turned_away = turned_away
            .ok_or_else(|| Status::resource_exhausted("too many come back at once: try again in a second"))?;
        // By serial, node or cluster; whom the core itself revokes by name it says by its object.
        let revoked = self.svid.load().bundles.revocations().of(&caller).cloned();
        let request = request.into_inner();
        let renew = move |core: &mut Core, moment| {
            core.turned_away(Action::Renew, turned_away, moment);
            core.renew_lapsed(&caller, revoked.as_deref(), &request, moment)
        };
        let renewed = self.core.attempt(renew).await;
        self.metrics.issued("renew_lapsed", &renewed);
        Ok(Response::new(renewed?))
    }
}
