//! A bundle on disk: `manifest.json`, `arrays.bin` (aligned sections, mmapped), `text/`, `rankers/`.
//!
//! Nothing in it is trusted before its checksum is verified and its structure checked, so that no later index into it
//! can be out of range.
#![allow(unsafe_code)] // One call: mapping a file.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use bytemuck::Pod;
use half::{bf16, f16};
use memmap2::Mmap;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use super::CatalogError;
use super::array::Array;
use super::generation::{
    Column, ColumnData, Entities, Generation, Histories, IdTable, Lists, Matrix, MatrixData, Metric, NO_CODE, NO_ROW,
    RankedList, RankerModel, Roles,
};
use super::index::{self, IndexSpec, SharedIndex, Tuned};
use super::text::TextIndex;
use crate::index::{IndexOptions, SearchParams, VectorIndex};
use crate::ranking::manifest::RankerManifest;

/// Raised with every change that an older server can't read.
pub const FORMAT_VERSION: u32 = 5;
/// Of bundles whose index is in partitions, which servers that read version 5 alone do not know.
const PARTITIONED_FORMAT_VERSION: u32 = 6;
const ALIGNMENT: u64 = 64;
const MANIFEST: &str = "manifest.json";
const ARRAYS: &str = "arrays.bin";
/// Also the mark of the format: the first bytes of `arrays.bin`.
const MAGIC: &[u8; 8] = b"TSTMBNDL";
/// How `manifest.json` begins: the checksum of everything behind this line.
const SEAL: &[u8] = b"{\n  \"xxh3\": \"";

