//! A dataset directory: `dataset.toml` and the Parquet files that it maps.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::types::{Float32Type, Float64Type, Int64Type};
use arrow_array::{Array as _, ArrayRef};
use arrow_schema::{DataType, TimeUnit};
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use serde::{Deserialize, Serialize};

use super::CatalogError;
use super::generation::{Column, ColumnData, Entities, IdTable, Metric, NO_CODE, Roles};

/// `dataset.toml`; every key has a default.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[derive(Default)]
pub struct DatasetConfig {
    /// Part of the bundle's version. Default: the directory's name.
    pub name: String,
    /// Items.
    pub items: ItemsConfig,
    /// Users.
    pub users: UsersConfig,
    /// Who did what.
    pub interactions: InteractionsConfig,
    /// Vectors.
    pub embeddings: EmbeddingsConfig,
}

/// Where items are and what their columns mean.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ItemsConfig {
    /// Relative to the dataset directory.
    pub file: PathBuf,
    /// Strings or integers, unique.
    pub id: String,
    /// Columns that text search covers: strings or lists of strings.
    pub text: Vec<String>,
    /// Category or list; the first value is the item's category.
    pub category: Option<String>,
    /// Author, brand, artist: category or list.
    pub creator: Option<String>,
    /// Category.
    pub series: Option<String>,
    /// Number.
    pub series_position: Option<String>,
    /// Display name.
    pub title: Option<String>,
    /// Columns to leave out.
    pub ignore: Vec<String>,
}

impl Default for ItemsConfig {
    fn default() -> Self {
        ItemsConfig {
            file: "items.parquet".into(),
            id: "item_id".into(),
            text: Vec::new(),
            category: None,
            creator: None,
            series: None,
            series_position: None,
            title: None,
            ignore: Vec::new(),
        }
    }
}

/// Where users are.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct UsersConfig {
    /// Relative to the dataset directory; may be absent: users then come from the interactions.
    pub file: PathBuf,
    /// Strings or integers, unique.
    pub id: String,
    /// Columns to leave out.
    pub ignore: Vec<String>,
}

impl Default for UsersConfig {
    fn default() -> Self {
        UsersConfig { file: "users.parquet".into(), id: "user_id".into(), ignore: Vec::new() }
    }
}

/// Where interactions are and how strong each is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct InteractionsConfig {
    /// Relative to the dataset directory; may be absent.
    pub file: PathBuf,
    /// User column.
    pub user: String,
    /// Item column.
    pub item: String,
    /// Number (seconds) or timestamp column; orders histories and decays trending.
    pub timestamp: Option<String>,
    /// Number column that is the weight; rules, where there are any, take its place.
    pub weight: Option<String>,
    /// The first rule whose conditions all hold decides; none: 1.
    pub weight_rule: Vec<WeightRule>,
    /// Half-life of trending, days before the newest timestamp.
    pub trending_half_life_days: f64,
}

impl Default for InteractionsConfig {
    fn default() -> Self {
        InteractionsConfig {
            file: "interactions.parquet".into(),
            user: "user_id".into(),
            item: "item_id".into(),
            timestamp: None,
            weight: None,
            weight_rule: Vec::new(),
            trending_half_life_days: 7.0,
        }
    }
}

/// Gives interactions a weight; 0: seen, but no sign of liking.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WeightRule {
    /// Numeric columns and the values that they may have; all must hold. None: always holds.
    #[serde(default, rename = "where")]
    pub conditions: HashMap<String, OneOrMany>,
    /// 0 or more.
    pub weight: f32,
}

/// A number or a list of numbers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum OneOrMany {
    /// Equal to this.
    One(f64),
    /// Equal to any of these.
    Many(Vec<f64>),
}

impl OneOrMany {
    fn holds(&self, value: f64) -> bool {
        match self {
            OneOrMany::One(one) => value == *one,
            OneOrMany::Many(many) => many.contains(&value),
        }
    }
}

/// Where vectors are and how they compare.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EmbeddingsConfig {
    /// `[n_items, dim]`; may be absent.
    pub items: PathBuf,
    /// `[n_users, dim]`; may be absent.
    pub users: PathBuf,
    /// How they compare.
    pub metric: Metric,
}

impl Default for EmbeddingsConfig {
    fn default() -> Self {
        EmbeddingsConfig {
            items: "item_embeddings.npy".into(),
            users: "user_embeddings.npy".into(),
            metric: Metric::InnerProduct,
        }
    }
}

