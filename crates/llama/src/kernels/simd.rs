//! Sixteen f32 at a time with what the CPU has, and the one inner product that all kernels share.
//!
//! All `unsafe` code of the kernels is in this file and in the one of the x86-64 instructions. A [`Simd`]
//! value is the proof that the CPU has the instructions behind it: only [`Level::run`] makes one, after
//! a look at the CPU.

// Shapes: R = rows of a tile, U = its units of 16 columns, K = depth of the product.

use std::{fmt, marker::PhantomData, ops::Range};

/// Lanes of a unit: what every kernel works in, whatever the width of the CPU's registers.
pub(crate) const UNIT: usize = 16;

/// Rows and units of the largest tile, whose sums fill the registers of AVX-512.
pub(crate) const MAX_ROWS: usize = 6;
pub(crate) const MAX_UNITS: usize = 4;

/// Sixteen lanes of f32.
pub(crate) trait Simd: Copy {
    /// The lanes.
    type Unit: Copy;

    fn splat(self, value: f32) -> Self::Unit;
    fn load(self, from: &[f32; UNIT]) -> Self::Unit;
    fn store(self, to: &mut [f32; UNIT], value: Self::Unit);
    fn add(self, a: Self::Unit, b: Self::Unit) -> Self::Unit;
    fn sub(self, a: Self::Unit, b: Self::Unit) -> Self::Unit;
    fn mul(self, a: Self::Unit, b: Self::Unit) -> Self::Unit;
    fn div(self, a: Self::Unit, b: Self::Unit) -> Self::Unit;
    /// `a * b + c`.
    fn mul_add(self, a: Self::Unit, b: Self::Unit, c: Self::Unit) -> Self::Unit;
    /// The larger; `b` where one of them is NaN.
    fn max(self, a: Self::Unit, b: Self::Unit) -> Self::Unit;
    /// The smaller; `b` where one of them is NaN.
    fn min(self, a: Self::Unit, b: Self::Unit) -> Self::Unit;
    /// To the nearest whole number.
    fn round(self, a: Self::Unit) -> Self::Unit;
    /// `a * 2^n` for whole `n` in -126..=128.
    fn scale_by_power(self, a: Self::Unit, n: Self::Unit) -> Self::Unit;
    /// In each lane the entry of `table` whose number is the lane's four bits of `codes`, see [`shift_of`].
    fn look_up(self, table: Self::Unit, codes: u64) -> Self::Unit;
    /// To the nearest number of bf16, of two the even one; `a` is finite.
    fn round_to_bf16(self, a: Self::Unit) -> Self::Unit;
    /// To the nearest number of f16, of two the even one; `a` is finite.
    fn round_to_f16(self, a: Self::Unit) -> Self::Unit;
    /// Asks for a cache line.
    fn prefetch(self, at: *const f32);
    /// Computes a tile with the shape that suits the registers.
    ///
    /// # Safety
    /// As for [`tile`], with `rows` at most [`MAX_ROWS`] and `units` at most [`MAX_UNITS`].
    unsafe fn tile(self, rows: usize, units: usize, of: &Tile);

    /// All lanes from `values`, of which there are at most 16; `fill` for the rest.
    #[inline(always)]
    fn load_part(self, values: &[f32], fill: f32) -> Self::Unit {
        let mut lanes = [fill; UNIT];
        lanes[..values.len()].copy_from_slice(values);
        self.load(&lanes)
    }

    #[inline(always)]
    fn lanes(self, a: Self::Unit) -> [f32; UNIT] {
        let mut lanes = [0.0; UNIT];
        self.store(&mut lanes, a);
        lanes
    }

    /// The sum of the lanes, in one order on every CPU.
    #[inline(always)]
    fn sum(self, a: Self::Unit) -> f32 {
        let mut lanes = self.lanes(a);
        for half in [8, 4, 2, 1] {
            for lane in 0..half {
                lanes[lane] += lanes[lane + half];
            }
        }
        lanes[0]
    }

    /// The largest lane, NaN aside.
    #[inline(always)]
    fn largest(self, a: Self::Unit) -> f32 {
        self.lanes(a).into_iter().fold(f32::NEG_INFINITY, f32::max)
    }

    /// `e^x` within two units of the last place, from 2^-125 up; NaN stays NaN.
    #[inline(always)]
    fn exp(self, x: Self::Unit) -> Self::Unit {
        // The argument is second in both, so that NaN passes.
        let x = self.min(self.splat(88.722_84), self.max(self.splat(-87.0), x));
        let n = self.round(self.mul(x, self.splat(std::f32::consts::LOG2_E)));
        // ln 2 in two parts, the first with so few bits that its multiples are exact.
        let r = self.mul_add(n, self.splat(-0.693_359_4), x);
        let r = self.mul_add(n, self.splat(2.121_944_4e-4), r);
        let mut p = self.splat(1.987_569_1e-4);
        for c in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 0.166_666_65, 0.5] {
            p = self.mul_add(p, r, self.splat(c));
        }
        let p = self.mul_add(p, self.mul(r, r), self.add(r, self.splat(1.0)));
        self.scale_by_power(p, n)
    }
}

