//! The instructions of x86-64 CPUs: AVX-512, and AVX2 with FMA.

use std::arch::x86_64::*;

use super::{Kernel, Simd, Tile, UNIT, tile};

/// # Safety
/// The CPU must have AVX-512F and FMA.
#[target_feature(enable = "avx512f,fma")]
pub(super) unsafe fn run_avx512<K: Kernel>(kernel: K) -> K::Output {
    kernel.run(Avx512(()))
}

/// # Safety
/// The CPU must have AVX2, FMA and F16C.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn run_avx2<K: Kernel>(kernel: K) -> K::Output {
    kernel.run(Avx2(()))
}

/// AVX-512F; the field is private, so that a value proves that the CPU has it.
#[derive(Clone, Copy)]
pub(super) struct Avx512(());

/// Wraps intrinsics that need nothing but the instructions.
macro_rules! with_instructions {
    ($($call:expr)?) => {
        // SAFETY: the value `self` proves that the CPU has the instruction; loads and stores
        // go through references to 16 values.
        $( unsafe { $call } )?
    };
}

macro_rules! lanewise {
    ($($name:ident: $call:ident,)*) => { $(
        #[inline(always)]
        fn $name(self, a: __m512, b: __m512) -> __m512 {
            with_instructions!($call(a, b))
        }
    )* };
}

macro_rules! lanewise_pair {
    ($($name:ident: $call:ident,)*) => { $(
        #[inline(always)]
        fn $name(self, a: Pair, b: Pair) -> Pair {
            with_instructions!(($call(a.0, b.0), $call(a.1, b.1)))
        }
    )* };
}

/// What is the same at both levels but for the tile that is called.
macro_rules! fetch_and_tile {
    ($tile:ident) => {
        #[inline(always)]
        fn prefetch(self, at: *const f32) {
            with_instructions!(_mm_prefetch::<_MM_HINT_T0>(at.cast()))
        }
        #[inline(always)]
        unsafe fn tile(self, rows: usize, units: usize, of: &Tile) {
            // SAFETY: the value `self` proves that the CPU has the instructions; the rest is the
            // caller's.
            unsafe { $tile(rows, units, of) }
        }
    };
}

impl Simd for Avx512 {
    type Unit = __m512;

    lanewise! {
        add: _mm512_add_ps, sub: _mm512_sub_ps, mul: _mm512_mul_ps, div: _mm512_div_ps,
        max: _mm512_max_ps, min: _mm512_min_ps,
    }

    fetch_and_tile!(tile_avx512);

    #[inline(always)]
    fn splat(self, value: f32) -> __m512 {
        with_instructions!(_mm512_set1_ps(value))
    }
    #[inline(always)]
    fn load(self, from: &[f32; UNIT]) -> __m512 {
        with_instructions!(_mm512_loadu_ps(from.as_ptr()))
    }
    #[inline(always)]
    fn store(self, to: &mut [f32; UNIT], value: __m512) {
        with_instructions!(_mm512_storeu_ps(to.as_mut_ptr(), value))
    }
    #[inline(always)]
    fn mul_add(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        with_instructions!(_mm512_fmadd_ps(a, b, c))
    }
    #[inline(always)]
    fn round(self, a: __m512) -> __m512 {
        with_instructions!(_mm512_roundscale_ps::<8>(a))
    }
    #[inline(always)]
    fn scale_by_power(self, a: __m512, n: __m512) -> __m512 {
        with_instructions!(_mm512_scalef_ps(a, n))
    }
    #[inline(always)]
    fn look_up(self, table: __m512, codes: u64) -> __m512 {
        with_instructions!({
            let shifts =
                _mm512_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28);
            let codes = _mm512_srlv_epi32(_mm512_set1_epi64(codes as i64), shifts);
            // It looks at the last four bits of each.
            _mm512_permutexvar_ps(codes, table)
        })
    }
    #[inline(always)]
    fn round_to_bf16(self, a: __m512) -> __m512 {
        with_instructions!({
            let bits = _mm512_castps_si512(a);
            let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
            let half = _mm512_add_epi32(odd, _mm512_set1_epi32(BELOW_HALF));
            let kept = _mm512_set1_epi32(BF16_BITS);
            _mm512_castsi512_ps(_mm512_and_si512(_mm512_add_epi32(bits, half), kept))
        })
    }
    #[inline(always)]
    fn round_to_f16(self, a: __m512) -> __m512 {
        with_instructions!(_mm512_cvtph_ps(_mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(a)))
    }
}

/// What bf16 keeps of an f32, and what is just below a half of the last of these bits.
const BF16_BITS: i32 = !0xffff;
const BELOW_HALF: i32 = 0x7fff;

