//! A bidirectional QUIC stream whose halves are reset, not cleanly ended, when they are dropped half-way.
//!
//! quinn's own `SendStream` finishes on drop, so a task that dies would make a truncated body look whole.

use std::future::Future;

use bytes::Bytes;
use quinn::{ReadError, RecvStream, SendStream, StoppedError, VarInt, WriteError};

use crate::codes;

/// Both halves of a stream.
#[derive(Debug)]
pub struct BiStream {
    send: SendHalf,
    recv: RecvHalf,
}

#[derive(Debug)]
pub struct SendHalf {
    stream: SendStream,
    over: bool,
}

#[derive(Debug)]
pub struct RecvHalf {
    stream: RecvStream,
    over: bool,
}

impl BiStream {
    pub fn new(send: SendStream, recv: RecvStream) -> Self {
        Self { send: SendHalf { stream: send, over: false }, recv: RecvHalf { stream: recv, over: false } }
    }
    /// As QUIC counts streams.
    pub fn id(&self) -> u64 {
        VarInt::from(self.send.stream.id()).into_inner()
    }
    pub fn halves(&mut self) -> (&mut SendHalf, &mut RecvHalf) {
        (&mut self.send, &mut self.recv)
    }
    /// Resets what is not over yet, both ways.
    pub fn abort(&mut self, code: u32) {
        self.send.reset(code);
        self.recv.stop(code);
    }
}

impl SendHalf {
    pub async fn write(&mut self, chunk: Bytes) -> Result<(), WriteError> {
        self.stream.write_chunk(chunk).await
    }
    /// Everything was written.
    pub fn finish(&mut self) {
        if !self.over {
            let _ = self.stream.finish();
            // From here on a drop must not discard what is still on its way.
            self.over = true;
        }
    }
    /// Ends when the peer stopped reading, or has acknowledged everything up to the finish (`None`).
    pub fn stopped(&self) -> impl Future<Output = Result<Option<VarInt>, StoppedError>> + Send + use<> {
        self.stream.stopped()
    }
    pub fn reset(&mut self, code: u32) {
        if !self.over {
            let _ = self.stream.reset(VarInt::from_u32(code));
            self.over = true;
        }
    }
}

impl Drop for SendHalf {
    fn drop(&mut self) {
        self.reset(codes::ABANDONED);
    }
}

impl RecvHalf {
    /// The next chunks in order; `None` at the end of the stream.
    pub async fn read(&mut self, chunks: &mut [Bytes]) -> Result<Option<usize>, ReadError> {
        let read = self.stream.read_chunks(chunks).await;
        self.over |= !matches!(read, Ok(Some(_)));
        read
    }
    /// At most `max` bytes of one chunk, in order.
    pub async fn read_some(&mut self, max: usize) -> Result<Option<Bytes>, ReadError> {
        let read = self.stream.read_chunk(max, true).await;
        self.over |= !matches!(read, Ok(Some(_)));
        Ok(read?.map(|chunk| chunk.bytes))
    }
    /// The code of the peer's reset; `None` when none can come any more.
    pub async fn received_reset(&mut self) -> Option<VarInt> {
        self.stream.received_reset().await.ok().flatten()
    }
    pub fn stop(&mut self, code: u32) {
        if !self.over {
            let _ = self.stream.stop(VarInt::from_u32(code));
            self.over = true;
        }
    }
}

impl Drop for RecvHalf {
    fn drop(&mut self) {
        self.stop(codes::ABANDONED);
    }
}
