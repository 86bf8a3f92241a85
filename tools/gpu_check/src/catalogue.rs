//! A catalogue that is made up to measure recommendations on: every source has as many candidates as it may give.

use std::fs::{self, File};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, Result};
use arrow_array::builder::{Float32Builder, Int64Builder, ListBuilder};
use arrow_array::{ArrayRef, Int64Array, RecordBatch};
use parquet::arrow::ArrowWriter;
use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng as _};
use tastemaker::catalog::build::{self, BuildOptions, Silent};
use tastemaker::catalog::generation::Generation;
use tastemaker::catalog::{bundle, npy};

use crate::onnx::perceptron;
use crate::search::Shape;

/// Users whose histories the bundle has.
const N_USERS: usize = 256;
/// Items that a user liked.
const N_LIKED: usize = 40;
/// Items that users like, and which have neighbours.
const N_HEAD: usize = 20_000;
/// Neighbours of one.
const N_NEIGHBOURS: usize = 60;
/// Columns of a candidate, all of which a GPU fills by itself.
const CROSS: [&str; 12] = [
    "cross.dot",
    "candidate.ann.score",
    "candidate.ann.rank",
    "candidate.ann.present",
    "candidate.collaborative.rank",
    "candidate.collaborative.present",
    "candidate.trending.rank",
    "cross.cooccurrence_sum",
    "cross.cooccurrence_max",
    "cross.cooccurrence_count",
    "cross.cooccurrence_mean",
    "cross.cooccurrence_top3",
];

/// A ranker of the catalogue: a perceptron over the request's, the item's and the candidate's columns.
#[derive(Clone, Debug)]
pub struct Network {
    /// Widths from the input's to the last hidden one's.
    pub widths: Vec<usize>,
}

impl Network {
    /// With widths divided by `share`.
    pub fn new(widths: &[usize], share: usize) -> Self {
        Network { widths: widths.iter().map(|width| (width / share).max(CROSS.len() + 2)).collect() }
    }

    /// As in records: all widths.
    pub fn name(&self) -> String {
        let widths: Vec<String> = self.widths.iter().chain([&1]).map(ToString::to_string).collect();
        widths.join("-")
    }

    /// Of its ranker that is computed in those numbers.
    pub fn ranker(&self, numbers: &str) -> String {
        format!("mlp-{}-{numbers}", self.name())
    }

    /// The columns of `[user.embedding, item.embedding, CROSS]` that it looks at: as many of both embeddings as fill its input up.
    fn picked(&self, dim: usize) -> Vec<i64> {
        let rest = self.widths[0] - CROSS.len();
        let (users, items) = (rest / 2, rest - rest / 2);
        let columns = (0..users).chain(dim..dim + items).chain(2 * dim..2 * dim + CROSS.len());
        columns.map(|column| column as i64).collect()
    }
}

fn write(file: &Path, columns: Vec<(&str, ArrayRef)>) -> Result<()> {
    let batch = RecordBatch::try_from_iter(columns)?;
    let mut writer = ArrowWriter::try_new(File::create(file)?, batch.schema(), None)?;
    writer.write(&batch)?;
    writer.close().map(drop).with_context(|| file.display().to_string())
}

/// Makes a bundle of `shape.n` items in `out`, with a ranker per network and numbers, both `f32` and `bf16`; `work` is for its dataset.
///
/// # Errors
/// The disk, or what `build` says.
pub fn make(work: &Path, out: &Path, shape: Shape, networks: &[Network], seed: u64) -> Result<()> {
    let random = &mut SmallRng::seed_from_u64(seed);
    let Shape { n, dim, .. } = shape;
    fs::create_dir_all(work.join("rankers"))?;
    let ids = |n: usize| Arc::new(Int64Array::from_iter_values(0..n as i64)) as ArrayRef;
    write(&work.join("items.parquet"), vec![("item_id", ids(n))])?;
    write(&work.join("users.parquet"), vec![("user_id", ids(N_USERS))])?;
    let (items, users) = shape.draw(N_USERS, seed);
    npy::write_f32(&work.join("item_embeddings.npy"), &items, dim)?;
    npy::write_f32(&work.join("user_embeddings.npy"), &users, dim)?;
    drop((items, users));

    // Items that are liked lie all over the catalogue.
    let n_head = N_HEAD.min(n);
    let head = |at: usize| (at * (n / n_head)) as i64;
    let users = (0..N_USERS as i64).flat_map(|user| std::iter::repeat_n(user, N_LIKED));
    let liked = (0..N_USERS * N_LIKED).map(|_| head(random.random_range(0..n_head)));
    let columns: [ArrayRef; 2] =
        [Arc::new(Int64Array::from_iter_values(users)), Arc::new(Int64Array::from_iter_values(liked))];
    let [users, liked] = columns;
    write(&work.join("interactions.parquet"), vec![("user_id", users), ("item_id", liked)])?;
    let mut rows = ListBuilder::new(Int64Builder::new());
    let mut scores = ListBuilder::new(Float32Builder::new());
    for _ in 0..n_head {
        let sample = rand::seq::index::sample(random, n, N_NEIGHBOURS.min(n));
        sample.into_iter().for_each(|row| rows.values().append_value(row as i64));
        (0..N_NEIGHBOURS.min(n)).for_each(|_| scores.values().append_value(random.random_range(0.05..1.0)));
        rows.append(true);
        scores.append(true);
    }
    let heads: ArrayRef = Arc::new(Int64Array::from_iter_values((0..n_head).map(head)));
    let lists: [ArrayRef; 2] = [Arc::new(rows.finish()), Arc::new(scores.finish())];
    let [rows, scores] = lists;
    write(&work.join("collaborative.parquet"), vec![("item_id", heads), ("neighbours", rows), ("scores", scores)])?;

    let quoted: Vec<String> =
        ["user.embedding", "item.embedding"].iter().chain(&CROSS).map(|column| format!("{column:?}")).collect();
    for network in networks {
        let onnx = perceptron(2 * dim + CROSS.len(), &network.picked(dim), &network.widths[1..], seed);
        for numbers in ["f32", "bf16"] {
            let file = work.join("rankers").join(network.ranker(numbers));
            fs::write(file.with_added_extension("onnx"), &onnx)?;
            // What it costs is measured here: it is no reason to compute otherwise.
            let manifest = format!(
                "[[inputs]]\nname = \"features\"\ncolumns = [{}]\n[output]\nname = \"score\"\n\
                 [calibration]\nprecision = \"{numbers}\"\nmin_ndcg = 0.0\n",
                quoted.join(", ")
            );
            fs::write(file.with_added_extension("toml"), manifest)?;
        }
    }
    fs::write(work.join("dataset.toml"), "name = \"made-up\"\n")?;
    build::build(work, out, &BuildOptions { overwrite: true, ..BuildOptions::default() }, &Silent)?;
    Ok(())
}

/// Opens a bundle with one of its rankers alone.
///
/// # Errors
/// The bundle's, or that it has no such ranker.
pub fn open(bundle: &Path, ranker: &str) -> Result<Arc<Generation>> {
    let mut generation = bundle::open(bundle)?;
    generation.rankers.retain(|model| model.name == ranker);
    anyhow::ensure!(!generation.rankers.is_empty(), "the bundle has no ranker {ranker}");
    Ok(Arc::new(generation))
}
