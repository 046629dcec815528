//! Where all chance of a run comes from: one seed, one sequence.

use std::ops::Range;

use uuid::Uuid;

/// Xoshiro256++ (Blackman and Vigna, 2019), seeded through SplitMix64 as its authors advise.
#[derive(Debug, Clone)]
pub struct Random([u64; 4]);

impl Random {
    /// The sequence of a seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        let mut state = seed;
        Self(std::array::from_fn(|_| {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            mix(state)
        }))
    }

    /// The next 64 bits.
    pub fn bits(&mut self) -> u64 {
        let state = &mut self.0;
        let result = state[0].wrapping_add(state[3]).rotate_left(23).wrapping_add(state[0]);
        let shifted = state[1] << 17;
        state[2] ^= state[0];
        state[3] ^= state[1];
        state[1] ^= state[2];
        state[0] ^= state[3];
        state[2] ^= shifted;
        state[3] = state[3].rotate_left(45);
        result
    }

    /// A number of the range, each as likely as the other; the start of an empty one.
    pub fn below(&mut self, range: Range<u64>) -> u64 {
        // A bias of 2^-40 does not matter here.
        range.start + self.bits() % (range.end.saturating_sub(range.start)).max(1)
    }

    /// True so often in a thousand times.
    pub fn per_mille(&mut self, often: u64) -> bool {
        self.below(0..1000) < often
    }

    /// A number of the range whose logarithm is evenly spread: mostly small ones, now and then a large one.
    pub fn skewed(&mut self, range: Range<u64>) -> u64 {
        let widest = range.end.saturating_sub(range.start).max(1);
        let bits = u64::from(64 - widest.leading_zeros());
        let top = 1u64 << self.below(0..bits);
        (range.start + self.below(0..top * 2)).min(range.end.saturating_sub(1)).max(range.start)
    }

    /// One of a slice.
    ///
    /// # Panics
    /// When it is empty.
    pub fn of<'a, T>(&mut self, choices: &'a [T]) -> &'a T {
        &choices[self.index(choices.len())]
    }

    /// A position among so many.
    pub fn index(&mut self, among: usize) -> usize {
        usize::try_from(self.below(0..among as u64)).unwrap_or(0)
    }

    /// An id.
    pub fn uuid(&mut self) -> Uuid {
        let bits = (u128::from(self.bits()) << 64) | u128::from(self.bits());
        uuid::Builder::from_random_bytes(bits.to_be_bytes()).into_uuid()
    }

    /// A sequence of its own, for a part whose draws must not shift those of others.
    pub fn fork(&mut self) -> Self {
        Self::new(self.bits())
    }
}

/// SplitMix64's finalizer: spreads every bit over all others.
#[must_use]
pub fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_gives_its_sequence_and_no_other_ones() {
        let draw = |seed| {
            std::array::from_fn::<u64, 4, _>({
                let mut random = Random::new(seed);
                move |_| random.bits()
            })
        };
        assert_eq!(draw(7), draw(7));
        assert_ne!(draw(7), draw(8));
    }

    #[test]
    fn draws_keep_to_their_range_and_reach_all_of_it() {
        let mut random = Random::new(1);
        let seen: std::collections::BTreeSet<u64> = (0..1000).map(|_| random.below(3..9)).collect();
        assert_eq!(seen.into_iter().collect::<Vec<_>>(), [3, 4, 5, 6, 7, 8]);
        assert!((0..1000).all(|_| (10..1_000_000).contains(&random.skewed(10..1_000_000))));
        assert_eq!(random.below(5..5), 5);
    }
}
