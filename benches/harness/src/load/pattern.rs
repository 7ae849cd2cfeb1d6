//! Payload bytes that both sides can make and check without hashing: slices of one pseudo-random block.
//!
//! Invariant: which slice follows from the direction, the sequence number and the offset alone. The block's period is a prime, so
//! a stream shifted by a record, a page or a buffer never meets itself again. Must not know sockets. Cannot fail.

use std::sync::LazyLock;

/// Bytes after which the pattern repeats: the largest prime below 64 KiB.
const PERIOD: usize = 65_521;
/// The longest run that is contiguous in memory at any offset, and so the largest single write or comparison.
pub(crate) const RUN_BYTES_MAX: usize = 128 * 1024;

static BLOCK: LazyLock<Box<[u8]>> = LazyLock::new(|| {
    let mut random = Random::new(0x5246_4231);
    let period: Vec<u8> = (0..PERIOD).map(|_| random.next().to_le_bytes()[0]).collect();
    period.iter().copied().cycle().take(PERIOD + RUN_BYTES_MAX).collect()
});

/// The payload of one message.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pattern {
    start: usize,
}

impl Pattern {
    /// What a client sends under `seq`.
    pub(crate) fn request(seq: u32) -> Self {
        Self::at(u64::from(seq))
    }

    /// What a server answers under `seq`: different from the request, so that an echo is no answer.
    pub(crate) fn response(seq: u32) -> Self {
        Self::at(u64::from(seq) | 1 << 32)
    }

    fn at(key: u64) -> Self {
        Self { start: (Random::new(key).next() % PERIOD as u64) as usize }
    }

    /// At most `len` payload bytes from `offset`, and at least one of them if `len` is not 0.
    pub(crate) fn run(self, offset: usize, len: usize) -> &'static [u8] {
        let from = (self.start + offset) % PERIOD;
        &BLOCK[from..from + len.min(RUN_BYTES_MAX)]
    }

    /// Whether `bytes` are the payload from `offset`.
    pub(crate) fn matches(self, offset: usize, bytes: &[u8]) -> bool {
        let mut at = offset;
        bytes.chunks(RUN_BYTES_MAX).all(|part| {
            let same = self.run(at, part.len()) == part;
            at += part.len();
            same
        })
    }
}

/// splitmix64: repeatable choices from a seed.
#[derive(Debug, Clone)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// One of `0..bound`.
    pub(crate) fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound.max(1) as u64) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn payload(pattern: Pattern, len: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(len);
        while bytes.len() < len {
            bytes.extend_from_slice(pattern.run(bytes.len(), len - bytes.len()));
        }
        bytes
    }

    #[test]
    fn accepts_its_own_bytes_in_pieces_of_any_size() {
        let pattern = Pattern::request(7);
        let bytes = payload(pattern, 3 * RUN_BYTES_MAX + 5);
        assert!(pattern.matches(0, &bytes));
        for piece in [1, 1_460, 16_384, RUN_BYTES_MAX + 1] {
            let mut offset = 0;
            for part in bytes.chunks(piece) {
                assert!(pattern.matches(offset, part), "piece {piece} at {offset}");
                offset += part.len();
            }
        }
    }

    #[test]
    fn detects_one_flipped_bit_anywhere() {
        let pattern = Pattern::response(1);
        let bytes = payload(pattern, 100_000);
        for at in [0, 1, 16_383, 16_384, 65_521, 99_999] {
            let mut bad = bytes.clone();
            bad[at] ^= 1;
            assert!(!pattern.matches(0, &bad), "flipped at {at}");
        }
    }

    #[test]
    fn detects_a_stream_shifted_by_any_likely_amount() {
        let pattern = Pattern::request(99);
        let bytes = payload(pattern, 300_000);
        for shift in [1, 16, 1_460, 4_096, 16_384, 16_406, 65_536, 131_072] {
            assert!(!pattern.matches(0, &bytes[shift..shift + 64]), "shifted by {shift}");
        }
    }

    #[test]
    fn tells_messages_and_directions_apart() {
        let bytes = payload(Pattern::request(5), 64);
        assert!(!Pattern::response(5).matches(0, &bytes));
        assert!(!Pattern::request(6).matches(0, &bytes));
    }

    #[test]
    fn an_empty_payload_matches() {
        assert!(Pattern::request(0).matches(0, &[]));
    }
}
