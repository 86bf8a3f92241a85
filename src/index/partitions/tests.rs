use std::collections::HashSet;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::candidates::best_first;
use crate::catalog::generation::MatrixData;
use crate::index::{BruteForce, HnswOptions, IvfOptions, build};

#[path = "scripted.rs"]
mod scripted;
use scripted::{Scripted, scripted};

const SEARCH: SearchParams = SearchParams { n_probes: None, refine_ratio: None, ef_search: None };

fn matrix(values: Vec<f32>, dim: usize) -> Matrix {
    Matrix { dim, data: MatrixData::F32(values.into()) }
}

fn ids(n: usize) -> Vec<String> {
    (0..n).map(|row| format!("item-{row}")).collect()
}

fn divided(options: &IndexOptions, matrix: &Matrix, metric: Metric, n_partitions: u32) -> Partitioned {
    let ids = ids(matrix.n_rows());
    let places = place(ids.iter().map(String::as_str), n_partitions).unwrap();
    Partitioned::build(options, matrix, metric, places, SEARCH, &|_, _, _| {}).unwrap()
}

fn searchers(n: usize) -> Arc<Searchers> {
    Searchers::start(n, |_| {}).unwrap()
}

/// Waits for what happens on another thread, for ten seconds at most.
fn eventually(what: &str, holds: impl Fn() -> bool) {
    let began = Instant::now();
    while !holds() {
        assert!(began.elapsed() < Duration::from_secs(10), "{what}");
        std::thread::yield_now();
    }
}

/// Of the ids in the test, in 1000 partitions.
const PLACED: [u32; 7] = [175, 99, 397, 70, 758, 596, 139];

#[test]
fn placement_is_what_it_has_always_been() {
    let placed = ["", "0", "1", "42", "item-7", "B00005N5PF", "\u{e4}\u{20ac}"].map(|id| partition_of(id, 1000));
    assert_eq!(placed, PLACED);
    let n = 10_000;
    let ids = ids(n);
    for n_partitions in [1, 3, 256] {
        let places = place(ids.iter().map(String::as_str), n_partitions).unwrap();
        let mut all: Vec<u32> = places.iter().flat_map(|rows| rows.iter().copied()).collect();
        assert!(places.iter().all(|rows| rows.is_sorted()));
        let mean = n as f64 / f64::from(n_partitions);
        assert!(places.iter().all(|rows| (rows.len() as f64 - mean).abs() <= 5.0 * mean.sqrt()), "{n_partitions}");
        all.sort_unstable();
        assert_eq!(all, (0..n as u32).collect::<Vec<_>>());
    }
    for wrong in [0, 257] {
        assert!(place(std::iter::empty(), wrong).unwrap_err().contains("must be 1 to 256"));
    }
}

proptest! {
    #[test]
    fn exact_kinds_answer_as_one_index_does(
        rows in prop::collection::vec(prop::collection::vec(-4i8..5, 3), 1..900),
        queries in prop::collection::vec(prop::collection::vec(-4i8..5, 3), 1..4),
        k in 1usize..400, every in 1u32..5, strict in any::<bool>(), n_partitions in 1u32..9, n_searchers in 0usize..3,
        metric in prop::sample::select(vec![Metric::InnerProduct, Metric::Cosine, Metric::L2]),
    ) {
        // Small integers make many ties.
        let flat = |vectors: &[Vec<i8>]| vectors.iter().flatten().map(|&v| f32::from(v)).collect::<Vec<f32>>();
        let (matrix, queries) = (matrix(flat(&rows), 3), flat(&queries));
        let whole = BruteForce::new(matrix.clone(), metric, Kernel::detect());
        let index = divided(&IndexOptions::BruteForce {}, &matrix, metric, n_partitions);
        index.give(searchers(n_searchers));
        let odd = |row: u32| row % 2 == 1;
        let bits: Vec<u64> = (0..rows.len().div_ceil(64) as u32)
            .map(|word| (0..64).fold(0, |bits, bit| bits | u64::from((word * 64 + bit).is_multiple_of(every)) << bit))
            .collect();
        let mut filter = if strict { Filter::predicate(&odd) } else { Filter::ALL };
        if every > 1 {
            filter = filter.within(&bits);
        }
        let (mut scratch, mut want) = (SearchScratch::default(), Vec::new());
        let mut got = vec![Vec::new(); queries.len() / 3];
        for (query, got) in queries.chunks_exact(3).zip(&mut got) {
            let (mut one, mut single) = (Vec::new(), Vec::new());
            whole.search(query, k, filter, &SEARCH, &mut scratch, &mut one);
            index.search(query, k, filter, &SEARCH, &mut scratch, &mut single);
            prop_assert_eq!(&single, &one);
            want.push(one);
            got.clear();
        }
        index.search_batch(&queries, k, filter, &SEARCH, &mut scratch, &mut got);
        prop_assert_eq!(got, want);
        prop_assert_eq!(scratch.coverage, Coverage::default());
    }
}