#[derive(Debug, Serialize, Deserialize)]
struct Manifest {
    format_version: u32,
    version: String,
    metric: Metric,
    n_items: usize,
    n_users: usize,
    integer_item_ids: bool,
    integer_user_ids: bool,
    item_columns: Vec<ColumnSpec>,
    user_columns: Vec<ColumnSpec>,
    roles: BTreeMap<String, usize>,
    rankers: Vec<String>,
    text: bool,
    /// What the text index is over; bundles from before it was said have none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    text_columns: Vec<String>,
    index: IndexSpec,
    arrays: BTreeMap<String, Section>,
    /// xxh3 of every other file, by path within the bundle.
    files: BTreeMap<String, String>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct ColumnSpec {
    name: String,
    kind: ColumnKind,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    default: Option<f32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum ColumnKind {
    Number,
    Category,
    Tags,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Section {
    dtype: String,
    shape: Vec<usize>,
    offset: u64,
    bytes: u64,
    xxh3: String,
}

/// A type that arrays of a bundle may have.
pub(super) trait Element: Pod {
    const NAME: &'static str;
}

impl Element for u8 {
    const NAME: &'static str = "u8";
}
impl Element for bf16 {
    const NAME: &'static str = "bf16";
}
impl Element for u32 {
    const NAME: &'static str = "u32";
}
impl Element for u64 {
    const NAME: &'static str = "u64";
}
impl Element for f32 {
    const NAME: &'static str = "f32";
}
impl Element for f16 {
    const NAME: &'static str = "f16";
}

fn hex(hash: u64) -> String {
    format!("{hash:016x}")
}

/// Everything that goes into a bundle, in memory.
pub struct Content<'a> {
    /// First part of the version.
    pub name: &'a str,
    /// Items.
    pub items: &'a Entities,
    /// Users.
    pub users: &'a Entities,
    /// By user.
    pub histories: &'a Histories,
    /// Vectors.
    pub item_embeddings: Option<&'a Matrix>,
    /// Vectors.
    pub user_embeddings: Option<&'a Matrix>,
    /// How they compare.
    pub metric: Metric,
    /// By item.
    pub collaborative: &'a Lists,
    /// Overall.
    pub trending: &'a RankedList,
    /// `[n_items]`
    pub popularity: &'a [f32],
    /// By category code.
    pub trending_by_category: &'a Lists,
    /// Item columns with a part.
    pub roles: Roles,
    /// Names of the rankers whose files lie in `rankers/` already.
    pub rankers: &'a [String],
    /// How the index over the item embeddings was made, and the index; none without embeddings.
    pub index: Option<(&'a IndexOptions, &'a dyn VectorIndex)>,
    /// What the index in `text/` is over, by column; empty without one.
    pub texts: &'a [(String, Vec<String>)],
}

pub(super) struct Writer {
    file: BufWriter<File>,
    path: PathBuf,
    position: u64,
    sections: BTreeMap<String, Section>,
}

impl Writer {
    pub(super) fn put<T: Element>(
        &mut self,
        name: String,
        values: &[T],
        shape: Vec<usize>,
    ) -> Result<(), CatalogError> {
        let io = |e| CatalogError::io(&self.path, e);
        let padding = self.position.next_multiple_of(ALIGNMENT) - self.position;
        self.file.write_all(&[0; ALIGNMENT as usize][..padding as usize]).map_err(io)?;
        let bytes: &[u8] = bytemuck::cast_slice(values);
        self.file.write_all(bytes).map_err(io)?;
        let section = Section {
            dtype: T::NAME.into(),
            shape,
            offset: self.position + padding,
            bytes: bytes.len() as u64,
            xxh3: hex(xxh3_64(bytes)),
        };
        self.position = section.offset + section.bytes;
        match self.sections.insert(name.clone(), section) {
            // As by columns `a` and `a.vocabulary`.
            Some(_) => Err(CatalogError::file(&self.path, format!("names of columns collide at `{name}`; rename one"))),
            None => Ok(()),
        }
    }

    pub(super) fn vector<T: Element>(&mut self, name: impl Into<String>, values: &[T]) -> Result<(), CatalogError> {
        self.put(name.into(), values, vec![values.len()])
    }

    fn ids(&mut self, name: &str, ids: &IdTable) -> Result<(), CatalogError> {
        self.vector(format!("{name}.offsets"), &ids.offsets)?;
        self.vector(format!("{name}.bytes"), &ids.bytes)?;
        self.vector(format!("{name}.slots"), &ids.slots)
    }

    fn columns(&mut self, name: &str, columns: &[Column]) -> Result<Vec<ColumnSpec>, CatalogError> {
        let mut specs = Vec::new();
        for column in columns {
            let prefix = format!("{name}.{}", column.name);
            let (kind, default) = match &column.data {
                ColumnData::Number { values, default } => {
                    self.vector(format!("{prefix}.values"), values)?;
                    (ColumnKind::Number, Some(*default))
                }
                ColumnData::Category { codes, vocabulary } => {
                    self.vector(format!("{prefix}.codes"), codes)?;
                    self.ids(&format!("{prefix}.vocabulary"), vocabulary)?;
                    (ColumnKind::Category, None)
                }
                ColumnData::Tags { offsets, codes, vocabulary } => {
                    self.vector(format!("{prefix}.offsets"), offsets)?;
                    self.vector(format!("{prefix}.codes"), codes)?;
                    self.ids(&format!("{prefix}.vocabulary"), vocabulary)?;
                    (ColumnKind::Tags, None)
                }
            };
            specs.push(ColumnSpec { name: column.name.clone(), kind, default });
        }
        Ok(specs)
    }

    fn lists(&mut self, name: &str, lists: &Lists) -> Result<(), CatalogError> {
        self.vector(format!("{name}.offsets"), &lists.offsets)?;
        self.vector(format!("{name}.rows"), &lists.rows)?;
        self.vector(format!("{name}.scores"), &lists.scores)
    }

    fn matrix(&mut self, name: &str, matrix: Option<&Matrix>) -> Result<(), CatalogError> {
        let Some(matrix) = matrix else { return Ok(()) };
        let shape = vec![matrix.n_rows(), matrix.dim];
        match &matrix.data {
            MatrixData::F32(values) => self.put(name.into(), values, shape),
            MatrixData::F16(values) => self.put(name.into(), values, shape),
        }
    }
}

/// Writes `arrays.bin` and `manifest.json` into `directory`, which already holds `text/` and `rankers/`, and makes all
/// of it durable. Returns the version.
///
/// # Errors
/// Those of the file system.
pub fn write(directory: &Path, content: &Content<'_>) -> Result<String, CatalogError> {
    let path = directory.join(ARRAYS);
    let file = File::create(&path).map_err(|e| CatalogError::io(&path, e))?;
    let mut writer = Writer { file: BufWriter::new(file), path, position: 0, sections: BTreeMap::new() };
    writer.file.write_all(MAGIC).map_err(|e| CatalogError::io(&writer.path, e))?;
    writer.position = MAGIC.len() as u64;
    writer.ids("items.ids", &content.items.ids)?;
    let item_columns = writer.columns("items.column", &content.items.columns)?;
    writer.ids("users.ids", &content.users.ids)?;
    let user_columns = writer.columns("users.column", &content.users.columns)?;
    writer.vector("histories.offsets", &content.histories.offsets)?;
    writer.vector("histories.rows", &content.histories.rows)?;
    writer.vector("histories.weights", &content.histories.weights)?;
    writer.matrix("items.embeddings", content.item_embeddings)?;
    writer.matrix("users.embeddings", content.user_embeddings)?;
    writer.lists("collaborative", content.collaborative)?;
    writer.vector("trending.rows", &content.trending.rows)?;
    writer.vector("trending.scores", &content.trending.scores)?;
    writer.vector("popularity", content.popularity)?;
    writer.lists("trending_by_category", content.trending_by_category)?;
    if let Some((_, index)) = content.index {
        index::write(&mut writer, index)?;
    }
    let Writer { file, path, sections, .. } = writer;
    let file = file.into_inner().map_err(|e| CatalogError::io(&path, e.into_error()))?;
    file.sync_all().map_err(|e| CatalogError::io(&path, e))?;

    let mut files = BTreeMap::new();
    for folder in ["rankers", "text"] {
        for path in files_in(&directory.join(folder))? {
            let bytes = std::fs::read(&path).map_err(|e| CatalogError::io(&path, e))?;
            File::open(&path).and_then(|f| f.sync_all()).map_err(|e| CatalogError::io(&path, e))?;
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            files.insert(format!("{folder}/{name}"), hex(xxh3_64(&bytes)));
        }
    }
    let roles = [
        ("category", content.roles.category),
        ("creator", content.roles.creator),
        ("series", content.roles.series),
        ("series_position", content.roles.series_position),
        ("title", content.roles.title),
    ];
    let (options, n_partitions) = match content.index {
        Some((options, index)) => (options.clone(), index.n_partitions()),
        None => (IndexOptions::BruteForce {}, 1),
    };
    let mut manifest = Manifest {
        format_version: if n_partitions > 1 { PARTITIONED_FORMAT_VERSION } else { FORMAT_VERSION },
        version: String::new(),
        metric: content.metric,
        n_items: content.items.len(),
        n_users: content.users.len(),
        integer_item_ids: content.items.ids.integer,
        integer_user_ids: content.users.ids.integer,
        item_columns,
        user_columns,
        roles: roles.into_iter().filter_map(|(name, at)| Some((name.to_owned(), at?))).collect(),
        rankers: content.rankers.to_vec(),
        text: !content.texts.is_empty(),
        text_columns: content.texts.iter().map(|(name, _)| name.clone()).collect(),
        index: IndexSpec::new(options, n_partitions),
        arrays: sections,
        files,
    };
    manifest.version = format!("{}-{}", content.name, content_hash(&manifest, content.texts));
    let path = directory.join(MANIFEST);
    let text = serde_json::to_vec_pretty(&manifest).map_err(|e| CatalogError::file(&path, e.to_string()))?;
    std::fs::write(&path, sealed(&text))
        .and_then(|()| File::open(&path)?.sync_all())
        .and_then(|()| File::open(directory)?.sync_all())
        .map_err(|e| CatalogError::io(&path, e))?;
    Ok(manifest.version)
}

/// The manifest with its own checksum in front.
fn sealed(manifest: &[u8]) -> Vec<u8> {
    let rest = manifest.strip_prefix(b"{").unwrap_or(manifest);
    [SEAL, hex(xxh3_64(rest)).as_bytes(), b"\",", rest].concat()
}

fn seal_holds(text: &[u8]) -> bool {
    let rest = text.strip_prefix(SEAL).and_then(|text| text.split_first_chunk::<16>());
    rest.and_then(|(hash, rest)| Some(hex(xxh3_64(rest.strip_prefix(b"\",")?)).as_bytes() == hash)).unwrap_or(false)
}

/// Names the content: the same dataset gives the same hash. Files of the text index are left out, since their names
/// are random; the texts stand for them.
fn content_hash(manifest: &Manifest, texts: &[(String, Vec<String>)]) -> String {
    let mut hash = Xxh3::new();
    let mut add = |bytes: &[u8]| {
        hash.update(&(bytes.len() as u64).to_le_bytes());
        hash.update(bytes);
    };
    for (name, section) in &manifest.arrays {
        add(name.as_bytes());
        add(format!("{} {:?} {}", section.dtype, section.shape, section.xxh3).as_bytes());
    }
    for (name, file) in manifest.files.iter().filter(|(name, _)| name.starts_with("rankers/")) {
        add(name.as_bytes());
        add(file.as_bytes());
    }
    let Manifest { metric, roles, integer_item_ids, integer_user_ids, index, .. } = manifest;
    add(format!("{metric:?} {roles:?} {integer_item_ids} {integer_user_ids} {:?}", index.options).as_bytes());
    index.partitions.iter().for_each(|partitions| add(format!("{partitions:?}").as_bytes()));
    for (column, texts) in texts {
        add(column.as_bytes());
        texts.iter().for_each(|text| add(text.as_bytes()));
    }
    format!("{:08x}", hash.digest() as u32)
}

fn files_in(folder: &Path) -> Result<Vec<PathBuf>, CatalogError> {
    if !folder.exists() {
        return Ok(Vec::new());
    }
    let entries = std::fs::read_dir(folder).map_err(|e| CatalogError::io(folder, e))?;
    let mut paths = Vec::new();
    for entry in entries {
        let path = entry.map_err(|e| CatalogError::io(folder, e))?.path();
        // Lock files are tantivy's; they hold nothing.
        if path.is_file() && path.extension().is_none_or(|e| e != "lock") {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}

pub(super) struct Reader {
    directory: PathBuf,
    map: Arc<Mmap>,
    manifest: Manifest,
}

impl Reader {
    fn open(directory: &Path) -> Result<Self, CatalogError> {
        let path = directory.join(MANIFEST);
        let text = std::fs::read(&path).map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => CatalogError::file(directory, "not a bundle: it has no manifest.json"),
            _ => CatalogError::io(&path, e),
        })?;
        #[derive(Deserialize)]
        struct Version {
            format_version: u32,
        }
        let damaged = |e: serde_json::Error| CatalogError::corrupt(&path, e.to_string());
        let Version { format_version } = serde_json::from_slice(&text).map_err(damaged)?;
        if !(FORMAT_VERSION..=PARTITIONED_FORMAT_VERSION).contains(&format_version) {
            let known = format!("{FORMAT_VERSION} and {PARTITIONED_FORMAT_VERSION}");
            let reason = format!("format version {format_version}; this server reads {known}: build it anew");
            return Err(CatalogError::file(&path, reason));
        }
        if !seal_holds(&text) {
            return Err(CatalogError::corrupt(&path, "checksum does not match"));
        }
        let manifest: Manifest = serde_json::from_slice(&text).map_err(damaged)?;
        let path = directory.join(ARRAYS);
        let file = File::open(&path).map_err(|e| CatalogError::io(&path, e))?;
        // SAFETY: a bundle is immutable once it is renamed into place, and its checksums are verified through this
        // very map. Whoever truncates it while it is served gets a SIGBUS, as with any mmapped database.
        let map = unsafe { Mmap::map(&file) }.map_err(|e| CatalogError::io(&path, e))?;
        if !map.starts_with(MAGIC) {
            return Err(CatalogError::corrupt(&path, "does not begin as a bundle's arrays do"));
        }
        let reader = Reader { directory: directory.into(), map: Arc::new(map), manifest };
        reader.verify()?;
        Ok(reader)
    }

    fn verify(&self) -> Result<(), CatalogError> {
        let path = self.directory.join(ARRAYS);
        let sections: Vec<_> = self.manifest.arrays.iter().collect();
        sections.par_iter().try_for_each(|(name, section)| {
            let range = usize::try_from(section.offset).ok().zip(usize::try_from(section.bytes).ok());
            let bytes = range.and_then(|(at, len)| self.map.get(at..at.checked_add(len)?));
            match bytes {
                Some(bytes) if hex(xxh3_64(bytes)) == section.xxh3 => Ok(()),
                Some(_) => Err(CatalogError::corrupt(&path, format!("checksum of `{name}` does not match"))),
                None => Err(CatalogError::corrupt(&path, format!("`{name}` is cut"))),
            }
        })?;
        let mut in_order: Vec<_> = sections.iter().map(|(_, section)| (section.offset, section.bytes)).collect();
        in_order.sort_unstable();
        let mut end = MAGIC.len();
        for (offset, bytes) in in_order {
            let padding = self.map.get(end..offset as usize);
            if padding.is_none_or(|padding| padding.iter().any(|&byte| byte != 0)) {
                return Err(CatalogError::corrupt(&path, "arrays overlap, or something lies between them"));
            }
            end = (offset + bytes) as usize;
        }
        if end != self.map.len() {
            return Err(CatalogError::corrupt(&path, "something lies behind the last array"));
        }
        for (name, want) in &self.manifest.files {
            let path = self.directory.join(name);
            if name.contains("..") || name.starts_with('/') {
                return Err(CatalogError::corrupt(&path, "a path that leaves the bundle"));
            }
            let bytes = std::fs::read(&path).map_err(|e| CatalogError::io(&path, e))?;
            if hex(xxh3_64(&bytes)) != *want {
                return Err(CatalogError::corrupt(&path, "checksum does not match"));
            }
        }
        Ok(())
    }

    pub(super) fn corrupt(&self, name: &str, reason: &str) -> CatalogError {
        CatalogError::corrupt(&self.directory.join(ARRAYS), format!("`{name}`: {reason}"))
    }

    /// The element type of an array, if there is one.
    pub(super) fn dtype(&self, name: &str) -> Option<&str> {
        self.manifest.arrays.get(name).map(|section| section.dtype.as_str())
    }

    /// The shape of an array, if there is one.
    pub(super) fn shape(&self, name: &str) -> Option<&[usize]> {
        self.manifest.arrays.get(name).map(|section| &section.shape[..])
    }

    pub(super) fn array<T: Element>(&self, name: &str) -> Result<Array<T>, CatalogError> {
        let section = self.manifest.arrays.get(name).ok_or_else(|| self.corrupt(name, "missing"))?;
        if section.dtype != T::NAME {
            return Err(self.corrupt(name, &format!("is {}, expected {}", section.dtype, T::NAME)));
        }
        let len = section.bytes as usize / size_of::<T>();
        Array::mapped(self.map.clone(), section.offset as usize, len)
            .filter(|_| (section.bytes as usize).is_multiple_of(size_of::<T>()))
            .ok_or_else(|| self.corrupt(name, "misaligned"))
    }

    /// Ends of compressed rows: from 0, ascending, up to `total`.
    fn offsets(&self, name: &str, n: usize, total: usize) -> Result<Array<u64>, CatalogError> {
        let offsets: Array<u64> = self.array(name)?;
        let sound = offsets.len() == n + 1
            && offsets[0] == 0
            && offsets[n] == total as u64
            && offsets.windows(2).all(|pair| pair[0] <= pair[1]);
        if sound { Ok(offsets) } else { Err(self.corrupt(name, "not the ends of rows")) }
    }

    /// Values below `bound`, or `none`.
    fn rows(&self, name: &str, bound: usize, none: Option<u32>) -> Result<Array<u32>, CatalogError> {
        let rows: Array<u32> = self.array(name)?;
        match rows.iter().all(|&row| (row as usize) < bound || Some(row) == none) {
            true => Ok(rows),
            false => Err(self.corrupt(name, "a value is out of range")),
        }
    }

    fn ids(&self, name: &str, n: usize, integer: bool) -> Result<IdTable, CatalogError> {
        let bytes: Array<u8> = self.array(&format!("{name}.bytes"))?;
        let offsets = match n {
            0 => self.array(&format!("{name}.offsets"))?,
            _ => self.offsets(&format!("{name}.offsets"), n, bytes.len())?,
        };
        let slots = self.rows(&format!("{name}.slots"), n, Some(NO_ROW))?;
        let room = slots.is_empty() && n == 0 || slots.len().is_power_of_two() && slots.contains(&NO_ROW);
        if !room {
            return Err(self.corrupt(name, "the hash table is full or of an odd size"));
        }
        Ok(IdTable { offsets, bytes, slots, integer, more: Arc::default() })
    }

    fn vocabulary(&self, name: &str) -> Result<Arc<IdTable>, CatalogError> {
        let ends: Array<u64> = self.array(&format!("{name}.offsets"))?;
        Ok(Arc::new(self.ids(name, ends.len().saturating_sub(1), false)?))
    }

    fn columns(&self, name: &str, specs: &[ColumnSpec], n: usize) -> Result<Vec<Column>, CatalogError> {
        let mut columns = Vec::new();
        for spec in specs {
            let prefix = format!("{name}.{}", spec.name);
            let data = match spec.kind {
                ColumnKind::Number => {
                    let values: Array<f32> = self.array(&format!("{prefix}.values"))?;
                    if values.len() != n {
                        return Err(self.corrupt(&prefix, "wrong length"));
                    }
                    ColumnData::Number { values, default: spec.default.unwrap_or(0.0) }
                }
                ColumnKind::Category => {
                    let vocabulary = self.vocabulary(&format!("{prefix}.vocabulary"))?;
                    let codes = self.rows(&format!("{prefix}.codes"), vocabulary.len(), Some(NO_CODE))?;
                    if codes.len() != n {
                        return Err(self.corrupt(&prefix, "wrong length"));
                    }
                    ColumnData::Category { codes, vocabulary }
                }
                ColumnKind::Tags => {
                    let vocabulary = self.vocabulary(&format!("{prefix}.vocabulary"))?;
                    let codes = self.rows(&format!("{prefix}.codes"), vocabulary.len(), None)?;
                    let offsets = self.offsets(&format!("{prefix}.offsets"), n, codes.len())?;
                    ColumnData::Tags { offsets, codes, vocabulary }
                }
            };
            columns.push(Column { name: spec.name.clone(), data });
        }
        Ok(columns)
    }

    fn lists(&self, name: &str, n: usize, n_items: usize) -> Result<Lists, CatalogError> {
        let rows = self.rows(&format!("{name}.rows"), n_items, None)?;
        let scores: Array<f32> = self.array(&format!("{name}.scores"))?;
        if scores.len() != rows.len() {
            return Err(self.corrupt(name, "rows and scores differ in length"));
        }
        let offsets: Array<u64> = self.array(&format!("{name}.offsets"))?;
        let offsets = match offsets.len() {
            0 if rows.is_empty() => offsets,
            _ => self.offsets(&format!("{name}.offsets"), n, rows.len())?,
        };
        Ok(Lists { offsets, rows, scores })
    }

    fn matrix(&self, name: &str, n: usize) -> Result<Option<Matrix>, CatalogError> {
        let Some(section) = self.manifest.arrays.get(name) else { return Ok(None) };
        let [rows, dim] = section.shape[..] else { return Err(self.corrupt(name, "not a matrix")) };
        let data = match section.dtype.as_str() {
            "f16" => MatrixData::F16(self.array(name)?),
            _ => MatrixData::F32(self.array(name)?),
        };
        let len = match &data {
            MatrixData::F32(values) => values.len(),
            MatrixData::F16(values) => values.len(),
        };
        if rows != n || dim == 0 || rows.checked_mul(dim) != Some(len) {
            return Err(self.corrupt(name, "its shape does not fit"));
        }
        Ok(Some(Matrix { dim, data }))
    }

    fn rankers(&self) -> Result<Vec<RankerModel>, CatalogError> {
        let mut rankers = Vec::new();
        for name in &self.manifest.rankers {
            let path = self.directory.join(format!("rankers/{name}.toml"));
            rankers.push(RankerModel {
                name: name.clone(),
                manifest: read_manifest(&path)?,
                onnx: self.directory.join(format!("rankers/{name}.onnx")),
            });
        }
        Ok(rankers)
    }

    fn generation(self) -> Result<Generation, CatalogError> {
        let m = &self.manifest;
        let (n_items, n_users) = (m.n_items, m.n_users);
        let items = Entities {
            ids: self.ids("items.ids", n_items, m.integer_item_ids)?,
            columns: self.columns("items.column", &m.item_columns, n_items)?,
        };
        let users = Entities {
            ids: self.ids("users.ids", n_users, m.integer_user_ids)?,
            columns: self.columns("users.column", &m.user_columns, n_users)?,
        };
        let rows = self.rows("histories.rows", n_items, None)?;
        let weights: Array<f32> = self.array("histories.weights")?;
        if weights.len() != rows.len() {
            return Err(self.corrupt("histories", "rows and weights differ in length"));
        }
        let histories = Histories { offsets: self.offsets("histories.offsets", n_users, rows.len())?, rows, weights };
        let role = |name: &str| m.roles.get(name).copied();
        let roles = Roles {
            category: role("category"),
            creator: role("creator"),
            series: role("series"),
            series_position: role("series_position"),
            title: role("title"),
        };
        if m.roles.values().any(|&at| at >= items.columns.len()) {
            return Err(CatalogError::corrupt(&self.directory.join(MANIFEST), "a role names no column"));
        }
        let n_categories = roles.category.and_then(|at| items.columns[at].data.vocabulary()).map_or(0, |v| v.len());
        let trending =
            RankedList { rows: self.rows("trending.rows", n_items, None)?, scores: self.array("trending.scores")? };
        if trending.rows.len() != trending.scores.len() {
            return Err(self.corrupt("trending", "rows and scores differ in length"));
        }
        let popularity: Array<f32> = self.array("popularity")?;
        if popularity.len() != n_items {
            return Err(self.corrupt("popularity", "wrong length"));
        }
        let item_embeddings = self.matrix("items.embeddings", n_items)?;
        let user_embeddings = self.matrix("users.embeddings", n_users)?;
        if let (Some(items), Some(users)) = (&item_embeddings, &user_embeddings)
            && items.dim != users.dim
        {
            return Err(self.corrupt("users.embeddings", "its dim is not the items'"));
        }
        let index = match &item_embeddings {
            Some(matrix) => index::read(&self, &m.index, matrix, m.metric, &items.ids)?,
            None => None,
        };
        Ok(Generation {
            version: m.version.clone(),
            histories,
            item_embeddings,
            user_embeddings,
            metric: m.metric,
            collaborative: self.lists("collaborative", n_items, n_items)?,
            trending,
            popularity,
            trending_by_category: self.lists("trending_by_category", n_categories, n_items)?,
            text: m.text.then(|| TextIndex::open(&self.directory.join("text"))).transpose()?,
            text_columns: m.text_columns.clone(),
            rankers: self.rankers()?,
            roles,
            shared_index: SharedIndex::new(m.index.clone(), index),
            shared_filters: Default::default(),
            shared_records: OnceLock::new(),
            shared_fold_in: OnceLock::new(),
            shared_rankers: OnceLock::new(),
            ranker_reports: OnceLock::new(),
            items,
            users,
        })
    }
}

/// Reads `NAME.toml` of a ranker.
///
/// # Errors
/// Missing, an unknown key, a wrong type, or an input without columns.
pub fn read_manifest(path: &Path) -> Result<RankerManifest, CatalogError> {
    let text = std::fs::read_to_string(path).map_err(|e| CatalogError::io(path, e))?;
    let manifest: RankerManifest = toml::from_str(&text).map_err(|e| CatalogError::file(path, e.to_string()))?;
    if manifest.inputs.is_empty() {
        return Err(CatalogError::file(path, "no [[inputs]]"));
    }
    match manifest.inputs.iter().find(|input| input.columns.is_empty()) {
        Some(input) => Err(CatalogError::file(path, format!("input `{}` has no columns", input.name))),
        None => Ok(manifest),
    }
}

/// Opens a bundle: verifies format version, checksums and structure, and maps its arrays.
///
/// # Errors
/// Names the file that is missing, damaged or of another format.
pub fn open(directory: &Path) -> Result<Generation, CatalogError> {
    Reader::open(directory)?.generation()
}

/// What `inspect` shows.
#[derive(Clone, Debug, Serialize)]
pub struct BundleInfo {
    /// As in responses.
    pub version: String,
    /// Of the files.
    pub format_version: u32,
    /// Items.
    pub n_items: usize,
    /// Users.
    pub n_users: usize,
    /// Entries of all histories.
    pub n_interactions: usize,
    /// Dimension of the embeddings; 0 without.
    pub dim: usize,
    /// How embeddings compare.
    pub metric: Metric,
    /// The index over the embeddings.
    pub index: IndexSpec,
    /// Neighbours in all item-item lists.
    pub n_neighbours: usize,
    /// Whether there is a text index.
    pub text: bool,
    /// Item columns and their kinds.
    pub item_columns: BTreeMap<String, String>,
    /// User columns and their kinds.
    pub user_columns: BTreeMap<String, String>,
    /// Role and column.
    pub roles: BTreeMap<String, String>,
    /// Ranker and its feature columns.
    pub rankers: BTreeMap<String, Vec<String>>,
    /// Mapped bytes per array.
    pub arrays_bytes: BTreeMap<String, u64>,
}

/// Gives an index other search parameters: the manifest is written anew, under another version, and takes the old one's place.
/// Returns the version and the index as it then is.
///
/// # Errors
/// As [`open`], and those of the file system.
pub fn set_search(directory: &Path, search: SearchParams, tuned: Tuned) -> Result<(String, IndexSpec), CatalogError> {
    let Reader { mut manifest, .. } = Reader::open(directory)?;
    manifest.index.search = search;
    manifest.index.tuned = Some(tuned);
    let content = manifest.version.split('+').next().unwrap_or_default();
    let hash = xxh3_64(format!("{search:?}").as_bytes()) as u16;
    manifest.version = format!("{content}+{hash:04x}");
    let path = directory.join(MANIFEST);
    let text = serde_json::to_vec_pretty(&manifest).map_err(|e| CatalogError::file(&path, e.to_string()))?;
    let io = |e| CatalogError::io(&path, e);
    let mut file = tempfile::NamedTempFile::new_in(directory).map_err(io)?;
    file.write_all(&sealed(&text)).and_then(|()| file.as_file().sync_all()).map_err(io)?;
    file.persist(&path).map_err(|e| io(e.error))?;
    File::open(directory).and_then(|d| d.sync_all()).map_err(io)?;
    Ok((manifest.version, manifest.index))
}

/// Verifies a bundle and describes it.
///
/// # Errors
/// As [`open`].
pub fn describe(directory: &Path) -> Result<BundleInfo, CatalogError> {
    let reader = Reader::open(directory)?;
    let m = &reader.manifest;
    let kinds = |columns: &[ColumnSpec]| {
        columns.iter().map(|c| (c.name.clone(), format!("{:?}", c.kind).to_lowercase())).collect()
    };
    let elements = |name: &str| m.arrays.get(name).map_or(0, |s| s.shape.iter().product());
    let info = BundleInfo {
        version: m.version.clone(),
        format_version: m.format_version,
        n_items: m.n_items,
        n_users: m.n_users,
        n_interactions: elements("histories.rows"),
        dim: m.arrays.get("items.embeddings").and_then(|s| s.shape.get(1).copied()).unwrap_or(0),
        metric: m.metric,
        index: m.index.clone(),
        n_neighbours: elements("collaborative.rows"),
        text: m.text,
        item_columns: kinds(&m.item_columns),
        user_columns: kinds(&m.user_columns),
        roles: m
            .roles
            .iter()
            .filter_map(|(role, &at)| Some((role.clone(), m.item_columns.get(at)?.name.clone())))
            .collect(),
        rankers: reader
            .rankers()?
            .into_iter()
            .map(|r| (r.name, r.manifest.inputs.into_iter().flat_map(|i| i.columns).collect()))
            .collect(),
        arrays_bytes: m.arrays.iter().map(|(name, s)| (name.clone(), s.bytes)).collect(),
    };
    reader.generation()?;
    Ok(info)
}

impl fmt::Display for BundleInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes: u64 = self.arrays_bytes.values().sum();
        writeln!(f, "{} (format {}, checksums verified)", self.version, self.format_version)?;
        writeln!(f, "items         {:>10}", self.n_items)?;
        writeln!(f, "users         {:>10}", self.n_users)?;
        writeln!(f, "interactions  {:>10}", self.n_interactions)?;
        writeln!(f, "neighbours    {:>10}", self.n_neighbours)?;
        match self.dim {
            0 => writeln!(f, "embeddings          none (the ann source is off)")?,
            dim => {
                writeln!(f, "embeddings    {dim:>10} dimensions, {:?}", self.metric)?;
                writeln!(f, "{}", self.index)?;
            }
        }
        writeln!(f, "text search   {:>10}", if self.text { "yes" } else { "no" })?;
        writeln!(f, "mapped        {:>10.1} MiB", bytes as f64 / f64::from(1 << 20))?;
        for (role, column) in &self.roles {
            writeln!(f, "role          {role} = {column}")?;
        }
        for (name, columns) in &self.rankers {
            writeln!(f, "ranker        {name}: {}", columns.join(", "))?;
        }
        let list = |columns: &BTreeMap<String, String>| {
            columns.iter().map(|(name, kind)| format!("{name} ({kind})")).collect::<Vec<_>>().join(", ")
        };
        writeln!(f, "item columns  {}", list(&self.item_columns))?;
        write!(f, "user columns  {}", list(&self.user_columns))
    }
}
