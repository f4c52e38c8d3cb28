//! Changed copies of seeds, for machines without a fuzzer: what a coverage-guided one does, without the guidance.

/// Pieces that readers give a meaning to.
const PIECES: [&[u8]; 18] = [
    b",",
    b"\"",
    b"\"\"",
    b"\r\n",
    b"{",
    b"}",
    b"[",
    b"]",
    b":",
    b"=",
    b"../",
    b"\\",
    b"\0",
    b"-1",
    b"18446744073709551616",
    b"1e999",
    b"\xff\xfe",
    b"lora_unet_transformer_",
];
/// The most changes to one copy.
const MOST_CHANGES: usize = 8;
/// Copies are cut here.
const MOST_BYTES: usize = 1 << 14;

/// An endless supply of changed seeds, the same for the same number.
pub struct Mutations<'a> {
    seeds: &'a [Vec<u8>],
    state: u64,
}

impl<'a> Mutations<'a> {
    /// Changes of these seeds, of which there is at least one.
    pub fn new(seeds: &'a [Vec<u8>], number: u64) -> Self {
        Self { seeds, state: number }
    }

    /// SplitMix64 (Steele, Lea and Flood 2014), below `end`.
    fn below(&mut self, end: usize) -> usize {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.state ^ (self.state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ (mixed >> 31)) % end.max(1) as u64) as usize
    }

    fn change(&mut self, bytes: &mut Vec<u8>) {
        let (start, length) = (self.below(bytes.len() + 1), self.below(24));
        let end = bytes.len().min(start + length);
        match self.below(6) {
            0 if start < bytes.len() => bytes[start] ^= 1 << self.below(8),
            1 if start < bytes.len() => bytes[start] = self.below(256) as u8,
            2 => drop(bytes.drain(start..end)),
            3 => {
                let copy = bytes[start..end].to_vec();
                let at = self.below(bytes.len() + 1);
                bytes.splice(at..at, copy);
            }
            4 => {
                let other = &self.seeds[self.below(self.seeds.len())];
                let from = self.below(other.len());
                bytes.splice(start..end, other[from..other.len().min(from + length)].iter().copied());
            }
            _ => {
                let piece = PIECES[self.below(PIECES.len())];
                bytes.splice(start..start, piece.iter().copied());
            }
        }
    }
}

impl Iterator for Mutations<'_> {
    type Item = Vec<u8>;

    fn next(&mut self) -> Option<Vec<u8>> {
        let mut bytes = self.seeds[self.below(self.seeds.len())].clone();
        for _ in 0..=self.below(MOST_CHANGES) {
            self.change(&mut bytes);
        }
        bytes.truncate(MOST_BYTES);
        Some(bytes)
    }
}
