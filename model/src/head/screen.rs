//! Which tokens may have the greatest logit, found without computing any. In: a head, once; then rows. Out: for each
//! row a token that probably has it, and once its logit is known, the few tokens that may have a greater one. Never
//! here: a logit.
//!
//! Decoding greedily wants one token of a whole vocabulary, and a head in BF16 may be as large as all else that a
//! token reads. A line w of it is kept in whole numbers n of 4 bits: w = w' + e with w' = s (n - 8 - u), s a step of
//! its block's; a row in p of 8 bits: x = t (p - v) + d. What is added before values are rounded, u and v, was drawn
//! for each place from between -1/2 and 1/2. That makes e and d uniform draws of half a step at most to either side,
//! independent from place to place, whatever w and x are (subtractive dither; Schuchman 1964). Then
//!
//! w x = t (s n) p - t s (8 + u) p - t w' v + w' d + e x.
//!
//! The first is a sum of whole numbers, and reads a quarter of what w would; the second is one number per block, for
//! all lines; the third one per line, for all rows.
//!
//! The others are sums of independent uniform draws. Such a sum is beyond k standard deviations to either side with a
//! chance of less than 2 exp(-k²/2): by Chernoff's bound, since a uniform draw's exponential moments are below those
//! of a normal one of its variance, sinh(h) / h <= exp(h² / 6). With [`DEVIATIONS`] for each of the two that is
//! 2.1e-26 a logit: a token that is not the greatest is taken with a chance of less than 10^-20. The draws are made
//! once, so that is the chance of a row and a head over all draws: the same row meets the same ones again, and rows
//! do not depend on them. Who with the most that may be added stays below a logit that is known is out.
//!
//! Before all this, lines and rows are turned, which leaves their products as they are: signs drawn at random and a
//! Hadamard transform within blocks spread what is large in one place over all, and steps become smaller.

use parking_lot::Mutex;

use super::kernels::{self, BLOCK, BYTES, PART};
use crate::{
    kernels::{Isa, Matrix, Rows, matrix::Values, team},
    wire::all_finite,
};

/// Sums of what was drawn are taken to be off by so many standard deviations, at most.
pub(super) const DEVIATIONS: f32 = 11.0;
/// What a logit computed in f32 may be off by, and what is computed here: a share of |w| |x|.
pub(super) const ROUNDING: f32 = 1.0 / 4096.0;
/// What it may lose when it becomes BF16, twice, as a share of itself.
const AS_BF16: f32 = 1.0 / 64.0;
/// Where one in so many of a vocabulary may win, all are computed.
const MOST_CANDIDATES: usize = 8;
/// Rows that a line is multiplied with at once.
const ROWS: usize = 4;
/// Blocks of a line, at most: sums of whole numbers fit, and those of f32 are off by less than [`ROUNDING`].
const MOST_BLOCKS: usize = 128;

/// A head, `[vocab_size, D]`, in whole numbers.
#[derive(Debug)]
pub(super) struct Screen {
    inner: usize,
    /// B, of a line.
    blocks: usize,
    drawn: Drawn,
    /// Two numbers a byte, `[vocab_size, B, 32]`.
    codes: Vec<u8>,
    /// Steps of blocks, in steps of their line, `[ceil(vocab_size / 128), B, 128]`.
    sizes: Vec<u8>,
    /// `[vocab_size]`
    lines: Vec<Line>,
}

/// What was drawn for each place of a line, `[B, 64]`. It decides which logits are computed, and about none of them.
#[derive(Debug)]
pub(super) struct Drawn {
    /// 1 or -1.
    pub(super) signs: Vec<f32>,
    /// u
    pub(super) for_lines: Vec<f32>,
    /// v
    pub(super) for_rows: Vec<f32>,
}

/// What a line's numbers are worth.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Line {
    /// A step of the line, of which a block's are multiples.
    pub(super) step: f32,
    /// Neither |w| nor |w'| is more.
    pub(super) norm: f32,
    /// w' v
    pub(super) shift: f32,
}

/// A row in whole numbers.
#[derive(Debug)]
pub(super) struct Row {
    /// p, `[B, 64]`
    pub(super) codes: Vec<i8>,
    /// Of each block (8 + u) p, `[B]`.
    pub(super) offsets: Vec<f32>,
    /// Of each block the square of its norm, in steps of the row, `[B]`.
    pub(super) squares: Vec<f32>,
    pub(super) worth: Worth,
    /// Whether they say anything of the row.
    finite: bool,
}

/// What a row's numbers are worth.
#[derive(Clone, Copy, Debug)]
pub(super) struct Worth {
    /// One of them: t.
    pub(super) step: f32,
    /// |x|
    pub(super) norm: f32,
}

/// What is known of one row's logits.
#[derive(Debug)]
pub(super) struct Seen {
    /// Which token has probably the greatest.
    pub(super) likeliest: u32,
    /// How great each may be, by parts.
    most: Vec<Vec<f32>>,
}

