//! Walking through a graph.

use super::codes::{CodedQuery, Codes};
use crate::candidates::{Packed, Scored};
use crate::memory::prefetch_range;
use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// Ends a list of neighbours that is not full.
pub const NO_LINK: u32 = u32::MAX;

/// One layer of a graph: nodes, and for each at most `degree` neighbours.
#[derive(Clone, Copy)]
pub struct Layer<'a> {
    /// `[n, degree]`, lists that are not full end with [`NO_LINK`].
    pub links: &'a [u32],
    /// Most neighbours of a node.
    pub degree: usize,
    /// The row of each node; absent where they are the same.
    pub rows: Option<&'a [u32]>,
}

impl Layer<'_> {
    /// The row of `node`.
    #[inline(always)]
    pub fn row(&self, node: u32) -> u32 {
        self.rows.map_or(node, |rows| rows[node as usize])
    }

    /// The neighbours of `node`.
    #[inline(always)]
    pub fn neighbours(&self, node: u32) -> impl Iterator<Item = u32> {
        let links = &self.links[node as usize * self.degree..][..self.degree];
        links.iter().copied().take_while(|&link| link != NO_LINK)
    }
}

/// Buffers of a search, reused from search to search.
#[derive(Debug, Default)]
pub struct Walk {
    /// What is searched for.
    pub query: CodedQuery,
    /// The nodes that a search found, best first after [`Walk::beam`].
    pub found: Best,
    visited: Visited,
    frontier: BinaryHeap<Reverse<Packed>>,
    fresh: Vec<u32>,
    rows: Vec<u32>,
    scores: Vec<f32>,
}

/// Nodes that a search has come across, forgotten at once when the next begins.
#[derive(Debug, Default)]
struct Visited {
    epoch: u8,
    marks: Vec<u8>,
}

impl Visited {
    fn begin(&mut self, n: usize) {
        if self.marks.len() < n {
            self.marks.resize(n, 0);
        }
        self.epoch = self.epoch.wrapping_add(1);
        if self.epoch == 0 {
            self.marks.fill(0);
            self.epoch = 1;
        }
    }

    /// Whether `node` is new.
    #[inline(always)]
    fn insert(&mut self, node: u32) -> bool {
        std::mem::replace(&mut self.marks[node as usize], self.epoch) != self.epoch
    }
}

/// The best of what is offered. It holds some more than it keeps and is pruned when there is no room left, which costs less than
/// a heap; the threshold follows as late.
#[derive(Debug, Default)]
pub struct Best {
    entries: Vec<Packed>,
    keep: usize,
    threshold: Option<Packed>,
}

impl Best {
    /// Empties it; `keep > 0`.
    pub fn begin(&mut self, keep: usize) {
        self.entries.clear();
        (self.keep, self.threshold) = (keep, None);
    }

    /// Whether `entry` may be among the best.
    #[inline(always)]
    pub fn admits(&self, entry: Packed) -> bool {
        self.threshold.is_none_or(|threshold| entry < threshold)
    }

    /// Whether what lies beyond `entry` may be among the best.
    #[inline(always)]
    fn reaches(&self, entry: Packed) -> bool {
        self.threshold.is_none_or(|threshold| entry <= threshold)
    }

    /// Takes an entry that it admits.
    #[inline(always)]
    pub fn push(&mut self, entry: Packed) {
        self.entries.push(entry);
        let room = match self.threshold {
            None => self.keep,
            Some(_) => self.keep + self.keep / 4 + 16,
        };
        if self.entries.len() >= room {
            self.entries.select_nth_unstable(self.keep - 1);
            self.entries.truncate(self.keep);
            self.threshold = Some(self.entries[self.keep - 1]);
        }
    }

    /// The best `k`, best first.
    pub fn finish(&mut self, k: usize) -> &[Packed] {
        crate::candidates::keep_best(&mut self.entries, k);
        &self.entries
    }

    /// Number of entries, some more than it keeps.
    pub fn len(&self) -> usize {
        self.entries.len()
    }
}

impl Walk {
    /// Moves from `node` to its best neighbour as long as that is better, and returns where it ends.
    pub fn descend(&mut self, layer: Layer<'_>, codes: &Codes, mut node: u32) -> u32 {
        self.score(layer, codes, [node].into_iter());
        let mut best = self.scores[0];
        loop {
            self.score(layer, codes, layer.neighbours(node));
            let before = node;
            for (&next, &score) in self.fresh.iter().zip(&self.scores) {
                // False for NaN, so that every step is a rise and there is an end.
                if score > best {
                    (node, best) = (next, score);
                }
            }
            if node == before {
                return node;
            }
        }
    }

    /// Finds the nodes nearest to the query, beginning at `starts`: those that `admits` admits of the best `ef > 0`, into `found`.
    pub fn beam(
        &mut self,
        layer: Layer<'_>,
        codes: &Codes,
        ef: usize,
        starts: impl Iterator<Item = u32>,
        admits: impl Fn(u32) -> bool,
    ) {
        self.visited.begin(layer.links.len() / layer.degree);
        self.frontier.clear();
        self.found.begin(ef);
        let Walk { query, found, visited, frontier, fresh, rows, scores } = self;
        fresh.clear();
        fresh.extend(starts.filter(|&node| visited.insert(node)));
        loop {
            let rows = match layer.rows {
                None => &*fresh,
                Some(of) => {
                    rows.clear();
                    rows.extend(fresh.iter().map(|&node| of[node as usize]));
                    &*rows
                }
            };
            codes.scores(query, rows, scores);
            for (&node, &score) in fresh.iter().zip(&*scores) {
                let entry = Packed::from(Scored { row: node, score });
                if found.admits(entry) {
                    frontier.push(Reverse(entry));
                    if admits(node) {
                        found.push(entry);
                    }
                }
            }
            let Some(Reverse(next)) = frontier.pop().filter(|next| found.reaches(next.0)) else {
                return;
            };
            if let Some(Reverse(then)) = frontier.peek() {
                let from = Scored::from(*then).row as usize * layer.degree;
                prefetch_range(layer.links, from..from + layer.degree);
            }
            fresh.clear();
            fresh.extend(layer.neighbours(Scored::from(next).row).filter(|&node| visited.insert(node)));
        }
    }

    /// Offers `rows` to `found`, whose `begin` was called.
    pub fn offer(&mut self, codes: &Codes, rows: &[u32]) {
        codes.scores(&self.query, rows, &mut self.scores);
        for (&row, &score) in rows.iter().zip(&self.scores) {
            let entry = Packed::from(Scored { row, score });
            if self.found.admits(entry) {
                self.found.push(entry);
            }
        }
    }

    fn score(&mut self, layer: Layer<'_>, codes: &Codes, nodes: impl Iterator<Item = u32>) {
        self.fresh.clear();
        self.fresh.extend(nodes);
        self.rows.clear();
        self.rows.extend(self.fresh.iter().map(|&node| layer.row(node)));
        codes.scores(&self.query, &self.rows, &mut self.scores);
    }
}
