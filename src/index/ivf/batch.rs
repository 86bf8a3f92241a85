//! Searching lists of whole vectors for several queries at a time: each list is read once for all that scan it.
//!
//! What a selection keeps depends on the order in which scores are offered. Scores are therefore computed list by list, but
//! offered in each query's own order: results are to the bit those of queries one by one.

use std::ops::Range;

use super::Ivf;
use super::search::{AT_ONCE, Asked, IvfScratch, Run};
use crate::candidates::Scored;
use crate::index::fastscan::BLOCK;
use crate::index::{Filter, SearchParams, SearchScratch};

/// Scores that are held at a time, of as many queries as that takes: they stay in the last cache.
const HELD: usize = if cfg!(test) { 2000 } else { 2 << 20 };

/// A query, the blocks of a list that it scans, and where their scores lie.
#[derive(Clone, Copy, Debug, Default)]
struct Visit {
    query: u32,
    run: Run,
    at: u32,
}

/// Buffers of a batch.
#[derive(Debug, Default)]
pub struct BatchScratch {
    /// By query that is held.
    of_query: Vec<IvfScratch>,
    /// `[query]`: position in the batch, and `|q|`.
    held: Vec<(u32, f32)>,
    n_scores: usize,
    scores: Vec<f32>,
    /// `[n_lists + 1]`: where the visits of each list end.
    ends: Vec<u32>,
    visits: Vec<Visit>,
}

impl Ivf {
    /// Whether several queries are answered faster together than one by one: enough of the lists are scanned by more than one. Codes
    /// are so small that holding their scores costs more than reading them once saves (1.2 times as long for 1,000,000 vectors).
    pub(super) fn shares(&self, n_queries: usize, k: usize, params: &SearchParams) -> bool {
        self.parts.codes().is_none() && 2 * n_queries * self.n_probes(k, params) >= self.parts.n_lists()
    }

    /// As [`Self::run`] for each of `queries`.
    pub(super) fn run_batch(
        &self,
        queries: &[f32],
        k: usize,
        filter: Filter<'_>,
        params: &SearchParams,
        scratch: &mut SearchScratch,
        out: &mut [Vec<Scored>],
    ) {
        let (n, dim) = (self.exact.rows().n_rows(), self.parts.dim.max(1));
        let asked = Asked { k: k.min(n), filter, params };
        if asked.k == 0 || queries.len() != dim * out.len() {
            return;
        }
        let share = filter.share(n);
        let mut batch = std::mem::take(&mut scratch.ivf_batch);
        for (at, query) in queries.chunks_exact(dim).enumerate() {
            let place = batch.held.len();
            if batch.of_query.len() == place {
                batch.of_query.push(IvfScratch::default());
            }
            let ivf = &mut batch.of_query[place];
            if let Some(query_norm) = self.begin(query, &asked, share, scratch, ivf, &mut out[at]) {
                batch.n_scores += ivf.runs.iter().map(|run| run.n_scores()).sum::<usize>();
                batch.held.push((at as u32, query_norm));
            }
            if batch.n_scores >= HELD {
                self.answer_held(queries, &asked, scratch, &mut batch, out);
            }
        }
        self.answer_held(queries, &asked, scratch, &mut batch, out);
        scratch.ivf_batch = batch;
    }

    fn answer_held(
        &self,
        queries: &[f32],
        asked: &Asked<'_>,
        scratch: &mut SearchScratch,
        batch: &mut BatchScratch,
        out: &mut [Vec<Scored>],
    ) {
        let BatchScratch { of_query, held, n_scores, scores, ends, visits } = batch;
        let of_query = &mut of_query[..held.len()];
        // Visits by list: counted, then put in their places from the last on.
        ends.clear();
        ends.resize(self.parts.n_lists() + 1, 0);
        for ivf in &mut *of_query {
            self.begin_scan(asked, ivf);
            ivf.runs.iter().for_each(|run| ends[run.list as usize] += 1);
        }
        let mut sum = 0;
        for end in &mut *ends {
            sum += *end;
            *end = sum;
        }
        visits.clear();
        visits.resize(sum as usize, Visit::default());
        let mut at = 0;
        for (query, ivf) in of_query.iter().enumerate() {
            for &run in &ivf.runs {
                let end = &mut ends[run.list as usize];
                *end -= 1;
                visits[*end as usize] = Visit { query: query as u32, run, at };
                at += run.n_scores() as u32;
            }
        }
        // By now `ends` holds the beginnings.
        scores.resize(scores.len().max(*n_scores), 0.0);
        for list in 0..self.parts.n_lists() {
            let visits = &visits[ends[list] as usize..ends[list + 1] as usize];
            if visits.is_empty() {
                continue;
            }
            for first in self.parts.blocks_of(list).step_by(AT_ONCE) {
                for Visit { query, run, at } in visits {
                    let Range { start, end } = run.blocks();
                    let blocks = start.max(first)..end.min(first + AT_ONCE);
                    if blocks.is_empty() {
                        continue;
                    }
                    let from = *at as usize + (blocks.start - start) * BLOCK;
                    let scores = &mut scores[from..from + blocks.len() * BLOCK];
                    self.score(blocks, &mut of_query[*query as usize], scores);
                }
            }
        }
        let mut rest = &scores[..*n_scores];
        let dim = self.parts.dim;
        for (ivf, &(at, query_norm)) in of_query.iter_mut().zip(&*held) {
            for place in 0..ivf.runs.len() {
                let run = ivf.runs[place];
                let (scores, others) = rest.split_at(run.n_scores());
                rest = others;
                self.offer(asked.filter, run.blocks(), scores, &mut ivf.select);
            }
            let query = &queries[at as usize * dim..(at as usize + 1) * dim];
            self.finish(query, query_norm, asked, scratch, ivf, &mut out[at as usize]);
        }
        held.clear();
        *n_scores = 0;
    }
}