/// One row's logits of one part.
#[derive(Debug)]
struct OfPart {
    most: Vec<f32>,
    /// Where the greatest is probably, and what it is then.
    likeliest: (usize, f32),
}

impl Screen {
    /// `None` where the head has what is no number, or nothing, or lines that are too long.
    pub(super) fn of(head: &Matrix<'_>) -> Option<Self> {
        let (vocab, inner) = (head.out, head.inner);
        let all = match head.values {
            Values::F32(values) => Rows::F32(values),
            Values::Bf16(values) => Rows::Bf16(values),
            Values::Fp8 { .. } => return None,
        };
        let blocks = inner.div_ceil(BLOCK);
        if vocab == 0 || !(1..=MOST_BLOCKS).contains(&blocks) {
            return None;
        }
        let mut screen = Self {
            inner,
            blocks,
            drawn: Drawn::draw(blocks * BLOCK),
            codes: vec![0; vocab * blocks * BYTES],
            sizes: vec![0; vocab.div_ceil(PART) * PART * blocks],
            lines: vec![Line::default(); vocab],
        };
        let (drawn, line_bytes) = (&screen.drawn, blocks * BYTES);
        let parts: Vec<_> = screen
            .codes
            .chunks_mut(PART * line_bytes)
            .zip(screen.sizes.chunks_exact_mut(PART * blocks))
            .zip(screen.lines.chunks_mut(PART))
            .map(Mutex::new)
            .collect();
        team::run(parts.len(), &|part| {
            let ((codes, sizes), lines) = &mut *parts[part].lock();
            for (nth, (codes, line)) in codes.chunks_exact_mut(line_bytes).zip(lines.iter_mut()).enumerate() {
                let values = all.part((part * PART + nth) * inner, inner).to_f32(Isa::best());
                *line = kernels::line_in_steps(&drawn.turned(&values), drawn, codes, &mut sizes[nth..]);
            }
        });
        drop(parts);
        screen.lines.iter().all(|line| line.norm.is_finite()).then_some(screen)
    }

    /// Whether reading the screen for so many rows costs less than computing all their logits. Where BF16 is
    /// multiplied as it is, one row's logits cost about what sixteen rows' do, and the screen's whole numbers do not.
    pub(super) fn suits(isa: Isa, rows: usize) -> bool {
        match isa {
            Isa::Amx | Isa::Avx512Bf16 => rows <= ROWS,
            Isa::Avx512 | Isa::Avx2 | Isa::Portable => true,
        }
    }

    /// What may be said of the logits of each of the rows `x` `[T, D]`; `None` where the row is no numbers.
    pub(super) fn look(&self, x: &[f32]) -> Vec<Option<Seen>> {
        let rows: Vec<Row> = x.chunks_exact(self.inner).map(|x| Row::of(x, &self.drawn)).collect();
        let parts: Vec<Mutex<Vec<OfPart>>> = self.lines.chunks(PART).map(|_| Mutex::default()).collect();
        team::run(parts.len(), &|part| *parts[part].lock() = self.part(part, &rows));
        let mut seen: Vec<Seen> = rows.iter().map(|_| Seen { likeliest: 0, most: Vec::new() }).collect();
        let mut greatest = vec![f32::NEG_INFINITY; rows.len()];
        for (part, of_rows) in parts.into_iter().map(Mutex::into_inner).enumerate() {
            for ((seen, greatest), of_part) in seen.iter_mut().zip(&mut greatest).zip(of_rows) {
                let (at, logit) = of_part.likeliest;
                if logit > *greatest {
                    (seen.likeliest, *greatest) = ((part * PART + at) as u32, logit);
                }
                seen.most.push(of_part.most);
            }
        }
        seen.into_iter().zip(&rows).map(|(seen, row)| row.finite.then_some(seen)).collect()
    }

    /// What may be said of part `part`, for each of `rows`.
    fn part(&self, part: usize, rows: &[Row]) -> Vec<OfPart> {
        let first = part * PART;
        let lines = &self.lines[first..self.lines.len().min(first + PART)];
        let sizes = &self.sizes[first * self.blocks..][..PART * self.blocks];
        let line_bytes = self.blocks * BYTES;
        let codes = &self.codes[first * line_bytes..][..lines.len() * line_bytes];
        let mut of_rows = Vec::with_capacity(rows.len());
        for rows in rows.chunks(ROWS) {
            let mut dots = [[0.0; PART]; ROWS];
            for (nth, codes) in codes.chunks_exact(line_bytes).enumerate() {
                let sizes = &sizes[nth..];
                if let [a, b, c, d] = rows {
                    let four = kernels::dots(codes, sizes, [a, b, c, d].map(|row| row.codes.as_slice()));
                    (0..ROWS).for_each(|row| dots[row][nth] = four[row]);
                } else {
                    for (dots, row) in dots.iter_mut().zip(rows) {
                        [dots[nth]] = kernels::dots(codes, sizes, [&row.codes]);
                    }
                }
            }
            of_rows.extend(rows.iter().zip(&dots).map(|(row, dots)| {
                let mut most = vec![0.0; lines.len()];
                let likeliest = kernels::bounds(lines, sizes, row, dots, &mut most);
                OfPart { most, likeliest }
            }));
        }
        of_rows
    }
}

