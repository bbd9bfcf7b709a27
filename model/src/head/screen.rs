//! Which tokens may have the greatest logit, found without computing any. In: a head, once; then rows. Out: for each row the few
//! tokens among which the greatest is. Never here: a logit; a token left out that might win.
//!
//! Decoding greedily wants one token of a whole vocabulary, and a head in BF16 may be as large as all else that a token reads. A
//! line w of it is kept as w = s q + e, q of whole numbers up to 127, and a row as x = t p + d, p of whole numbers up to some
//! thousands. Then w x = s t (q p) + e x + s q d, where q p is exact and reads half of what w would, and the other two
//! are at most |e| |x| + |s q| |d| (Cauchy and Schwarz), of which the norms of lines are known beforehand. Who with the most that may be
//! added to him stays below what another has at least is out.

use parking_lot::Mutex;

use super::kernels;
use crate::{
    kernels::{Isa, Matrix, Rows, matrix::Values, team},
    wire::all_finite,
};

/// Lines that one thread takes at once.
const PART: usize = 256;
/// Whole numbers of a row, at most: more would make its own error small beside the lines', which it is already.
const MOST_STEPS: f32 = 4095.0;
/// What a logit computed in f32 may be off by, and the norms of lines and rows too: a share of |w| |x|.
pub(super) const ROUNDING: f32 = 1.0 / 4096.0;
/// What it may lose when it becomes BF16, twice, as a share of itself.
const AS_BF16: f32 = 1.0 / 64.0;
/// Where one in so many of a vocabulary may win, all are computed.
const MOST_CANDIDATES: usize = 8;
/// Rows that a line is multiplied with at once.
const ROWS: usize = 4;

/// A head, `[vocab_size, D]`, in whole numbers.
#[derive(Debug)]
pub(super) struct Screen {
    inner: usize,
    /// `[vocab_size, D]`
    codes: Vec<i8>,
    worth: Vec<Worth>,
}

/// What whole numbers are worth.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Worth {
    /// One of them: s, t.
    pub(super) step: f32,
    /// What they leave, its norm: |e|, |d|.
    pub(super) left: f32,
    /// All together, their norm: |s q|, |t p|.
    pub(super) norm: f32,
}

/// What is known of the logits of one part.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Known {
    /// The greatest is not below.
    pub(super) least: f32,
    /// None is above.
    pub(super) most: f32,
}

impl Screen {
    /// `None` where the head has what is no number, or nothing.
    pub(super) fn of(head: &Matrix<'_>) -> Option<Self> {
        let (vocab, inner) = (head.out, head.inner);
        let all = match head.values {
            Values::F32(values) => Rows::F32(values),
            Values::Bf16(values) => Rows::Bf16(values),
            Values::Fp8 { .. } => return None,
        };
        let mut screen = Self { inner, codes: vec![0; vocab * inner], worth: vec![Worth::default(); vocab] };
        let parts: Vec<_> =
            screen.codes.chunks_mut(PART * inner).zip(screen.worth.chunks_mut(PART)).map(Mutex::new).collect();
        team::run(parts.len(), &|part| {
            let (codes, worth) = &mut *parts[part].lock();
            for (nth, (codes, worth)) in codes.chunks_exact_mut(inner).zip(worth.iter_mut()).enumerate() {
                let values = all.part((part * PART + nth) * inner, inner).to_f32(Isa::best());
                *worth = kernels::line_in_steps(&values, codes);
            }
        });
        drop(parts);
        let numbers = screen.worth.iter().all(|worth| (worth.left + worth.norm).is_finite());
        (numbers && vocab > 0).then_some(screen)
    }

    /// Whether reading the screen for so many rows costs less than computing all their logits. Where BF16 is multiplied as it is, one
    /// row's logits cost about what sixteen rows' do, and the screen's whole numbers do not.
    pub(super) fn suits(isa: Isa, rows: usize) -> bool {
        match isa {
            Isa::Amx | Isa::Avx512Bf16 => rows <= ROWS,
            Isa::Avx512 | Isa::Avx2 | Isa::Portable => true,
        }
    }