/// Where a lane's four bits are in a word of codes. Even lanes have the lower half of it, as a vector of
/// halves falls into lanes.
pub(crate) const fn shift_of(lane: usize) -> usize {
    4 * (lane / 2) + 32 * (lane % 2)
}

/// Code that runs at any level.
pub(crate) trait Kernel {
    type Output;
    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

/// What the CPU has; made by a look at it alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Level(Instructions);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Instructions {
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    Portable,
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.0)
    }
}

impl Level {
    /// All that this CPU has, the best first.
    pub(crate) fn supported() -> Vec<Self> {
        let mut levels = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            let fma = std::arch::is_x86_feature_detected!("fma");
            if fma && std::arch::is_x86_feature_detected!("avx512f") {
                levels.push(Self(Instructions::Avx512));
            }
            let f16c = std::arch::is_x86_feature_detected!("f16c");
            if fma && f16c && std::arch::is_x86_feature_detected!("avx2") {
                levels.push(Self(Instructions::Avx2));
            }
        }
        levels.push(Self(Instructions::Portable));
        levels
    }

    /// Runs a kernel with this level's instructions.
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `supported` made this level, so the CPU has the instructions.
            Instructions::Avx512 => unsafe { x86::run_avx512(kernel) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Instructions::Avx2 => unsafe { x86::run_avx2(kernel) },
            Instructions::Portable => kernel.run(Portable),
        }
    }
}

/// One tile of a product: `out[r][c] = sum over k of a[r][k] * b[k][c]`.
pub(crate) struct Tile {
    depth: usize,
    a: *const f32,
    a_row: usize,
    a_step: usize,
    b: *const f32,
    b_row: usize,
    b_unit: usize,
    out: *mut f32,
    out_row: usize,
    /// Add to what `out` holds.
    accumulate: bool,
    /// Lines to ask for: `fetch_lines` a step, `fetch_unit` apart, 16 values on at the next step.
    fetch: *const f32,
    fetch_unit: usize,
    fetch_lines: usize,
}

/// # Safety
/// For all `r < R`, `u < U`, `k < depth`: `a + r * a_row + k * a_step` must be readable; 16 values from
/// `b + k * b_row + u * b_unit` must be readable; 16 values from `out + r * out_row + 16 u` must be
/// readable and writable, by nobody else. The lines to fetch need not exist.
#[inline(always)]
unsafe fn tile<S: Simd, const R: usize, const U: usize>(simd: S, of: &Tile) {
    // SAFETY: the caller's promise.
    unsafe {
        match of.fetch_lines {
            0 => tile_fetching::<S, R, U, 0>(simd, of),
            1 => tile_fetching::<S, R, U, 1>(simd, of),
            2 => tile_fetching::<S, R, U, 2>(simd, of),
            _ => tile_fetching::<S, R, U, 4>(simd, of),
        }
    }
}

/// # Safety
/// As for [`tile`].
#[inline(always)]
unsafe fn tile_fetching<S: Simd, const R: usize, const U: usize, const F: usize>(
    simd: S,
    of: &Tile,
) {
    let mut sums = [[simd.splat(0.0); U]; R];
    let (mut a, mut b, mut fetch) = (of.a, of.b, of.fetch);
    for _ in 0..of.depth {
        for line in 0..F {
            simd.prefetch(fetch.wrapping_add(line * of.fetch_unit));
        }
        fetch = fetch.wrapping_add(UNIT);
        let mut columns = [simd.splat(0.0); U];
        for (unit, column) in columns.iter_mut().enumerate() {
            // SAFETY: 16 readable values, by the caller's promise.
            *column = simd.load(unsafe { &*b.wrapping_add(unit * of.b_unit).cast() });
        }
        for (row, sums) in sums.iter_mut().enumerate() {
            // SAFETY: one readable value, by the caller's promise.
            let value = simd.splat(unsafe { *a.wrapping_add(row * of.a_row) });
            for (sum, &column) in sums.iter_mut().zip(&columns) {
                *sum = simd.mul_add(value, column, *sum);
            }
        }
        a = a.wrapping_add(of.a_step);
        b = b.wrapping_add(of.b_row);
    }
    for (row, sums) in sums.iter().enumerate() {
        for (unit, &sum) in sums.iter().enumerate() {
            // SAFETY: 16 values that only this call reads and writes, by the caller's promise.
            let out = unsafe { &mut *of.out.wrapping_add(row * of.out_row + unit * UNIT).cast() };
            let sum = if of.accumulate { simd.add(sum, simd.load(out)) } else { sum };
            simd.store(out, sum);
        }
    }
}