impl DatasetConfig {
    /// Reads `dataset.toml` of a directory, or the defaults where there is none.
    ///
    /// # Errors
    /// An unknown key or a wrong type, with its line.
    pub fn read(directory: &Path) -> Result<Self, CatalogError> {
        if !directory.is_dir() {
            return Err(CatalogError::file(directory, "no such directory"));
        }
        let file = directory.join("dataset.toml");
        let mut config = match std::fs::read_to_string(&file) {
            Ok(text) => toml::from_str(&text).map_err(|e| CatalogError::file(&file, e.to_string()))?,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => DatasetConfig::default(),
            Err(e) => return Err(CatalogError::io(&file, e)),
        };
        if config.name.is_empty() {
            let name = directory.canonicalize().ok().and_then(|d| d.file_name().map(|n| n.to_string_lossy().into()));
            config.name = name.unwrap_or_else(|| "dataset".into());
        }
        for (at, rule) in config.interactions.weight_rule.iter().enumerate() {
            if !(rule.weight >= 0.0 && rule.weight.is_finite()) {
                return Err(CatalogError::file(&file, format!("weight_rule {}: weight must be 0 or more", at + 1)));
            }
        }
        let half_life = config.interactions.trending_half_life_days;
        if !half_life.is_finite() || half_life <= 0.0 {
            return Err(CatalogError::file(&file, "interactions.trending_half_life_days must be above 0"));
        }
        Ok(config)
    }
}

/// The columns of a Parquet file, each one array over all rows.
pub struct Table {
    file: PathBuf,
    names: Vec<String>,
    columns: Vec<ArrayRef>,
}

impl Table {
    /// Reads the named columns, or all of them.
    ///
    /// # Errors
    /// The file is missing, cut or not Parquet.
    pub fn read(file: &Path, only: Option<&[&str]>) -> Result<Self, CatalogError> {
        let open = std::fs::File::open(file).map_err(|e| CatalogError::io(file, e))?;
        let damaged = |e: &dyn std::fmt::Display| CatalogError::file(file, format!("not readable as Parquet: {e}"));
        let builder = ParquetRecordBatchReaderBuilder::try_new(open).map_err(|e| damaged(&e))?;
        let fields = builder.schema().fields().clone();
        let chosen: Vec<usize> = (0..fields.len())
            .filter(|&at| only.is_none_or(|only| only.contains(&fields[at].name().as_str())))
            .collect();
        let names: Vec<String> = chosen.iter().map(|&at| fields[at].name().clone()).collect();
        let mut seen = std::collections::HashSet::new();
        if let Some(twice) = names.iter().find(|name| !seen.insert(name.as_str())) {
            return Err(CatalogError::column(file, twice, "there are two of this name"));
        }
        let mask = parquet::arrow::ProjectionMask::roots(builder.parquet_schema(), chosen.iter().copied());
        let reader = builder.with_projection(mask).with_batch_size(65_536).build().map_err(|e| damaged(&e))?;
        let mut parts: Vec<Vec<ArrayRef>> = vec![Vec::new(); names.len()];
        for batch in reader {
            let batch = batch.map_err(|e| damaged(&e))?;
            for (part, column) in parts.iter_mut().zip(batch.columns()) {
                part.push(column.clone());
            }
        }
        let mut columns = Vec::with_capacity(names.len());
        for (part, at) in parts.iter().zip(chosen) {
            let part: Vec<&dyn arrow_array::Array> = part.iter().map(AsRef::as_ref).collect();
            columns.push(match part.is_empty() {
                // A file without rows has no batches, but its columns have types.
                true => arrow_array::new_empty_array(fields[at].data_type()),
                false => arrow_select::concat::concat(&part).map_err(|e| damaged(&e))?,
            });
        }
        Ok(Table { file: file.into(), names, columns })
    }

    /// Number of rows.
    pub fn n_rows(&self) -> usize {
        self.columns.first().map_or(0, |c| c.len())
    }

    fn column(&self, name: &str) -> Result<&ArrayRef, CatalogError> {
        self.names.iter().position(|n| n == name).map(|at| &self.columns[at]).ok_or_else(|| {
            let nearest = crate::context::nearest(name, self.names.iter().map(String::as_str));
            let hint = nearest.map(|n| format!("; did you mean `{n}`?")).unwrap_or_default();
            CatalogError::column(&self.file, name, format!("no such column{hint}"))
        })
    }

