//! `Workload`: what a member asks for on behalf of the application behind it.

use tombolo_proto::v1;
use tombolo_proto::v1::workload_server::Workload;
use tonic::{Request, Response, Status};

use super::member;
use crate::core::CoreHandle;
use crate::metrics::Metrics;

pub struct WorkloadService {
    pub core: CoreHandle,
    pub metrics: Metrics,
}

#[tonic::async_trait]
impl Workload for WorkloadService {
    async fn mint_jwt(
        &self,
        request: Request<v1::MintJwtRequest>,
    ) -> Result<Response<v1::MintJwtResponse>, Status> {
        let caller = member(&request, &self.core.facts().cluster.name)?;
        let request = request.into_inner();
        let minted =
            self.core.attempt(move |core, moment| core.mint_jwt(&caller.identity, &request, moment)).await;
        self.metrics.issued("mint_jwt", &minted);
        Ok(Response::new(minted?))
    }
}
