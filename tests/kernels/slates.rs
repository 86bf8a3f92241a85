//! The kernels that make slates of scores.

use tastemaker::candidates::{Candidates, Source, SourceSet};
use tastemaker::catalog::generation::{Interaction, Lists as Neighbours, Matrix, MatrixData, Metric};
use tastemaker::index::{Exact, Kernel};
use tastemaker::retrieval::collaborative::Signals;

use super::*;

#[derive(Clone, Copy, Debug)]
pub struct ExactScores {
    pub n_requests: usize,
    pub n_rows: usize,
    pub n_more: usize,
    pub dim: usize,
    pub places: usize,
    pub metric: Metric,
    pub with_counts: bool,
    pub with_sources: bool,
}

impl ExactScores {
    fn any() -> impl Strategy<Value = ExactScores> {
        let metric = prop::sample::select(vec![Metric::InnerProduct, Metric::Cosine, Metric::L2]);
        let flags = (any::<bool>(), any::<bool>());
        (1usize..4, 1usize..60, 0usize..60, 1usize..200, 1usize..80, metric, flags).prop_map(
            |(n_requests, n_rows, n_more, dim, places, metric, (with_counts, with_sources))| ExactScores {
                n_requests,
                n_rows,
                n_more,
                dim,
                places,
                metric,
                with_counts,
                with_sources,
            },
        )
    }

    pub fn check(&self, variant: &str, seed: u64) -> Result<(), String> {
        let &ExactScores { n_requests, n_rows, n_more, dim, places, metric, .. } = self;
        let (random, width) = (&mut SmallRng::seed_from_u64(seed), dim.next_multiple_of(8));
        let mut take = |n: usize| -> Vec<f32> { (0..n).map(|_| random.random_range(-1.0f32..1.0)).collect() };
        let (table, mut queries) = (take((n_rows + n_more) * dim), take(n_requests * dim));
        if metric == Metric::Cosine && seed.is_multiple_of(3) {
            queries[..dim].fill(0.0);
        }
        let rows: Vec<u32> =
            (0..n_requests * places)
                .map(|_| {
                    if random.random_ratio(1, 9) {
                        NO_ROW
                    } else {
                        random.random_range(0..(n_rows + n_more) as u32 + 2)
                    }
                })
                .collect();
        let there: Vec<u32> = (0..n_more.div_ceil(32)).map(|_| random.random()).collect();
        let counts: Vec<u32> = (0..n_requests).map(|_| random.random_range(0..places as u32 + 3)).collect();
        let sources: Vec<u8> = (0..n_requests * places).map(|_| random.random_range(0..16)).collect();
        let padded = |values: &[f32]| -> Vec<f32> {
            values
                .chunks_exact(dim)
                .flat_map(|row| row.iter().copied().chain(std::iter::repeat(7.0)).take(width))
                .collect()
        };
        for kernel in Kernel::available() {
            let matrix = Matrix { dim, data: MatrixData::F32(table.clone().into()) };
            let exact = Exact::new(matrix, metric, kernel);
            let order = match kernel {
                Kernel::Avx512 => kernels::SumOrder::Avx512,
                Kernel::Avx2 => kernels::SumOrder::Avx2,
                Kernel::Portable => kernels::SumOrder::Portable,
            };
            let by = match metric {
                Metric::InnerProduct => kernels::ScoreBy::InnerProduct,
                Metric::Cosine => kernels::ScoreBy::Times,
                Metric::L2 => kernels::ScoreBy::TwiceLess,
            };
            let bounds: Vec<f32> =
                queries.chunks_exact(dim).flat_map(|query| [9.0, 9.0, 9.0, exact.query_norm(query)]).collect();
            let mut want = vec![LEFT; n_requests * places];
            for (at, query) in queries.chunks_exact(dim).enumerate() {
                let n = if self.with_counts { places.min(counts[at] as usize) } else { places };
                let has = |row: u32| row.checked_sub(n_rows as u32).is_none_or(|slot| twins::bit(&there, slot));
                let scores = twins::exact_scores(&exact, query, &rows[at * places..at * places + n], has);
                for (place, score) in (at * places..).zip(scores) {
                    if !self.with_sources || sources[place] & 1 == 0 {
                        want[place] = score;
                    }
                }
            }
            let (in_table, beside) = table.split_at(n_rows * dim);
            let (norms, more_norms) = exact.norms().split_at(exact.norms().len().min(n_rows));
            let (on_queries, on_table) = (Buffer::new_16(&padded(&queries)), Buffer::new_16(&padded(in_table)));
            let (more, more_norms, more_there) =
                (Buffer::new_16(&padded(beside)), Buffer::new(more_norms), Buffer::new(&there));
            let (norms, bounds) = (Buffer::new(norms), Buffer::new_16(&bounds));
            let (rows, scores) = (Buffer::new(&rows), Buffer::new(&vec![LEFT; n_requests * places]));
            let (counts, sources) = (Buffer::new(&counts), Buffer::new(&sources));
            let launch = kernels::ExactScores {
                queries: on_queries.address(),
                table: on_table.address(),
                n_rows: n_rows as u32,
                width: width as u32,
                dim: dim as u32,
                norms: norms.address(),
                more: kernels::More { rows: more.address(), n: n_more as u32 },
                more_norms: more_norms.address(),
                more_there: more_there.address(),
                by,
                order,
                bounds: bounds.address(),
                rows: rows.address(),
                counts: self.with_counts.then(|| counts.address()),
                sources: self.with_sources.then(|| sources.address()),
                scores: scores.address(),
                n_requests: n_requests as u32,
                places: places as u32,
            };
            run(variant, launch.launch(), seed)?;
            // A zero of either sign is 0 to whoever reads it.
            let plain = |values: &[f32]| bits(&values.iter().map(|value| value + 0.0).collect::<Vec<_>>());
            same(&format!("{kernel:?}"), &plain(&scores), &plain(&want))?;
            intact("scores", &scores)?;
        }
        Ok(())
    }
}