impl Seen {
    /// Tokens whose logit may be `logit` or greater, the lowest first; `None` where they are many.
    pub(super) fn not_below(&self, logit: f32) -> Option<Vec<u32>> {
        let least = logit - logit.abs() * AS_BF16;
        let vocab: usize = self.most.iter().map(Vec::len).sum();
        let mut candidates = Vec::new();
        // Nearly all parts have none, which a loop without a branch finds sooner than one that keeps what it finds.
        let any = |most: &[f32]| most.iter().fold(false, |any, most| any | (*most >= least));
        for (first, most) in (0..).step_by(PART).zip(&self.most).filter(|(_, most)| any(most)) {
            candidates.extend((first..).zip(most).filter_map(|(token, most)| (*most >= least).then_some(token)));
            if candidates.len() > vocab / MOST_CANDIDATES {
                return None;
            }
        }
        Some(candidates)
    }
}

impl Drawn {
    fn draw(places: usize) -> Self {
        let draw = || (0..places).map(|_| rand::random::<f32>() - 0.5).collect();
        Self {
            signs: (0..places).map(|_| if rand::random() { 1.0 } else { -1.0 }).collect(),
            for_lines: draw(),
            for_rows: draw(),
        }
    }

    /// A line or a row as it is kept, `[B, 64]`.
    fn turned(&self, values: &[f32]) -> Vec<f32> {
        let mut turned = vec![0.0; self.signs.len()];
        turned[..values.len()].copy_from_slice(values);
        kernels::turn(&mut turned, &self.signs);
        turned
    }
}

impl Row {
    fn of(x: &[f32], drawn: &Drawn) -> Self {
        let places = drawn.signs.len();
        let (mut codes, blocks) = (vec![0; places], places / BLOCK);
        let (mut offsets, mut squares) = (vec![0.0; blocks], vec![0.0; blocks]);
        let turned = drawn.turned(x);
        let worth = kernels::row_in_steps(&turned, drawn, &mut codes, &mut offsets, &mut squares);
        let finite = all_finite(x) && worth.step >= f32::MIN_POSITIVE && worth.norm.is_finite();
        Self { codes, offsets, squares, worth, finite }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of a line, at a place.
    type Value<'a> = dyn Fn(usize, usize) -> f32 + 'a;

    /// All kinds of lines, and a row with one large value.
    #[test]
    fn estimates_are_off_by_what_draws_are() {
        const VOCAB: usize = 1500;
        let draw = || rand::random::<f32>() - 0.5;
        let row = |place: usize| (place as f32 * 0.01).sin() + if place == 3 { 9.0 } else { 0.0 };
        let kinds: [(&str, &Value<'_>); 4] = [
            ("drawn", &|_, _| draw()),
            ("all the same", &|line, _| line as f32),
            ("some far larger", &|_, place| if place % 50 == 7 { 40.0 * draw() } else { draw() }),
            ("like the row", &|_, place| row(place) + 0.1 * draw()),
        ];
        for (kind, value) in kinds {
            for inner in [100, 576, 2048] {
                let head: Vec<f32> = (0..VOCAB * inner).map(|at| value(at / inner, at % inner)).collect();
                let screen = Screen::of(&Matrix::new(Values::F32(&head), VOCAB, inner)).unwrap();
                let x: Vec<f32> = (0..inner).map(row).collect();
                // A row and its opposite: half the sum is what may be above, half the difference the estimate, but
                // for what the row's own numbers lose, which is not of opposite sign and counts for less here.
                let [most, of_opposite] = [1.0, -1.0].map(|sign| {
                    screen.look(&x.iter().map(|x| sign * x).collect::<Vec<_>>()).remove(0).unwrap().most.concat()
                });
                let shares =
                    head.chunks_exact(inner).zip(most.iter().zip(&of_opposite)).map(|(line, (most, of_opposite))| {
                        let logit: f64 = line.iter().zip(&x).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum();
                        let (most, of_opposite) = (f64::from(*most), f64::from(*of_opposite));
                        ((most - of_opposite) / 2.0 - logit) / ((most + of_opposite) / 2.0)
                    });
                let largest = shares.fold(0f64, |most, share| most.max(share.abs()));
                // Seven deviations: none in a thousand million draws.
                assert!(largest < 7.0 / f64::from(DEVIATIONS), "{kind}, {inner}: {largest}");
            }
        }
    }
}
