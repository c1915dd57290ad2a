//! Every kernel at every level that this CPU has, against libtorch's operations.

use std::{f64::consts::LN_2, ops::Range};

use rand::{Rng, SeedableRng, rngs::StdRng};
use tch::{Device, Kind, Tensor};

use super::{
    FusedStep, Kernels, MakesPanels, PackedWeight, Sequence, SlotKeys,
    attend::{AttendKeys, HeadKeys, HeadLayout, Join, Partial, Scores, Seen},
    simd::{Kernel, Level, Simd, UNIT, shift_of},
};
use crate::{
    heads::{HeadRun, Heads},
    kv_cache::{LayerStep, SharedPrefix, SlotCache, Step, StepRow, Storage},
};

const F: (Kind, Device) = (Kind::Float, Device::Cpu);

/// Largest difference over the largest value.
fn off(got: &Tensor, want: &Tensor) -> f64 {
    assert_eq!(got.size(), want.size());
    let largest = |t: &Tensor| f64::try_from(t.abs().max()).unwrap();
    largest(&(got - want)) / largest(want).max(1e-30)
}

struct Exp(Vec<f32>);

impl Kernel for Exp {
    type Output = Vec<f32>;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> Vec<f32> {
        let units = self.0.as_chunks::<UNIT>().0.iter();
        units.flat_map(|unit| simd.lanes(simd.exp(simd.load(unit)))).collect()
    }
}

#[test]
fn exp_is_exact_to_some_units_and_keeps_nan() {
    let values: Vec<f32> = (0..16_000).map(|i| -86.0 + i as f32 * 0.0107).collect();
    for level in Level::supported() {
        for (x, got) in values.iter().zip(level.run(Exp(values.clone()))) {
            let want = f64::from(*x).exp();
            assert!((f64::from(got) / want - 1.0).abs() < 3e-7, "{level:?} {x} {got} {want}");
        }
        let mut edges = vec![0.0; UNIT];
        edges[..5].copy_from_slice(&[f32::NAN, f32::NEG_INFINITY, -1e30, 1e4, LN_2 as f32]);
        let got = level.run(Exp(edges));
        assert!(got[0].is_nan() && got[1] < 1e-37 && got[2] < 1e-37 && got[3] > 3e38, "{got:?}");
        assert!((got[4] - 2.0).abs() < 3e-7 && got[5] == 1.0);
    }
}

#[test]
fn logits_are_weighed_as_libtorch_does() {
    tch::manual_seed(9);
    for kernels in Kernels::all() {
        for count in [1, 15, 16, 17, 49_152, 1000] {
            for (temperature, scale) in [(1.0, 4.0), (0.7, 30.0), (1e-6, 4.0), (1e6, 1.0)] {
                let logits = Tensor::randn([count], F) * scale;
                let want = (&logits.to_kind(Kind::Double) - logits.max()) / temperature;
                let want = f64::try_from(want.exp().sum(Kind::Double)).unwrap();
                let values = Vec::<f32>::try_from(&logits).unwrap();
                let (max, total) = kernels.weigh(&values, temperature, -1e30);
                assert_eq!(f64::from(max), f64::try_from(logits.max()).unwrap());
                assert!((total / want - 1.0).abs() < 1e-6, "{kernels:?} {count} {total} {want}");
            }
        }
        let mut values = vec![f32::NEG_INFINITY; 40];
        let none = kernels.weigh(&values, 1.0, -1e30);
        assert!(none.0 == f32::NEG_INFINITY && none.1 < 1e-30, "{none:?}");
        values[3] = 2.0;
        assert!((kernels.weigh(&values, 1.0, -1e30).1 - 1.0).abs() < 1e-30);
        for bad in [f32::NAN, f32::INFINITY] {
            values[38] = bad;
            assert!(kernels.weigh(&values, 1.0, -1e30).1.is_nan(), "{kernels:?} {bad}");
        }
    }
}

