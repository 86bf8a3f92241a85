//! Searching the lists.

use std::ops::Range;

use half::slice::HalfFloatSliceExt;

use super::Ivf;
use super::codes::Codes;
use super::parts::{IvfParts, Lists, Vectors};
use crate::candidates::{Packed, Scored, keep_best};
use crate::catalog::generation::{Metric, NO_ROW};
use crate::index::fastscan::{self, BLOCK, Blocks, Tables, Terms};
use crate::index::refine::{self, WideQuery};
use crate::index::select::Select;
use crate::index::simd::for_each_simd;
use crate::index::sort::Sorter;
use crate::index::{Filter, Kernel, SearchParams, SearchScratch};
use crate::memory::{prefetch, prefetch_range};

/// Blocks whose scores are computed before they are looked at: they stay in the L1 cache.
pub(super) const AT_ONCE: usize = 8;
/// Lists whose blocks are ranked, as a multiple of the lists that the blocks to scan would fill.
const COARSE_RATIO: usize = 4;
/// The same where lists are chosen by the signs of their centroids.
const SIGNS_RATIO: usize = 8;
/// Up to so many lists' products are computed at once; of more those that their signs promise most of.
const ALL_LISTS: usize = 4096;
/// Runs of blocks ahead of their scan that memory is asked for.
const SOON: usize = 2;
/// Products with centroids that are written together.
const FILLED: usize = 4;
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
    /// By list that is ranked: what makes places in `ranks` its blocks.
    shifts: Vec<u32>,
    /// By list that is ranked: what the query's product with its first block comes to.
    products: Vec<f32>,
    /// What the blocks of these lists promise.
    ranks: Vec<f32>,
    /// By place in `ranks`: whose block it is, counted among the lists that are ranked.
    owners: Vec<u32>,
    /// What is scanned, but not yet in its order.
    found: Vec<Run>,
    /// What to scan, best first.
    pub(super) runs: Vec<Run>,
    /// By block: the query's product with the list's centroid, where the block is scanned.
    bases: Vec<f32>,
    scores: Vec<f32>,
    rows: Vec<u32>,
    sorter: Sorter,
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
        ivf.select.prune(self.simd, spare(k));
        let (scores, positions) = ivf.select.kept();
        rows_at(&self.parts.ids, positions, &mut ivf.rows);
        pack(self.simd, &ivf.rows, scores, best);
        if k <= EXACT_BELOW && !matches!(self.parts.lists, Lists::Flat(Vectors::F32(_))) {
            keep_best(best, rescored(k));
            ivf.rows.clear();
            ivf.rows.extend(best.iter().map(|&p| Scored::from(p).row));
            self.exact.rescore(query, &ivf.rows, block, exact, best);
            keep_best(best, k);
            out.extend(best.iter().map(|&p| Scored::from(p)));
        } else {
            ivf.sorter.sort(self.simd, best);
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
            rotated,
            select,
            ranked,
            shifts,
            products,
            ranks,
            owners,
            found,
            runs,
            bases,
            rows: lists,
            sorter,
            ..
        } = ivf;
        let parts = &self.parts;
        let most = parts.n_blocks().next_multiple_of(BLOCK) + TOGETHER;
        ranks.resize(most.max(ranks.len()), f32::NAN);
        owners.resize(ranks.len(), 0);
        let n_ranked = rank(self.simd, parts, lists, products, weight, shifts, ranks, owners);
        let padded = n_ranked.next_multiple_of(BLOCK);
        ranks[n_ranked..padded].fill(f32::NAN);
        let n_blocks = (n_probes as f64 * parts.n_blocks() as f64 / parts.n_lists() as f64).ceil() as usize;
        select.begin(n_blocks);
        select.push_all(self.simd, &ranks[..padded], 0, |_| u32::MAX, None);
        select.prune(self.simd, n_blocks / 16);

        // What is kept is in the order of the lists.
        let (ranks, places) = select.kept();
        found.resize(places.len(), Run::default());
        ranked.resize(places.len(), Packed::from(Scored { row: 0, score: 0.0 }));
        let mut n_runs = 0;
        let (mut last, mut begin) = ((u32::MAX, u32::MAX), (0, Packed::from(Scored { row: 0, score: 0.0 })));
        for (&rank, &place) in ranks.iter().zip(places) {
            let owner = owners[place as usize];
            let block = place.wrapping_add(shifts[owner as usize]);
            // No branch: whether a block goes on with a run is as good as random. If so, the run is written anew.
            let goes_on = (last.0 == place.wrapping_sub(1)) & (last.1 == owner);
            n_runs -= usize::from(goes_on);
            let this = (block, Packed::from(Scored { row: n_runs as u32, score: rank }));
            begin = if goes_on { begin } else { this };
            found[n_runs] = Run { list: lists[owner as usize], first: begin.0, end: block + 1 };
            ranked[n_runs] = begin.1;
            n_runs += 1;
            last = (place, owner);
        }
        found.truncate(n_runs);
        ranked.truncate(n_runs);
        sorter.sort(self.simd, ranked);
        runs.clear();
        runs.extend(ranked.iter().map(|&run| found[Scored::from(run).row as usize]));

        if parts.codes().is_none() {
            return;
        }
        bases.resize(parts.n_blocks() + FILLED, 0.0);
        let padded = parts.padded;
        let centroid = |list: u32| &parts.centroids[list as usize * padded..(list as usize + 1) * padded];
        for (at, run) in found.iter().enumerate() {
            if let Some(later) = found.get(at + 2) {
                prefetch_range(centroid(later.list), 0..padded);
            }
            let base = self.exact.kernel().dot(rotated, centroid(run.list));
            // Beyond its end, too: the next run is further on and overwrites it.
            for first in run.blocks().step_by(FILLED) {
                bases[first..first + FILLED].fill(base);
            }
        }
    }

    /// Fills `ivf.rows` with the lists whose blocks are worth ranking and `ivf.products` with what the query's products with their first
    /// blocks come to, and makes `ivf.wide` ready.
    fn choose_lists(&self, weight: f32, n_probes: usize, ivf: &mut IvfScratch) {
        let n_lists = self.parts.n_lists();
        ivf.wide.prepare(&ivf.rotated);
        ivf.rows.clear();
        if n_lists > ALL_LISTS && 2 * SIGNS_RATIO * n_probes < n_lists {
            self.choose_by_signs(weight, n_probes * SIGNS_RATIO, ivf);
        } else {
            self.choose_of_all(weight, n_probes * COARSE_RATIO, ivf);
        }
    }

    /// By the products with all lists, read one behind the other.
    fn choose_of_all(&self, weight: f32, keep: usize, ivf: &mut IvfScratch) {
        let IvfScratch { wide, select, scores, products, ranks, rows, .. } = ivf;
        let (coarse, n_lists) = (&self.parts.coarse, self.parts.n_lists());
        scores.resize(coarse.scales.len() * BLOCK, 0.0);
        refine::blocks(self.simd, wide, &coarse.refined, &coarse.scales, 0.0, scores);
        if 2 * keep >= n_lists {
            rows.extend(0..n_lists as u32);
            products.clone_from(scores);
            return;
        }
        ranks.resize(ranks.len().max(scores.len()), f32::NAN);
        let ranks = &mut ranks[..scores.len()];
        ranks.copy_from_slice(scores);
        add_biases(self.simd, coarse.layout, &coarse.blocks, weight, ranks);
        select.begin(keep);
        select.push_all(self.simd, ranks, 0, |at| lanes_of(n_lists, at), None);
        select.prune(self.simd, keep / 16);
        rows.extend_from_slice(select.kept().1);
        let promises = self.parts.promises.as_chunks::<2>().0;
        products.clear();
        products.extend(rows.iter().map(|&list| {
            prefetch(promises, self.parts.offsets[list as usize] as usize);
            scores[list as usize]
        }));
    }

    /// Of very many lists: by the signs of what they are ranked by, so that only those of the best are multiplied.
    fn choose_by_signs(&self, weight: f32, keep: usize, ivf: &mut IvfScratch) {
        let IvfScratch { rotated, tables, wide, select, scores, products, rows, .. } = ivf;
        let (coarse, n_lists) = (&self.parts.coarse, self.parts.n_lists());
        let (n_blocks, bytes) = (coarse.scales.len(), coarse.layout.bytes());
        tables.prepare(self.simd, rotated, coarse.layout.n_subspaces, &self.signs.words);
        select.begin(keep);
        scores.resize(AT_ONCE * BLOCK, 0.0);
        for first in (0..n_blocks).step_by(AT_ONCE) {
            let n = (n_blocks - first).min(AT_ONCE);
            let blocks = &coarse.blocks[first * bytes..(first + n) * bytes];
            let (terms, scores) = (Terms { base: 0.0, weight }, &mut scores[..n * BLOCK]);
            fastscan::scan(self.simd, coarse.layout, blocks, tables, terms, scores);
            let lanes = |at: usize| lanes_of(n_lists, first + at);
            select.push_all(self.simd, scores, (first * BLOCK) as u32, lanes, None);
        }
        select.prune(self.simd, keep / 16);
        rows.extend_from_slice(select.kept().1);
        let promises = self.parts.promises.as_chunks::<2>().0;
        let soon = |list: u32| prefetch(promises, self.parts.offsets[list as usize] as usize);
        products.resize(rows.len(), 0.0);
        refine::dots(self.simd, wide, &coarse.refined, rows, soon, products);
        products.iter_mut().zip(&*rows).for_each(|(product, &list)| *product *= coarse.scales[list as usize / BLOCK]);
    }

    /// Scores the blocks to scan and selects.
    fn scan(&self, filter: Filter<'_>, ivf: &mut IvfScratch) {
        let mut scores = std::mem::take(&mut ivf.scores);
        for at in 0..ivf.runs.len() {
            if let Some(&later) = ivf.runs.get(at + SOON) {
                self.ask_for(later, ivf.direct);
            }
            let run = ivf.runs[at];
            match self.parts.codes() {
                Some(codes) if !ivf.direct => self.scan_codes(codes, filter, run.blocks(), ivf, &mut scores),
                _ => {
                    scores.resize(AT_ONCE * BLOCK, 0.0);
                    for first in run.blocks().step_by(AT_ONCE) {
                        let blocks = first..(first + AT_ONCE).min(run.end as usize);
                        let scores = &mut scores[..blocks.len() * BLOCK];
                        self.score(blocks.clone(), ivf, scores);
                        self.offer(filter, blocks, scores, &mut ivf.select);
                    }
                }
            }
        }
        ivf.scores = scores;
    }

    /// What [`Self::score`] and [`Self::offer`] do with codes, while the scores are still at hand.
    #[inline]
    fn scan_codes(
        &self,
        codes: &Codes,
        filter: Filter<'_>,
        range: Range<usize>,
        ivf: &mut IvfScratch,
        scores: &mut Vec<f32>,
    ) {
        let IvfScratch { tables, select, bases, .. } = ivf;
        let bytes = codes.layout.bytes();
        let blocks = &codes.blocks[range.start * bytes..range.end * bytes];
        let terms = Terms { base: bases[range.start], weight: 1.0 };
        let lanes = ((range.start * BLOCK) as u32, &self.lanes[range]);
        self.admitting(filter, |admits| {
            fastscan::scan_into(self.simd, codes.layout, blocks, tables, terms, lanes, admits, scores, select);
        });
    }

    /// Calls with what tells whether the filter admits the row at a position.
    #[inline]
    fn admitting(&self, filter: Filter<'_>, with: impl FnOnce(Option<&dyn Fn(u32) -> bool>)) {
        let ids = &self.parts.ids[..];
        let admits = |position: u32| filter.allows(ids[position as usize]);
        with(if filter.is_all() { None } else { Some(&admits) });
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
        let bytes = codes.layout.bytes();
        add_biases(self.simd, codes.layout, &codes.blocks[range.start * bytes..range.end * bytes], 1.0, scores);
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
        let lanes = &self.lanes[blocks.clone()];
        let first = (blocks.start * BLOCK) as u32;
        self.admitting(filter, |admits| select.push_all(self.simd, scores, first, |at| lanes[at], admits));
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
    /// Writes what the blocks of `lists` promise and which of the lists they are of, one list behind the other, and returns how many blocks
    /// they are; `shifts` become what is added to a place in `ranks` for the block. `products` are those with the lists' first blocks.
    #[allow(clippy::too_many_arguments)]
    fn rank(
        parts: &IvfParts,
        lists: &[u32],
        products: &[f32],
        weight: f32,
        shifts: &mut Vec<u32>,
        ranks: &mut [f32],
        owners: &mut [u32],
    ) -> usize = rank_of
);