    fn no_nulls(&self, name: &str, column: &ArrayRef) -> Result<(), CatalogError> {
        match (0..column.len()).find(|&row| column.is_null(row)) {
            Some(row) => {
                Err(CatalogError::Row { file: self.file.clone(), row, column: name.into(), reason: "null".into() })
            }
            None => Ok(()),
        }
    }

    /// An id column as strings, and whether it holds integers.
    ///
    /// # Errors
    /// Missing, of another type, or with a null.
    pub fn ids(&self, name: &str) -> Result<(Vec<String>, bool), CatalogError> {
        let column = self.column(name)?;
        if is_string(column.data_type()) {
            let id = |(row, id): (usize, Option<&str>)| match id {
                Some(id) if (1..=256).contains(&id.len()) => Ok(id.to_owned()),
                Some(_) => Err((row, "an id has 1 to 256 bytes")),
                None => Err((row, "null")),
            };
            let ids: Result<Vec<String>, _> = strings(column).into_iter().enumerate().map(id).collect();
            return ids.map(|ids| (ids, false)).map_err(|(row, reason)| CatalogError::Row {
                file: self.file.clone(),
                row,
                column: name.into(),
                reason: reason.into(),
            });
        }
        if column.data_type().is_integer() {
            self.no_nulls(name, column)?;
            let column = self.cast(name, column, &DataType::Int64)?;
            self.no_nulls(name, &column)?;
            return Ok((column.as_primitive::<Int64Type>().values().iter().map(i64::to_string).collect(), true));
        }
        let reason = format!("is {}, expected strings or integers", column.data_type());
        Err(CatalogError::column(&self.file, name, reason))
    }

    /// A numeric column as f64, NaN where null. Timestamps become seconds.
    ///
    /// # Errors
    /// Missing or not numeric.
    pub fn numbers(&self, name: &str) -> Result<Vec<f64>, CatalogError> {
        let column = self.column(name)?;
        let (column, scale) = match column.data_type() {
            DataType::Timestamp(unit, _) => {
                let scale = match unit {
                    TimeUnit::Second => 1.0,
                    TimeUnit::Millisecond => 1e-3,
                    TimeUnit::Microsecond => 1e-6,
                    TimeUnit::Nanosecond => 1e-9,
                };
                (self.cast(name, column, &DataType::Int64)?, scale)
            }
            kind if kind.is_numeric() || *kind == DataType::Boolean => (column.clone(), 1.0),
            kind => return Err(CatalogError::column(&self.file, name, format!("is {kind}, expected numbers"))),
        };
        let column = self.cast(name, &column, &DataType::Float64)?;
        let values = column.as_primitive::<Float64Type>();
        Ok((0..values.len())
            .map(|row| if values.is_null(row) { f64::NAN } else { values.value(row) * scale })
            .collect())
    }

    fn cast(&self, name: &str, column: &ArrayRef, to: &DataType) -> Result<ArrayRef, CatalogError> {
        arrow_cast::cast(column, to).map_err(|e| CatalogError::column(&self.file, name, e.to_string()))
    }

    /// A column's values as text, joined where they are lists; for the text index.
    ///
    /// # Errors
    /// Missing, or neither strings nor lists of strings.
    pub fn text(&self, name: &str) -> Result<Vec<String>, CatalogError> {
        let column = self.column(name)?;
        if is_string(column.data_type()) {
            return Ok(strings(column).into_iter().map(|s| s.unwrap_or_default().to_owned()).collect());
        }
        match lists(column) {
            Some(lists) => Ok(lists.into_iter().map(|list| list.join(" ")).collect()),
            None => {
                let reason = format!("is {}, expected strings or lists of strings", column.data_type());
                Err(CatalogError::column(&self.file, name, reason))
            }
        }
    }

