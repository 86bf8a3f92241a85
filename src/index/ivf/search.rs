//! Searching the lists.

use std::ops::Range;

use half::slice::HalfFloatSliceExt;

use super::Ivf;
use super::codes::Codes;
use super::parts::{Lists, Vectors};
use crate::candidates::{Packed, Scored, keep_best};
use crate::catalog::generation::{Metric, NO_ROW};
use crate::index::fastscan::{self, BLOCK, Tables, Terms};
use crate::index::refine::{self, WideQuery};
use crate::index::select::Select;
use crate::index::{Filter, Kernel, SearchParams, SearchScratch};
use crate::memory::{prefetch, prefetch_range};

/// Blocks whose scores are computed before they are looked at: they stay in the L1 cache.
pub(super) const AT_ONCE: usize = 8;
/// Candidates for the lists, as a multiple of the lists that are scanned.
const COARSE_RATIO: usize = 3;
/// Up to so many results are scored exactly in the end: 8 bits would cost recall there.
pub const EXACT_BELOW: usize = 128;
/// Vectors that pay for one random read of a whole vector, when it is decided to read all that a filter admits.
const READS: f64 = 40.0;
/// How the scanned share grows as the share that a filter admits falls.
const FILTER_EXPONENT: f64 = 0.6;

/// Buffers of a search in inverted lists.
#[derive(Debug, Default)]
pub struct IvfScratch {
    unit: Vec<f32>,
    rotated: Vec<f32>,
    tables: Tables,
    wide: WideQuery,
    pub(super) select: Select,
    ranked: Vec<Packed>,
    /// Lists to scan, best first.
    pub(super) probes: Vec<u32>,
    /// By list: the query's product with the centroid, where the list is scanned.
    bases: Vec<f32>,
    scores: Vec<f32>,
    rows: Vec<u32>,
    /// Vectors that are stored in 2 bytes a value.
    converted: Vec<f32>,
    n_refined: usize,
}

/// What is asked, but for the query.
pub(super) struct Asked<'a> {
    /// At least 1, at most the number of rows.
    pub k: usize,
    pub filter: Filter<'a>,
    pub params: &'a SearchParams,
}

impl Ivf {
    /// How many lists are scanned without a filter.
    pub(super) fn n_probes(&self, k: usize, params: &SearchParams) -> usize {
        params.n_probes_of(k, self.exact.rows().n_rows(), self.parts.n_lists())
    }

    /// How many candidates are refined.
    fn n_refined(&self, k: usize, params: &SearchParams) -> usize {
        params.n_refined_of(k, self.parts.kind)
    }

    pub(super) fn run(
        &self,
        query: &[f32],
        k: usize,
        filter: Filter<'_>,
        params: &SearchParams,
        scratch: &mut SearchScratch,
        out: &mut Vec<Scored>,
    ) {
        let mut ivf = std::mem::take(&mut scratch.ivf);
        let asked = Asked { k: k.min(self.exact.rows().n_rows()), filter, params };
        if asked.k > 0
            && let share = filter.share(self.exact.rows().n_rows())
            && let Some(query_norm) = self.begin(query, &asked, share, scratch, &mut ivf, out)
        {
            self.begin_scan(&asked, &mut ivf);
            self.scan(filter, &mut ivf);
            self.finish(query, query_norm, &asked, scratch, &mut ivf, out);
        }
        scratch.ivf = ivf;
    }

