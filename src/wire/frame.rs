//! Frames: a length and that many bytes.

/// Bytes of the length prefix.
pub const PREFIX: usize = 4;

/// What the front of a buffer holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split<'a> {
    /// A whole frame; the rest begins after `PREFIX + frame.len()`.
    Frame(&'a [u8]),
    /// The beginning of a frame, which needs this many bytes in all with its prefix.
    Partial {
        /// 4 until the prefix is there.
        need: usize,
    },
    /// A length beyond the limit: the stream can't be trusted any more.
    TooLarge {
        /// As announced.
        len: usize,
    },
}

/// Looks at the front of `bytes`. No allocation depends on the announced length before it was checked.
pub fn split(bytes: &[u8], max: usize) -> Split<'_> {
    let Some((prefix, rest)) = bytes.split_first_chunk::<PREFIX>() else { return Split::Partial { need: PREFIX } };
    let len = u32::from_le_bytes(*prefix) as usize;
    match rest.get(..len) {
        _ if len > max => Split::TooLarge { len },
        Some(frame) => Split::Frame(frame),
        None => Split::Partial { need: PREFIX + len },
    }
}

/// Appends a frame.
pub fn append(out: &mut Vec<u8>, message: &[u8]) {
    out.extend_from_slice(&(message.len() as u32).to_le_bytes());
    out.extend_from_slice(message);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn byte_by_byte() {
        let mut stream = Vec::new();
        append(&mut stream, b"hello");
        append(&mut stream, b"");
        for end in 0..4 {
            assert_eq!(split(&stream[..end], 10), Split::Partial { need: 4 });
        }
        for end in 4..9 {
            assert_eq!(split(&stream[..end], 10), Split::Partial { need: 9 });
        }
        assert_eq!(split(&stream, 10), Split::Frame(b"hello"));
        assert_eq!(split(&stream[9..], 10), Split::Frame(b""));
        assert_eq!(split(&stream, 4), Split::TooLarge { len: 5 });
        assert_eq!(split(&[255; 4], 1 << 20), Split::TooLarge { len: u32::MAX as usize });
    }
}