    /// The file's columns as features, without `skip`. Returns also the names of columns of no usable type.
    ///
    /// # Errors
    /// None of its own: unusable columns are left out.
    pub fn features(&self, skip: &[&str]) -> Result<(Vec<Column>, Vec<String>), CatalogError> {
        let (mut columns, mut unusable) = (Vec::new(), Vec::new());
        for (name, column) in self.names.iter().zip(&self.columns).filter(|(n, _)| !skip.contains(&n.as_str())) {
            let data = if is_string(column.data_type()) {
                let (codes, vocabulary) = encode(strings(column).into_iter())?;
                ColumnData::Category { codes: codes.into(), vocabulary }
            } else if let Some(lists) = lists(column) {
                let mut offsets = vec![0u64];
                for list in &lists {
                    offsets.push(offsets[offsets.len() - 1] + list.len() as u64);
                }
                let (codes, vocabulary) = encode(lists.into_iter().flatten().map(Some))?;
                ColumnData::Tags { offsets: offsets.into(), codes: codes.into(), vocabulary }
            } else if let Ok(values) = self.numbers(name) {
                let present = || values.iter().filter(|v| (**v as f32).is_finite());
                let default = present().sum::<f64>() / present().count().max(1) as f64;
                let values: Vec<f32> =
                    values.iter().map(|v| *v as f32).map(|v| if v.is_finite() { v } else { f32::NAN }).collect();
                ColumnData::Number { values: values.into(), default: default as f32 }
            } else {
                unusable.push(format!("{name} ({})", column.data_type()));
                continue;
            };
            columns.push(Column { name: name.clone(), data });
        }
        Ok((columns, unusable))
    }

    /// Rows of lists of numbers, NaN where null, for precomputed neighbours.
    ///
    /// # Errors
    /// Missing or not a list.
    pub fn number_lists(&self, name: &str) -> Result<Vec<Vec<f32>>, CatalogError> {
        let column = self.column(name)?;
        let wrong = || CatalogError::column(&self.file, name, "expected lists of numbers");
        if !is_list(column.data_type()) {
            return Err(wrong());
        }
        let column = self.cast(name, column, &DataType::new_list(DataType::Float32, true)).map_err(|_| wrong())?;
        let list = column.as_list::<i32>();
        let numbers = |row: usize| {
            let values = list.value(row);
            values.as_primitive::<Float32Type>().iter().map(|v| v.unwrap_or(f32::NAN)).collect()
        };
        Ok((0..list.len()).map(|row| if list.is_null(row) { Vec::new() } else { numbers(row) }).collect())
    }

    /// Rows of lists of ids, for precomputed neighbours.
    ///
    /// # Errors
    /// Missing or not a list.
    pub fn id_lists(&self, name: &str) -> Result<Vec<Vec<String>>, CatalogError> {
        let column = self.column(name)?;
        let wrong = || CatalogError::column(&self.file, name, "expected lists of ids");
        if !is_list(column.data_type()) {
            return Err(wrong());
        }
        let column = self.cast(name, column, &DataType::new_list(DataType::Utf8, true)).map_err(|_| wrong())?;
        Ok(lists(&column)
            .ok_or_else(wrong)?
            .into_iter()
            .map(|list| list.into_iter().map(String::from).collect())
            .collect())
    }
}

fn is_string(kind: &DataType) -> bool {
    match kind {
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View => true,
        DataType::Dictionary(_, value) => is_string(value),
        _ => false,
    }
}

fn is_list(kind: &DataType) -> bool {
    matches!(kind, DataType::List(_) | DataType::LargeList(_) | DataType::FixedSizeList(..))
}

/// The values of a string column of any encoding; `None` where null.
fn strings(column: &ArrayRef) -> Vec<Option<&str>> {
    match column.data_type() {
        DataType::Utf8 => column.as_string::<i32>().iter().collect(),
        DataType::LargeUtf8 => column.as_string::<i64>().iter().collect(),
        DataType::Utf8View => column.as_string_view().iter().collect(),
        DataType::Dictionary(..) => {
            let dictionary = column.as_any_dictionary();
            let values = strings(dictionary.values());
            if values.is_empty() {
                return vec![None; column.len()];
            }
            let keys = dictionary.normalized_keys();
            (0..column.len()).map(|row| if column.is_null(row) { None } else { values[keys[row]] }).collect()
        }
        _ => Vec::new(),
    }
}

/// The values of a column of lists of strings; empty where null.
fn lists(column: &ArrayRef) -> Option<Vec<Vec<&str>>> {
    let (values, ends): (&ArrayRef, Vec<usize>) = match column.data_type() {
        DataType::List(item) if is_string(item.data_type()) => {
            let list = column.as_list::<i32>();
            (list.values(), list.value_offsets().iter().map(|&o| o as usize).collect())
        }
        DataType::LargeList(item) if is_string(item.data_type()) => {
            let list = column.as_list::<i64>();
            (list.values(), list.value_offsets().iter().map(|&o| o as usize).collect())
        }
        _ => return None,
    };
    let values = strings(values);
    Some(
        (0..column.len())
            .map(|row| match column.is_null(row) {
                true => Vec::new(),
                false => values[ends[row]..ends[row + 1]].iter().flatten().copied().collect(),
            })
            .collect(),
    )
}