#[test]
fn a_packed_linear_equals_matmul() {
    tch::manual_seed(1);
    for kernels in Kernels::all() {
        for (out, depth) in [(96, 64), (7, 5), (1, 1), (33, 130), (160, 577), (64, 1536)] {
            let weight = Tensor::randn([out, depth], F);
            let packed = PackedWeight::pack(kernels, &weight).unwrap();
            assert_eq!((packed.size(), packed.unpack().unwrap()), ((out, depth), weight.copy()));
            let last = out as u32 - 1;
            let rows = Tensor::from_slice(&[i64::from(last), 0, i64::from(last)]);
            assert_eq!(packed.rows(&[last, 0, last]).unwrap(), weight.index_select(0, &rows));
            for rows in [0, 1, 2, 3, 7, 13, 32, 64, 250] {
                let x = Tensor::randn([rows, depth], F);
                let (got, want) = (packed.forward(&x).unwrap(), x.matmul(&weight.tr()));
                assert!(rows == 0 || off(&got, &want) < 1e-5, "{kernels:?} {rows} {out} {depth}");
                assert_eq!(got.size(), [rows, out]);
            }
            let odd = Tensor::randn([depth, 6], F).tr();
            assert!(off(&packed.forward(&odd).unwrap(), &odd.matmul(&weight.tr())) < 1e-5);
            assert!(packed.forward(&Tensor::randn([2, depth + 1], F)).is_err());
        }
    }
}

#[test]
fn a_packed_linear_passes_gradients_on() {
    let weight = Tensor::randn([5, 9], F);
    let packed = PackedWeight::pack(Kernels::detect(), &weight).unwrap();
    let x = Tensor::randn([3, 9], F).set_requires_grad(true);
    packed.forward(&x).unwrap().sum(Kind::Float).backward();
    assert!(off(&x.grad(), &Tensor::ones([3, 5], F).matmul(&weight)) < 1e-5);
}

#[test]
fn element_wise_passes_equal_libtorch() {
    tch::manual_seed(2);
    for kernels in Kernels::all() {
        for (tokens, width) in [(1, 5), (3, 16), (7, 576), (100, 700)] {
            let (x, weight) = (Tensor::randn([tokens, width], F), Tensor::randn([width], F));
            let scale = (x.square().mean_dim(-1, true, Kind::Float) + 1e-5).rsqrt();
            assert!(off(&kernels.norm(&x, &weight, 1e-5).unwrap(), &(&x * scale * &weight)) < 1e-6);
            let gate_up = Tensor::randn([tokens, 2 * width], F) * 30.0;
            let halves = gate_up.chunk(2, -1);
            let want = halves[0].silu() * &halves[1];
            assert!(off(&kernels.silu_mul(&gate_up).unwrap(), &want) < 1e-6);
        }
        for (tokens, heads, head_dim) in [(1, 3, 8), (5, 12, 64), (300, 3, 80)] {
            let x = Tensor::randn([tokens, heads + 2, head_dim], F).narrow(1, 0, heads);
            let angle = Tensor::randn([tokens, 1, head_dim / 2], F);
            let (cos, sin) = (angle.cos(), angle.sin());
            let halves = x.chunk(2, -1);
            let turned =
                [&halves[0] * &cos - &halves[1] * &sin, &halves[1] * &cos + &halves[0] * &sin];
            let got = kernels.rotate(&x, [&cos, &sin]).unwrap();
            assert!(off(&got, &Tensor::cat(&turned, -1)) < 1e-6);
        }
    }
}

fn even(n_kv: i64, group: i64, head_dim: i64) -> Heads {
    Heads { head_dim, runs: vec![HeadRun { kv: 0..n_kv, q: 0..n_kv * group }] }
}

fn uneven(head_dim: i64) -> Heads {
    let runs = vec![
        HeadRun { kv: 0..1, q: 0..1 },
        HeadRun { kv: 1..3, q: 1..7 },
        HeadRun { kv: 3..4, q: 7..9 },
    ];
    Heads { head_dim, runs }
}

/// Rows behind a prefix: their prompts first, then a token of each.
struct Case {
    heads: Heads,
    prefix: i64,
    /// Own tokens of each row, and the prefix tokens that it sees.
    rows: Vec<(i64, i64)>,
    scale: f64,
}

impl Case {
    fn new(heads: Heads, prefix: i64, rows: usize) -> Self {
        let row = |row: usize| {
            let seen = if row % 4 == 3 { prefix * row as i64 / rows as i64 } else { prefix };
            (1 + (row as i64 * 7) % 23, seen)
        };
        Self { heads, prefix, rows: (0..rows).map(row).collect(), scale: 1.0 }
    }