#[test]
fn approximate_kinds_keep_their_recall() {
    let (n, dim, k) = (3000, 24, 50);
    let mut noise = crate::testing::noise(4);
    let values: Vec<f32> = (0..n * dim).map(|at| noise() + ((at / dim * 7 + at % dim) % 11) as f32 / 20.0).collect();
    let queries: Vec<f32> = (0..8 * dim).map(|_| noise()).collect();
    let matrix = matrix(values, dim);
    let oracle = BruteForce::new(matrix.clone(), Metric::InnerProduct, Kernel::detect());
    let ivf = IvfOptions { kmeans_n_iters: Some(3), ..Default::default() };
    let hnsw = HnswOptions { graph_degree: 16, ef_construction: 60, seed: 0 };
    let mut scratch = SearchScratch::default();
    for options in [
        IndexOptions::IvfFlat(ivf.clone()),
        IndexOptions::IvfPq(ivf.clone()),
        IndexOptions::IvfRabitq(ivf),
        IndexOptions::Hnsw(hnsw),
    ] {
        let one = build(&options, &matrix, Metric::InnerProduct, &|_, _, _| {}).unwrap();
        let several = divided(&options, &matrix, Metric::InnerProduct, 4);
        assert_eq!((several.kind(), several.n_partitions()), (options.kind(), 4));
        several.give(searchers(2));
        for percent in [1, 10, 50, 99, 100] {
            let admits = |row: u32| row * 37 % 100 < percent;
            let filter = if percent == 100 { Filter::ALL } else { Filter::predicate(&admits) };
            let mut recalls = [0.0; 2];
            for query in queries.chunks_exact(dim) {
                let mut want = Vec::new();
                oracle.search(query, k, filter, &SEARCH, &mut scratch, &mut want);
                let want_rows: HashSet<u32> = want.iter().map(|s| s.row).collect();
                for (index, recall) in [&*one, &several].into_iter().zip(&mut recalls) {
                    let mut got = Vec::new();
                    index.search(query, k, filter, &SEARCH, &mut scratch, &mut got);
                    assert!(got.iter().all(|s| filter.allows(s.row)) && got.len() == want.len());
                    assert!(got.is_sorted_by(|a, b| best_first(a, b).is_lt()));
                    *recall +=
                        got.iter().filter(|s| want_rows.contains(&s.row)).count() as f64 / want.len() as f64 / 8.0;
                }
            }
            assert!(recalls[1] >= recalls[0] - 0.03, "{options:?} {percent} %: {recalls:?}");
        }
    }
}

