//! Application error codes of RESET_STREAM and STOP_SENDING: what one sidecar tells the other about a stream.
//!
//! Codes from [`REFUSED_FIRST`] to [`REFUSED_LAST`] promise that no byte of the stream reached the application, so
//! that the caller may try another endpoint with the same bytes.

use quinn::VarInt;

/// The application's own connection was reset.
pub const APP_RESET: u32 = 0x01;
/// Dropped without a reason: the task that carried it ended.
pub const ABANDONED: u32 = 0x02;
/// No byte either way for longer than the idle limit.
pub const IDLE: u32 = 0x03;
/// The drain's patience is over.
pub const CUT_BY_DRAIN: u32 = 0x04;
/// The stream header was too long, malformed or late.
pub const BAD_HEADER: u32 = 0x05;
/// The port in the header is not one of the service's.
pub const UNKNOWN_PORT: u32 = 0x06;
/// An access policy of the service does not admit the caller. Nothing was delivered, but it is an answer: other endpoints
/// have the same policies, and a caller that is denied here must not be sent around to find out.
pub const DENIED: u32 = 0x07;
/// The stream was admitted when it was opened; a change of the access policies has ended it.
pub const CUT_BY_POLICY: u32 = 0x08;

/// First code that promises: nothing reached the application.
pub const REFUSED_FIRST: u32 = 0x10;
/// The application did not accept the connection.
pub const CONNECT_REFUSED: u32 = 0x10;
/// As many application connections as allowed are open.
pub const OVERLOADED: u32 = 0x11;
/// The sidecar is shutting down: use another one from now on.
pub const DRAINING: u32 = 0x12;
/// The service is not served here any more.
pub const NOT_SERVED: u32 = 0x13;
/// The caller's identity has ended on this connection: another one is to be opened.
pub const EXPIRED: u32 = 0x14;
/// Last code that promises: nothing reached the application.
pub const REFUSED_LAST: u32 = 0x1f;

/// Whether the peer promises that no byte of the stream reached the application.
pub fn promises_nothing_delivered(code: VarInt) -> bool {
    (u64::from(REFUSED_FIRST)..=u64::from(REFUSED_LAST)).contains(&code.into_inner())
}

/// A metric label and access-log reason: a closed set.
pub fn name(code: VarInt) -> &'static str {
    match u32::try_from(code.into_inner()).unwrap_or(u32::MAX) {
        APP_RESET => "app_reset",
        ABANDONED => "abandoned",
        IDLE => "idle",
        CUT_BY_DRAIN => "cut_by_drain",
        BAD_HEADER => "bad_header",
        UNKNOWN_PORT => "unknown_port",
        DENIED => "denied",
        CUT_BY_POLICY => "cut_by_policy",
        CONNECT_REFUSED => "connect_refused",
        OVERLOADED => "overloaded",
        DRAINING => "draining",
        NOT_SERVED => "not_served",
        EXPIRED => "expired",
        _ => "other",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_refusals_promise_that_nothing_was_delivered() {
        for code in [CONNECT_REFUSED, OVERLOADED, DRAINING, NOT_SERVED, EXPIRED] {
            assert!(promises_nothing_delivered(VarInt::from_u32(code)), "{code}");
        }
        let final_codes = [
            APP_RESET,
            ABANDONED,
            IDLE,
            CUT_BY_DRAIN,
            BAD_HEADER,
            UNKNOWN_PORT,
            DENIED,
            CUT_BY_POLICY,
            0,
            0x20,
        ];
        for code in final_codes {
            assert!(!promises_nothing_delivered(VarInt::from_u32(code)), "{code}");
        }
        assert!(!promises_nothing_delivered(VarInt::MAX));
    }
}