    /// `(T, heads, D)`; at a large scale of whole numbers, so that scores are exact.
    fn random(&self, rng: &mut StdRng, tokens: i64, heads: i64) -> Tensor {
        let size = [tokens, heads, self.heads.head_dim];
        let mut value = || {
            if self.scale == 1.0 {
                rng.random_range(-2.0..2.0)
            } else {
                rng.random_range(-2..=2) as f32
            }
        };
        let values: Vec<f32> = (0..size.iter().product()).map(|_| value()).collect();
        Tensor::from_slice(&values).view(size) * self.scale
    }

    /// What a prefill and a decode step give.
    fn results(&self, kernels: Option<Kernels>) -> [Tensor; 2] {
        // libtorch's generator is shared with the tests that run beside this one.
        let mut rng = StdRng::seed_from_u64(11);
        let heads = &self.heads;
        let (h, n_kv) = (heads.n_local_heads(), heads.n_local_kv_heads());
        let storage =
            Storage { device: Device::Cpu, kind: Kind::Float, num_hidden_layers: 1, kernels };
        let ids = (0..self.prefix as u32).collect();
        let mut shared = SharedPrefix::new(ids);
        let [k, v] = [(); 2].map(|()| self.random(&mut rng, self.prefix, n_kv));
        shared.push_layer(heads, &storage, &k, &v).unwrap();
        let shared = (self.prefix > 0).then_some(&shared);
        let mut cache = SlotCache::new(heads, &storage, self.rows.len() as i64, 24).unwrap();
        let rows = || (0..).zip(self.rows.iter().copied());
        let prompts: Vec<StepRow> = rows()
            .map(|(slot, (own, prefix))| StepRow { slot, new: own, length: own, prefix })
            .collect();
        let next: Vec<StepRow> = rows()
            .map(|(slot, (own, prefix))| StepRow { slot, new: 1, length: own + 1, prefix })
            .collect();
        let tokens: i64 = self.rows.iter().map(|row| row.0).sum();
        let device = Device::Cpu;
        let prefill = Step::prefill(&cache, heads, device, &prompts, shared);
        let decode = Step::decode(&cache, heads, device, &next, shared, 0);
        [(prefill, tokens), (decode, self.rows.len() as i64)].map(|(mut step, tokens)| {
            let [q, k, v] = [h, n_kv, n_kv].map(|heads| self.random(&mut rng, tokens, heads));
            let (q, k, v) = (&q, &k, &v);
            let of = LayerStep { layer: 0, heads, prefix: shared, q, k, v };
            step.attend(&mut cache, of).unwrap()
        })
    }

    fn check(&self) {
        let want = self.results(None);
        for kernels in Kernels::all() {
            for (got, want) in self.results(Some(kernels)).iter().zip(&want) {
                let (off, Heads { head_dim, runs }) = (off(got, want), &self.heads);
                let (rows, prefix, scale) = (self.rows.len(), self.prefix, self.scale);
                assert!(
                    off < 1e-5,
                    "{off:.1e}: {kernels:?} D {head_dim} {runs:?} B {rows} P {prefix} x {scale}"
                );
            }
        }
    }
}

#[test]
fn attention_equals_the_portable_path() {
    for (n_kv, group, head_dim) in [(3, 3, 64), (2, 1, 8), (1, 2, 80), (2, 8, 128)] {
        for (prefix, rows) in [(0, 1), (1, 7), (330, 7), (700, 64), (2816, 1), (2816, 7)] {
            Case::new(even(n_kv, group, head_dim), prefix, rows).check();
        }
    }
    for (prefix, rows) in [(0, 7), (37, 7), (641, 64), (2816, 64)] {
        Case::new(uneven(16), prefix, rows).check();
    }
}

#[test]
fn attention_takes_scores_of_ten_thousands() {
    for (prefix, rows) in [(0, 7), (1, 1), (700, 7)] {
        let case = Case::new(even(3, 3, 64), prefix, rows);
        Case { scale: 40.0, ..case }.check();
    }
}

#[test]
fn a_prompt_of_its_own_is_causal() {
    tch::manual_seed(3);
    for heads in [even(3, 3, 64), uneven(8)] {
        let (h, n_kv, d) = (heads.n_local_heads(), heads.n_local_kv_heads(), heads.head_dim);
        let q = Tensor::randn([700, h, d], F);
        let [k, v] = [(); 2].map(|()| Tensor::randn([700, n_kv, d], F));
        let want = crate::attention::causal_attention(&heads, &q, &k, &v, &[700]).unwrap();
        for kernels in Kernels::all() {
            let keys = kernels.prefix(&heads, [&k, &v]).unwrap();
            let got = kernels.attend_within(&heads, &keys, &q).unwrap();
            assert!(off(&got, &want) < 1e-5, "{kernels:?}");
        }
    }
}