#[test]
fn as_much_is_found_when_probes_are_those_for_another_number_of_partitions() {
    let (n, dim, k) = (12_000, 16, 100);
    let mut noise = crate::testing::noise(6);
    let centers: Vec<f32> = (0..40 * dim).map(|_| noise()).collect();
    let mut near = |at: usize| -> Vec<f32> { (0..dim).map(|d| centers[at % 40 * dim + d] + noise()).collect() };
    let matrix = matrix((0..n).flat_map(&mut near).collect(), dim);
    let queries: Vec<f32> = (0..30).flat_map(near).collect();
    let oracle = BruteForce::new(matrix.clone(), Metric::InnerProduct, Kernel::detect());
    let mut scratch = SearchScratch::default();
    let mut found = |index: &dyn VectorIndex, search: &SearchParams| {
        let rows: Vec<HashSet<u32>> = queries
            .chunks_exact(dim)
            .map(|query| {
                let mut out = Vec::new();
                index.search(query, k, Filter::ALL, search, &mut scratch, &mut out);
                out.iter().map(|s| s.row).collect()
            })
            .collect();
        rows
    };
    let want = found(&oracle, &SEARCH);
    for n_lists in [None, Some(80)] {
        let options = IndexOptions::IvfFlat(IvfOptions { n_lists, kmeans_n_iters: Some(4), ..Default::default() });
        let mut recall = |n_partitions: u32, n_probes: u32| {
            let got = found(
                &divided(&options, &matrix, Metric::InnerProduct, n_partitions),
                &SearchParams { n_probes: Some(n_probes), ..SEARCH },
            );
            got.iter().zip(&want).map(|(got, want)| got.intersection(want).count()).sum::<usize>() as f64
                / (k * want.len()) as f64
        };
        let one = recall(1, 12);
        assert!((0.8..0.98).contains(&one), "{one}: too easy or too hard");
        for to in [2, 4] {
            let there = n_probes_for(12, [1, to], n_lists.is_some());
            let several = recall(to, there);
            assert!(
                (-0.02..0.06).contains(&(several - one)),
                "{n_lists:?}, {to} partitions: {several}, not {one}, of {there} probes"
            );
        }
    }
    assert_eq!(
        [n_probes_for(25, [1, 8], false), n_probes_for(13, [8, 1], false), n_probes_for(3, [0, 0], true)],
        [13, 26, 3]
    );
}

#[test]
fn a_partition_that_has_all_of_the_best_is_asked_again() {
    let (n, k) = (2000, 300);
    let placed: Vec<bool> = ids(n).iter().map(|id| partition_of(id, 4) == 2).collect();
    // The best are all in one partition.
    let values: Vec<f32> =
        placed.iter().enumerate().map(|(row, is)| row as f32 + if *is { 1e5 } else { 0.0 }).collect();
    let matrix = matrix(values, 1);
    let index = divided(&IndexOptions::BruteForce {}, &matrix, Metric::InnerProduct, 4);
    assert!(Partitioned::share_of(k, 4) < k && k < index.pieces[2].rows.len());
    for n_searchers in [0, 2] {
        index.give(searchers(n_searchers));
        let mut got = vec![Vec::new(); 2];
        index.search_batch(&[1.0, -1.0], k, Filter::ALL, &SEARCH, &mut SearchScratch::default(), &mut got);
        let best: Vec<u32> = (0..n as u32).rev().filter(|&row| placed[row as usize]).take(k).collect();
        assert_eq!(got[0].iter().map(|s| s.row).collect::<Vec<_>>(), best);
        let worst: Vec<u32> = (0..n as u32).filter(|&row| !placed[row as usize]).take(k).collect();
        assert_eq!(got[1].iter().map(|s| s.row).collect::<Vec<_>>(), worst);
    }
}

/// Rows whose vectors are their numbers, in four partitions, of which one is scripted.
fn with_scripted(n: usize) -> (Partitioned, Arc<Scripted>) {
    let ids = ids(n);
    let places = place(ids.iter().map(String::as_str), 4).unwrap();
    scripted(&matrix((0..n).map(|row| row as f32).collect(), 1), Metric::InnerProduct, places)
}

/// The best 20 rows, without those of partition 1 where `partial`.
fn best(index: &Partitioned, partial: bool) -> Vec<u32> {
    let n = index.n_rows() as u32;
    (0..n).rev().filter(|row| !partial || index.pieces[1].rows.binary_search(row).is_err()).take(20).collect()
}

fn search(index: &Partitioned, filter: Filter<'_>, scratch: &mut SearchScratch) -> Vec<u32> {
    let mut out = Vec::new();
    index.search(&[1.0], 20, filter, &SEARCH, scratch, &mut out);
    out.iter().map(|s| s.row).collect()
}

#[test]
fn a_partition_that_panics_is_left_out_and_comes_back() {
    for n_searchers in [0, 2] {
        let (index, scripted) = with_scripted(400);
        index.give(searchers(n_searchers));
        let mut scratch = SearchScratch::default();
        assert_eq!(search(&index, Filter::ALL, &mut scratch), best(&index, false));
        scripted.panics.store(true, SeqCst);
        let missing = index.pieces[1].rows.len() as f32 / 400.0;
        for _ in 0..3 {
            assert_eq!(search(&index, Filter::ALL, &mut scratch), best(&index, true));
            let Coverage { missing: told, failed, late, .. } = scratch.coverage;
            assert_eq!((told, failed, late), (missing, true, false));
        }
        let State { is_up, failures, latenesses } = index.pieces[1].state();
        // Within the pause it is asked once.
        assert!(!is_up && failures >= 1 && latenesses == 0 && scripted.asked.load(SeqCst) as u64 == failures + 1);
        scripted.panics.store(false, SeqCst);
        eventually("asked again after the pause", || {
            search(&index, Filter::ALL, &mut SearchScratch::default()) == best(&index, false)
        });
        assert!(index.pieces[1].state().is_up);
        assert_eq!(search(&index, Filter::ALL, &mut scratch), best(&index, false));
        assert_eq!(scratch.coverage, Coverage::default());
    }
}