    /// For each of the rows `x` `[T, D]` the tokens that may have the greatest logit, the lowest first; `None` where they are
    /// many, or the row is no numbers.
    pub(super) fn candidates(&self, x: &[f32]) -> Vec<Option<Vec<u32>>> {
        let rows: Vec<Row> = x.chunks_exact(self.inner).map(Row::of).collect();
        let parts: Vec<Mutex<Vec<OfPart>>> = self.worth.chunks(PART).map(|_| Mutex::default()).collect();
        team::run(parts.len(), &|part| *parts[part].lock() = self.part(part, &rows));
        let parts: Vec<Vec<OfPart>> = parts.into_iter().map(Mutex::into_inner).collect();
        let of_row = |row| parts.iter().map(move |of_rows| &of_rows[row]);
        (0..rows.len()).map(|row| if rows[row].finite { self.may_win(of_row(row)) } else { None }).collect()
    }

    /// What may be said of part `part`, for each of `rows`.
    fn part(&self, part: usize, rows: &[Row]) -> Vec<OfPart> {
        let worth = &self.worth[part * PART..];
        let worth = &worth[..PART.min(worth.len())];
        let codes = &self.codes[part * PART * self.inner..][..worth.len() * self.inner];
        let mut of_rows: Vec<OfPart> =
            rows.iter().map(|_| OfPart { most: vec![0.0; worth.len()], known: Known::default() }).collect();
        let mut dots = vec![0; rows.len() * worth.len()];
        for (nth, codes) in codes.chunks_exact(self.inner).enumerate() {
            for (first, rows) in (0..).step_by(ROWS).zip(rows.chunks(ROWS)) {
                let mut put = |row: usize, dot| dots[(first + row) * worth.len() + nth] = dot;
                if let [a, b, c, d] = rows {
                    let four = kernels::four_dots(codes, [&a.steps, &b.steps, &c.steps, &d.steps]);
                    four.into_iter().enumerate().for_each(|(row, dot)| put(row, dot));
                } else {
                    rows.iter().enumerate().for_each(|(row, x)| put(row, kernels::dot(codes, &x.steps)));
                }
            }
        }
        for ((of_row, row), dots) in of_rows.iter_mut().zip(rows).zip(dots.chunks_exact(worth.len())) {
            of_row.known = kernels::bounds(worth, row.worth, dots, &mut of_row.most);
        }
        of_rows
    }

    fn may_win<'a>(&self, parts: impl Iterator<Item = &'a OfPart> + Clone) -> Option<Vec<u32>> {
        let least = parts.clone().map(|part| part.known.least).fold(f32::NEG_INFINITY, f32::max);
        let least = least - least.abs() * AS_BF16;
        if !least.is_finite() {
            return None;
        }
        let most = self.worth.len() / MOST_CANDIDATES;
        let mut candidates = Vec::new();
        for (first, part) in (0..).step_by(PART).zip(parts).filter(|(_, part)| part.known.most >= least) {
            let may_win = |(token, logit): (u32, &f32)| (*logit >= least).then_some(token);
            candidates.extend((first..).zip(&part.most).filter_map(may_win));
            if candidates.len() > most {
                return None;
            }
        }
        (!candidates.is_empty()).then_some(candidates)
    }
}

/// A row in whole numbers.
struct Row {
    /// p
    steps: Vec<i16>,
    worth: Worth,
    /// Whether they say anything of the row.
    finite: bool,
}

/// One row's logits of one part.
struct OfPart {
    /// None is above.
    most: Vec<f32>,
    known: Known,
}

impl Row {
    fn of(x: &[f32]) -> Self {
        // No sum of products with a line's numbers may be too large.
        let most_steps = MOST_STEPS.min((i32::MAX as usize / 128 / x.len()) as f32).max(1.0);
        let mut steps = vec![0; x.len()];
        let worth = kernels::row_in_steps(x, most_steps, &mut steps);
        let finite = all_finite(x) && worth.step >= f32::MIN_POSITIVE && (worth.left + worth.norm).is_finite();
        Self { steps, worth, finite }
    }
}
