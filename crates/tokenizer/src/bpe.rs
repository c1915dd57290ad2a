//! Byte pair merging over token ids, in `O(n log n)` for any word.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::hash::{BuildHasherDefault, Hasher};

/// Lookup tables only: nothing iterates them, so their order cannot reach the output.
#[expect(clippy::disallowed_types, reason = "looked up by key alone, never iterated")]
pub(crate) type Table<K, V> = std::collections::HashMap<K, V, BuildHasherDefault<MixHasher>>;

/// A multiplicative hash for integer keys: the keys come from the vocabulary file, and SipHash
/// would take most of the encoding time.
#[derive(Default)]
pub(crate) struct MixHasher(u64);

impl Hasher for MixHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u64(u64::from(byte));
        }
    }

    fn write_u32(&mut self, value: u32) {
        self.write_u64(u64::from(value));
    }

    fn write_u64(&mut self, value: u64) {
        // The multiplier of Fibonacci hashing, 2^64 / golden ratio.
        let mixed = (self.0.rotate_left(5) ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = mixed ^ (mixed >> 32);
    }
}

/// What two neighbours become, and how early.
#[derive(Clone, Copy)]
struct Merged {
    rank: u32,
    id: u32,
}

/// The merges of a vocabulary.
#[derive(Default)]
pub(crate) struct Merges {
    table: Table<u64, Merged>,
}

fn key(left: u32, right: u32) -> u64 {
    u64::from(left) << 32 | u64::from(right)
}

/// The end of the list of symbols.
const NONE: u32 = u32::MAX;

#[derive(Clone, Copy)]
struct Symbol {
    id: u32,
    previous: u32,
    next: u32,
    alive: bool,
}

/// A possible merge: ordered by rank, then from the left; the id tells whether it is out of date.
type Candidate = Reverse<(u32, u32, u32)>;

/// Memory that one call of an encoder reuses from word to word.
#[derive(Default)]
pub(crate) struct Scratch {
    /// Ids of the word's characters, to be filled before [`Merges::apply`].
    pub(crate) word: Vec<u32>,
    symbols: Vec<Symbol>,
    queue: BinaryHeap<Candidate>,
    #[cfg(test)]
    pub(crate) steps: u64,
}

impl Merges {
    /// A pair that occurs twice keeps its later rank, as in HF's table.
    pub(crate) fn insert(&mut self, left: u32, right: u32, rank: u32, id: u32) {
        self.table.insert(key(left, right), Merged { rank, id });
    }

    fn get(&self, left: u32, right: u32) -> Option<Merged> {
        self.table.get(&key(left, right)).copied()
    }

    /// Merges `scratch.word` and appends the result to `out`; the word is empty afterwards.
    pub(crate) fn apply(&self, scratch: &mut Scratch, out: &mut Vec<u32>) {
        match scratch.word.len() {
            0 => return,
            1 => out.push(scratch.word[0]),
            _ => {
                scratch.link();
                for at in 0..scratch.symbols.len() as u32 - 1 {
                    self.propose(scratch, at);
                }
                while let Some(Reverse((_, at, id))) = scratch.queue.pop() {
                    self.merge_at(scratch, at, id);
                }
                out.extend(scratch.symbols.iter().filter(|s| s.alive).map(|s| s.id));
            }
        }
        scratch.word.clear();
    }

    /// Queues the merge of the symbol with its right neighbour, if there is one.
    fn propose(&self, scratch: &mut Scratch, at: u32) {
        #[cfg(test)]
        {
            scratch.steps += 1;
        }
        let left = scratch.symbols[at as usize];
        if left.next == NONE {
            return;
        }
        let right = scratch.symbols[left.next as usize];
        if let Some(merged) = self.get(left.id, right.id) {
            scratch.queue.push(Reverse((merged.rank, at, merged.id)));
        }
    }

    fn merge_at(&self, scratch: &mut Scratch, at: u32, id: u32) {
        let left = scratch.symbols[at as usize];
        if !left.alive || left.next == NONE {
            return;
        }
        let right = scratch.symbols[left.next as usize];
        // One of the two has changed since the candidate was queued.
        if self.get(left.id, right.id).is_none_or(|now| now.id != id) {
            return;
        }
        scratch.symbols[left.next as usize].alive = false;
        let symbol = &mut scratch.symbols[at as usize];
        symbol.id = id;
        symbol.next = right.next;
        if right.next != NONE {
            scratch.symbols[right.next as usize].previous = at;
        }
        if left.previous != NONE {
            self.propose(scratch, left.previous);
        }
        self.propose(scratch, at);
    }
}

impl Scratch {
    /// Makes the word a linked list of symbols.
    fn link(&mut self) {
        let len = self.word.len();
        self.symbols.clear();
        self.queue.clear();
        self.symbols.extend(self.word.iter().enumerate().map(|(at, &id)| Symbol {
            id,
            previous: if at == 0 { NONE } else { at as u32 - 1 },
            next: if at + 1 == len { NONE } else { at as u32 + 1 },
            alive: true,
        }));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn merge(merges: &[(u32, u32, u32)], word: &[u32]) -> Vec<u32> {
        let mut table = Merges::default();
        for (rank, &(left, right, id)) in merges.iter().enumerate() {
            table.insert(left, right, rank as u32, id);
        }
        let mut scratch = Scratch { word: word.to_vec(), ..Scratch::default() };
        let mut out = Vec::new();
        table.apply(&mut scratch, &mut out);
        assert!(scratch.word.is_empty());
        out
    }

    #[test]
    fn the_lowest_rank_goes_first_and_equal_ranks_from_the_left() {
        assert_eq!(merge(&[(1, 1, 2)], &[1, 1, 1]), [2, 1]);
        assert_eq!(merge(&[(2, 3, 9), (1, 2, 8)], &[1, 2, 3]), [1, 9]);
        assert_eq!(merge(&[(1, 2, 8), (2, 3, 9)], &[1, 2, 3]), [8, 3]);
        assert_eq!(merge(&[(1, 1, 2), (2, 2, 3), (3, 1, 4)], &[1; 5]), [4]);
        assert_eq!(merge(&[], &[]), [0; 0]);
    }

    #[test]
    fn a_long_word_takes_steps_in_proportion_to_its_length() {
        let mut table = Merges::default();
        for rank in 0..6 {
            table.insert(rank + 1, rank + 1, rank, rank + 2);
        }
        let steps = |len: usize| {
            let mut scratch = Scratch { word: vec![1; len], ..Scratch::default() };
            table.apply(&mut scratch, &mut Vec::new());
            scratch.steps
        };
        assert!(steps(20_000) <= 2 * steps(10_000) + 10);
    }
}