/// A row's result must not depend, not even in its last bit, on what is computed beside it or on
/// the number of threads.
#[test]
fn rows_are_independent_to_the_last_bit() {
    let whole = Case::new(even(3, 3, 64), 2000, 40);
    for kernels in Kernels::all() {
        tch::set_num_threads(2);
        let [_, all] = whole.results(Some(kernels));
        tch::set_num_threads(1);
        let [_, alone] = whole.results(Some(kernels));
        assert_eq!(all, alone);
        let weight = PackedWeight::pack(kernels, &Tensor::randn([200, 300], F)).unwrap();
        let x = Tensor::randn([300, 300], F);
        let one_thread = weight.forward(&x).unwrap();
        tch::set_num_threads(2);
        assert_eq!(weight.forward(&x).unwrap(), one_thread);
        for row in [0, 17, 299] {
            let alone = weight.forward(&x.narrow(0, row, 1)).unwrap();
            assert_eq!(alone, one_thread.narrow(0, row, 1));
        }
    }
}

#[test]
fn a_row_alone_equals_the_row_in_a_batch() {
    tch::manual_seed(4);
    let heads = even(3, 3, 64);
    let [k, v] = [(); 2].map(|()| Tensor::randn([900, 3, 64], F));
    let (own_k, own_v) = (Tensor::randn([33, 3, 64], F), Tensor::randn([33, 3, 64], F));
    let q = Tensor::randn([33, 9, 64], F);
    for kernels in Kernels::all() {
        let prefix = kernels.prefix(&heads, [&k, &v]).unwrap();
        let run = |rows: std::ops::Range<i64>| {
            let count = rows.end - rows.start;
            let mut slots = SlotKeys::new(&heads, count as usize, 1).unwrap();
            let prefix_of = |row: i64| if row % 3 == 0 { 400 } else { 900 };
            let sequence =
                |(slot, row)| Sequence { slot, prefix: prefix_of(row), ..Sequence::whole(1) };
            let sequences = (0..).zip(rows.clone()).map(sequence).collect();
            let part = |t: &Tensor| t.narrow(0, rows.start, count);
            let mut step = FusedStep::new(kernels, sequences);
            step.store(&mut slots, [&part(&own_k), &part(&own_v)]).unwrap();
            step.attend(&heads, &slots, Some(&prefix), &part(&q)).unwrap()
        };
        let all = run(0..33);
        for row in [0, 5, 32] {
            assert_eq!(run(row..row + 1), all.narrow(0, row, 1), "{kernels:?} {row}");
        }
    }
}

#[test]
fn nan_surfaces_in_its_row_alone() {
    let heads = even(1, 2, 16);
    for kernels in Kernels::all() {
        let prefix = Tensor::randn([50, 1, 16], F);
        let prefix = kernels.prefix(&heads, [&prefix, &prefix]).unwrap();
        for poisoned in ["q", "k", "v"] {
            let [q, k, v] = [("q", 2), ("k", 1), ("v", 1)].map(|(name, heads)| {
                let t = Tensor::randn([3, heads, 16], F);
                if name == poisoned {
                    let _ = t.get(1).get(0).get(5).fill_(f64::NAN);
                }
                t
            });
            let mut slots = SlotKeys::new(&heads, 3, 1).unwrap();
            let sequence = |slot| Sequence { slot, prefix: 50, ..Sequence::whole(1) };
            let mut step = FusedStep::new(kernels, (0..3).map(sequence).collect());
            step.store(&mut slots, [&k, &v]).unwrap();
            let out = step.attend(&heads, &slots, Some(&prefix), &q).unwrap();
            let nan = |row: i64| i64::try_from(out.get(row).isnan().sum(Kind::Int64)).unwrap();
            assert!(nan(1) > 0 && nan(0) == 0 && nan(2) == 0, "{kernels:?} {poisoned}");
        }
    }
}

