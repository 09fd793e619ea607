//! `Linking`: first contact of a cluster that an object here names (ADR 24). On such a connection this one call is served and
//! nothing else; the overlay has checked that the caller is of the cluster whose handle it dialled.

use tombolo_identity::SvidHandle;
use tombolo_model::audit::{Action, Event};
use tombolo_overlay::HandleClass;
use tombolo_overlay::grpc::PeerInfo;
use tombolo_proto::v1;
use tombolo_proto::v1::linking_server::Linking;
use tonic::{Request, Response, Status};

use super::join::chain_with_root;
use super::pace::Pace;
use crate::core::{Core, CoreHandle, first_contact};

/// A handful of clusters, every few seconds each: a call costs a signature check and a commit.
const PER_SECOND: f64 = 5.0;
const BURST: f64 = 20.0;

pub struct LinkingService {
    core: CoreHandle,
    svid: SvidHandle,
    pace: Pace,
}

impl LinkingService {
    pub fn new(core: CoreHandle, svid: SvidHandle) -> Self {
        Self { core, svid, pace: Pace::new(PER_SECOND, BURST) }
    }
}

#[tonic::async_trait]
impl Linking for LinkingService {
    async fn link(
        &self,
        request: Request<v1::LinkRequest>,
    ) -> Result<Response<v1::JoinLinkResponse>, Status> {
        let info =
            request.extensions().get::<PeerInfo>().filter(|info| info.class == HandleClass::FirstContact);
        let caller = info.filter(|info| !info.expired()).and_then(PeerInfo::identity);
        let caller =
            caller.ok_or_else(|| Status::unauthenticated("this call needs a connection of first contact"))?;
        let turned_away = self.pace.admit();
        let turned_away = turned_away
            .ok_or_else(|| Status::resource_exhausted("too many ask to be linked at once: try again"))?;
        let party = request.into_inner().caller;
        let party = party.ok_or_else(|| Status::invalid_argument("field caller: nothing is not a party"))?;
        let chain = chain_with_root(&self.svid);
        let link = move |core: &mut Core, moment| {
            core.turned_away(Action::Link, turned_away, moment);
            let answer = first_contact::answer(core, &caller, &party, chain, moment);
            if let Err(error) = &answer {
                let event = Event::refused(Action::Link, format!("cluster:{}", caller.cluster), "");
                core.refused(event, error, moment);
            }
            answer
        };
        Ok(Response::new(self.core.attempt(link).await?))
    }
}