/// Calls the tile of the right size.
macro_rules! sized_tile {
    ($simd:expr, $rows:expr, $units:expr, $of:expr, [$($r:literal)*], $u:tt) => {
        match $rows {
            $( $r => sized_tile!(@row $simd, $units, $of, $r, $u), )*
            _ => {}
        }
    };
    (@row $simd:expr, $units:expr, $of:expr, $r:literal, [$($u:literal)*]) => {
        match $units {
            // SAFETY: the promise of the caller of `Simd::tile`.
            $( $u => unsafe { tile::<_, $r, $u>($simd, $of) }, )*
            _ => {}
        }
    };
}

// Behind the macro, which it uses.
#[cfg(target_arch = "x86_64")]
mod x86;

/// Any CPU: plain loops, which compilers turn into what the target has at least.
#[derive(Clone, Copy)]
pub(crate) struct Portable;

impl Portable {
    #[inline(always)]
    fn zip(a: [f32; UNIT], b: [f32; UNIT], f: impl Fn(f32, f32) -> f32) -> [f32; UNIT] {
        std::array::from_fn(|lane| f(a[lane], b[lane]))
    }
}

impl Simd for Portable {
    type Unit = [f32; UNIT];

    #[inline(always)]
    fn splat(self, value: f32) -> Self::Unit {
        [value; UNIT]
    }
    #[inline(always)]
    fn load(self, from: &[f32; UNIT]) -> Self::Unit {
        *from
    }
    #[inline(always)]
    fn store(self, to: &mut [f32; UNIT], value: Self::Unit) {
        *to = value;
    }
    #[inline(always)]
    fn add(self, a: Self::Unit, b: Self::Unit) -> Self::Unit {
        Self::zip(a, b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, a: Self::Unit, b: Self::Unit) -> Self::Unit {
        Self::zip(a, b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, a: Self::Unit, b: Self::Unit) -> Self::Unit {
        Self::zip(a, b, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, a: Self::Unit, b: Self::Unit) -> Self::Unit {
        Self::zip(a, b, |a, b| a / b)
    }
    #[inline(always)]
    fn mul_add(self, a: Self::Unit, b: Self::Unit, c: Self::Unit) -> Self::Unit {
        // `f32::mul_add` is a call into the C library where the target has no such instruction.
        std::array::from_fn(|lane| a[lane] * b[lane] + c[lane])
    }
    #[inline(always)]
    fn max(self, a: Self::Unit, b: Self::Unit) -> Self::Unit {
        Self::zip(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn min(self, a: Self::Unit, b: Self::Unit) -> Self::Unit {
        Self::zip(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn round(self, a: Self::Unit) -> Self::Unit {
        a.map(f32::round_ties_even)
    }
    #[inline(always)]
    fn scale_by_power(self, a: Self::Unit, n: Self::Unit) -> Self::Unit {
        Self::zip(a, n, |a, n| a * f32::from_bits(((n as i32 + 127) as u32) << 23))
    }
    #[inline(always)]
    fn look_up(self, table: Self::Unit, codes: u64) -> Self::Unit {
        std::array::from_fn(|lane| table[(codes >> shift_of(lane)) as usize & 15])
    }
    #[inline(always)]
    fn round_to_bf16(self, a: Self::Unit) -> Self::Unit {
        a.map(|a| half::bf16::from_f32(a).to_f32())
    }
    #[inline(always)]
    fn round_to_f16(self, a: Self::Unit) -> Self::Unit {
        a.map(|a| half::f16::from_f32(a).to_f32())
    }
    #[inline(always)]
    fn prefetch(self, _: *const f32) {}
    unsafe fn tile(self, rows: usize, units: usize, of: &Tile) {
        for unit in 0..units {
            let of = of.unit(unit);
            sized_tile!(self, rows, 1, &of, [6 5 4 3 2 1], [1]);
        }
    }
}

impl Tile {
    /// One unit of it, which fetches the lines of that unit.
    fn unit(&self, unit: usize) -> Self {
        Self {
            b: self.b.wrapping_add(unit * self.b_unit),
            out: self.out.wrapping_add(unit * UNIT),
            fetch: self.fetch.wrapping_add(unit * self.fetch_unit),
            fetch_lines: usize::from(unit < self.fetch_lines),
            ..*self
        }
    }
}

/// A matrix in units of 16 columns: value `(k, 16 u + lane)` is at `k * row + u * unit + lane`.
#[derive(Clone, Copy)]
pub(crate) struct Units<'a> {
    pub(crate) values: &'a [f32],
    pub(crate) row: usize,
    pub(crate) unit: usize,
}

/// Columns of a row-major matrix that one thread alone writes to.
pub(crate) struct Columns<'a> {
    start: *mut f32,
    rows: usize,
    row: usize,
    width: usize,
    matrix: PhantomData<&'a mut [f32]>,
}

// SAFETY: it is the only way to its values, like a `&mut [f32]`, which is `Send`.
unsafe impl Send for Columns<'_> {}

impl<'a> Columns<'a> {
    /// All columns of a matrix whose rows are `row` long.
    pub(crate) fn of(matrix: &'a mut [f32], row: usize) -> Self {
        let rows = matrix.len() / row;
        Self { start: matrix.as_mut_ptr(), rows, row, width: row, matrix: PhantomData }
    }

    /// Some columns of the first `rows` rows, which are `row` apart; the last one may end with them.
    pub(crate) fn rows_of(
        matrix: &'a mut [f32],
        rows: usize,
        row: usize,
        columns: Range<usize>,
    ) -> Self {
        assert!(columns.start <= columns.end && columns.end <= row && rows > 0);
        assert!((rows - 1) * row + columns.end <= matrix.len());
        let start = matrix.as_mut_ptr().wrapping_add(columns.start);
        Self { start, rows, row, width: columns.end - columns.start, matrix: PhantomData }
    }

    /// One row.
    pub(crate) fn row(&mut self, row: usize) -> &mut [f32] {
        assert!(row < self.rows);
        // SAFETY: the row is in the matrix, and no other `Columns` has any of its values.
        unsafe {
            std::slice::from_raw_parts_mut(self.start.wrapping_add(row * self.row), self.width)
        }
    }

    /// The matrix cut into ranges of columns, which must rise without overlap.
    pub(crate) fn cut(self, ranges: &[Range<usize>]) -> Vec<Self> {
        let mut end = 0;
        let mut cut = Vec::with_capacity(ranges.len());
        for range in ranges {
            assert!(end <= range.start && range.start <= range.end && range.end <= self.width);
            end = range.end;
            let start = self.start.wrapping_add(range.start);
            cut.push(Self { start, width: range.end - range.start, ..self });
        }
        cut
    }

    pub(crate) fn rows(&self) -> usize {
        self.rows
    }
}

/// A product of rows and units: `out[rows][units] (+)= a[rows][..depth] * b[..depth][units]`.
pub(crate) struct Product<'a> {
    /// Rows `a_row` apart, the values of one `a_step`: 1, but for the transpose of what lies there.
    pub(crate) a: &'a [f32],
    pub(crate) a_row: usize,
    pub(crate) a_step: usize,
    pub(crate) b: Units<'a>,
    pub(crate) depth: usize,
    /// Add to what `out` holds.
    pub(crate) accumulate: bool,
    /// What is needed next, to be fetched meanwhile: one, two or four units, 16 values a step.
    pub(crate) fetch: Option<(Units<'a>, usize)>,
}

impl Product<'_> {
    /// Computes it into `rows` of the columns from `at` on.
    #[inline(always)]
    pub(crate) fn run<S: Simd>(
        &self,
        simd: S,
        out: &mut Columns<'_>,
        (rows, units): (Range<usize>, usize),
        at: usize,
    ) {
        let count = rows.end - rows.start;
        assert!(count <= MAX_ROWS && units <= MAX_UNITS && count > 0 && units > 0);
        assert!(rows.end <= out.rows && at + units * UNIT <= out.width);
        let (fetch, fetch_unit, fetch_lines) = match self.fetch {
            Some((of, lines)) => (of.values.as_ptr(), of.unit, lines),
            None => (std::ptr::null(), 0, 0),
        };
        if self.depth > 0 {
            let last = self.depth - 1;
            assert!((count - 1) * self.a_row + last * self.a_step < self.a.len());
            assert!(last * self.b.row + (units - 1) * self.b.unit + UNIT <= self.b.values.len());
        }
        let of = Tile {
            depth: self.depth,
            a: self.a.as_ptr(),
            a_row: self.a_row,
            a_step: self.a_step,
            b: self.b.values.as_ptr(),
            b_row: self.b.row,
            b_unit: self.b.unit,
            out: out.start.wrapping_add(rows.start * out.row + at),
            out_row: out.row,
            accumulate: self.accumulate,
            fetch,
            fetch_unit,
            fetch_lines,
        };
        // SAFETY: the assertions above bound all three operands; `out` is borrowed mutably, and
        // other `Columns` of the matrix do not overlap with it.
        unsafe { simd.tile(count, units, &of) }
    }
}

/// Cuts `count` into the fewest ranges of at most `most`, as even as can be.
pub(crate) fn even_parts(count: usize, most: usize) -> impl Iterator<Item = Range<usize>> {
    let parts = count.div_ceil(most);
    (0..parts).map(move |part| part * count / parts..(part + 1) * count / parts)
}
