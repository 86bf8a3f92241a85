//! Dataset → bundle: read, check, derive, write into a temporary directory, make durable, rename.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::cooccurrence::{self, MAX_NEIGHBOURS};
use super::dataset::{Dataset, EmbeddingsConfig, RawInteraction, Table, optional};
use super::generation::{Entities, Generation, Histories, Lists, Matrix};
use super::index::make;
use super::text::TextIndex;
use super::{CatalogError, bundle, npy, popularity};
use crate::index::{GraphMaker, Hnsw, IndexOptions, SearchParams, VectorIndex};
use parking_lot::Mutex;

/// What can't be served of a generation's rankers.
pub type TryRankers = fn(&Generation) -> Result<(), String>;

/// How to build.
#[derive(Clone, Debug)]
pub struct BuildOptions {
    /// Replace an existing bundle.
    pub overwrite: bool,
    /// Given the finished bundle before it appears, says what in its rankers can't be served.
    pub try_rankers: Option<TryRankers>,
    /// The index over the item embeddings.
    pub index: IndexOptions,
    /// What it is divided into; 1: nothing.
    pub partitions: u32,
    /// Makes the graph of an `hnsw` index of one piece, but for a small one; `None`: the CPU does.
    pub graphs: Option<Arc<dyn GraphMaker>>,
}

impl Default for BuildOptions {
    fn default() -> Self {
        let index = IndexOptions::BruteForce {};
        BuildOptions { overwrite: false, try_rankers: None, index, partitions: 1, graphs: None }
    }
}

/// Vectors up to which the CPU makes a graph in any case: it does in a moment, and there are more than any list is long.
const FEW_VECTORS: usize = 2048;

/// Hears how far a build is.
pub trait Progress: Sync {
    /// A stage begins; `total` is 0 where the number of its steps is unknown.
    fn begin(&self, stage: &str, total: u64);
    /// Steps finished.
    fn advance(&self, steps: u64);
}

/// Says nothing.
pub struct Silent;

impl Progress for Silent {
    fn begin(&self, _: &str, _: u64) {}
    fn advance(&self, _: u64) {}
}

/// What a build did.
#[derive(Clone, Debug)]
pub struct BuildReport {
    /// The bundle's.
    pub version: String,
    /// Where it is.
    pub path: PathBuf,
    /// Items.
    pub n_items: usize,
    /// Users.
    pub n_users: usize,
    /// Interactions used.
    pub n_interactions: usize,
    /// Rankers.
    pub rankers: Vec<String>,
    /// What was left out, and what was done without.
    pub warnings: Vec<String>,
    /// Wall time.
    pub elapsed: Duration,
}

impl fmt::Display for BuildReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for warning in &self.warnings {
            writeln!(f, "note: {warning}")?;
        }
        write!(
            f,
            "{}: {} ({} items, {} users, {} interactions, rankers: {}) in {:.1} s",
            self.path.display(),
            self.version,
            self.n_items,
            self.n_users,
            self.n_interactions,
            if self.rankers.is_empty() { "none".into() } else { self.rankers.join(", ") },
            self.elapsed.as_secs_f64()
        )
    }
}

