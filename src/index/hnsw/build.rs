//! Making a graph: batches of vectors are inserted at a time.
//!
//! The vectors of a batch search the graph as it was before, all at once; then each list of neighbours that they change is written,
//! all at once. So no lock is needed, and the graph depends on the seed alone (ParlayANN; Dobson et al., PPoPP 2024, where batches
//! double; here they are a fixed share of what is there, as what is in a batch does not see each other).

use super::codes::{CodedQuery, Codes};
use super::search::{Layer, NO_LINK, Walk};
use crate::candidates::Scored;
use crate::index::HnswOptions;
use crate::index::rotation::split_mix;
use rayon::prelude::*;

/// A batch is one of so many parts of what is there.
const SHARE: usize = 32;
/// Lists that one task writes.
const BLOCK: usize = 256;
/// A neighbour is left out if another is nearer to it by this factor of the squared distance: above 1, walks make larger steps
/// (Subramanya et al., "DiskANN", NeurIPS 2019).
const ALPHA: f32 = 1.2;
/// Squared distance, as a part of the squared length, up to which vectors are the same but for rounding.
const SAME: f32 = 1e-6;

/// The layers of a graph, bottom first.
pub struct Graph {
    pub bottom: Links,
    pub upper: Vec<Links>,
    /// Rows of the nodes of the upper layers: those that reach highest come first, so that every layer's are the first of them.
    pub upper_rows: Vec<u32>,
}

/// Lists of neighbours.
pub struct Links {
    degree: usize,
    pub links: Vec<u32>,
}

impl Links {
    fn new(n: usize, degree: usize) -> Self {
        Links { degree, links: vec![NO_LINK; n * degree] }
    }

    /// Number of nodes.
    pub fn n_nodes(&self) -> usize {
        self.links.len() / self.degree
    }

    fn layer<'a>(&'a self, rows: Option<&'a [u32]>) -> Layer<'a> {
        Layer { links: &self.links, degree: self.degree, rows }
    }
}

/// A mix of the bits of both, as random as they look.
fn mix(seed: u64, value: u64) -> u64 {
    split_mix(&mut (seed ^ value.wrapping_mul(0x9e37_79b9_7f4a_7c15)))
}

/// The highest layer of a row: geometric, so that each layer has one of `degree` of the nodes below.
fn level(seed: u64, row: u32, degree: usize) -> usize {
    let uniform = ((mix(!seed, u64::from(row)) >> 11) + 1) as f64 / (1u64 << 53) as f64;
    (-uniform.ln() / (degree as f64).ln()) as usize
}

/// Builds the graph over `n` rows of `codes`. `progress` is told how many are in.
pub fn build(codes: &Codes, n: usize, options: &HnswOptions, progress: &(dyn Fn(u64) + Sync)) -> Graph {
    let degree = options.graph_degree as usize;
    let upper_degree = degree / 2;
    let ef = options.ef_construction as usize;
    let mut order: Vec<u32> = (0..n as u32).collect();
    order.par_sort_unstable_by_key(|&row| (mix(options.seed, u64::from(row)), row));
    let levels: Vec<u8> = order.par_iter().map(|&row| level(options.seed, row, upper_degree) as u8).collect();
    let mut upper: Vec<(u8, u32)> = levels.iter().copied().zip(order.iter().copied()).filter(|at| at.0 > 0).collect();
    upper.sort_by_key(|&(level, _)| std::cmp::Reverse(level));
    let n_layers = upper.first().map_or(0, |first| usize::from(first.0));
    let layer_sizes = (1..=n_layers).map(|layer| upper.partition_point(|at| usize::from(at.0) >= layer));
    let mut graph = Graph {
        bottom: Links::new(n, degree),
        upper: layer_sizes.map(|n| Links::new(n, upper_degree)).collect(),
        upper_rows: upper.iter().map(|at| at.1).collect(),
    };
    let mut node_of = vec![NO_LINK; n];
    for (node, &row) in graph.upper_rows.iter().enumerate() {
        node_of[row as usize] = node as u32;
    }
    // The entry is there before all others.
    if let Some(&entry) = graph.upper_rows.first() {
        let at = order.iter().position(|&row| row == entry).expect("of these rows");
        order[..=at].rotate_right(1);
    }
    let mut n_in = 1;
    while n_in < n {
        let batch = &order[n_in..(n_in + n_in.div_ceil(SHARE)).min(n)];
        let insert = |state: &mut (Walk, Pruner), &row: &u32| {
            insert(&graph, codes, ef, row, node_of[row as usize], order[0], state)
        };
        let found: Vec<Vec<Vec<(u32, u32)>>> =
            batch.par_iter().with_min_len(4).map_init(Default::default, insert).collect();
        let mut edges: Vec<Vec<(u32, u32)>> = vec![Vec::new(); graph.upper.len() + 1];
        for layers in found {
            for (layer, found) in layers.into_iter().enumerate() {
                edges[layer].extend(found.iter().flat_map(|&(a, b)| [(a, b), (b, a)]));
            }
        }
        let Graph { bottom, upper, upper_rows } = &mut graph;
        connect(bottom, None, codes, &mut edges[0]);
        for (links, edges) in upper.iter_mut().zip(&mut edges[1..]) {
            connect(links, Some(upper_rows), codes, edges);
        }
        n_in += batch.len();
        progress(n_in as u64);
    }
    graph
}

