//! CRC32C per block, XXH3-128 per tensor, and names from content (BLAKE3, 128 bits).

use xxhash_rust::xxh3::Xxh3;

use crate::source::Source;

/// Side tensors and pads have blocks of this many bytes; sites of at most this many (one row at
/// least).
pub const BLOCK_BYTES: u64 = 128 * 1024;

/// Returns the rows in one block of a tensor whose rows have `row_bytes` bytes: the largest power
/// of two that fits in [`BLOCK_BYTES`], one at least.
pub fn block_rows(row_bytes: u64) -> u64 {
    let fitting = BLOCK_BYTES / row_bytes.max(1);
    fitting.checked_ilog2().map_or(1, |power| 1 << power)
}

/// Returns the CRC32C of `bytes`, continuing from `crc` (0 at the start).
pub fn crc32c(crc: u32, bytes: &[u8]) -> u32 {
    crc32c::crc32c_append(crc, bytes)
}

/// The checksums of one tensor as its bytes arrive in order.
#[derive(Clone)]
pub struct Running {
    block_bytes: u64,
    blocks: Vec<u32>,
    current: u32,
    len: u64,
    xxh3: Box<Xxh3>,
}

impl std::fmt::Debug for Running {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Running").field("len", &self.len).finish_non_exhaustive()
    }
}

impl Running {
    /// Returns the checksums of nothing yet, with blocks of `block_bytes`.
    pub fn new(block_bytes: u64) -> Self {
        Self {
            block_bytes: block_bytes.max(1),
            blocks: Vec::new(),
            current: 0,
            len: 0,
            xxh3: Box::new(Xxh3::new()),
        }
    }

    /// Returns the bytes seen.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Returns whether no byte was seen.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Returns the bytes of a whole block.
    pub fn block_bytes(&self) -> u64 {
        self.block_bytes
    }

    /// Takes the next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.xxh3.update(bytes);
        let mut rest = bytes;
        while !rest.is_empty() {
            let room = self.block_bytes - self.len % self.block_bytes;
            let take = usize::try_from(room).unwrap_or(usize::MAX).min(rest.len());
            let (head, tail) = rest.split_at(take);
            self.current = crc32c(self.current, head);
            self.len += head.len() as u64;
            if self.len.is_multiple_of(self.block_bytes) {
                self.blocks.push(self.current);
                self.current = 0;
            }
            rest = tail;
        }
    }

    /// Returns the CRC of block `index`, the unfinished last one included.
    pub fn block(&self, index: u64) -> Option<u32> {
        let index = usize::try_from(index).ok()?;
        if index == self.blocks.len() && !self.len.is_multiple_of(self.block_bytes) {
            return Some(self.current);
        }
        self.blocks.get(index).copied()
    }

    /// Returns the CRC of every block, the unfinished last one included.
    pub fn blocks(&self) -> impl Iterator<Item = u32> + '_ {
        let unfinished = !self.len.is_multiple_of(self.block_bytes);
        self.blocks.iter().copied().chain(unfinished.then_some(self.current))
    }

    /// Returns the XXH3-128 of all bytes, low half first.
    pub fn xxh3(&self) -> [u64; 2] {
        halves(self.xxh3.digest128())
    }
}

/// Returns the low and the high half of a 128-bit digest.
#[expect(clippy::cast_possible_truncation, reason = "the halves are what is wanted")]
pub fn halves(digest: u128) -> [u64; 2] {
    [digest as u64, (digest >> 64) as u64]
}

/// Returns 128 bits of BLAKE3 over the parts, as 32 lower-case hex digits.
pub fn name<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> String {
    let mut hasher = blake3::Hasher::new();
    for part in parts {
        hasher.update(part);
    }
    let mut hex = hasher.finalize().to_hex();
    hex.truncate(32);
    hex.to_string()
}

/// Returns XXH3-128 over the bytes of all sources, one after another, as 32 hex digits.
pub fn hash<'a>(sources: impl IntoIterator<Item = &'a dyn Source>) -> String {
    let mut hasher = Xxh3::new();
    let mut scratch = Vec::new();
    for source in sources {
        let mut done = 0;
        while done < source.len() {
            scratch.resize((256 * 1024).min(source.len() - done), 0);
            source.copy_to(done, &mut scratch);
            hasher.update(&scratch);
            done += scratch.len();
        }
    }
    format!("{:032x}", hasher.digest128())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_powers_of_two_of_whole_rows() {
        assert_eq!(block_rows(1152), 64);
        assert_eq!(block_rows(2), 65_536);
        assert_eq!(block_rows(131_072), 1);
        assert_eq!(block_rows(131_073), 1);
        assert_eq!(block_rows(65_537), 1);
    }

    #[test]
    fn bytes_in_pieces_give_the_checksums_of_bytes_at_once() {
        let bytes: Vec<u8> = (0..1000u32).flat_map(u32::to_le_bytes).collect();
        let mut whole = Running::new(300);
        whole.update(&bytes);
        let mut pieces = Running::new(300);
        for piece in bytes.chunks(77) {
            pieces.update(piece);
        }
        assert_eq!(whole.blocks().collect::<Vec<_>>(), pieces.blocks().collect::<Vec<_>>());
        assert_eq!(whole.xxh3(), pieces.xxh3());
        assert_eq!(whole.blocks().count(), 14);
        assert_eq!(whole.block(13), Some(crc32c(0, &bytes[3900..])));
        assert_eq!(whole.block(14), None);
        assert_eq!(whole.xxh3(), halves(xxhash_rust::xxh3::xxh3_128(&bytes)));
    }

    #[test]
    fn crc32c_is_the_castagnoli_polynomial() {
        assert_eq!(crc32c(0, b"123456789"), 0xE306_9283);
    }
}