/// AVX2 with FMA; the field is private, so that a value proves that the CPU has them.
#[derive(Clone, Copy)]
pub(super) struct Avx2(());

type Pair = (__m256, __m256);

impl Avx2 {
    /// The entries whose numbers are in the last four bits of `codes`.
    #[inline(always)]
    fn entry(self, table: Pair, codes: __m256i) -> __m256 {
        with_instructions!({
            // Both halves by the last three bits, and the fourth one where a choice looks for it.
            let low = _mm256_permutevar8x32_ps(table.0, codes);
            let high = _mm256_permutevar8x32_ps(table.1, codes);
            let is_high = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(codes));
            _mm256_blendv_ps(low, high, is_high)
        })
    }

    #[inline(always)]
    fn half_to_bf16(self, a: __m256) -> __m256 {
        with_instructions!({
            let bits = _mm256_castps_si256(a);
            let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
            let half = _mm256_add_epi32(odd, _mm256_set1_epi32(BELOW_HALF));
            let kept = _mm256_set1_epi32(BF16_BITS);
            _mm256_castsi256_ps(_mm256_and_si256(_mm256_add_epi32(bits, half), kept))
        })
    }

    /// `2^n`, by its bits.
    #[inline(always)]
    fn power(self, n: __m256) -> __m256 {
        with_instructions!({
            let exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
            _mm256_castsi256_ps(_mm256_slli_epi32::<23>(exponent))
        })
    }
}

impl Simd for Avx2 {
    type Unit = Pair;

    lanewise_pair! {
        add: _mm256_add_ps, sub: _mm256_sub_ps, mul: _mm256_mul_ps, div: _mm256_div_ps,
        max: _mm256_max_ps, min: _mm256_min_ps,
    }

    fetch_and_tile!(tile_avx2);

    #[inline(always)]
    fn splat(self, value: f32) -> Pair {
        let half = with_instructions!(_mm256_set1_ps(value));
        (half, half)
    }
    #[inline(always)]
    fn load(self, from: &[f32; UNIT]) -> Pair {
        let from = from.as_ptr();
        with_instructions!((_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))))
    }
    #[inline(always)]
    fn store(self, to: &mut [f32; UNIT], value: Pair) {
        let to = to.as_mut_ptr();
        with_instructions!({
            _mm256_storeu_ps(to, value.0);
            _mm256_storeu_ps(to.add(8), value.1);
        })
    }
    #[inline(always)]
    fn mul_add(self, a: Pair, b: Pair, c: Pair) -> Pair {
        with_instructions!((_mm256_fmadd_ps(a.0, b.0, c.0), _mm256_fmadd_ps(a.1, b.1, c.1)))
    }
    #[inline(always)]
    fn round(self, a: Pair) -> Pair {
        with_instructions!((_mm256_round_ps::<8>(a.0), _mm256_round_ps::<8>(a.1)))
    }
    #[inline(always)]
    fn scale_by_power(self, a: Pair, n: Pair) -> Pair {
        self.mul(a, (self.power(n.0), self.power(n.1)))
    }
    #[inline(always)]
    fn look_up(self, table: Pair, codes: u64) -> Pair {
        with_instructions!({
            let codes = _mm256_set1_epi64x(codes as i64);
            let shifts = _mm256_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12);
            let first = _mm256_srlv_epi32(codes, shifts);
            let second = _mm256_srli_epi32::<16>(first);
            (self.entry(table, first), self.entry(table, second))
        })
    }
    #[inline(always)]
    fn round_to_bf16(self, a: Pair) -> Pair {
        (self.half_to_bf16(a.0), self.half_to_bf16(a.1))
    }
    #[inline(always)]
    fn round_to_f16(self, a: Pair) -> Pair {
        with_instructions!((
            _mm256_cvtph_ps(_mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(a.0)),
            _mm256_cvtph_ps(_mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(a.1)),
        ))
    }
}

/// # Safety
/// The CPU must have AVX-512F and FMA; the rest as for [`Simd::tile`].
#[target_feature(enable = "avx512f,fma")]
unsafe fn tile_avx512(rows: usize, units: usize, of: &Tile) {
    sized_tile!(Avx512(()), rows, units, of, [6 5 4 3 2 1], [4 3 2 1]);
}

/// # Safety
/// The CPU must have AVX2 and FMA; the rest as for [`Simd::tile`].
#[target_feature(enable = "avx2,fma")]
unsafe fn tile_avx2(rows: usize, units: usize, of: &Tile) {
    for unit in 0..units {
        let of = of.unit(unit);
        sized_tile!(Avx2(()), rows, 1, &of, [6 5 4 3 2 1], [1]);
    }
}