    /// Finds the lists to scan. `None`: there is nothing to scan, and what there is to find is in `out`; else `|q|`. `share` is
    /// the filter's.
    pub(super) fn begin(
        &self,
        query: &[f32],
        asked: &Asked<'_>,
        share: f64,
        scratch: &mut SearchScratch,
        ivf: &mut IvfScratch,
        out: &mut Vec<Scored>,
    ) -> Option<f32> {
        let &Asked { k, filter, params } = asked;
        let n = self.exact.rows().n_rows();
        if query.len() != self.parts.dim || query.iter().any(|v| !v.is_finite()) {
            return None;
        }
        let query_norm = self.exact.kernel().dot(query, query).sqrt();
        // Cosine: against unit vectors.
        let unit = if self.exact.metric() == Metric::Cosine && query_norm > 0.0 { 1.0 / query_norm } else { 1.0 };
        ivf.unit.clear();
        ivf.unit.extend(query.iter().map(|v| v * unit));

        let mut n_probes = self.n_probes(k, params);
        if share < 1.0 {
            let admitted = share * n as f64;
            n_probes = (n_probes as f64 / share.max(1e-9).powf(FILTER_EXPONENT)).ceil() as usize;
            let scanned = n_probes.min(self.parts.n_lists()) as f64 / self.parts.n_lists() as f64 * n as f64;
            if admitted * READS <= scanned || admitted <= k as f64 {
                let SearchScratch { best, block, exact, .. } = scratch;
                ivf.rows.clear();
                filter.each(n, |row| ivf.rows.push(row));
                self.exact.rescore(query, &ivf.rows, block, exact, best);
                keep_best(best, k);
                out.extend(best.iter().map(|&p| Scored::from(p)));
                return None;
            }
        }
        self.rotation.apply(&ivf.unit, &mut ivf.rotated);
        self.rank_lists(query_norm * unit, n_probes.min(self.parts.n_lists()), ivf);
        Some(query_norm)
    }

    /// Makes ready for scores of the lists.
    pub(super) fn begin_scan(&self, asked: &Asked<'_>, ivf: &mut IvfScratch) {
        let keep = match &self.parts.lists {
            Lists::Flat(_) => asked.k,
            Lists::Pq { codes, .. } | Lists::Rabitq(codes) => {
                let words = self.codebook.as_ref().map_or(&self.signs.words, |book| &book.words);
                ivf.tables.prepare(self.simd, &ivf.rotated, codes.layout.n_subspaces, words);
                self.n_refined(asked.k, asked.params)
            }
        };
        ivf.select.begin(keep);
        ivf.n_refined = keep;
    }

    /// Finds the best among what was selected.
    pub(super) fn finish(
        &self,
        query: &[f32],
        query_norm: f32,
        asked: &Asked<'_>,
        scratch: &mut SearchScratch,
        ivf: &mut IvfScratch,
        out: &mut Vec<Scored>,
    ) {
        let k = asked.k;
        let SearchScratch { best, block, exact, .. } = scratch;
        best.clear();
        match &self.parts.lists {
            Lists::Flat(_) => {
                ivf.select.prune(self.simd, 0);
                let (scores, positions) = ivf.select.kept();
                let found = positions.iter().zip(scores);
                best.extend(
                    found.map(|(&at, &score)| Packed::from(Scored { row: self.parts.ids[at as usize], score })),
                );
            }
            Lists::Pq { codes, .. } | Lists::Rabitq(codes) => {
                ivf.select.prune(self.simd, ivf.n_refined / 16);
                self.refine(codes, ivf, best);
            }
        }
        if k <= EXACT_BELOW && !matches!(self.parts.lists, Lists::Flat(Vectors::F32(_))) {
            keep_best(best, k + k / 4 + 16);
            ivf.rows.clear();
            ivf.rows.extend(best.iter().map(|&p| Scored::from(p).row));
            self.exact.rescore(query, &ivf.rows, block, exact, best);
            keep_best(best, k);
            out.extend(best.iter().map(|&p| Scored::from(p)));
        } else {
            keep_best(best, k);
            out.extend(
                best.iter()
                    .map(|&p| Scored::from(p))
                    .map(|s| Scored { score: self.metric_score(s.score, query_norm), ..s }),
            );
        }
    }

    /// What lists are ordered and vectors selected by, as the metric's score: for L2 that is `<q, x> - |x|²/2`.
    fn metric_score(&self, score: f32, query_norm: f32) -> f32 {
        match self.exact.metric() {
            Metric::InnerProduct => score,
            Metric::Cosine if query_norm > 0.0 => score,
            Metric::Cosine => 0.0,
            Metric::L2 => 2.0 * score - query_norm * query_norm,
        }
    }