#[inline(always)]
fn rank_of<const FUSED: bool>(
    parts: &IvfParts,
    lists: &[u32],
    products: &[f32],
    weight: f32,
    shifts: &mut Vec<u32>,
    ranks: &mut [f32],
    owners: &mut [u32],
) -> usize {
    let promises = parts.promises.as_chunks::<2>().0;
    let mut n_ranked = 0;
    shifts.clear();
    for (owner, (&list, &product)) in lists.iter().zip(products).enumerate() {
        let rank = |&[gain, lift]: &[f32; 2]| gain * product + weight * lift;
        let blocks = parts.blocks_of(list as usize);
        shifts.push((blocks.start as u32).wrapping_sub(n_ranked as u32));
        // The last of them may reach beyond the list: what they write there, the next list overwrites.
        for first in blocks.clone().step_by(TOGETHER) {
            let at = n_ranked + first - blocks.start;
            owners[at..at + TOGETHER].fill(owner as u32);
            let ranks = &mut ranks[at..at + TOGETHER];
            match promises[first..].first_chunk::<TOGETHER>() {
                Some(promises) => ranks.iter_mut().zip(promises).for_each(|(to, promise)| *to = rank(promise)),
                None => ranks.iter_mut().zip(&promises[first..]).for_each(|(to, promise)| *to = rank(promise)),
            }
        }
        n_ranked += blocks.len();
    }
    n_ranked
}

