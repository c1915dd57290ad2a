//! The likeliest tokens of a row, and the draw among them.

use std::cmp::Ordering;

use super::Sampling;

/// Tokens that each rank offers for a row.
pub(super) const CANDIDATES: usize = 256;

/// Logits are looked at in blocks of this many: their maxima tell which blocks to read again.
const BLOCK: usize = 64;

/// A token with its logit.
pub(super) type Candidate = (f32, u32);

/// Likelier tokens first, and among equals those of smaller ids: the order does not depend on how
/// the vocabulary is split.
pub(super) fn sort(candidates: &mut [Candidate]) {
    #[cfg(test)]
    LONGEST_SORT.set(LONGEST_SORT.get().max(candidates.len()));
    candidates.sort_unstable_by(order);
}

fn order(a: &Candidate, b: &Candidate) -> Ordering {
    b.0.total_cmp(&a.0).then(a.1.cmp(&b.1))
}

#[cfg(test)]
thread_local! {
    /// The most tokens that this thread has sorted at once.
    pub(super) static LONGEST_SORT: std::cell::Cell<usize> = const { std::cell::Cell::new(0) };
}

/// The `count` best of a shard's logits, best first; fewer where there are no more. `first` is the
/// id of the shard's first token.
///
/// No token outside of the blocks whose maxima are among the `count` largest can be one of them.
pub(super) fn best_of(logits: &[f32], first: u32, count: usize, into: &mut Vec<Candidate>) {
    into.clear();
    let largest = |block: &[f32]| block.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let maxima: Vec<f32> = logits.chunks(BLOCK).map(largest).collect();
    let mut floor = f32::NEG_INFINITY;
    if maxima.len() > count {
        let mut sorted = maxima.clone();
        floor = *sorted.select_nth_unstable_by(count - 1, |a, b| b.total_cmp(a)).1;
    }
    for (index, (block, _)) in
        logits.chunks(BLOCK).zip(&maxima).enumerate().filter(|(_, (_, max))| **max >= floor)
    {
        let id = first + (index * BLOCK) as u32;
        let above = block.iter().zip(id..).filter(|(logit, _)| **logit >= floor);
        into.extend(above.map(|(&logit, id)| (logit, id)));
    }
    if into.len() > count {
        let _ = into.select_nth_unstable_by(count - 1, order);
        into.truncate(count);
    }
    sort(into);
}

/// What is known of a row's distribution.
#[derive(Debug, Clone, Copy)]
pub(super) struct Known<'a> {
    /// The likeliest tokens, best first, without a gap.
    pub(super) best: &'a [Candidate],
    /// Whether these are all tokens.
    pub(super) complete: bool,
    /// Sum of `e^((logit - largest logit) / temperature)` over all tokens.
    pub(super) total: f64,
}

/// The token at `uniform` of the mass of the kept tokens; `None` where it cannot be told from what
/// is known.
///
/// Tokens have their shares in the order of their probabilities, so that a draw from the whole
/// vocabulary needs the unlikely tokens only where it falls on one of them.
pub(super) fn draw(known: &Known<'_>, sampling: &Sampling, uniform: f64) -> Option<u32> {
    let Known { best, complete, total } = *known;
    let max = f64::from(best.first()?.0);
    let weight = |logit: f32| ((f64::from(logit) - max) / sampling.temperature).exp();
    let top_k = if sampling.top_k == 0 { usize::MAX } else { sampling.top_k };
    let (pool, mass, closed) = if top_k <= best.len() {
        let pool = &best[..top_k];
        (pool, pool.iter().map(|&(logit, _)| weight(logit)).sum(), true)
    } else if complete || top_k == usize::MAX {
        (best, total, complete)
    } else {
        return None;
    };
    let all = sampling.top_p >= 1.0 && sampling.min_p == 0.0;
    let kept_mass = if all { mass } else { kept_mass(pool, mass, closed, sampling, &weight)? };
    let target = uniform * kept_mass;
    let (mut before, mut last) = (0.0, None);
    for &(logit, id) in pool {
        let share = weight(logit);
        if share > 0.0 && before < kept_mass {
            last = Some(id);
        }
        before += share;
        if target < before {
            return last;
        }
    }
    // Rounding can leave the target behind the last token.
    last.filter(|_| closed)
}