/// Lists that came with requests, as they lie in the tail, and what is asked.
#[derive(Default)]
struct Asked {
    tail: Vec<u32>,
    words: Vec<u32>,
}

impl Asked {
    fn push(&mut self, lists: [&[Scored]; 3], seen: &[u32], liked: &[Interaction]) {
        let start = self.tail.len() as u32;
        for list in lists {
            self.tail.extend(list.iter().map(|scored| scored.row));
            self.tail.extend(list.iter().map(|scored| scored.score.to_bits()));
        }
        let seen_from = self.tail.len() as u32;
        self.tail.extend(seen);
        let liked_from = self.tail.len() as u32;
        self.tail.extend(liked.iter().map(|entry| entry.row));
        self.tail.extend(liked.iter().map(|entry| entry.weight.to_bits()));
        let [one, two, three] = lists.map(|list| list.len() as u32);
        self.words.extend([start, one, two, three, seen_from, seen.len() as u32, liked_from, liked.len() as u32]);
    }
}

#[derive(Clone, Copy, Debug)]
pub struct MaskSeen {
    pub n_requests: usize,
    pub n_rows: usize,
    pub n_seen: usize,
}

impl MaskSeen {
    pub fn check(&self, variant: &str, seed: u64) -> Result<(), String> {
        let &MaskSeen { n_requests, n_rows, n_seen } = self;
        let random = &mut SmallRng::seed_from_u64(seed);
        let (mut asked, mut all) = (Asked::default(), Vec::new());
        for _ in 0..n_requests {
            let seen: Vec<u32> =
                (0..random.random_range(0..=n_seen)).map(|_| random.random_range(0..n_rows as u32 + 3)).collect();
            asked.push([&[], &[], &[]], &seen, &[]);
            all.push(seen);
        }
        let mut want = Scores::Many.take(n_requests * n_rows, random);
        let scores = Buffer::new(&want);
        twins::mask_seen(&mut want, &all.iter().map(|rows| &rows[..]).collect::<Vec<_>>(), n_rows);
        let (tail, words) = (Buffer::new(&asked.tail), Buffer::new(&asked.words));
        let launch = kernels::MaskSeen {
            tail: tail.address(),
            asked: words.address(),
            scores: scores.address(),
            n_requests: n_requests as u32,
            n_rows: n_rows as u32,
        };
        run(variant, launch.launch(), seed)?;
        same("scores", &bits(&scores), &bits(&want))?;
        intact("scores", &scores)
    }
}

