//! An index for tests that panics or hangs when it is told to; of this library's own tests and of those over sockets, which both
//! name what it needs.

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicBool, AtomicUsize};

use parking_lot::{Condvar, Mutex};

use super::{
    BruteForce, Exact, Filter, IndexKind, Kernel, Matrix, Metric, Partitioned, Scored, SearchParams, SearchScratch,
    VectorIndex,
};

/// An index that does what it is told.
#[derive(Debug)]
pub struct Scripted {
    inner: BruteForce,
    pub panics: AtomicBool,
    /// Searches wait until it is open.
    door: Mutex<bool>,
    opened: Condvar,
    pub asked: AtomicUsize,
}

impl Scripted {
    pub fn open(&self, is: bool) {
        *self.door.lock() = is;
        self.opened.notify_all();
    }
}

impl VectorIndex for Scripted {
    fn kind(&self) -> IndexKind {
        IndexKind::BruteForce
    }

    fn dim(&self) -> usize {
        self.inner.dim()
    }

    fn bytes(&self) -> usize {
        self.inner.bytes()
    }

    fn search(
        &self,
        query: &[f32],
        k: usize,
        filter: Filter<'_>,
        params: &SearchParams,
        scratch: &mut SearchScratch,
        out: &mut Vec<Scored>,
    ) {
        self.asked.fetch_add(1, SeqCst);
        assert!(!self.panics.load(SeqCst), "told to");
        let mut door = self.door.lock();
        while !*door {
            self.opened.wait(&mut door);
        }
        drop(door);
        self.inner.search(query, k, filter, params, scratch, out);
    }

    fn scores(&self, query: &[f32], rows: &[u32], scratch: &mut SearchScratch, out: &mut Vec<f32>) {
        self.inner.scores(query, rows, scratch, out);
    }
}

/// An exact index over `matrix` in partitions, of which the second is scripted.
pub fn scripted(matrix: &Matrix, metric: Metric, places: Vec<Arc<[u32]>>) -> (Partitioned, Arc<Scripted>) {
    let exact =
        |rows: &Arc<[u32]>| BruteForce::over(Exact::of_chosen(matrix.clone(), rows.clone(), metric, Kernel::detect()));
    let scripted = Arc::new(Scripted {
        inner: exact(&places[1]),
        panics: AtomicBool::new(false),
        door: Mutex::new(true),
        opened: Condvar::new(),
        asked: AtomicUsize::new(0),
    });
    let pieces: Vec<(Arc<dyn VectorIndex>, _)> = places
        .into_iter()
        .enumerate()
        .map(|(at, rows)| match at {
            1 => (scripted.clone() as Arc<dyn VectorIndex>, rows),
            _ => (Arc::new(exact(&rows)) as Arc<dyn VectorIndex>, rows),
        })
        .collect();
    (Partitioned::new(IndexKind::BruteForce, matrix, metric, pieces), scripted)
}