/// As [`draw`] from all of a row's tokens, without their order: the mass of the likelier half tells on
/// which side a draw is, and only the last few around it are sorted. `None` where logits are not
/// finite.
pub(super) fn draw_by_mass(
    tokens: &mut Vec<Candidate>,
    total: f64,
    sampling: &Sampling,
    uniform: f64,
) -> Option<u32> {
    let max = f64::from(tokens.iter().copied().min_by(order)?.0);
    let weight = |logit: f32| ((f64::from(logit) - max) / sampling.temperature).exp();
    let mass_of = |tokens: &[Candidate]| tokens.iter().map(|&(logit, _)| weight(logit)).sum();
    let mut mass = total;
    if (1..tokens.len()).contains(&sampling.top_k) {
        let _ = tokens.select_nth_unstable_by(sampling.top_k - 1, order);
        tokens.truncate(sampling.top_k);
        mass = mass_of(tokens);
    }
    let limit = sampling.top_p * mass;
    if sampling.min_p > 0.0 {
        tokens.retain(|&(logit, _)| weight(logit) >= sampling.min_p);
        mass = mass_of(tokens);
    }
    if sampling.top_p < 1.0
        && let Some(last) = token_at(tokens, limit, &weight)
    {
        // The token that passes the limit is the last one that is kept.
        tokens.truncate(last + 1);
        mass = mass_of(tokens);
    }
    if let Some(at) = token_at(tokens, uniform * mass, &weight) {
        return Some(tokens[at].1);
    }
    // Rounding can leave the target behind the last token.
    let likely = tokens.iter().copied().filter(|&(logit, _)| weight(logit) > 0.0);
    likely.max_by(order).map(|(_, id)| id)
}

/// The place of the token, in their order, with which their mass comes above `target`: those before it
/// stand before it afterwards.
fn token_at(tokens: &mut [Candidate], target: f64, weight: &impl Fn(f32) -> f64) -> Option<usize> {
    let (mut start, mut end, mut before) = (0, tokens.len(), 0.0);
    while end - start > BLOCK {
        let part = &mut tokens[start..end];
        let half = part.len() / 2;
        let _ = part.select_nth_unstable_by(half, order);
        let mass: f64 = part[..half].iter().map(|&(logit, _)| weight(logit)).sum();
        if target < before + mass {
            end = start + half;
        } else {
            before += mass;
            start += half;
        }
    }
    sort(&mut tokens[start..end]);
    tokens[start..end].iter().zip(start..).find_map(|(&(logit, _), at)| {
        before += weight(logit);
        (target < before).then_some(at)
    })
}

/// The mass of the tokens that `top_p` and `min_p` keep, if all of them are in the pool.
fn kept_mass(
    pool: &[Candidate],
    mass: f64,
    closed: bool,
    sampling: &Sampling,
    weight: &impl Fn(f32) -> f64,
) -> Option<f64> {
    let limit = if sampling.top_p >= 1.0 { f64::INFINITY } else { sampling.top_p * mass };
    let mut kept = 0.0;
    for &(logit, _) in pool {
        let share = weight(logit);
        // The likeliest token has weight 1 and is always kept.
        if kept > limit || share < sampling.min_p {
            return Some(kept);
        }
        kept += share;
    }
    closed.then_some(kept)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_best_are_those_of_a_full_sort(
            logits in prop::collection::vec((-40i32..40).prop_map(|x| x as f32 / 4.0), 1..1500),
            count in 1usize..40,
        ) {
            let mut want: Vec<Candidate> = logits.iter().copied().zip(100..).collect();
            sort(&mut want);
            want.truncate(count);
            let mut got = Vec::new();
            best_of(&logits, 100, count, &mut got);
            prop_assert_eq!(got, want);
        }
    }

    #[test]
    fn what_is_not_known_is_not_guessed() {
        let best = [(3.0, 7), (2.0, 1), (1.0, 4)];
        let weights: Vec<f64> = [0.0f64, -1.0, -2.0].iter().map(|x| x.exp()).collect();
        let sum: f64 = weights.iter().sum();
        let open = Known { best: &best, complete: false, total: 2.0 * sum };
        let of = |top_p, top_k, min_p| Sampling { top_k, min_p, ..Sampling::nucleus(1.0, top_p) };
        // The three hold half of the mass.
        assert_eq!(draw(&open, &of(1.0, 0, 0.0), 0.49), Some(4));
        assert_eq!(draw(&open, &of(1.0, 0, 0.0), 0.51), None);
        assert_eq!(draw(&open, &of(0.49, 0, 0.0), 0.999), None);
        assert_eq!(draw(&open, &of(0.40, 0, 0.0), 0.999), Some(1));
        assert_eq!(draw(&open, &of(1.0, 3, 0.0), 0.999), Some(4));
        assert_eq!(draw(&open, &of(1.0, 4, 0.0), 0.1), None);
        assert_eq!(draw(&open, &of(1.0, 0, 0.1), 0.999), None);
        assert_eq!(draw(&open, &of(1.0, 0, 0.2), 0.999), Some(1));
        let whole = Known { complete: true, total: sum, ..open };
        assert_eq!(draw(&whole, &of(1.0, 4, 0.0), 0.999), Some(4));
        assert_eq!(draw(&whole, &of(1.0, 0, 0.0), 1.0 - 1e-17), Some(4));
    }
}