/// A list with unique rows below `n_items`, in order.
fn list(n: usize, n_items: usize, scores: Scores, random: &mut SmallRng) -> Vec<Scored> {
    let mut rows: Vec<u32> = (0..n_items as u32).collect();
    for at in 0..n.min(n_items) {
        rows.swap(at, random.random_range(at..n_items));
    }
    rows.truncate(n);
    let mut list: Vec<Packed> = rows
        .iter()
        .zip(scores.take(rows.len(), random))
        .map(|(&row, score)| Packed::from(Scored { row, score }))
        .collect();
    list.sort_unstable();
    list.into_iter().map(Scored::from).collect()
}

#[derive(Clone, Copy, Debug)]
pub struct Settle {
    pub n_requests: usize,
    pub fetched: usize,
    pub widths: [usize; 4],
    pub scores: Scores,
    pub error: f32,
}

impl Settle {
    fn any() -> impl Strategy<Value = Settle> {
        let error = prop_oneof![Just(0.0f32), 0.0f32..0.5];
        let widths = prop::array::uniform4(prop_oneof![0usize..6, 0usize..300]);
        (1usize..4, prop_oneof![1usize..20, 1usize..1025], widths, Scores::any(), error).prop_map(
            |(n_requests, fetched, widths, scores, error)| {
                let widths = [widths[0].min(fetched), widths[1].max(1), widths[2], widths[3]];
                Settle { n_requests, fetched, widths, scores, error }
            },
        )
    }

    pub fn check(&self, variant: &str, seed: u64) -> Result<(), String> {
        let &Settle { n_requests, fetched, widths, .. } = self;
        let random = &mut SmallRng::seed_from_u64(seed);
        let (width, n_asked) = (widths.iter().sum::<usize>(), n_requests - usize::from(seed.is_multiple_of(5)));
        let mut found = sorted_lists(n_requests, fetched, self.scores, random);
        for request in 0..n_requests {
            let masked = fetched - random.random_range(0..=fetched / 4);
            found.scores[request * fetched + masked..(request + 1) * fetched].fill(f32::NAN);
        }
        // What was masked has a score all the same.
        let mut score_of = |score: &f32| match score.is_nan() {
            true => random.random_range(-1.0..1.0),
            false => score * 2.0 - 1.0 + random.random_range(-0.1..0.1),
        };
        let exact: Vec<f32> = found.scores.iter().map(&mut score_of).collect();
        let (mut asked, mut want_rows) = (Asked::default(), vec![UNTOUCHED; n_requests * width]);
        let (mut want_scores, mut want_lengths) = (vec![LEFT; n_requests * width], vec![0u32; n_requests * 4]);
        let (mut want_open, mut bounds) = (vec![0u32; n_requests], Vec::<f32>::new());
        for request in 0..n_requests {
            let lists = [1, 2, 3].map(|s| list(random.random_range(0..=widths[s]), 900, self.scores, random));
            asked.push(lists.each_ref().map(|list| &list[..]), &[1, 2], &[]);
            let bound = [0.5, 0.5, self.error];
            bounds.extend(bound.iter().chain(&[1.0]));
            if request >= n_asked {
                continue;
            }
            let own = request * fetched..(request + 1) * fetched;
            let (best, open) =
                twins::settle_list(&found.rows[own.clone()], &found.scores[own.clone()], &exact[own], widths[0], bound);
            want_open[request] = u32::from(open);
            let mut start = request * width;
            for (source, (list, wide)) in std::iter::once(&best).chain(&lists).zip(widths).enumerate() {
                want_lengths[4 * request + source] = list.len() as u32;
                for (at, scored) in (start..).zip(list) {
                    (want_rows[at], want_scores[at]) = (scored.row, scored.score);
                }
                start += wide;
            }
        }
        let header = Buffer::new_16(&[n_asked as u32, 0, 0, 0]);
        let (rows, scores, exact) = (Buffer::new(&found.rows), Buffer::new(&found.scores), Buffer::new(&exact));
        let (bounds, tail, words) = (Buffer::new_16(&bounds), Buffer::new(&asked.tail), Buffer::new(&asked.words));
        let (out_rows, out_scores) =
            (Buffer::new(&vec![UNTOUCHED; n_requests * width]), Buffer::new(&vec![LEFT; n_requests * width]));
        let (lengths, open) =
            (Buffer::new(&vec![UNTOUCHED; n_requests * 4]), Buffer::new(&vec![UNTOUCHED; n_requests]));
        let launch = kernels::SettleLists {
            header: header.address(),
            rows: rows.address(),
            scores: scores.address(),
            exact: exact.address(),
            fetched: fetched as u32,
            bounds: bounds.address(),
            tail: tail.address(),
            asked: words.address(),
            widths: widths.map(|width| width as u32),
            n_requests: n_requests as u32,
            out_rows: out_rows.address(),
            out_scores: out_scores.address(),
            lengths: lengths.address(),
            open: open.address(),
        };
        run(variant, launch.launch(), seed)?;
        same("rows", &out_rows, &want_rows)?;
        same("scores", &bits(&out_scores), &bits(&want_scores))?;
        same("lengths", &lengths, &want_lengths)?;
        same("open", &open, &want_open)?;
        intact("rows", &out_rows)?;
        intact("scores", &out_scores)
    }
}

