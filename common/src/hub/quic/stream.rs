//! The halves of a stream.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use quinn_proto::{FinishError, ReadError, StreamId, WriteError};
use tokio::io::ReadBuf;

use super::connection::{Handle, State};
use crate::hub::mux::StreamEnd;
use crate::hub::transport::{Class, TransportError, code};

/// The writing half. Whoever drops it has finished or reset it before.
pub(in crate::hub) struct SendStream {
    connection: Arc<Handle>,
    id: StreamId,
}

impl SendStream {
    pub(super) fn new(connection: Arc<Handle>, id: StreamId) -> Self {
        Self { connection, id }
    }

    pub(super) fn id(&self) -> StreamId {
        self.id
    }

    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        write: impl FnOnce(&mut quinn_proto::SendStream<'_>) -> Result<usize, WriteError>,
    ) -> Poll<Result<usize, TransportError>> {
        let mut state = self.connection.lock();
        if let Some(error) = &state.ended {
            return Poll::Ready(Err(error.clone().into()));
        }
        let written = match write(&mut state.proto.send_stream(self.id)) {
            Ok(written) => written,
            Err(WriteError::Blocked) => {
                state.writers.add(self.id, cx.waker());
                return Poll::Pending;
            }
            Err(WriteError::Stopped(n)) => {
                return Poll::Ready(Err(StreamEnd::Stopped(code(n)).into()));
            }
            Err(WriteError::ClosedStream) => return Poll::Ready(Err(StreamEnd::Gone.into())),
        };
        drop(state);
        self.connection.wake();
        Poll::Ready(Ok(written))
    }

    /// Takes what there is room for.
    pub(in crate::hub) fn poll_write(
        &mut self,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<Result<usize, TransportError>> {
        self.poll(cx, |stream| stream.write(bytes))
    }

    /// Waits for room as the reader makes it. Not cancel-safe: a part may have been written.
    pub(in crate::hub) async fn write_all(&mut self, bytes: Bytes) -> Result<(), TransportError> {
        // What is written is taken out of it.
        let mut rest = [bytes];
        while !rest[0].is_empty() {
            poll_fn(|cx| self.poll(cx, |s| s.write_chunks(&mut rest).map(|w| w.bytes))).await?;
        }
        Ok(())
    }

    /// Does what fails only for a stream that has ended already.
    fn act<E>(&self, act: impl FnOnce(&mut quinn_proto::SendStream<'_>) -> Result<(), E>) {
        let mut state = self.connection.lock();
        if state.ended.is_some() || act(&mut state.proto.send_stream(self.id)).is_err() {
            return;
        }
        drop(state);
        self.connection.wake();
    }

    pub(in crate::hub) fn finish(&mut self) {
        self.act(|stream| match stream.finish() {
            // One that the reader stopped must end as well, or its place is never given back.
            Err(FinishError::Stopped(code)) => stream.reset(code),
            Err(FinishError::ClosedStream) | Ok(()) => Ok(()),
        });
    }

    pub(in crate::hub) fn reset(&mut self, code: u32) {
        self.act(|stream| stream.reset(code.into()));
    }

    /// quinn sends higher numbers first and treats equal ones alike.
    pub(in crate::hub) fn prioritise(&self, class: Class) {
        let priority = match class {
            Class::Control => 3,
            Class::Status => 2,
            Class::Interactive => 1,
            Class::Bulk => 0,
        };
        self.act(|stream| stream.set_priority(priority));
    }
}

impl Drop for SendStream {
    fn drop(&mut self) {
        self.connection.lock().writers.remove(self.id);
    }
}

/// The reading half. Dropped before its end, it tells the writer to stop.
pub(in crate::hub) struct RecvStream {
    connection: Arc<Handle>,
    id: StreamId,
    end: Option<End>,
}

#[derive(Clone, Copy)]
enum End {
    /// All was read, or no more is wanted.
    Over,
    Reset(u32),
}

impl RecvStream {
    pub(super) fn new(connection: Arc<Handle>, id: StreamId) -> Self {
        Self {
            connection,
            id,
            end: None,
        }
    }

    pub(super) fn id(&self) -> StreamId {
        self.id
    }

    /// The next bytes, at most `max`; nothing at the end.
    pub(in crate::hub) fn poll_read(
        &mut self,
        cx: &mut Context<'_>,
        max: usize,
    ) -> Poll<Result<Option<Bytes>, TransportError>> {
        let mut read = (max == 0).then(Bytes::new);
        ready!(self.poll_each(cx, max, |bytes| {
            read = Some(bytes);
            false
        }))?;
        Poll::Ready(Ok(read))
    }

    /// Fills what there is room for; nothing at the end.
    pub(in crate::hub) fn poll_read_buf(
        &mut self,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<Result<(), TransportError>> {
        self.poll_each(cx, buffer.remaining(), |bytes| {
            buffer.put_slice(&bytes);
            true
        })
    }

    /// Gives what came, at most `room`, while more is taken. Ready without any at the end.
    fn poll_each(
        &mut self,
        cx: &mut Context<'_>,
        mut room: usize,
        mut take: impl FnMut(Bytes) -> bool,
    ) -> Poll<Result<(), TransportError>> {
        match self.end {
            _ if room == 0 => return Poll::Ready(Ok(())),
            Some(End::Over) => return Poll::Ready(Ok(())),
            Some(End::Reset(code)) => return Poll::Ready(Err(StreamEnd::Reset(code).into())),
            None => {}
        }
        let mut state = self.connection.lock();
        let State {
            proto,
            ended,
            readers,
            ..
        } = &mut *state;
        let mut stream = proto.recv_stream(self.id);
        let Ok(mut chunks) = stream.read(true) else {
            return Poll::Ready(Err(StreamEnd::Gone.into()));
        };
        let mut some = false;
        let mut more = true;
        while more && room > 0 {
            match chunks.next(room) {
                Ok(Some(chunk)) => {
                    some = true;
                    room -= chunk.bytes.len();
                    more = take(chunk.bytes);
                }
                Ok(None) => {
                    self.end = Some(End::Over);
                    break;
                }
                Err(ReadError::Reset(n)) => {
                    self.end = Some(End::Reset(code(n)));
                    break;
                }
                Err(ReadError::Blocked) => break,
            }
        }
        let grants = chunks.finalize().should_transmit();
        let polled = match (self.end, &*ended) {
            _ if some => Poll::Ready(Ok(())),
            (Some(End::Over), _) => Poll::Ready(Ok(())),
            (Some(End::Reset(code)), _) => Poll::Ready(Err(StreamEnd::Reset(code).into())),
            (None, Some(error)) => Poll::Ready(Err(error.clone().into())),
            (None, None) => {
                readers.add(self.id, cx.waker());
                Poll::Pending
            }
        };
        drop(state);
        if grants {
            self.connection.wake();
        }
        polled
    }

    /// Nothing more is wanted; the writer sees the code.
    pub(in crate::hub) fn stop(&mut self, code: u32) {
        if self.end.is_some() {
            return;
        }
        self.end = Some(End::Over);
        let mut state = self.connection.lock();
        state.readers.remove(self.id);
        // Fails only for a stream that has ended already.
        if state.ended.is_none() && state.proto.recv_stream(self.id).stop(code.into()).is_ok() {
            drop(state);
            self.connection.wake();
        }
    }
}

impl Drop for RecvStream {
    fn drop(&mut self) {
        self.stop(0);
    }
}