    /// Fills `ivf.probes` with the lists that promise most, best first, and `ivf.bases` for them.
    fn rank_lists(&self, length: f32, n_probes: usize, ivf: &mut IvfScratch) {
        let IvfScratch { rotated, tables, wide, select, ranked, probes, bases, scores, rows, .. } = ivf;
        let (coarse, n_lists) = (&self.parts.coarse, self.parts.n_lists());
        let weight = if self.exact.metric() == Metric::L2 { 1.0 } else { length };
        wide.prepare(rotated);
        ranked.clear();
        bases.resize(n_lists, 0.0);
        let score = |list: u32, dot: f32| {
            let (block, lane) = (list as usize / BLOCK, list as usize % BLOCK);
            let bytes = coarse.layout.bytes();
            let bias = coarse.layout.bias(&coarse.blocks[block * bytes..(block + 1) * bytes], lane);
            coarse.scales[block] * dot + weight * bias
        };
        if n_probes * COARSE_RATIO * 2 >= n_lists {
            select.begin(n_lists);
            rows.clear();
            rows.extend(0..n_lists as u32);
            refine::each(
                self.simd,
                wide,
                &coarse.refined,
                rows,
                |_| {},
                |at, dot| {
                    ranked.push(Packed::from(Scored { row: rows[at], score: score(rows[at], dot) }));
                },
            );
        } else {
            tables.prepare(self.simd, rotated, coarse.layout.n_subspaces, &self.signs.words);
            select.begin(n_probes * COARSE_RATIO);
            let bytes = coarse.layout.bytes();
            for first in (0..n_lists).step_by(AT_ONCE * BLOCK) {
                let n = (n_lists - first).div_ceil(BLOCK).min(AT_ONCE);
                let blocks = &coarse.blocks[first / BLOCK * bytes..(first / BLOCK + n) * bytes];
                scores.resize(AT_ONCE * BLOCK, 0.0);
                fastscan::scan(
                    self.simd,
                    coarse.layout,
                    blocks,
                    tables,
                    Terms { base: 0.0, weight },
                    &mut scores[..n * BLOCK],
                );
                for (at, scores) in scores[..n * BLOCK].as_chunks::<BLOCK>().0.iter().enumerate() {
                    let from = first + at * BLOCK;
                    let lanes = if n_lists - from >= BLOCK { u32::MAX } else { (1 << (n_lists - from)) - 1 };
                    select.push(self.simd, scores, from as u32, lanes, None);
                }
            }
            select.prune(self.simd, n_probes / 8);
            let lists = select.kept().1;
            refine::each(
                self.simd,
                wide,
                &coarse.refined,
                lists,
                |_| {},
                |at, dot| {
                    ranked.push(Packed::from(Scored { row: lists[at], score: score(lists[at], dot) }));
                },
            );
        }
        keep_best(ranked, n_probes);
        probes.clear();
        probes.extend(ranked.iter().map(|&list| Scored::from(list).row));
        let padded = self.parts.padded;
        let centroid = |list: u32| &self.parts.centroids[list as usize * padded..(list as usize + 1) * padded];
        for (at, &list) in probes.iter().enumerate() {
            if let Some(&later) = probes.get(at + 2) {
                prefetch_range(centroid(later), 0..padded);
            }
            bases[list as usize] = self.exact.kernel().dot(rotated, centroid(list));
        }
    }

    /// Scores the blocks of the lists to scan, some at a time, and selects.
    fn scan(&self, filter: Filter<'_>, ivf: &mut IvfScratch) {
        let mut scores = std::mem::take(&mut ivf.scores);
        scores.resize(AT_ONCE * BLOCK, 0.0);
        for at in 0..ivf.probes.len() {
            if let Some(&next) = ivf.probes.get(at + 1) {
                self.ask_for(next);
            }
            let list = ivf.probes[at];
            let range = self.parts.blocks_of(list as usize);
            for first in range.clone().step_by(AT_ONCE) {
                let blocks = first..(first + AT_ONCE).min(range.end);
                let scores = &mut scores[..blocks.len() * BLOCK];
                self.score(list, blocks.clone(), ivf, scores);
                self.offer(filter, blocks, scores, &mut ivf.select);
            }
        }
        ivf.scores = scores;
    }

