//! Searching the lists.

use std::ops::Range;

use half::slice::HalfFloatSliceExt;

use super::Ivf;
use super::codes::Codes;
use super::parts::{IvfParts, Lists, Vectors};
use crate::candidates::{Packed, Scored, keep_best, sort_best};
use crate::catalog::generation::{Metric, NO_ROW};
use crate::index::fastscan::{self, BLOCK, Tables, Terms};
use crate::index::refine::{self, WideQuery};
use crate::index::select::Select;
use crate::index::simd::for_each_simd;
use crate::index::{Filter, Kernel, SearchParams, SearchScratch};
use crate::memory::{prefetch, prefetch_range};

/// Blocks whose scores are computed before they are looked at: they stay in the L1 cache.
pub(super) const AT_ONCE: usize = 8;
/// Lists whose blocks are ranked, as a multiple of the lists that the blocks to scan would fill.
const COARSE_RATIO: usize = 8;
/// Runs of blocks ahead of their scan that memory is asked for.
const SOON: usize = 2;
/// Promises of blocks that are looked at together.
const TOGETHER: usize = 16;
/// Results ahead of whose reading their rows are asked for.
const LATER: usize = 16;
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
    /// By list that is ranked: where its blocks' ranks begin.
    starts: Vec<u32>,
    /// By list that is ranked: what the query's product with its first block comes to.
    products: Vec<f32>,
    /// What the blocks of these lists promise.
    ranks: Vec<f32>,
    /// What is scanned, but not yet in its order.
    found: Vec<Run>,
    /// What to scan, best first.
    pub(super) runs: Vec<Run>,
    /// By block: the query's product with the list's centroid, where the block is scanned.
    bases: Vec<f32>,
    scores: Vec<f32>,
    rows: Vec<u32>,
    /// A buffer for sorting.
    spare: Vec<Packed>,
    /// Vectors that are stored in 2 bytes a value.
    converted: Vec<f32>,
    n_refined: usize,
    /// Whether what is scanned is scored by its 8-bit codes at once.
    direct: bool,
}

/// Neighbouring blocks of one list.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Run {
    pub list: u32,
    first: u32,
    end: u32,
}

impl Run {
    /// The blocks.
    pub fn blocks(self) -> Range<usize> {
        self.first as usize..self.end as usize
    }

    /// Scores that they get, those of empty lanes among them.
    pub fn n_scores(self) -> usize {
        self.blocks().len() * BLOCK
    }
}

/// What is asked, but for the query.
pub(super) struct Asked<'a> {
    /// At least 1, at most the number of rows.
    pub k: usize,
    pub filter: Filter<'a>,
    pub params: &'a SearchParams,
}

