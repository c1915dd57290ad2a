//! The attention heads of one rank, as runs that one batched product can serve.

use std::ops::Range;

use crate::plan::RankPlan;

/// Neighbouring K/V heads of a rank that serve equally many of its query heads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeadRun {
    /// K/V heads, counted from this rank's first.
    pub kv: Range<i64>,
    /// Query heads, counted from this rank's first.
    pub q: Range<i64>,
}

impl HeadRun {
    /// Number of K/V heads.
    pub fn n_kv(&self) -> i64 {
        self.kv.end - self.kv.start
    }

    /// Number of query heads.
    pub fn n_q(&self) -> i64 {
        self.q.end - self.q.start
    }

    /// Query heads for each K/V head.
    pub fn group(&self) -> i64 {
        self.n_q() / self.n_kv()
    }
}

/// The query and K/V heads of one rank.
///
/// A model that is not split, or is split evenly, has one run; otherwise a rank's first and last K/V
/// head may serve fewer of its query heads than the others do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Heads {
    /// Width of a head.
    pub head_dim: i64,
    /// The runs, in the order of the heads.
    pub runs: Vec<HeadRun>,
}

impl Heads {
    /// The heads of a rank of the plan.
    pub fn new(plan: &RankPlan, head_dim: i64) -> Self {
        let sizes = plan.groups.iter().map(|(_, q)| q.len() as i64);
        Self { head_dim, runs: runs(sizes) }
    }

    /// Number of query heads.
    pub fn n_local_heads(&self) -> i64 {
        self.runs.iter().map(HeadRun::n_q).sum()
    }

    /// Number of K/V heads.
    pub fn n_local_kv_heads(&self) -> i64 {
        self.runs.iter().map(HeadRun::n_kv).sum()
    }
}

/// Joins neighbours of equal size.
fn runs(sizes: impl Iterator<Item = i64>) -> Vec<HeadRun> {
    let mut runs: Vec<HeadRun> = Vec::new();
    let (mut next_kv, mut next_q) = (0, 0);
    for size in sizes {
        let (kv, q) = (next_kv..next_kv + 1, next_q..next_q + size);
        (next_kv, next_q) = (kv.end, q.end);
        match runs.last_mut() {
            Some(last) if last.group() == size => {
                last.kv.end = kv.end;
                last.q.end = q.end;
            }
            _ => runs.push(HeadRun { kv, q }),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_groups_make_one_run() {
        assert_eq!(runs([3, 3, 3].into_iter()), [HeadRun { kv: 0..3, q: 0..9 }]);
        let uneven = runs([1, 3, 3, 2].into_iter());
        let kv: Vec<_> = uneven.iter().map(|run| (run.kv.clone(), run.q.clone())).collect();
        assert_eq!(kv, [(0..1, 0..1), (1..3, 1..7), (3..4, 7..9)]);
        assert_eq!(uneven[1].group(), 3);
    }
}