#[test]
fn a_query_that_sees_no_key_is_nan_and_changes_nothing_when_joined() {
    let layout = HeadLayout { head_dim: 8 };
    let values: Vec<f32> = (0..16 * 16).map(|i| i as f32 / 100.0).collect();
    let queries = [0.5f32; 16];
    for level in Level::supported() {
        let attend = |limits: [usize; 2]| {
            let mut memory = vec![0.0; Partial::len(2, layout)];
            level.run(AttendKeys {
                layout,
                queries: &queries,
                head: HeadKeys { keys: &values, values: &values },
                range: 0..16,
                limits: &limits,
                partial: &mut Partial::start(&mut memory, 2),
                scores: &mut Scores::new(),
            });
            memory
        };
        let (first, both) = (attend([0, 16]), attend([16, 16]));
        let join = |parts: &[&Vec<f32>]| {
            let parts: Vec<_> = parts.iter().map(|part| Seen::new(part, 2)).collect();
            let (mut out, mut weights) = (vec![0.0; 16], Vec::new());
            level.run(Join { layout, parts: &parts, out: &mut out, weights: &mut weights });
            out
        };
        let alone = join(&[&first]);
        assert!(alone[..8].iter().all(|value| value.is_nan()), "{alone:?}");
        assert!(alone[8..].iter().all(|value| value.is_finite()));
        assert_eq!(join(&[&first, &both])[..8], join(&[&both])[..8]);
    }
}

/// Rows of a weight that is there.
struct Dense {
    values: Vec<f32>,
    depth: usize,
}

impl MakesPanels for Dense {
    fn make<S: Simd>(&self, _: S, rows: Range<usize>, columns: Range<usize>, panel: &mut [f32]) {
        for (lane, row) in rows.enumerate() {
            let values = &self.values[row * self.depth..][columns.clone()];
            for (line, value) in panel.chunks_exact_mut(UNIT).zip(values) {
                line[lane] = *value;
            }
        }
    }
}

#[test]
fn products_with_made_panels_are_those_with_packed_ones_to_the_last_bit() {
    tch::manual_seed(19);
    for kernels in Kernels::all() {
        for (tokens, depth, out) in [
            (1, 576, 960),
            (7, 295, 100),
            (240, 150, 65),
            (250, 144, 65),
            (487, 1536, 590),
            (3, 1, 1),
        ] {
            let weight = Tensor::randn([out, depth], F);
            let x = Tensor::randn([tokens, depth], F);
            let values = Vec::try_from(weight.view(-1)).unwrap();
            let made = Dense { values, depth: depth as usize };
            let sizes = [out as usize, depth as usize];
            let got = kernels.multiply_made(&x, &made, sizes).unwrap();
            let want = PackedWeight::pack(kernels, &weight).unwrap().forward(&x).unwrap();
            assert!(got == want, "{kernels:?} {tokens} x {depth} x {out}");
            assert!(off(&got, &x.matmul(&weight.tr())) < 1e-5);
            assert!(kernels.multiply_made(&x.narrow(1, 1, depth - 1), &made, sizes).is_err());
        }
    }
}

struct LookUp<'a>(&'a [f32; UNIT], u64);

impl Kernel for LookUp<'_> {
    type Output = [[f32; UNIT]; 3];

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> Self::Output {
        let values = simd.look_up(simd.load(self.0), self.1);
        let rounded = [values, simd.round_to_bf16(values), simd.round_to_f16(values)];
        [simd.lanes(rounded[0]), simd.lanes(rounded[1]), simd.lanes(rounded[2])]
    }
}

#[test]
fn looked_up_values_are_rounded_as_conversions_do() {
    let mut rng = StdRng::seed_from_u64(23);
    for level in Level::supported() {
        for _ in 0..1000 {
            let codes = rng.random();
            // Every other one half-way between two of bf16 or of f16, or next to it.
            let table: [f32; UNIT] = std::array::from_fn(|lane| {
                let value = f32::from_bits(rng.random_range(0x3300_0000..0x4700_0000));
                let half = [0x8000, 0x1000][lane / 2 % 2];
                let near = rng.random_range(half - 1..=half + 1);
                let bits = value.to_bits() & !(2 * half - 1) | near;
                if lane % 2 == 0 { value } else { -f32::from_bits(bits) }
            });
            let got = level.run(LookUp(&table, codes));
            for lane in 0..UNIT {
                let value = table[(codes >> shift_of(lane)) as usize & 15];
                let want = [
                    value,
                    half::bf16::from_f32(value).to_f32(),
                    half::f16::from_f32(value).to_f32(),
                ];
                assert_eq!(got.map(|lanes| lanes[lane]), want, "{level:?} lane {lane}");
            }
        }
    }
}