/// Candidates of requests, in lines of `width`.
struct Merged {
    candidates: Vec<Candidates>,
    lists: Vec<[Vec<Scored>; 4]>,
    rows: Vec<u32>,
    sources: Vec<u8>,
    source_scores: Vec<f32>,
    source_ranks: Vec<u16>,
    counts: Vec<u32>,
}

impl Merged {
    fn new(n_requests: usize, widths: [usize; 4], n_items: usize, random: &mut SmallRng) -> Self {
        let width = widths.iter().sum::<usize>();
        let mut merged = Merged {
            candidates: Vec::new(),
            lists: Vec::new(),
            rows: vec![UNTOUCHED; n_requests * width],
            sources: vec![0xee; n_requests * width],
            source_scores: vec![LEFT; n_requests * 4 * width],
            source_ranks: vec![0xeeee; n_requests * 4 * width],
            counts: Vec::new(),
        };
        for request in 0..n_requests {
            let lists = widths.map(|wide| list(random.random_range(0..=wide), n_items, Scores::Many, random));
            let mut candidates = Candidates::default();
            tastemaker::retrieval::merge::merge(&lists, n_items, &mut Default::default(), &mut candidates);
            let n = candidates.len();
            merged.rows[request * width..][..n].copy_from_slice(&candidates.rows);
            let sets = candidates.sources.iter().map(|set| set.0);
            merged.sources[request * width..][..n].iter_mut().zip(sets).for_each(|(to, set)| *to = set);
            for source in 0..Source::COUNT {
                let start = (request * 4 + source) * width;
                merged.source_scores[start..][..n].copy_from_slice(&candidates.source_scores[source]);
                merged.source_ranks[start..][..n].copy_from_slice(&candidates.source_ranks[source]);
            }
            merged.counts.push(n as u32);
            merged.candidates.push(candidates);
            merged.lists.push(lists);
        }
        merged
    }
}

#[derive(Clone, Copy, Debug)]
pub struct Fill {
    pub n_requests: usize,
    pub widths: [usize; 4],
    pub n_items: usize,
    pub n_liked: usize,
    pub spare: usize,
    pub reads_lists: bool,
}

impl Fill {
    fn any() -> impl Strategy<Value = Fill> {
        let widths = prop_oneof![prop::array::uniform4(1usize..40), Just([500, 300, 100, 200])];
        (1usize..4, widths, prop_oneof![1usize..40, 1usize..2000], 0usize..30, 0usize..4, any::<bool>()).prop_map(
            |(n_requests, widths, n_items, n_liked, spare, reads_lists)| Fill {
                n_requests,
                widths,
                n_items,
                n_liked,
                spare,
                reads_lists,
            },
        )
    }