/// Finds the neighbours of `row`, by layer from the bottom: pairs of nodes.
fn insert(
    graph: &Graph,
    codes: &Codes,
    ef: usize,
    row: u32,
    node: u32,
    first: u32,
    (walk, pruner): &mut (Walk, Pruner),
) -> Vec<Vec<(u32, u32)>> {
    codes.prepare_row(row, &mut walk.query);
    let level = graph.upper.partition_point(|links| node != NO_LINK && (node as usize) < links.n_nodes());
    let mut found = vec![Vec::new(); level + 1];
    let mut start = 0;
    for (at, links) in graph.upper.iter().enumerate().rev() {
        let layer = links.layer(Some(&graph.upper_rows));
        if at >= level {
            start = walk.descend(layer, codes, start);
        } else {
            found[at + 1] = neighbours(layer, codes, ef, node, start, walk, pruner);
            start = found[at + 1].first().map_or(start, |pair| pair.1);
        }
    }
    let start = graph.upper_rows.get(start as usize).copied().unwrap_or(first);
    found[0] = neighbours(graph.bottom.layer(None), codes, ef, row, start, walk, pruner);
    found
}

fn neighbours(
    layer: Layer<'_>,
    codes: &Codes,
    ef: usize,
    node: u32,
    start: u32,
    walk: &mut Walk,
    pruner: &mut Pruner,
) -> Vec<(u32, u32)> {
    walk.beam(layer, codes, ef, [start].into_iter(), |_| true);
    let norm = codes.norm(layer.row(node));
    pruner.candidates.clear();
    let found = walk.found.finish(ef).iter().map(|&entry| Scored::from(entry));
    pruner.candidates.extend(found.map(|found| (norm - found.score, found.row)));
    pruner.prune(layer, codes, norm);
    pruner.kept.iter().map(|&other| (node, other)).collect()
}

/// Adds links from the first to the second of each pair, and prunes the lists that are full.
fn connect(links: &mut Links, rows: Option<&[u32]>, codes: &Codes, edges: &mut [(u32, u32)]) {
    edges.par_sort_unstable();
    let edges = &*edges;
    let degree = links.degree;
    links.links.par_chunks_mut(BLOCK * degree).enumerate().for_each_init(Pruner::default, |pruner, (block, lists)| {
        let from = edges.partition_point(|edge| (edge.0 as usize) < block * BLOCK);
        let to = edges.partition_point(|edge| (edge.0 as usize) < (block + 1) * BLOCK);
        for edges in edges[from..to].chunk_by(|a, b| a.0 == b.0) {
            let node = edges[0].0;
            let list = &mut lists[(node as usize - block * BLOCK) * degree..][..degree];
            let n_links = list.iter().position(|&link| link == NO_LINK).unwrap_or(degree);
            if n_links + edges.len() <= degree {
                list[n_links..].iter_mut().zip(edges).for_each(|(link, edge)| *link = edge.1);
                continue;
            }
            // Only what it takes to find the rows.
            let layer = Layer { links: &[], degree, rows };
            let norm = codes.norm(layer.row(node));
            let nodes = list[..n_links].iter().copied().chain(edges.iter().map(|edge| edge.1));
            pruner.measure(layer, codes, node, norm, nodes);
            pruner.prune(layer, codes, norm);
            list.fill(NO_LINK);
            list.iter_mut().zip(&pruner.kept).for_each(|(link, &kept)| *link = kept);
        }
    });
}

/// Chooses neighbours among candidates.
#[derive(Default)]
struct Pruner {
    /// Squared distances and nodes.
    candidates: Vec<(f32, u32)>,
    kept: Vec<u32>,
    rows: Vec<u32>,
    query: CodedQuery,
    scores: Vec<f32>,
}

impl Pruner {
    /// Makes `nodes` the candidates of `node`, nearest first.
    fn measure(&mut self, layer: Layer<'_>, codes: &Codes, node: u32, norm: f32, nodes: impl Iterator<Item = u32>) {
        codes.prepare_row(layer.row(node), &mut self.query);
        self.candidates.clear();
        self.candidates.extend(nodes.map(|node| (0.0, node)));
        self.rows.clear();
        self.rows.extend(self.candidates.iter().map(|&(_, node)| layer.row(node)));
        codes.scores(&self.query, &self.rows, &mut self.scores);
        self.candidates.iter_mut().zip(&self.scores).for_each(|(candidate, score)| candidate.0 = norm - score);
        self.candidates.sort_unstable_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    }

    /// Keeps at most `layer.degree` of the candidates, which come nearest first: those that are nearer to the node, whose squared
    /// length is `norm`, than to any that is kept (algorithm 4 of Malkov and Yashunin).
    fn prune(&mut self, layer: Layer<'_>, codes: &Codes, norm: f32) {
        let Pruner { candidates, kept, rows, query, scores } = self;
        kept.clear();
        rows.clear();
        let mut n_same = 0;
        for &(distance, node) in &*candidates {
            if kept.len() == layer.degree {
                break;
            }
            let row = layer.row(node);
            if distance <= SAME * norm {
                // Many that are the same would leave no link to what is not.
                n_same += 1;
                if n_same > layer.degree / 2 {
                    continue;
                }
            } else {
                codes.prepare_row(row, query);
                let nearest = codes.norm(row) - distance / ALPHA;
                let nearer = |rows: &[u32], scores: &mut Vec<f32>| {
                    codes.scores(query, rows, scores);
                    scores.iter().any(|&score| score > nearest)
                };
                if rows.chunks(8).any(|rows| nearer(rows, scores)) {
                    continue;
                }
            }
            kept.push(node);
            rows.push(row);
        }
    }
}
