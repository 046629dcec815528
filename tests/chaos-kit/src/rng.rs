//! Random numbers from a seed: what a run tries is decided by one number.

use std::ops::Range;

/// SplitMix64: small, and good enough to choose faults by.
#[derive(Debug, Clone)]
pub struct Rng(u64);

impl Rng {
    /// A stream of its own for each `part` of a run.
    pub fn new(seed: u64, part: u64) -> Self {
        let mut rng = Self(seed ^ part.wrapping_mul(0xd6e8_feb8_6659_fd93));
        rng.draw();
        rng
    }

    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    pub fn within(&mut self, range: Range<u64>) -> u64 {
        range.start + self.draw() % (range.end - range.start)
    }

    /// True this many times of a hundred.
    pub fn percent(&mut self, percent: u64) -> bool {
        self.within(0..100) < percent
    }

    pub fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[usize::try_from(self.within(0..from.len() as u64)).unwrap()]
    }

    pub fn uuid(&mut self) -> String {
        let bytes = [self.draw().to_be_bytes(), self.draw().to_be_bytes()].concat();
        uuid::Builder::from_random_bytes(bytes.try_into().unwrap()).into_uuid().to_string()
    }
}
