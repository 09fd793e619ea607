//! One task that keeps the application's own X509-SVID: a key made here, asked for at once, renewed at half its life; anew
//! when that certificate alone is revoked (a key that leaked), and when the sidecar's own chain has another issuer (a
//! rotated intermediate).

use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::CertificateDer;
use tokio::sync::watch;
use tombolo_identity::peer_identity_from_certs;
use tombolo_overlay::Overlay;
use tombolo_overlay::member::Member;
use tombolo_overlay::member::backoff::Backoff;
use tombolo_overlay::member::renewal::due_at;
use tombolo_overlay::member::workload::WorkloadSvid;
use tombolo_runtime::clock;

use crate::tables::Tables;

/// The clock may have been set, and the sidecar's chain may be another.
const LOOK: Duration = Duration::from_secs(5);

/// Until nobody reads it any more.
pub(super) async fn keep_issued(
    member: Member,
    overlay: Overlay,
    mut tables: watch::Receiver<Option<Arc<Tables>>>,
    svid: watch::Sender<Option<Arc<WorkloadSvid>>>,
) {
    let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(60));
    while !svid.is_closed() {
        let issuer = issuer_of(&member);
        match member.workload_svid(&overlay).await {
            Ok(issued) => {
                backoff.worked();
                let due = due_at(clock::unix_seconds(), issued.not_after, rand::random());
                tracing::info!(spiffe_id = %issued.spiffe_id, not_after = issued.not_after,
                    "the application's SVID is issued");
                let issued = Arc::new(issued);
                svid.send_replace(Some(Arc::clone(&issued)));
                while clock::unix_seconds() < due && still_good(&member, &issued, &issuer) {
                    // A configuration brings revocations; without any there is the time.
                    if let Ok(Err(_)) = tokio::time::timeout(LOOK, tables.changed()).await {
                        return;
                    }
                }
            }
            Err(error) => {
                tracing::warn!(%error, "the application's SVID can't be had; tried again");
                tokio::time::sleep(backoff.failed(rand::random())).await;
            }
        }
    }
}

/// Whose chain the sidecar shows itself.
fn issuer_of(member: &Member) -> Option<CertificateDer<'static>> {
    member.svid().load().chain().get(1).cloned()
}

/// Whether peers accept it as well as they do the sidecar's own. `issuer`: the sidecar's when it was asked for. The
/// federator may have issued this one by a newer, which is no reason to ask again.
fn still_good(member: &Member, issued: &WorkloadSvid, issuer: &Option<CertificateDer<'static>>) -> bool {
    let own = member.svid().load();
    let revoked = peer_identity_from_certs(&issued.chain)
        .is_ok_and(|identity| own.bundles.revocations().of(&identity).is_some());
    !revoked && issuer_of(member) == *issuer
}