for_each_simd!(
    /// Adds the additive parts of blocks to scores, `weight` times.
    fn add_biases(layout: Blocks, blocks: &[u8], weight: f32, scores: &mut [f32]) = add_biases_of
);

#[inline(always)]
fn add_biases_of<const FUSED: bool>(layout: Blocks, blocks: &[u8], weight: f32, scores: &mut [f32]) {
    for (block, scores) in blocks.chunks_exact(layout.bytes()).zip(scores.as_chunks_mut::<BLOCK>().0) {
        for (score, bias) in scores.iter_mut().zip(layout.biases(block)) {
            *score += weight * f32::from_le_bytes(*bias);
        }
    }
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

/// The lanes of a block that hold one of `n`.
fn lanes_of(n: usize, block: usize) -> u32 {
    match n - block * BLOCK {
        n if n >= BLOCK => u32::MAX,
        n => (1 << n) - 1,
    }
}

/// How many more than `k` may be sorted: sorting takes as long for fewer than a power of two.
fn spare(k: usize) -> usize {
    match k.next_power_of_two() - k {
        few if few < k / 64 => k / 16,
        some => some.min(k / 16),
    }
}

/// Replaces `rows` by those at `positions`.
fn rows_at(ids: &[u32], positions: &[u32], rows: &mut Vec<u32>) {
    rows.resize(positions.len(), 0);
    let later = positions.iter().skip(LATER).chain(std::iter::repeat(&0));
    for ((row, &position), &later) in rows.iter_mut().zip(positions).zip(later) {
        prefetch(ids, later as usize);
        *row = ids[position as usize];
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::index::exact::Exact;
    use crate::index::ivf::tests::{clustered, matrix};
    use crate::index::{IndexKind, IvfOptions};

    #[test]
    fn lists_are_chosen_alike_by_signs_and_by_products() {
        let (n, dim, keep) = (3000, 32, 40);
        let exact = Exact::new(matrix(clustered(n, dim, 9), dim, false), Metric::InnerProduct, Kernel::detect());
        let options = IvfOptions { n_lists: Some(150), kmeans_n_iters: Some(3), ..Default::default() };
        let index = Ivf::build(IndexKind::IvfPq, &options, exact, &|_, _, _| {}).unwrap();
        let mut ivf = IvfScratch::default();
        let mut in_both = 0;
        let queries = clustered(10, dim, 4);
        for query in queries.chunks_exact(dim) {
            index.rotation.apply(query, &mut ivf.rotated);
            ivf.wide.prepare(&ivf.rotated);
            let mut choose = |by_signs: bool| {
                ivf.rows.clear();
                if by_signs {
                    index.choose_by_signs(1.0, keep, &mut ivf);
                } else {
                    index.choose_of_all(1.0, keep, &mut ivf);
                }
                assert!(ivf.rows.is_sorted() && (keep..=keep + keep / 16).contains(&ivf.rows.len()));
                assert_eq!(ivf.products.len(), ivf.rows.len());
                ivf.rows.iter().copied().zip(ivf.products.iter().copied()).collect::<Vec<_>>()
            };
            let (by_signs, mut of_all) = (choose(true), choose(false));
            of_all.sort_by(|a, b| b.1.total_cmp(&a.1));
            for (list, product) in &of_all[..keep / SIGNS_RATIO] {
                if let Ok(at) = by_signs.binary_search_by_key(list, |&(list, _)| list) {
                    assert!((product - by_signs[at].1).abs() <= 1e-6 * product.abs());
                    in_both += 1;
                }
            }
        }
        assert!(in_both >= 10 * (keep / SIGNS_RATIO) * 9 / 10, "{in_both}");
    }
}