    pub fn check(&self, variant: &str, seed: u64) -> Result<(), String> {
        let &Fill { n_requests, widths, n_items, n_liked, spare, reads_lists } = self;
        let (random, width) = (&mut SmallRng::seed_from_u64(seed), widths.iter().sum::<usize>());
        let merged = Merged::new(n_requests, widths, n_items, random);
        // Some similarities below 0, and every third item without a list.
        let (mut offsets, mut list_rows, mut list_scores) = (vec![0u64], Vec::new(), Vec::new());
        for key in 0..n_items {
            let n = if key % 3 == 0 { 0 } else { random.random_range(0..n_items.min(300)) };
            for scored in list(n, n_items, Scores::Many, random) {
                list_rows.push(scored.row);
                list_scores.push(scored.score + 0.4);
            }
            offsets.push(list_rows.len() as u64);
        }
        let neighbours = Neighbours {
            offsets: offsets.clone().into(),
            rows: list_rows.clone().into(),
            scores: list_scores.clone().into(),
        };
        use kernels::Column::*;
        let mut columns = vec![
            CoSum,
            SourceScore(0),
            Dot,
            SourceRank(3),
            CoMax,
            CoTop3,
            SourcePresent(1),
            CoCount,
            CoMean,
            SourcePresent(0),
            Counted,
            SourceRank(1),
        ];
        if !reads_lists {
            columns.retain(|column| !column.reads_lists());
        }
        let (stride, dots) = (columns.len() + spare, Scores::Many.take(n_requests * width, random));
        let (mut asked, mut want) = (Asked::default(), vec![LEFT; n_requests * width * stride]);
        for (request, candidates) in merged.candidates.iter().enumerate() {
            // An item may be liked twice, or not be one of the bundle.
            let liked: Vec<Interaction> = (0..n_liked)
                .map(|_| Interaction {
                    row: random.random_range(0..n_items as u32 + 2),
                    weight: random.random_range(0.5f32..2.0),
                })
                .collect();
            asked.push([&[], &[], &[]], &[], &liked);
            let mut signals = Signals::default();
            signals.gather(&neighbours, &liked, n_items);
            let own = request * width;
            let values = twins::fill_columns(&columns, candidates, &signals, &dots[own..own + width]);
            for (at, line) in values.chunks_exact(columns.len()).enumerate() {
                let to = &mut want[(own + at) * stride..][..columns.len()];
                let filled = to.iter_mut().zip(line).zip(&columns).filter(|(_, column)| **column != Counted);
                filled.for_each(|((to, value), _)| *to = *value);
            }
        }
        let codes: Vec<u32> = columns.iter().map(|column| column.code()).collect();
        let logarithms: Vec<f32> = (0..=n_liked).map(|n| (n as f32).ln_1p()).collect();
        // As u32: the low words come first.
        let halves: Vec<u32> = offsets.iter().flat_map(|offset| [*offset as u32, (offset >> 32) as u32]).collect();
        let (rows, sources, counts) =
            (Buffer::new(&merged.rows), Buffer::new(&merged.sources), Buffer::new(&merged.counts));
        let (source_scores, source_ranks) = (Buffer::new(&merged.source_scores), Buffer::new(&merged.source_ranks));
        let (dots, codes, logarithms) = (Buffer::new(&dots), Buffer::new(&codes), Buffer::new(&logarithms));
        let (offsets, list_rows, list_scores) =
            (Buffer::new_16(&halves), Buffer::new(&list_rows), Buffer::new(&list_scores));
        let (tail, words, values) =
            (Buffer::new(&asked.tail), Buffer::new(&asked.words), Buffer::new(&vec![LEFT; want.len()]));
        let launch = kernels::FillColumns {
            rows: rows.address(),
            sources: sources.address(),
            source_scores: source_scores.address(),
            source_ranks: source_ranks.address(),
            counts: counts.address(),
            n_requests: n_requests as u32,
            width: width as u32,
            dots: dots.address(),
            columns: codes.address(),
            n_columns: columns.len() as u32,
            offsets: offsets.address(),
            n_keys: if reads_lists { n_items as u32 } else { 0 },
            list_rows: list_rows.address(),
            list_scores: list_scores.address(),
            tail: tail.address(),
            asked: words.address(),
            logarithms: logarithms.address(),
            n_logarithms: n_liked as u32 + 1,
            values: values.address(),
            stride: stride as u32,
        };
        run(variant, launch.launch(), seed)?;
        same("values", &bits(&values), &bits(&want))?;
        intact("values", &values)
    }
}

