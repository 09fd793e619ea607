//! Connections that the machine's rules hand to the sidecar (`tombolo sidecar capture`), applications unchanged.
//!
//! ```text
//!  application --connect 241.64.3.7:80--> REDIRECT --> CapturedTask --virtual or taken-over address--> outbound
//!                                                          `--anything else--> pass, marked, to where it was going
//!  outside --connect 10.0.0.5:8080--> TPROXY --> PlainTask --permissive--> application
//!                                                   `--strict--> reset
//! ```
//! [`targets`] says what an address stands for, [`names`] keeps that up, [`wanted`] which services the federator is asked for because somebody has
//! called them, [`listener`] how sockets are made and original destinations read, [`pass`] how what is not ours goes on.
//! Everything a connection needs is bounded: slots for connections, a fixed number of services.

mod inbound;
pub mod listener;
pub mod metrics;
pub(crate) mod names;
mod outbound;
pub mod pass;
pub mod settings;
pub mod targets;
pub mod wanted;

pub use inbound::{PlainContext, PlainTask};
pub use outbound::{CapturedContext, CapturedTask};
pub use settings::{CaptureAddress, CaptureConfig, InboundCapture, InboundMode};
