//! Signing the CRL: the key is the core's.

use super::{Core, CoreError, Moment};
use crate::crl;

impl Core {
    /// The list of all that is revoked now and that the present intermediate has issued, DER.
    pub fn sign_crl(&mut self, moment: Moment) -> Result<Vec<u8>, CoreError> {
        let unix = moment.unix.as_secs();
        let issuer = self.issuer.spki_sha256();
        let revoked: Vec<_> = crl::revoked(&self.facts, unix)
            .into_iter()
            .filter(|r| r.is_of(&issuer))
            .map(|r| r.entry)
            .collect();
        // Seconds grow over restarts too; two lists of one second, or a clock that was set back, must not repeat one.
        let number = unix.max(self.crl_number + 1);
        let der = self.issuer.sign_crl(&revoked, number, moment.unix, crl::LIFE)?;
        self.crl_number = number;
        Ok(der)
    }
}
