//! What a member asks its federator for on behalf of the application behind it: an SVID with a key of its own, and tokens.
//! Nothing of it is stored: the next process asks anew.

use std::time::Duration;

use rustls::pki_types::CertificateDer;
use tombolo_identity::SpiffeId;
use tombolo_identity::issuer::KeyAndCsr;
use tombolo_proto::v1;
use tombolo_proto::v1::config_client::ConfigClient;
use tombolo_proto::v1::workload_client::WorkloadClient;
use zeroize::Zeroizing;

use super::renewal::RenewError;
use super::{Member, MemberError, check_svid};
use crate::endpoint::Overlay;

const CALL_TIMEOUT: Duration = Duration::from_secs(10);

/// An application's X509-SVID with its key. The key is wiped when dropped, and shows in no log.
pub struct WorkloadSvid {
    pub spiffe_id: SpiffeId,
    /// Leaf first.
    pub chain: Vec<CertificateDer<'static>>,
    /// PKCS#8 DER.
    pub key: Zeroizing<Vec<u8>>,
    /// Unix seconds.
    pub not_after: u64,
}

impl std::fmt::Debug for WorkloadSvid {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WorkloadSvid")
            .field("spiffe_id", &self.spiffe_id)
            .field("not_after", &self.not_after)
            .finish_non_exhaustive()
    }
}

impl Member {
    /// A fresh key, and an SVID of the member's own SPIFFE ID for it.
    pub async fn workload_svid(&self, overlay: &Overlay) -> Result<WorkloadSvid, RenewError> {
        let KeyAndCsr { key_der, csr_der } = KeyAndCsr::generate().map_err(MemberError::from)?;
        let mut client = ConfigClient::new(self.connect(overlay).await?);
        let lease = v1::EndpointLease { keys: None, ..self.lease().to_wire() };
        let request = v1::RenewRequest { csr_der, lease: Some(lease), workload: true };
        let answer = tokio::time::timeout(CALL_TIMEOUT, client.renew(request)).await;
        let answer = answer.map_err(|_| RenewError::Late)?.map_err(Box::new)?.into_inner();
        let svid = check_svid(&key_der, &answer.svid.ok_or(RenewError::Empty)?)?;
        let own = self.spiffe_id();
        if svid.spiffe_id != own {
            let (found, expected) = (svid.spiffe_id.to_string(), own.to_string());
            return Err(MemberError::OtherIdentity { found, expected }.into());
        }
        Ok(WorkloadSvid {
            spiffe_id: own,
            chain: svid.chain().to_vec(),
            key: key_der,
            not_after: svid.not_after,
        })
    }

    /// A JWT-SVID of the member's own SPIFFE ID, and when it ends (unix seconds).
    pub async fn workload_jwt(
        &self,
        overlay: &Overlay,
        audience: Vec<String>,
    ) -> Result<(String, u64), RenewError> {
        let mut client = WorkloadClient::new(self.connect(overlay).await?);
        let answer =
            tokio::time::timeout(CALL_TIMEOUT, client.mint_jwt(v1::MintJwtRequest { audience })).await;
        let v1::MintJwtResponse { token, not_after_unix } =
            answer.map_err(|_| RenewError::Late)?.map_err(Box::new)?.into_inner();
        Ok((token, u64::try_from(not_after_unix).unwrap_or(0)))
    }
}