impl Ivf {
    /// How many lists' worth of blocks are scanned without a filter.
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
        self.rank_blocks(query_norm * unit, n_probes.min(self.parts.n_lists()), ivf);
        Some(query_norm)
    }

    /// Makes ready for scores of the lists.
    pub(super) fn begin_scan(&self, asked: &Asked<'_>, ivf: &mut IvfScratch) {
        ivf.direct = false;
        let keep = match &self.parts.lists {
            Lists::Flat(_) => asked.k,
            Lists::Pq { codes, .. } | Lists::Rabitq(codes) => {
                let n_refined = self.n_refined(asked.k, asked.params);
                // All would be refined: then nothing need be estimated before.
                ivf.direct = ivf.runs.iter().map(|run| run.n_scores()).sum::<usize>() <= n_refined;
                if ivf.direct {
                    rescored(asked.k)
                } else {
                    let words = self.codebook.as_ref().map_or(&self.signs.words, |book| &book.words);
                    ivf.tables.prepare(self.simd, &ivf.rotated, codes.layout.n_subspaces, words);
                    n_refined
                }
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
        if let Some(codes) = self.parts.codes()
            && !ivf.direct
        {
            ivf.select.prune(self.simd, ivf.n_refined / 16);
            self.refine(codes, ivf);
            ivf.select.again(rescored(k));
        }
        ivf.select.prune(self.simd, k / 16);
        let (ids, (scores, positions)) = (&self.parts.ids[..], ivf.select.kept());
        ivf.rows.clear();
        ivf.rows.extend(positions.iter().enumerate().map(|(at, &position)| {
            if let Some(&later) = positions.get(at + LATER) {
                prefetch(ids, later as usize);
            }
            ids[position as usize]
        }));
        pack(self.simd, &ivf.rows, scores, best);
        if k <= EXACT_BELOW && !matches!(self.parts.lists, Lists::Flat(Vectors::F32(_))) {
            keep_best(best, rescored(k));
            ivf.rows.clear();
            ivf.rows.extend(best.iter().map(|&p| Scored::from(p).row));
            self.exact.rescore(query, &ivf.rows, block, exact, best);
            keep_best(best, k);
            out.extend(best.iter().map(|&p| Scored::from(p)));
        } else {
            sort_best(best, &mut ivf.spare);
            best.truncate(k);
            unpack(self.simd, best, self.metric_score(query_norm), out);
        }
    }

    /// Factor and addend that make the metric's score of what lists are ordered and vectors selected by: for L2 that is
    /// `<q, x> - |x|²/2`.
    fn metric_score(&self, query_norm: f32) -> (f32, f32) {
        match self.exact.metric() {
            Metric::InnerProduct => (1.0, 0.0),
            Metric::Cosine if query_norm > 0.0 => (1.0, 0.0),
            Metric::Cosine => (0.0, 0.0),
            Metric::L2 => (2.0, -query_norm * query_norm),
        }
    }

    /// Fills `ivf.runs` with the blocks that promise most, as many as `n_probes` lists have on average, and `ivf.bases` for them where there are codes.
    fn rank_blocks(&self, length: f32, n_probes: usize, ivf: &mut IvfScratch) {
        let weight = if self.exact.metric() == Metric::L2 { 1.0 } else { length };
        self.choose_lists(weight, n_probes, ivf);
        let IvfScratch {
            rotated, wide, select, ranked, starts, products, ranks, found, runs, bases, rows: lists, ..
        } = ivf;
        let (parts, coarse) = (&self.parts, &self.parts.coarse);
        let promises = parts.promises.as_chunks::<2>().0;
        let soon = |list: u32| prefetch(promises, parts.offsets[list as usize] as usize);
        products.resize(lists.len(), 0.0);
        refine::dots(self.simd, wide, &coarse.refined, lists, soon, products);
        let most = promises.len().next_multiple_of(BLOCK) + TOGETHER;
        ranks.resize(most.max(ranks.len()), f32::NAN);
        let n_ranked = rank(self.simd, parts, lists, products, weight, starts, ranks);
        let padded = n_ranked.next_multiple_of(BLOCK);
        ranks[n_ranked..padded].fill(f32::NAN);
        let n_blocks = (n_probes as f64 * parts.n_blocks() as f64 / parts.n_lists() as f64).ceil() as usize;
        select.begin(n_blocks);
        select.push_all(self.simd, &ranks[..padded], 0, |_| u32::MAX, None);
        select.prune(self.simd, n_blocks / 16);

        // What is kept is in the order of the lists.
        found.clear();
        ranked.clear();
        let (mut at, mut last) = (0, u32::MAX);
        for (&rank, &place) in {
            let (ranks, places) = select.kept();
            ranks.iter().zip(places)
        } {
            while starts[at + 1] <= place {
                at += 1;
            }
            let block = parts.offsets[lists[at] as usize] + place - starts[at];
            match found.last_mut() {
                Some(run) if last == place.wrapping_sub(1) && run.list == lists[at] => run.end += 1,
                _ => {
                    ranked.push(Packed::from(Scored { row: found.len() as u32, score: rank }));
                    found.push(Run { list: lists[at], first: block, end: block + 1 });
                }
            }
            last = place;
        }
        ranked.sort_unstable();
        runs.clear();
        runs.extend(ranked.iter().map(|&run| found[Scored::from(run).row as usize]));

        if parts.codes().is_none() {
            return;
        }
        bases.resize(parts.n_blocks(), 0.0);
        let padded = parts.padded;
        let centroid = |list: u32| &parts.centroids[list as usize * padded..(list as usize + 1) * padded];
        for (at, run) in runs.iter().enumerate() {
            if let Some(later) = runs.get(at + 2) {
                prefetch_range(centroid(later.list), 0..padded);
            }
            let base = self.exact.kernel().dot(rotated, centroid(run.list));
            bases[run.blocks()].fill(base);
        }
    }

    /// Fills `ivf.rows` with the lists whose blocks are worth ranking, and makes `ivf.wide` ready.
    fn choose_lists(&self, weight: f32, n_probes: usize, ivf: &mut IvfScratch) {
        let IvfScratch { rotated, tables, wide, select, scores, rows, .. } = ivf;
        let (coarse, n_lists) = (&self.parts.coarse, self.parts.n_lists());
        wide.prepare(rotated);
        rows.clear();
        if n_probes * COARSE_RATIO * 2 >= n_lists {
            rows.extend(0..n_lists as u32);
            return;
        }
        tables.prepare(self.simd, rotated, coarse.layout.n_subspaces, &self.signs.words);
        select.begin(n_probes * COARSE_RATIO);
        let bytes = coarse.layout.bytes();
        for first in (0..n_lists).step_by(AT_ONCE * BLOCK) {
            let n = (n_lists - first).div_ceil(BLOCK).min(AT_ONCE);
            let blocks = &coarse.blocks[first / BLOCK * bytes..(first / BLOCK + n) * bytes];
            scores.resize(AT_ONCE * BLOCK, 0.0);
            let terms = Terms { base: 0.0, weight };
            fastscan::scan(self.simd, coarse.layout, blocks, tables, terms, &mut scores[..n * BLOCK]);
            let lanes = |at: usize| match n_lists - (first + at * BLOCK) {
                n if n >= BLOCK => u32::MAX,
                n => (1 << n) - 1,
            };
            select.push_all(self.simd, &scores[..n * BLOCK], first as u32, lanes, None);
        }
        select.prune(self.simd, n_probes * COARSE_RATIO / 16);
        rows.extend_from_slice(select.kept().1);
    }

    /// Scores the blocks of the lists to scan, some at a time, and selects.
    fn scan(&self, filter: Filter<'_>, ivf: &mut IvfScratch) {
        let mut scores = std::mem::take(&mut ivf.scores);
        scores.resize(AT_ONCE * BLOCK, 0.0);
        for at in 0..ivf.runs.len() {
            if let Some(&later) = ivf.runs.get(at + SOON) {
                self.ask_for(later, ivf.direct);
            }
            let run = ivf.runs[at];
            for first in run.blocks().step_by(AT_ONCE) {
                let blocks = first..(first + AT_ONCE).min(run.end as usize);
                let scores = &mut scores[..blocks.len() * BLOCK];
                self.score(blocks.clone(), ivf, scores);
                self.offer(filter, blocks, scores, &mut ivf.select);
            }
        }
        ivf.scores = scores;
    }

    /// Asks the memory for the first blocks of a run.
    fn ask_for(&self, run: Run, direct: bool) {
        if let Some(codes) = self.parts.codes() {
            let Range { start, end } = run.blocks();
            let (of, bytes) = if direct {
                (&codes.refined, BLOCK * self.parts.padded)
            } else {
                (&codes.blocks, codes.layout.bytes())
            };
            prefetch_range(of, start * bytes..end.min(start + 2) * bytes);
        }
    }

    /// The scores of some neighbouring blocks of a list; `scores` is as long as they are.
    pub(super) fn score(&self, range: Range<usize>, ivf: &mut IvfScratch, scores: &mut [f32]) {
        match &self.parts.lists {
            Lists::Flat(vectors) => self.score_vectors(vectors, range, ivf, scores),
            Lists::Pq { codes, .. } | Lists::Rabitq(codes) if ivf.direct => {
                self.score_at_once(codes, ivf.bases[range.start], range, &ivf.wide, scores);
            }
            Lists::Pq { codes, .. } | Lists::Rabitq(codes) => {
                let bytes = codes.layout.bytes();
                let blocks = &codes.blocks[range.start * bytes..range.end * bytes];
                let terms = Terms { base: ivf.bases[range.start], weight: 1.0 };
                fastscan::scan(self.simd, codes.layout, blocks, &ivf.tables, terms, scores);
            }
        }
    }

    /// The scores of blocks by their 8-bit codes.
    fn score_at_once(&self, codes: &Codes, base: f32, range: Range<usize>, query: &WideQuery, scores: &mut [f32]) {
        let size = BLOCK * self.parts.padded;
        let rows = &codes.refined[range.start * size..range.end * size];
        refine::blocks(self.simd, query, rows, &codes.scales[range.clone()], base, scores);
        if codes.layout.has_bias {
            let bytes = codes.layout.bytes();
            let blocks = codes.blocks[range.start * bytes..range.end * bytes].chunks_exact(bytes);
            for (block, scores) in blocks.zip(scores.as_chunks_mut::<BLOCK>().0) {
                scores.iter_mut().enumerate().for_each(|(lane, score)| *score += codes.layout.bias(block, lane));
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
        let lanes = &self.lanes[blocks.clone()];
        select.push_all(self.simd, scores, (blocks.start * BLOCK) as u32, |at| lanes[at], admits);
    }

    /// Scores what was selected anew, by its 8-bit codes.
    fn refine(&self, codes: &Codes, ivf: &mut IvfScratch) {
        let IvfScratch { select, wide, bases, .. } = ivf;
        let (scores, positions) = select.kept_mut();
        let (blocks, scales, bytes) = (&codes.blocks[..], &codes.scales[..], codes.layout.bytes());
        refine::dots(self.simd, wide, &codes.refined, positions, |_| {}, scores);
        for (score, &position) in scores.iter_mut().zip(positions) {
            let (block, lane) = (position as usize / BLOCK, position as usize % BLOCK);
            *score = bases[block] + scales[block] * *score;
            if codes.layout.has_bias {
                *score += codes.layout.bias(&blocks[block * bytes..(block + 1) * bytes], lane);
            }
        }
    }
}

for_each_simd!(
    /// Writes what the blocks of `lists` promise, list by list, and to `starts` where each list's begin and the last's end, which is
    /// returned. `products` are those with the lists' first blocks but for the scales.
    fn rank(
        parts: &IvfParts,
        lists: &[u32],
        products: &[f32],
        weight: f32,
        starts: &mut Vec<u32>,
        ranks: &mut [f32],
    ) -> usize = rank_of
);

#[inline(always)]
fn rank_of<const FUSED: bool>(
    parts: &IvfParts,
    lists: &[u32],
    products: &[f32],
    weight: f32,
    starts: &mut Vec<u32>,
    ranks: &mut [f32],
) -> usize {
    let promises = parts.promises.as_chunks::<2>().0;
    let mut n_ranked = 0;
    starts.clear();
    for (&list, &product) in lists.iter().zip(products) {
        let product = parts.coarse.scales[list as usize / BLOCK] * product;
        let rank = |&[gain, lift]: &[f32; 2]| gain * product + weight * lift;
        starts.push(n_ranked as u32);
        let blocks = parts.blocks_of(list as usize);
        // The last of them may reach beyond the list: what they write there, the next list overwrites.
        for first in blocks.clone().step_by(TOGETHER) {
            let ranks = &mut ranks[n_ranked + first - blocks.start..][..TOGETHER];
            match promises[first..].first_chunk::<TOGETHER>() {
                Some(promises) => ranks.iter_mut().zip(promises).for_each(|(to, promise)| *to = rank(promise)),
                None => ranks.iter_mut().zip(&promises[first..]).for_each(|(to, promise)| *to = rank(promise)),
            }
        }
        n_ranked += blocks.len();
    }
    starts.push(n_ranked as u32);
    n_ranked
}

for_each_simd!(
    fn pack(rows: &[u32], scores: &[f32], best: &mut Vec<Packed>) = pack_of
);

#[inline(always)]
fn pack_of<const FUSED: bool>(rows: &[u32], scores: &[f32], best: &mut Vec<Packed>) {
    best.clear();
    best.extend(rows.iter().zip(scores).map(|(&row, &score)| Packed::from(Scored { row, score })));
}

for_each_simd!(
    fn unpack(best: &[Packed], score: (f32, f32), out: &mut Vec<Scored>) = unpack_of
);

#[inline(always)]
fn unpack_of<const FUSED: bool>(best: &[Packed], (factor, addend): (f32, f32), out: &mut Vec<Scored>) {
    let found = best.iter().map(|&packed| Scored::from(packed));
    out.extend(found.map(|s| Scored { score: factor * s.score + addend, ..s }));
}

/// Up to [`EXACT_BELOW`] results: how many are scored exactly for them; for more, as many as they are.
fn rescored(k: usize) -> usize {
    if k <= EXACT_BELOW { k + k / 4 + 16 } else { k }
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