#[derive(Clone, Copy, Debug)]
pub struct Count {
    pub n_requests: usize,
    pub width: usize,
    pub n_items: usize,
    pub n_more: usize,
    pub n_codes: u32,
    pub by: kernels::CountBy,
}

impl Count {
    fn any() -> impl Strategy<Value = Count> {
        let by = [kernels::CountBy::Logarithm, kernels::CountBy::First, kernels::CountBy::Share];
        (1usize..4, 1usize..700, 1usize..300, 0usize..300, 1u32..60, prop::sample::select(by.to_vec())).prop_map(
            |(n_requests, width, n_items, n_more, n_codes, by)| Count {
                n_requests,
                width,
                n_items,
                n_more,
                n_codes,
                by,
            },
        )
    }

    pub fn check(&self, variant: &str, seed: u64) -> Result<(), String> {
        let &Count { n_requests, width, n_items, n_more, n_codes, by } = self;
        let (random, stride, places_stride) = (&mut SmallRng::seed_from_u64(seed), 3, 5);
        let all = n_items + n_more;
        let of_items: Vec<Vec<u32>> = (0..all)
            .map(|_| (0..random.random_range(0..6)).map(|_| random.random_range(0..n_codes)).collect())
            .collect();
        // An item that there is not has no codes.
        let rows: Vec<u32> = (0..n_requests * width).map(|_| random.random_range(0..all as u32 + 2)).collect();
        let counts: Vec<u32> = (0..n_requests).map(|_| random.random_range(0..width as u32 + 3)).collect();
        let (mut tail, mut asked, mut places) = (vec![UNTOUCHED; 3], Vec::new(), Vec::new());
        let mut want = vec![LEFT; n_requests * width * stride];
        for request in 0..n_requests {
            let known: Vec<u32> = (0..n_codes).filter(|_| random.random()).collect();
            let times: Vec<u32> = known.iter().map(|_| random.random_range(1..9)).collect();
            let n_liked = random.random_range(0..5usize);
            asked.extend([0, 0, 0, 0, 0, 0, 0, n_liked as u32]);
            places.extend([UNTOUCHED, UNTOUCHED, tail.len() as u32, known.len() as u32, UNTOUCHED]);
            tail.extend(known.iter().chain(&times));
            let times = |code: u32| known.binary_search(&code).map_or(0, |at| times[at]);
            for at in 0..width.min(counts[request] as usize) {
                let codes = of_items.get(rows[request * width + at] as usize).map_or(&[][..], |codes| &codes[..]);
                want[(request * width + at) * stride + 1] = twins::fill_counts(by, codes, times, n_liked);
            }
        }
        let mut offsets = vec![0u32];
        let (in_table, beside) = of_items.split_at(n_items);
        in_table.iter().for_each(|codes| offsets.push(offsets[offsets.len() - 1] + codes.len() as u32));
        let codes: Vec<u32> = in_table.concat();
        // With gaps between them.
        let (mut spans, mut more_codes) = (Vec::new(), Vec::new());
        for codes in beside {
            more_codes.resize(more_codes.len() + random.random_range(0..3), 0);
            spans.extend([more_codes.len() as u32, (more_codes.len() + codes.len()) as u32]);
            more_codes.extend_from_slice(codes);
        }
        let (spans, more_codes) = (Buffer::new(&spans), Buffer::new(&more_codes));
        let logarithms: Vec<f32> = (0..100).map(|n| (n as f32).ln_1p()).collect();
        let (rows, counts, values) = (Buffer::new(&rows), Buffer::new(&counts), Buffer::new(&vec![LEFT; want.len()]));
        let (offsets, codes, tail) = (Buffer::new(&offsets), Buffer::new(&codes), Buffer::new(&tail));
        let (asked, places, logarithms) = (Buffer::new(&asked), Buffer::new(&places), Buffer::new(&logarithms));
        let launch = kernels::FillCounts {
            rows: rows.address(),
            counts: counts.address(),
            n_requests: n_requests as u32,
            width: width as u32,
            offsets: offsets.address(),
            codes: codes.address(),
            n_items: n_items as u32,
            more: kernels::More { rows: spans.address(), n: n_more as u32 },
            more_codes: more_codes.address(),
            tail: tail.address(),
            asked: asked.address(),
            places: places.address(),
            places_stride,
            place: 2,
            by,
            logarithms: logarithms.address(),
            n_logarithms: 100,
            values: values.address(),
            stride: stride as u32,
            column: 1,
        };
        run(variant, launch.launch(), seed)?;
        same("values", &bits(&values), &bits(&want))?;
        intact("values", &values)
    }
}