/// Builds `directory` into a bundle at `out`, which appears whole or not at all.
///
/// # Errors
/// What is wrong with the dataset, by file, row and column; or that `out` is taken.
pub fn build(
    directory: &Path,
    out: &Path,
    options: &BuildOptions,
    progress: &dyn Progress,
) -> Result<BuildReport, CatalogError> {
    let start = Instant::now();
    check_target(out, options.overwrite)?;

    progress.begin("reading dataset", 0);
    let dataset = Dataset::read(directory)?;
    let (n_items, n_users) = (dataset.items.len(), dataset.users.len());
    let mut warnings = dataset.warnings.clone();
    let config = &dataset.config;
    let (item_embeddings, user_embeddings) = embeddings(&dataset, &mut warnings)?;
    let rankers = rankers(directory)?;
    let histories = histories(&dataset.interactions, n_users);

    let collaborative = match precomputed(&dataset, &mut warnings)? {
        Some(lists) => lists,
        None => {
            progress.begin("item-item neighbours", n_items as u64);
            cooccurrence::neighbours(&histories, n_users, n_items, &|done| progress.advance(done))
        }
    };
    let category = dataset.roles.category.map(|at| &dataset.items.columns[at].data);
    let half_life = config.interactions.trending_half_life_days * 86_400.0;
    let (trending, trending_by_category, popularity) =
        popularity::trending(&dataset.interactions, n_items, half_life, category);

    let index = make_index(&dataset, item_embeddings.as_ref(), options, progress)?;
    let parent = match out.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    std::fs::create_dir_all(parent).map_err(|e| CatalogError::io(parent, e))?;
    // Removed when dropped, so that an error leaves nothing behind.
    let temporary = tempfile::Builder::new()
        .prefix(".tastemaker-build-")
        .tempdir_in(parent)
        .map_err(|e| CatalogError::io(parent, e))?;
    if !dataset.texts.is_empty() {
        progress.begin("text index", 0);
        TextIndex::build(&temporary.path().join("text"), &dataset.texts, n_items)?;
    }
    copy_rankers(directory, temporary.path(), &rankers)?;
    progress.begin("writing bundle", 0);
    let version = bundle::write(
        temporary.path(),
        &bundle::Content {
            name: &config.name,
            items: &dataset.items,
            users: &dataset.users,
            histories: &histories,
            item_embeddings: item_embeddings.as_ref(),
            user_embeddings: user_embeddings.as_ref(),
            metric: config.embeddings.metric,
            collaborative: &collaborative,
            trending: &trending,
            popularity: &popularity,
            trending_by_category: &trending_by_category,
            roles: dataset.roles,
            rankers: &rankers,
            index: index.as_deref().map(|index| (&options.index, index)),
            texts: &dataset.texts,
        },
    )?;
    // What was written is read back before anybody relies on it.
    let generation = bundle::open(temporary.path())?;
    if let Some(try_rankers) = options.try_rankers.filter(|_| !rankers.is_empty()) {
        progress.begin("trying rankers", 0);
        try_rankers(&generation).map_err(|reason| CatalogError::File {
            file: directory.join("rankers"),
            // The copies are gone when this is read.
            reason: reason.replace(&*temporary.path().to_string_lossy(), &directory.to_string_lossy()),
        })?;
    }
    drop(generation);
    put_in_place(temporary, out, parent)?;
    Ok(BuildReport {
        version,
        path: out.into(),
        n_items,
        n_users,
        n_interactions: dataset.interactions.len(),
        rankers,
        warnings,
        elapsed: start.elapsed(),
    })
}

/// Refuses a target that is taken, unless it is a bundle that may be replaced.
fn check_target(out: &Path, overwrite: bool) -> Result<(), CatalogError> {
    if !out.exists() {
        return Ok(());
    }
    // A manifest.json alone may be anybody's.
    let is_bundle = out.join("manifest.json").exists() && out.join("arrays.bin").exists();
    let reason = match (is_bundle, overwrite) {
        (true, true) => return Ok(()),
        (true, false) => "exists; --overwrite replaces it",
        (false, _) => "exists and is not a bundle",
    };
    Err(CatalogError::Exists { path: out.into(), reason: reason.into() })
}

fn put_in_place(temporary: tempfile::TempDir, out: &Path, parent: &Path) -> Result<(), CatalogError> {
    let built = temporary.keep();
    let moved = (|| {
        if out.exists() {
            replace(&built, out)?;
        } else {
            std::fs::rename(&built, out)?;
        }
        std::fs::File::open(parent)?.sync_all()
    })();
    moved.map_err(|e| {
        // The rename failed: what was built would otherwise stay as litter.
        let _ = std::fs::remove_dir_all(&built);
        CatalogError::io(out, e)
    })
}