    /// Asks the memory for the first blocks of a list.
    pub(super) fn ask_for(&self, list: u32) {
        if let Some(codes) = self.parts.codes() {
            let (bytes, blocks) = (codes.layout.bytes(), &codes.blocks[..]);
            let from = self.parts.blocks_of(list as usize).start * bytes;
            prefetch_range(blocks, from..(from + 2 * bytes).min(blocks.len()));
        }
    }

    /// The scores of some blocks of a list; `scores` is as long as they are.
    pub(super) fn score(&self, list: u32, range: Range<usize>, ivf: &mut IvfScratch, scores: &mut [f32]) {
        match &self.parts.lists {
            Lists::Flat(vectors) => self.score_vectors(vectors, range, ivf, scores),
            Lists::Pq { codes, .. } | Lists::Rabitq(codes) => {
                let bytes = codes.layout.bytes();
                let blocks = &codes.blocks[range.start * bytes..range.end * bytes];
                let terms = Terms { base: ivf.bases[list as usize], weight: 1.0 };
                fastscan::scan(self.simd, codes.layout, blocks, &ivf.tables, terms, scores);
            }
        }
    }

    fn score_vectors(&self, vectors: &Vectors, range: Range<usize>, ivf: &mut IvfScratch, scores: &mut [f32]) {
        let IvfScratch { unit, converted, .. } = ivf;
        let (dim, ids, kernel) = (self.parts.dim, &self.parts.ids[..], self.exact.kernel());
        let values = range.start * BLOCK * dim..range.end * BLOCK * dim;
        match vectors {
            Vectors::F32(all) => kernel.dots(unit, &all[values], scores),
            Vectors::F16(all) => dots_of_half(kernel, unit, &all[values], converted, scores),
            Vectors::Bf16(all) => dots_of_half(kernel, unit, &all[values], converted, scores),
        }
        if self.exact.metric() != Metric::InnerProduct {
            for (score, &row) in scores.iter_mut().zip(&ids[range.start * BLOCK..]) {
                if row != NO_ROW {
                    *score = match self.exact.metric() {
                        Metric::L2 => *score - 0.5 * self.exact.norms()[row as usize],
                        _ => *score * self.exact.norms()[row as usize],
                    };
                }
            }
        }
    }

    /// Offers the scores of blocks for selection, as far as the filter admits their rows.
    #[inline]
    pub(super) fn offer(&self, filter: Filter<'_>, blocks: Range<usize>, scores: &[f32], select: &mut Select) {
        let ids = &self.parts.ids[..];
        let admits = |position: u32| filter.allows(ids[position as usize]);
        let admits: Option<&dyn Fn(u32) -> bool> = if filter.is_all() { None } else { Some(&admits) };
        for (block, scores) in blocks.zip(scores.as_chunks::<BLOCK>().0) {
            select.push(self.simd, scores, (block * BLOCK) as u32, self.lanes[block], admits);
        }
    }

    /// Scores what was selected by its 8-bit codes.
    fn refine(&self, codes: &Codes, ivf: &IvfScratch, best: &mut Vec<Packed>) {
        let positions = ivf.select.kept().1;
        let (ids, bytes) = (&self.parts.ids[..], codes.layout.bytes());
        let (blocks, scales) = (&codes.blocks[..], &codes.scales[..]);
        let soon = |position: u32| prefetch(ids, position as usize);
        refine::each(self.simd, &ivf.wide, &codes.refined, positions, soon, |at, dot| {
            let position = positions[at] as usize;
            let block = position / BLOCK;
            let base = ivf.bases[self.list_of_block[block] as usize];
            let mut score = base + scales[block] * dot;
            if codes.layout.has_bias {
                score += codes.layout.bias(&blocks[block * bytes..(block + 1) * bytes], position % BLOCK);
            }
            best.push(Packed::from(Scored { row: ids[position], score }));
        });
    }
}

/// Inner products with rows of 2 bytes a value.
fn dots_of_half<T>(kernel: Kernel, query: &[f32], rows: &[T], converted: &mut Vec<f32>, out: &mut [f32])
where
    [T]: HalfFloatSliceExt,
{
    converted.resize(rows.len(), 0.0);
    rows.convert_to_f32_slice(converted);
    kernel.dots(query, converted, out);
}