#[derive(Clone, Copy, Debug)]
pub struct Finish {
    pub n_requests: usize,
    pub widths: [usize; 4],
    pub m: usize,
    pub n_members: usize,
    pub scores: Scores,
}

impl Finish {
    fn any() -> impl Strategy<Value = Finish> {
        let widths = prop_oneof![prop::array::uniform4(1usize..40), Just([500, 300, 100, 200]), Just([512; 4])];
        (1usize..4, widths, prop_oneof![1usize..20, 1usize..513], 1usize..4, Scores::any()).prop_map(
            |(n_requests, widths, m, n_members, scores)| Finish { n_requests, widths, m: 4 * m, n_members, scores },
        )
    }

    pub fn check(&self, variant: &str, seed: u64) -> Result<(), String> {
        let &Finish { n_requests, widths, m, n_members, .. } = self;
        let (random, width) = (&mut SmallRng::seed_from_u64(seed), widths.iter().sum::<usize>());
        let merged = Merged::new(n_requests, widths, 1500, random);
        let members: Vec<(Vec<f32>, f32)> = (0..n_members)
            .map(|_| (self.scores.take(n_requests * width, random), random.random_range(0.25f32..3.0)))
            .collect();
        let weight: f32 = members.iter().map(|member| member.1).fold(0.0, |sum, weight| sum + weight);
        let want_sums = twins::add_scores(&members.iter().map(|(s, w)| (&s[..], *w)).collect::<Vec<_>>());
        let sums = Buffer::new(&vec![LEFT; n_requests * width]);
        for (at, (scores, weight)) in members.iter().enumerate() {
            let scores = Buffer::new(scores);
            let (n, weight) = ((n_requests * width) as u32, *weight);
            let launch =
                kernels::AddScores { scores: scores.address(), n, weight, first: at == 0, sums: sums.address() };
            run("plain", launch.launch(), seed)?;
        }
        // NaN is NaN, whichever.
        let plain = |values: &[f32]| {
            let value = |value: &f32| if value.is_nan() { f32::NAN } else { value + 0.0 };
            bits(&values.iter().map(value).collect::<Vec<_>>())
        };
        same("sums", &plain(&sums), &plain(&want_sums))?;

        let search_weight = 0.75;
        let record = kernels::FinishSlates::record(m);
        let n_asked = n_requests - usize::from(seed.is_multiple_of(5));
        let mut want = vec![UNTOUCHED; n_requests * record];
        let (mut lengths, mut list_scores) = (Vec::new(), vec![LEFT; n_requests * width]);
        let open: Vec<u32> = (0..n_requests).map(|_| random.random_range(0..2)).collect();
        let start_3 = width - widths[3];
        for (request, candidates) in merged.candidates.iter().enumerate() {
            lengths.extend(merged.lists[request].iter().map(|list| list.len() as u32));
            let best = merged.lists[request][3].first().map_or(0.0, |scored| scored.score);
            list_scores[request * width + start_3] = best;
            if request >= n_asked {
                continue;
            }
            let own = &want_sums[request * width..][..candidates.len()];
            let (items, n_nan) = twins::finish_slate(candidates, own, weight, (search_weight, best), m);
            let to = &mut want[request * record..(request + 1) * record];
            to[..4].copy_from_slice(&[candidates.len() as u32, lengths[4 * request], n_nan as u32, open[request]]);
            let holes = (Scored { row: NO_ROW, score: f32::NAN }, SourceSet::default());
            let sets = &mut vec![0u8; m];
            for (at, (scored, set)) in items.into_iter().chain(std::iter::repeat(holes)).take(m).enumerate() {
                (to[4 + at], to[4 + m + at], sets[at]) = (scored.row, scored.score.to_bits(), set.0);
            }
            for (word, four) in to[4 + 2 * m..].iter_mut().zip(sets.as_chunks().0) {
                *word = u32::from_le_bytes(*four);
            }
        }
        let header = Buffer::new_16(&[n_asked as u32, m as u32, 0, 0]);
        let (rows, sources, counts) =
            (Buffer::new(&merged.rows), Buffer::new(&merged.sources), Buffer::new(&merged.counts));
        let (source_scores, list_scores) = (Buffer::new(&merged.source_scores), Buffer::new(&list_scores));
        let (lengths, open) = (Buffer::new(&lengths), Buffer::new(&open));
        let records = Buffer::new(&vec![UNTOUCHED; n_requests * record]);
        let launch = kernels::FinishSlates {
            header: header.address(),
            rows: rows.address(),
            sources: sources.address(),
            sums: sums.address(),
            counts: counts.address(),
            widths: widths.map(|width| width as u32),
            weight,
            source_scores: source_scores.address(),
            list_scores: list_scores.address(),
            lengths: lengths.address(),
            search_weight,
            open: open.address(),
            records: records.address(),
            n_requests: n_requests as u32,
        };
        run(variant, launch.launch(), seed)?;
        same("records", &records, &want)?;
        intact("records", &records)
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn exact_scores_equal_the_cpu_s(shape in ExactScores::any(), seed in any::<u64>()) {
        held(shape.check("plain", seed))?;
    }

    #[test]
    fn mask_seen_equals_its_twin(n_requests in 1usize..4, n_rows in 1usize..700, n_seen in 0usize..600, seed in any::<u64>()) {
        held(MaskSeen { n_requests, n_rows, n_seen }.check("plain", seed))?;
    }

    #[test]
    fn settle_lists_equals_its_twin(shape in Settle::any(), seed in any::<u64>()) {
        held(shape.check("plain", seed))?;
    }

    #[test]
    fn fill_columns_equals_the_cpu_s(shape in Fill::any(), seed in any::<u64>()) {
        held(shape.check("plain", seed))?;
    }

    #[test]
    fn fill_counts_equals_its_twin(shape in Count::any(), seed in any::<u64>()) {
        held(shape.check("plain", seed))?;
    }

    #[test]
    fn finish_slates_equals_its_twin(shape in Finish::any(), seed in any::<u64>()) {
        held(shape.check("plain", seed))?;
    }
}

/// Shapes that reach every part of a kernel.
pub fn check(kernel: &str, variant: &str, seed: u64) -> Result<(), String> {
    let odd = seed % 2 == 1;
    match kernel {
        "exact_scores" => {
            let metric = [Metric::InnerProduct, Metric::Cosine, Metric::L2][seed as usize % 3];
            let (dim, with_counts) = ([131, 64, 40, 7][seed as usize % 4], seed % 4 < 2);
            let sizes = ExactScores {
                n_requests: 2,
                n_rows: 20,
                n_more: 30,
                dim,
                places: 37,
                metric,
                with_counts,
                with_sources: odd,
            };
            sizes.check(variant, seed)
        }
        "mask_seen" => MaskSeen { n_requests: 3, n_rows: 300, n_seen: 400 }.check(variant, seed),
        "settle_lists" => {
            let (widths, error) =
                ([[500, 300, 100, 200], [7, 1, 3, 0]][seed as usize % 2], [0.0, 0.3][seed as usize / 2 % 2]);
            let fetched = if odd { 9 } else { 640 };
            Settle { n_requests: 2, fetched, widths, scores: Scores::Many, error }.check(variant, seed)
        }
        "fill_columns" => {
            let widths = [500, 300, 100, 200];
            Fill { n_requests: 2, widths, n_items: 900, n_liked: 12, spare: 1, reads_lists: true }.check(variant, seed)
        }
        "fill_counts" => {
            let by = [kernels::CountBy::Logarithm, kernels::CountBy::First, kernels::CountBy::Share][seed as usize % 3];
            Count { n_requests: 2, width: 500, n_items: 100, n_more: 100, n_codes: 40, by }.check(variant, seed)
        }
        "finish_slates" => {
            let scores = if odd { Scores::Bits } else { Scores::Many };
            let widths = [500, 300, 100, 200];
            Finish { n_requests: 2, widths, m: [128, 1100][seed as usize / 2 % 2], n_members: 2, scores }
                .check(variant, seed)
        }
        _ => Err(format!("no shapes for {kernel}")),
    }
}