/// Puts `new` in the place of `old`, which is removed: at once where the file system can exchange two directories, else with a
/// moment in between at which there is neither.
fn replace(new: &Path, old: &Path) -> std::io::Result<()> {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    match renameat_with(CWD, new, CWD, old, RenameFlags::EXCHANGE) {
        Ok(()) => return std::fs::remove_dir_all(new),
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS) => {}
        Err(e) => return Err(e.into()),
    }
    let aside = new.with_extension("old");
    std::fs::rename(old, &aside)?;
    if let Err(e) = std::fs::rename(new, old) {
        std::fs::rename(&aside, old)?;
        return Err(e);
    }
    std::fs::remove_dir_all(&aside)
}

fn embeddings(dataset: &Dataset, warnings: &mut Vec<String>) -> Result<(Option<Matrix>, Option<Matrix>), CatalogError> {
    let read = |file: &Path, default: &Path, n: usize, of: &Path| {
        let path = optional(&dataset.directory, file, default)?;
        path.map(|path| npy::read(&path, n, &of.display().to_string())).transpose()
    };
    let (config, default) = (&dataset.config, EmbeddingsConfig::default());
    let items = read(&config.embeddings.items, &default.items, dataset.items.len(), &config.items.file)?;
    let users = read(&config.embeddings.users, &default.users, dataset.users.len(), &config.users.file)?;
    match (&items, &users) {
        (Some(items), Some(users)) if items.dim != users.dim => {
            let reason = format!("dim is {}, but that of the items is {}", users.dim, items.dim);
            return Err(CatalogError::file(&dataset.directory.join(&config.embeddings.users), reason));
        }
        (None, Some(_)) => warnings.push("user embeddings without item embeddings are of no use".into()),
        (Some(_), None) => {
            warnings.push("no user embeddings: the ann source is off, search by vector and item works".into())
        }
        (None, None) => warnings.push("no embeddings: the ann source is off".into()),
        _ => {}
    }
    Ok((items, users))
}

fn make_index(
    dataset: &Dataset,
    matrix: Option<&Matrix>,
    options: &BuildOptions,
    progress: &dyn Progress,
) -> Result<Option<Arc<dyn VectorIndex>>, CatalogError> {
    let Some(matrix) = matrix else { return Ok(None) };
    // Steps are told from several threads and may overtake each other.
    let stage = Mutex::new((String::new(), 0));
    let told = |name: &str, done: u64, total: u64| {
        let mut stage = stage.lock();
        if stage.0 != name {
            *stage = (name.to_owned(), 0);
            progress.begin(&format!("index: {name}"), total);
        }
        progress.advance(done.saturating_sub(stage.1));
        stage.1 = stage.1.max(done);
    };
    let config = &dataset.config.embeddings;
    let (ids, search) = (&dataset.items.ids, SearchParams::default());
    let index = match (&options.index, &options.graphs) {
        (IndexOptions::Hnsw(hnsw), Some(maker)) if options.partitions == 1 && matrix.n_rows() > FEW_VECTORS => {
            told(&format!("graph by {}", maker.name()), 0, 0);
            let made = Hnsw::made_by(&**maker, hnsw, matrix, config.metric);
            made.map(|made| Arc::new(made) as Arc<dyn VectorIndex>)
        }
        _ => make(&options.index, matrix, config.metric, ids, options.partitions, search, &told),
    };
    index.map(Some).map_err(|reason| CatalogError::file(&dataset.directory.join(&config.items), reason))
}