#[test]
fn a_partition_that_is_late_is_not_waited_for_and_asks_no_filter_that_is_gone() {
    // Of one searcher, none is left while it hangs.
    (1..=2).for_each(hangs);
}

fn hangs(n_searchers: usize) {
    let (index, scripted) = with_scripted(400);
    index.give(searchers(n_searchers));
    let mut scratch = SearchScratch::default();
    scripted.open(false);
    let budget = Duration::from_millis(600);
    scratch.until = Some(Instant::now() + budget);
    {
        let asked = AtomicUsize::new(0);
        let admits = |row: u32| {
            asked.fetch_add(1, Relaxed);
            row != 399
        };
        let began = Instant::now();
        let got = search(&index, Filter::predicate(&admits), &mut scratch);
        assert!(began.elapsed() >= budget);
        let want: Vec<u32> = best(&index, true).into_iter().filter(|&row| row != 399).collect();
        assert_eq!(got[..19], want[..19]);
        assert!(scratch.coverage.late && !scratch.coverage.failed && scratch.coverage.missing > 0.1);
        assert!(asked.load(Relaxed) > 0);
    }
    // While it hangs, others neither wait for it nor give it a thread.
    for _ in 0..50 {
        scratch.until = Some(Instant::now() + Duration::from_secs(2));
        assert_eq!(search(&index, Filter::ALL, &mut scratch), best(&index, true));
        assert!(scratch.coverage.late);
        if scripted.asked.load(SeqCst) > 1 {
            // A slow machine: the pause is over.
            break;
        }
    }
    // It goes on with a filter that is closed, and then answers again.
    scripted.open(true);
    eventually("answers again", || {
        let mut scratch = SearchScratch::default();
        search(&index, Filter::ALL, &mut scratch) == best(&index, false) && scratch.coverage == Coverage::default()
    });
    assert!(index.pieces[1].state().latenesses >= 1);
}

#[test]
fn without_searchers_partitions_that_time_does_not_allow_are_left_out() {
    let (index, scripted) = with_scripted(400);
    let mut scratch = SearchScratch { until: Some(Instant::now()), ..SearchScratch::default() };
    assert_eq!(search(&index, Filter::ALL, &mut scratch), [0; 0]);
    assert_eq!((scratch.coverage.missing, scratch.coverage.late), (1.0, true));
    // Nobody is to blame for it.
    assert_eq!(scripted.asked.load(SeqCst), 0);
    assert!(index.pieces.iter().all(|piece| piece.state() == State { is_up: true, failures: 0, latenesses: 0 }));
    scratch.until = None;
    assert_eq!(search(&index, Filter::ALL, &mut scratch), best(&index, false));
}

#[test]
fn many_callers_share_the_searchers() {
    let (index, _) = with_scripted(3000);
    index.give(searchers(2));
    std::thread::scope(|scope| {
        for caller in 0..3u32 {
            let index = &index;
            scope.spawn(move || {
                let mut scratch = SearchScratch::default();
                for round in 0..300 {
                    // A filter of this round, gone after it.
                    let barred: HashSet<u32> = (0..5).map(|at| 2999 - (at * 3 + caller + round) % 20).collect();
                    let admits = |row: u32| !barred.contains(&row);
                    let got = search(index, Filter::predicate(&admits), &mut scratch);
                    let want: Vec<u32> = (0..3000).rev().filter(|row| !barred.contains(row)).take(20).collect();
                    assert_eq!(got, want);
                }
                // All searchers are through with them but for a moment: few are ever made.
                assert!(scratch.partitions.flights.len() <= 4, "{}", scratch.partitions.flights.len());
            });
        }
    });
}
