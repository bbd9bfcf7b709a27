//! Frames of HTTP/2 come in, whole gRPC messages go out. A message that lies in one frame is a slice of it; only one that
//! is spread over several is copied together. Never here: a length believed beyond the limit.

use bytes::{Buf, Bytes, BytesMut};
use tonic::Status;

use crate::server::MAX_INTERNAL_MESSAGE;

/// Bytes before each message: a flag and a length.
pub const HEADER: usize = 5;

/// A message being written: the room for its header comes first, so that it leaves as it is.
#[derive(Debug)]
pub struct Message(BytesMut);

impl Message {
    /// Room for about `capacity` bytes.
    pub fn with_capacity(capacity: usize) -> Self {
        let mut bytes = BytesMut::with_capacity(HEADER + capacity);
        bytes.resize(HEADER, 0);
        Self(bytes)
    }

    /// Where it is written to, at the end.
    pub fn body(&mut self) -> &mut BytesMut {
        &mut self.0
    }

    /// As it goes out. One that is too long is an error here, before anybody else must find out.
    pub fn finish(mut self) -> Result<Bytes, TooLong> {
        let length = self.0.len().saturating_sub(HEADER);
        match u32::try_from(length) {
            Ok(header) if length <= MAX_INTERNAL_MESSAGE && self.0.len() >= HEADER => {
                self.0[1..HEADER].copy_from_slice(&header.to_be_bytes());
                Ok(self.0.freeze())
            }
            _ => Err(TooLong(length)),
        }
    }
}

#[derive(Debug, thiserror::Error)]
#[error("a message of {0} bytes is more than {MAX_INTERNAL_MESSAGE}")]
pub struct TooLong(usize);

/// What has arrived of messages that are not whole yet.
#[derive(Debug, Default)]
pub(super) struct Assembly {
    /// The rest of the last frame.
    frame: Bytes,
    header: [u8; HEADER],
    /// Of it, what is known.
    known: usize,
    /// The beginning of a message that goes on in the next frame.
    partial: Option<BytesMut>,
}

impl Assembly {
    /// Takes the next frame. What the last one held must have been taken out by [`Assembly::next`].
    pub(super) fn push(&mut self, frame: Bytes) {
        debug_assert!(self.frame.is_empty(), "a frame is used up before the next");
        self.frame = frame;
    }

    /// Whether nothing of a message is here.
    pub(super) fn is_empty(&self) -> bool {
        self.frame.is_empty() && self.known == 0
    }

    /// The next whole message, if it is here.
    pub(super) fn next(&mut self) -> Result<Option<Bytes>, Status> {
        if self.known < HEADER {
            let more = (HEADER - self.known).min(self.frame.len());
            self.header[self.known..self.known + more].copy_from_slice(&self.frame[..more]);
            self.frame.advance(more);
            self.known += more;
            if self.known < HEADER {
                return Ok(None);
            }
        }
        let [flag, length @ ..] = self.header;
        let length = u32::from_be_bytes(length) as usize;
        if flag != 0 {
            return Err(Status::unimplemented("compressed messages are not taken here"));
        }
        if length > MAX_INTERNAL_MESSAGE {
            return Err(Status::out_of_range(format!(
                "a message of {length} bytes is more than {MAX_INTERNAL_MESSAGE}"
            )));
        }
        if self.partial.is_none() && self.frame.len() >= length {
            self.known = 0;
            return Ok(Some(self.frame.split_to(length)));
        }
        let partial = self.partial.get_or_insert_with(|| BytesMut::with_capacity(length));
        let more = (length - partial.len()).min(self.frame.len());
        partial.extend_from_slice(&self.frame[..more]);
        self.frame.advance(more);
        if partial.len() < length {
            return Ok(None);
        }
        self.known = 0;
        Ok(self.partial.take().map(BytesMut::freeze))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(body: &[u8]) -> Bytes {
        let mut message = Message::with_capacity(0);
        message.body().extend_from_slice(body);
        message.finish().unwrap()
    }

    #[test]
    fn messages_come_out_whole_however_they_were_cut() {
        let bodies: Vec<Vec<u8>> =
            [0usize, 1, 4, 5, 300, 7].iter().map(|&n| (0..n).map(|i| i as u8).collect()).collect();
        let all: Vec<u8> = bodies.iter().flat_map(|body| message(body).to_vec()).collect();
        for size in 1..all.len() + 1 {
            let (mut assembly, mut out) = (Assembly::default(), Vec::new());
            for frame in all.chunks(size) {
                assembly.push(Bytes::copy_from_slice(frame));
                while let Some(message) = assembly.next().unwrap() {
                    out.push(message.to_vec());
                }
            }
            assert_eq!(out, bodies, "frames of {size}");
            assert!(assembly.is_empty());
        }
    }

    #[test]
    fn what_is_whole_in_its_frame_is_not_copied() {
        let frame = message(&[7; 64]);
        let mut assembly = Assembly::default();
        assembly.push(frame.clone());
        assert_eq!(assembly.next().unwrap().unwrap().as_ptr(), frame[HEADER..].as_ptr());
    }

    #[test]
    fn lengths_and_compression_are_refused() {
        for header in [[1, 0, 0, 0, 1], [0, 255, 255, 255, 255]] {
            let mut assembly = Assembly::default();
            assembly.push(Bytes::copy_from_slice(&header));
            assembly.next().unwrap_err();
        }
        let mut long = Message::with_capacity(0);
        long.body().resize(HEADER + MAX_INTERNAL_MESSAGE + 1, 0);
        long.finish().unwrap_err();
    }
}