/// Histories by user: one entry per item (the last one stays), oldest first.
fn histories(interactions: &[RawInteraction], n_users: usize) -> Histories {
    let mut by_user: Vec<Vec<(f64, u32, f32)>> = vec![Vec::new(); n_users];
    for i in interactions {
        by_user[i.user as usize].push((i.time, i.item, i.weight));
    }
    let (mut offsets, mut rows, mut weights) = (vec![0u64], Vec::new(), Vec::new());
    let mut last_of = std::collections::HashMap::new();
    for entries in &mut by_user {
        // Stable: without times, the order of the file.
        entries.sort_by(|a, b| a.0.total_cmp(&b.0));
        last_of.clear();
        last_of.extend(entries.iter().enumerate().map(|(at, entry)| (entry.1, at)));
        for (_, (_, row, weight)) in entries.iter().enumerate().filter(|(at, entry)| last_of[&entry.1] == *at) {
            rows.push(*row);
            weights.push(*weight);
        }
        offsets.push(rows.len() as u64);
    }
    Histories { offsets: offsets.into(), rows: rows.into(), weights: weights.into() }
}

/// `collaborative.parquet`: item_id, neighbours (list of ids), scores (list of numbers, best first).
fn precomputed(dataset: &Dataset, warnings: &mut Vec<String>) -> Result<Option<Lists>, CatalogError> {
    let file = dataset.directory.join("collaborative.parquet");
    if !file.exists() {
        return Ok(None);
    }
    let table = Table::read(&file, None)?;
    let (ids, _) = table.ids("item_id")?;
    let (neighbours, scores) = (table.id_lists("neighbours")?, table.number_lists("scores")?);
    let items: &Entities = &dataset.items;
    let (mut rows, mut unknown) = (vec![Vec::new(); items.len()], 0usize);
    for (row, id) in ids.iter().enumerate() {
        let wrong = |column: &str, reason: &str| CatalogError::Row {
            file: file.clone(),
            row,
            column: column.into(),
            reason: reason.into(),
        };
        if neighbours[row].len() != scores[row].len() {
            return Err(wrong("scores", "neighbours and scores differ in length"));
        }
        if scores[row].iter().any(|s| !s.is_finite()) {
            return Err(wrong("scores", "not a finite number"));
        }
        let Some(item) = items.ids.row(id) else {
            unknown += 1;
            continue;
        };
        let known = neighbours[row].iter().zip(&scores[row]).filter_map(|(id, &s)| Some((items.ids.row(id)?, s)));
        let mut list: Vec<(u32, f32)> = known.filter(|&(other, _)| other != item).collect();
        list.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        list.truncate(MAX_NEIGHBOURS);
        rows[item as usize] = list;
    }
    if unknown > 0 {
        warnings.push(format!("{}: {unknown} rows name an unknown item", file.display()));
    }
    Ok(Some(cooccurrence::from_rows(&rows)))
}

/// The names of `rankers/NAME.{onnx,toml}`, `main` first, then by name. Their manifests are checked.
fn rankers(directory: &Path) -> Result<Vec<String>, CatalogError> {
    let from = directory.join("rankers");
    if !from.exists() {
        return Ok(Vec::new());
    }
    let mut names = Vec::new();
    for entry in std::fs::read_dir(&from).map_err(|e| CatalogError::io(&from, e))? {
        let path = entry.map_err(|e| CatalogError::io(&from, e))?.path();
        if path.extension().is_some_and(|e| e == "onnx")
            && let Some(name) = path.file_stem().and_then(|s| s.to_str())
        {
            names.push(name.to_owned());
        }
    }
    names.sort_by_key(|name| (name != "main", name.clone()));
    for name in &names {
        bundle::read_manifest(&from.join(format!("{name}.toml")))?;
    }
    Ok(names)
}

fn copy_rankers(directory: &Path, out: &Path, names: &[String]) -> Result<(), CatalogError> {
    let (from, to) = (directory.join("rankers"), out.join("rankers"));
    std::fs::create_dir_all(&to).map_err(|e| CatalogError::io(&to, e))?;
    for file in names.iter().flat_map(|name| [format!("{name}.onnx"), format!("{name}.toml")]) {
        std::fs::copy(from.join(&file), to.join(&file)).map_err(|e| CatalogError::io(&from.join(&file), e))?;
    }
    Ok(())
}