/// Codes in the order of first appearance, and the vocabulary.
fn encode<'a>(values: impl Iterator<Item = Option<&'a str>>) -> Result<(Vec<u32>, Arc<IdTable>), CatalogError> {
    let mut codes_of: HashMap<&str, u32> = HashMap::new();
    let mut names: Vec<&str> = Vec::new();
    let codes = values
        .map(|value| match value {
            None => NO_CODE,
            Some(value) => *codes_of.entry(value).or_insert_with(|| {
                names.push(value);
                names.len() as u32 - 1
            }),
        })
        .collect();
    let vocabulary = IdTable::build(names.iter(), false).unwrap_or_default();
    Ok((codes, Arc::new(vocabulary)))
}

/// Everything that the Parquet files of a dataset hold.
pub struct Dataset {
    /// The directory.
    pub directory: PathBuf,
    /// `dataset.toml`.
    pub config: DatasetConfig,
    /// Ids and columns.
    pub items: Entities,
    /// Which item columns play a part.
    pub roles: Roles,
    /// Per text column, the text of every item.
    pub texts: Vec<(String, Vec<String>)>,
    /// Ids and columns; from `users.parquet`, or else from the interactions.
    pub users: Entities,
    /// In the order of the file.
    pub interactions: Vec<RawInteraction>,
    /// Whether interactions have times.
    pub timed: bool,
    /// For the report: what was left out.
    pub warnings: Vec<String>,
}

/// One row of the interactions.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RawInteraction {
    /// User row.
    pub user: u32,
    /// Item row.
    pub item: u32,
    /// 0 or more.
    pub weight: f32,
    /// Seconds; 0 without times.
    pub time: f64,
}

impl Dataset {
    /// Reads and checks everything but embeddings and rankers.
    ///
    /// # Errors
    /// The first thing that is wrong, with file, row and column.
    pub fn read(directory: &Path) -> Result<Self, CatalogError> {
        let config = DatasetConfig::read(directory)?;
        let mut warnings = Vec::new();

        let items_file = directory.join(&config.items.file);
        let table = Table::read(&items_file, None)?;
        let items = entities(&table, &config.items.id, &config.items.ignore, &mut warnings)?;
        if items.is_empty() {
            return Err(CatalogError::file(&items_file, "no items"));
        }
        if items.len() > 200_000_000 {
            return Err(CatalogError::file(&items_file, "more than 200,000,000 items"));
        }
        let roles = roles(&config.items, &items, &items_file)?;
        let mut texts = Vec::new();
        for column in &config.items.text {
            texts.push((column.clone(), table.text(column)?));
        }
        drop(table);

        let interactions_file = optional(directory, &config.interactions.file, &InteractionsConfig::default().file)?;
        let table = interactions_file.map(|file| Table::read(&file, None)).transpose()?;
        let users_file = optional(directory, &config.users.file, &UsersConfig::default().file)?;
        let users = if let Some(users_file) = users_file {
            entities(&Table::read(&users_file, None)?, &config.users.id, &config.users.ignore, &mut warnings)?
        } else if let Some(table) = &table {
            let (mut ids, integer) = table.ids(&config.interactions.user)?;
            let mut seen = std::collections::HashSet::new();
            ids.retain(|id| seen.insert(id.clone()));
            Entities { ids: IdTable::build(ids.iter(), integer).unwrap_or_default(), columns: Vec::new() }
        } else {
            Entities::default()
        };
        let interactions = match &table {
            Some(table) => interactions(table, &config.interactions, &users, &items, &mut warnings)?,
            None => Vec::new(),
        };
        let timed = config.interactions.timestamp.is_some();
        Ok(Dataset { directory: directory.into(), config, items, roles, texts, users, interactions, timed, warnings })
    }
}

/// A file that may be absent, unless `dataset.toml` names another one than the default.
///
/// # Errors
/// It is named and absent.
pub fn optional(directory: &Path, file: &Path, default: &Path) -> Result<Option<PathBuf>, CatalogError> {
    let path = directory.join(file);
    match path.exists() {
        true => Ok(Some(path)),
        false if file == default => Ok(None),
        false => Err(CatalogError::file(&path, "dataset.toml names this file, but it does not exist")),
    }
}

