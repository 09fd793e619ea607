//! What the federator and the shared sidecar have in common in Kubernetes (pure): tables that follow a watch ([`table`]), how
//! long one that failed waits ([`pauses`]), and the words by which one knows what the other has written ([`words`]).

pub mod pauses;
pub mod table;
pub mod words;
