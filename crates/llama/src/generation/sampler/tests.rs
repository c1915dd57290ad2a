use std::path::Path;

use dromedary_parallel::{SingleProcess, threads};
use proptest::prelude::{
    Just, ProptestConfig, Strategy, any, prop, prop_assert_eq, prop_assume, prop_oneof, proptest,
};
use rand::Rng;
use tch::Device;

use super::super::candidates::LONGEST_SORT;
use super::*;

/// Decisions that are nearer than this may go either way by rounding.
const NEAR: f64 = 1e-6;

fn tokenizer() -> Tokenizer {
    Tokenizer::open(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/stories260k")).unwrap()
}

fn key(position: u64) -> RowKey<'static> {
    RowKey { seed: 7, id: "row", position, generated: &[] }
}

/// The tokens of one process, which all rows have.
fn alone(sampling: &Sampling, logits: &Tensor, keys: &[RowKey<'_>]) -> Vec<u32> {
    choices(sampling, logits, keys).into_iter().map(Option::unwrap).collect()
}

fn choices(sampling: &Sampling, logits: &Tensor, keys: &[RowKey<'_>]) -> Vec<Option<u32>> {
    let width = logits.size2().unwrap().1;
    let whole = |local: Tensor| Ok(local);
    let vocabulary = Vocabulary { comm: &SingleProcess, rows: 0..width, gather: &whole };
    Sampler::new(sampling.clone(), &tokenizer()).choose(logits.copy(), &vocabulary, keys).unwrap()
}

/// The same on ranks that hold the columns up to each of these borders; the tokens, and how many
/// rows were gathered.
fn split(
    sampling: &Sampling,
    logits: &Tensor,
    keys: &[RowKey<'_>],
    borders: &[i64],
) -> (Vec<u32>, u64) {
    let (count, width) = logits.size2().unwrap();
    let values = Vec::<f32>::try_from(logits.reshape(-1)).unwrap();
    let values = &values;
    let results: Vec<_> = std::thread::scope(|scope| {
        let rank = |comm: dromedary_parallel::ThreadCommunicator| {
            scope.spawn(move || {
                tch::set_num_threads(1);
                let start = if comm.rank() == 0 { 0 } else { borders[comm.rank() - 1] };
                let rows = start..borders[comm.rank()];
                let logits = Tensor::from_slice(values).view([count, width]);
                let local = logits.narrow(1, rows.start, rows.end - rows.start).copy();
                let gather = |local: Tensor| {
                    let columns = comm.all_gather(&local.tr().contiguous())?; // (V, B)
                    Ok(columns.tr().contiguous())
                };
                let vocabulary = Vocabulary { comm: &comm, rows, gather: &gather };
                let mut sampler = Sampler::new(sampling.clone(), &tokenizer());
                let tokens = sampler.choose(local, &vocabulary, keys).unwrap();
                (tokens.into_iter().map(Option::unwrap).collect(), sampler.take_gathered_rows())
            })
        };
        let ranks: Vec<_> = threads(borders.len()).into_iter().map(rank).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    });
    assert!(results.iter().all(|of_rank| *of_rank == results[0]));
    results[0].clone()
}

/// Sort all, cut, draw: as straight as it can be written. Also how far, as a share of all mass, the
/// nearest other decision was: the sum of all is in f32 outside of this test.
fn reference(logits: &[f32], sampling: &Sampling, uniform: f64) -> (u32, f64) {
    let mut sorted: Vec<(f64, u32)> = logits.iter().map(|&x| f64::from(x)).zip(0..).collect();
    sorted.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    let largest = sorted[0].0;
    let mut kept: Vec<(f64, u32)> = sorted
        .into_iter()
        .map(|(logit, id)| (((logit - largest) / sampling.temperature).exp(), id))
        .collect();
    if sampling.top_k > 0 {
        kept.truncate(sampling.top_k);
    }
    let mass: f64 = kept.iter().map(|&(p, _)| p).sum();
    let (mut before, mut margin) = (0.0, f64::INFINITY);
    kept.retain(|&(p, _)| {
        if sampling.top_p < 1.0 {
            margin = margin.min((before / mass - sampling.top_p).abs());
        }
        let keep = before / mass <= sampling.top_p || sampling.top_p >= 1.0;
        before += p;
        keep
    });
    kept.retain(|&(p, _)| p >= sampling.min_p);
    let mass: f64 = kept.iter().map(|&(p, _)| p).sum();
    let (mut sum, mut chosen) = (0.0, None);
    for &(p, id) in &kept {
        sum += p;
        margin = margin.min((uniform - sum / mass).abs());
        if uniform * mass < sum && chosen.is_none() {
            chosen = Some(id);
        }
    }
    (chosen.unwrap_or(kept.last().unwrap().1), margin)
}

fn samplings() -> impl Strategy<Value = Sampling> {
    let top_p = prop_oneof![Just(1.0), Just(0.95), 0.01f64..1.0];
    let top_k = prop_oneof![Just(0usize), 1usize..400];
    let min_p = prop_oneof![Just(0.0), 0.001f64..0.9];
    (0.2f64..3.0, top_p, top_k, min_p).prop_map(|(temperature, top_p, top_k, min_p)| Sampling {
        top_k,
        min_p,
        ..Sampling::nucleus(temperature, top_p)
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn draws_equal_a_full_sort(
        logits in prop::collection::vec(-9.0f32..9.0, 1..2500),
        sampling in samplings(),
        position in 0u64..1000,
    ) {
        let row = Tensor::from_slice(&logits).view([1, -1]);
        let (want, margin) = reference(&logits, &sampling, key(position).uniform());
        prop_assume!(margin > NEAR);
        prop_assert_eq!(alone(&sampling, &row, &[key(position)]), [want]);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn ranks_choose_what_one_process_does(
        seed in 0i64..1000,
        sampling in samplings(),
        width in 40i64..4000,
        quantised in any::<bool>(),
    ) {
        // Logits of 16 bits have many equals.
        let mut logits = noise(5, width, seed);
        if quantised {
            logits = (logits * 4.0).round() / 4.0;
        }
        let keys: Vec<_> = (0..5).map(key).collect();
        for key in &keys {
            let row = Vec::<f32>::try_from(logits.get(key.position as i64)).unwrap();
            prop_assume!(reference(&row, &sampling, key.uniform()).1 > NEAR);
        }
        let want = alone(&sampling, &logits, &keys);
        for borders in [vec![width / 2, width], vec![1, width - 7, width]] {
            prop_assert_eq!(&split(&sampling, &logits, &keys, &borders).0, &want);
        }
        let greedy = Sampling::default();
        let want = alone(&greedy, &logits, &keys);
        prop_assert_eq!(split(&greedy, &logits, &keys, &[width / 3, width]).0, want);
    }
}

fn noise(rows: i64, width: i64, seed: i64) -> Tensor {
    let mut random = ChaCha8Rng::seed_from_u64(seed as u64);
    let values: Vec<f32> =
        (0..rows * width).map(|_| (random.random::<f32>() - 0.5) * 12.0).collect();
    Tensor::from_slice(&values).view([rows, width])
}

#[test]
fn logits_are_gathered_only_where_candidates_do_not_tell() {
    let width = 6000;
    let keys: Vec<_> = (0..8).map(key).collect();
    // Peaked rows: the candidates hold nearly all of the mass.
    let peaked = noise(8, width, 1) * 4.0;
    let (_, gathered) = split(&Sampling::nucleus(1.0, 0.95), &peaked, &keys, &[3000, 6000]);
    assert_eq!(gathered, 0);
    let flat = noise(8, width, 2) * 0.01;
    let (tokens, gathered) = split(&Sampling::nucleus(1.0, 0.95), &flat, &keys, &[3000, 6000]);
    assert_eq!(gathered, 8);
    assert_eq!(tokens, alone(&Sampling::nucleus(1.0, 0.95), &flat, &keys));
    // Penalties change each rank's own logits and need no more of them.
    let penalised = Sampling {
        logit_bias: [(17, 3.0), (4000, -5.0)].into(),
        presence_penalty: 1.0,
        ..Sampling::nucleus(1.0, 0.95)
    };
    let generated: Vec<u32> = (0..500).map(|id| id * 11).collect();
    let keys: Vec<_> =
        keys.into_iter().map(|key| RowKey { generated: &generated, ..key }).collect();
    let (tokens, gathered) = split(&penalised, &peaked, &keys, &[3000, 6000]);
    assert_eq!(gathered, 0);
    assert_eq!(tokens, alone(&penalised, &peaked, &keys));
}

/// Draws that fall behind what is sorted, from a vocabulary that is larger.
#[test]
fn no_vocabulary_is_sorted_whole() {
    const WIDTH: usize = 50_000;
    let logits = Vec::<f32>::try_from(noise(1, WIDTH as i64, 3).reshape(-1)).unwrap();
    // As 16 bits have them: many equals.
    let coarse: Vec<f32> = logits.iter().map(|logit| (logit * 4.0).round() / 4.0).collect();
    let hot = |top_p| Sampling::nucleus(20.0, top_p);
    let samplings = [
        hot(1.0),
        hot(0.9),
        Sampling { top_k: 30_000, ..hot(1.0) },
        Sampling { top_k: 40_000, ..hot(0.8) },
        Sampling { min_p: 0.6, ..hot(1.0) },
        Sampling { min_p: 0.6, ..hot(0.95) },
        Sampling { min_p: 0.6, top_k: 40_000, ..hot(0.7) },
    ];
    LONGEST_SORT.set(0);
    let mut behind = 0;
    for logits in [logits, coarse] {
        let max = logits.iter().copied().fold(f32::MIN, f32::max);
        let mut sorted: Vec<Candidate> = logits.iter().copied().zip(0..).collect();
        sorted.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        for sampling in &samplings {
            let weight = |&logit: &f32| (f64::from(logit - max) / sampling.temperature).exp();
            let total = logits.iter().map(weight).sum();
            for uniform in [0.02, 0.3, 0.5, 0.77, 0.9, 0.999, 1.0 - 1e-16] {
                let (want, margin) = reference(&logits, sampling, uniform);
                if uniform < 0.9999 {
                    assert!(margin > 1e-12, "choose another number than {uniform}");
                }
                let got = draw_from_all(&logits, total, sampling, uniform, &mut Vec::new());
                assert_eq!(got, Some(want), "{uniform} {sampling:?}");
                behind += usize::from(sorted[SORTED[1]..].iter().any(|&(_, id)| id == want));
            }
        }
    }
    assert!(behind > 40, "{behind}");
    assert!(LONGEST_SORT.get() <= SORTED[1], "{}", LONGEST_SORT.get());
}

/// Counts draws of each token, and compares them with what `want` expects, by chi-square with this
/// critical value.
fn check_distribution(sampling: &Sampling, logits: &[f32], want: &[f64], critical: f64) {
    const DRAWS: usize = 20_000;
    let row = Tensor::from_slice(logits).view([1, -1]).repeat([100, 1]);
    let mut counts = vec![0f64; logits.len()];
    let mut sampler = Sampler::new(sampling.clone(), &tokenizer());
    let whole = |local: Tensor| Ok(local);
    let rows = 0..logits.len() as i64;
    let vocabulary = Vocabulary { comm: &SingleProcess, rows, gather: &whole };
    for first in (0..DRAWS as u64).step_by(100) {
        let keys: Vec<_> = (first..first + 100).map(key).collect();
        for token in sampler.choose(row.copy(), &vocabulary, &keys).unwrap() {
            counts[token.unwrap() as usize] += 1.0;
        }
    }
    let chi_square: f64 = counts
        .iter()
        .zip(want)
        .map(|(&count, &p)| {
            let expected = p * DRAWS as f64;
            assert!(p > 0.0 || count == 0.0, "a token was drawn that is not kept");
            if p > 0.0 { (count - expected).powi(2) / expected } else { 0.0 }
        })
        .sum();
    assert!(chi_square < critical, "{chi_square}");
}

#[test]
fn draws_follow_the_distribution() {
    // 40 tokens with probabilities like 1 / rank, in an order that is not theirs.
    let logits: Vec<f32> = (0..40).map(|id| -f32::ln((id * 7 % 40 + 1) as f32)).collect();
    let probabilities = |keep: &dyn Fn(usize) -> bool, temperature: f64| -> Vec<f64> {
        let weight = |id: usize| (f64::from(logits[id]) / temperature).exp();
        let rank = |id: usize| id * 7 % 40;
        let weights: Vec<f64> =
            (0..40).map(|id| if keep(rank(id)) { weight(id) } else { 0.0 }).collect();
        let mass: f64 = weights.iter().sum();
        weights.iter().map(|weight| weight / mass).collect()
    };
    // Critical values of chi-square at 0.001 for 39, 9, 24 and 6 degrees of freedom.
    let nucleus = |top_p| Sampling::nucleus(1.0, top_p);
    check_distribution(&nucleus(1.0), &logits, &probabilities(&|_| true, 1.0), 72.1);
    let top_k = Sampling { top_k: 10, ..nucleus(1.0) };
    check_distribution(&top_k, &logits, &probabilities(&|rank| rank < 10, 1.0), 27.9);
    // 1 + 1/2 + .. + 1/24 = 3.776 of 4.279 is below 0.89, with 1/25 it is above.
    check_distribution(&nucleus(0.89), &logits, &probabilities(&|rank| rank < 25, 1.0), 51.2);
    let min_p = Sampling { min_p: 0.02, ..Sampling::nucleus(0.5, 1.0) };
    check_distribution(&min_p, &logits, &probabilities(&|rank| rank < 7, 0.5), 22.5);
}

#[test]
fn random_numbers_depend_on_seed_row_and_position() {
    let base = key(3).uniform();
    assert_eq!(base, key(3).uniform());
    assert!((0.0..1.0).contains(&base));
    let others = [
        key(4).uniform(),
        RowKey { seed: 8, ..key(3) }.uniform(),
        RowKey { id: "other", ..key(3) }.uniform(),
    ];
    assert!(others.iter().all(|&other| other != base));
}

#[test]
fn extreme_temperatures_and_bad_logits() {
    let logits = Tensor::from_slice(&[-1e4f32, 1e4, 9e3]).view([1, 3]);
    for temperature in [0.0, 1e-30, 1.0] {
        let sampling = Sampling::nucleus(temperature, 0.9);
        assert_eq!(alone(&sampling, &logits, &[key(0)]), [1]);
    }
    let samplings = [Sampling::default(), Sampling::nucleus(1.0, 1.0), Sampling::nucleus(0.7, 0.9)];
    for bad in [f32::NAN, f32::INFINITY] {
        let logits = Tensor::from_slice(&[0.0f32, 1.0, 2.0, 0.0, bad, 1.0]).view([2, 3]);
        for sampling in &samplings {
            let keys = [key(4), RowKey { id: "bad one", ..key(5) }];
            let chosen = choices(sampling, &logits, &keys);
            assert!(chosen[0].is_some() && chosen[1].is_none(), "{chosen:?}");
        }
    }
    let none = Tensor::full([1, 3], f64::NEG_INFINITY, (Kind::Float, Device::Cpu));
    assert!(samplings.iter().all(|sampling| choices(sampling, &none, &[key(0)]) == [None]));
}

#[test]
fn a_bad_logit_of_one_rank_is_seen_by_all() {
    for bad in [f32::NAN, f32::INFINITY] {
        let values = [0.0, 1.0, 2.0, bad, 1.0, 0.5];
        for sampling in [Sampling::default(), Sampling::nucleus(1.0, 0.9)] {
            let failed: Vec<bool> = std::thread::scope(|scope| {
                let rank = |comm: dromedary_parallel::ThreadCommunicator| {
                    let sampling = sampling.clone();
                    scope.spawn(move || {
                        let start = comm.rank() * 3;
                        let local = Tensor::from_slice(&values[start..start + 3]).view([1, 3]);
                        let gather = |_: Tensor| unreachable!("nothing is gathered");
                        let rows = start as i64..start as i64 + 3;
                        let vocabulary = Vocabulary { comm: &comm, rows, gather: &gather };
                        Sampler::new(sampling, &tokenizer())
                            .choose(local, &vocabulary, &[key(0)])
                            .unwrap()
                            == [None]
                    })
                };
                let ranks: Vec<_> = threads(2).into_iter().map(rank).collect();
                ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
            });
            assert_eq!(failed, [true, true]);
        }
    }
}