fn entities(table: &Table, id: &str, ignore: &[String], warnings: &mut Vec<String>) -> Result<Entities, CatalogError> {
    let (ids, integer) = table.ids(id)?;
    let skip: Vec<&str> = ignore.iter().map(String::as_str).chain([id]).collect();
    let (columns, unusable) = table.features(&skip)?;
    warnings.extend(unusable.into_iter().map(|c| format!("{}: column {c} has no usable type", table.file.display())));
    let ids = IdTable::build(ids.iter(), integer).map_err(|row| CatalogError::Row {
        file: table.file.clone(),
        row,
        column: id.into(),
        reason: format!("duplicate id `{}`", ids[row]),
    })?;
    Ok(Entities { ids, columns })
}

fn roles(config: &ItemsConfig, items: &Entities, file: &Path) -> Result<Roles, CatalogError> {
    let find = |name: &Option<String>, number: bool| -> Result<Option<usize>, CatalogError> {
        let Some(name) = name else { return Ok(None) };
        let Some(at) = items.column_index(name) else {
            let nearest = crate::context::nearest(name, items.columns.iter().map(|c| c.name.as_str()));
            let hint = nearest.map(|n| format!("; did you mean `{n}`?")).unwrap_or_default();
            return Err(CatalogError::column(file, name, format!("no such column{hint}")));
        };
        match (&items.columns[at].data, number) {
            (ColumnData::Number { .. }, true) => Ok(Some(at)),
            (ColumnData::Category { .. } | ColumnData::Tags { .. }, false) => Ok(Some(at)),
            _ => Err(CatalogError::column(file, name, if number { "expected numbers" } else { "expected strings" })),
        }
    };
    Ok(Roles {
        category: find(&config.category, false)?,
        creator: find(&config.creator, false)?,
        series: find(&config.series, false)?,
        series_position: find(&config.series_position, true)?,
        title: find(&config.title, false)?,
    })
}

fn interactions(
    table: &Table,
    config: &InteractionsConfig,
    users: &Entities,
    items: &Entities,
    warnings: &mut Vec<String>,
) -> Result<Vec<RawInteraction>, CatalogError> {
    let (user_ids, _) = table.ids(&config.user)?;
    let (item_ids, _) = table.ids(&config.item)?;
    let times = config.timestamp.as_ref().map(|name| table.numbers(name)).transpose()?;
    if let (Some(times), Some(name)) = (&times, &config.timestamp)
        && let Some(row) = times.iter().position(|t| !t.is_finite())
    {
        let reason = "null or not a finite number".into();
        return Err(CatalogError::Row { file: table.file.clone(), row, column: name.clone(), reason });
    }
    let weights = weights(table, config)?;
    let (mut found, mut unknown) = (Vec::with_capacity(table.n_rows()), 0usize);
    for row in 0..table.n_rows() {
        match (users.ids.row(&user_ids[row]), items.ids.row(&item_ids[row])) {
            (Some(user), Some(item)) => found.push(RawInteraction {
                user,
                item,
                weight: weights[row],
                time: times.as_ref().map_or(0.0, |t| t[row]),
            }),
            _ => unknown += 1,
        }
    }
    if unknown > 0 {
        warnings.push(format!("{}: {unknown} rows name an unknown user or item", table.file.display()));
    }
    Ok(found)
}

fn weights(table: &Table, config: &InteractionsConfig) -> Result<Vec<f32>, CatalogError> {
    if !config.weight_rule.is_empty() {
        let mut columns: HashMap<&str, Vec<f64>> = HashMap::new();
        for name in config.weight_rule.iter().flat_map(|rule| rule.conditions.keys()) {
            if !columns.contains_key(name.as_str()) {
                columns.insert(name, table.numbers(name)?);
            }
        }
        return Ok((0..table.n_rows())
            .map(|row| {
                let holds = |rule: &&WeightRule| {
                    rule.conditions.iter().all(|(name, wanted)| wanted.holds(columns[name.as_str()][row]))
                };
                config.weight_rule.iter().find(holds).map_or(1.0, |rule| rule.weight)
            })
            .collect());
    }
    let Some(name) = &config.weight else { return Ok(vec![1.0; table.n_rows()]) };
    let values = table.numbers(name)?;
    if let Some(row) = values.iter().position(|v| !((*v as f32).is_finite() && *v >= 0.0)) {
        let reason = "a weight is a finite number of 0 or more".into();
        return Err(CatalogError::Row { file: table.file.clone(), row, column: name.clone(), reason });
    }
    Ok(values.into_iter().map(|v| v as f32).collect())
}
