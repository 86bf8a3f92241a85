//! Dataset → bundle: what is wrong is named by file, row and column, and leaves nothing behind; what is right is the same
//! every time; what is damaged afterwards is refused.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow_array::builder::{ListBuilder, PrimitiveBuilder, StringBuilder};
use arrow_array::types::{Float32Type, Int32Type};
use arrow_array::{
    ArrayRef, DictionaryArray, Float32Array, Float64Array, Int32Array, Int64Array, RecordBatch, StringArray,
};
use arrow_schema::{Field, Schema};
use half::f16;
use parquet::arrow::ArrowWriter;
use tastemaker::catalog::build::{self, BuildOptions, BuildReport, Silent};
use tastemaker::catalog::generation::{Generation, MatrixData, Metric};
use tastemaker::catalog::{CatalogError, bundle};
use tastemaker::index::partitions::place;
use tastemaker::index::{
    Filter, IndexKind, IndexOptions, IvfOptions, Partitioned, SearchParams, SearchScratch, Storage,
};

const ITEMS: [&str; 4] = ["a", "b", "c", "d"];

fn text(values: &[&str]) -> ArrayRef {
    Arc::new(StringArray::from(values.to_vec()))
}

fn numbers(values: &[f32]) -> ArrayRef {
    Arc::new(Float32Array::from(values.to_vec()))
}

fn integers(values: &[i64]) -> ArrayRef {
    Arc::new(Int64Array::from(values.to_vec()))
}

fn dictionary(values: &[Option<&str>]) -> ArrayRef {
    Arc::new(values.iter().copied().collect::<DictionaryArray<Int32Type>>())
}

fn text_lists(lists: &[&[&str]]) -> ArrayRef {
    let mut builder = ListBuilder::new(StringBuilder::new());
    lists.iter().for_each(|list| builder.append_value(list.iter().map(Some)));
    Arc::new(builder.finish())
}

fn number_lists(lists: &[&[Option<f32>]]) -> ArrayRef {
    let mut builder = ListBuilder::new(PrimitiveBuilder::<Float32Type>::new());
    lists.iter().for_each(|list| builder.append_value(list.iter().copied()));
    Arc::new(builder.finish())
}

fn parquet(path: &Path, columns: &[(&str, ArrayRef)]) {
    let field = |(name, array): &(&str, ArrayRef)| Field::new(*name, array.data_type().clone(), true);
    let schema = Arc::new(Schema::new(columns.iter().map(field).collect::<Vec<_>>()));
    let arrays = columns.iter().map(|(_, array)| array.clone()).collect();
    let batch = RecordBatch::try_new(schema.clone(), arrays).unwrap();
    let mut writer = ArrowWriter::try_new(std::fs::File::create(path).unwrap(), schema, None).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
}

/// An `.npy` of format version 1 with this dictionary.
fn npy(path: &Path, dictionary: &str, data: &[u8]) {
    let header = format!("{dictionary}\n");
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend((header.len() as u16).to_le_bytes());
    bytes.extend(header.as_bytes());
    bytes.extend(data);
    std::fs::write(path, bytes).unwrap();
}

fn matrix(path: &Path, rows: usize, values: &[f32]) {
    let dim = values.len() / rows;
    let data: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    npy(path, &format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, {dim}), }}"), &data);
}

fn items() -> Vec<(&'static str, ArrayRef)> {
    vec![
        ("item_id", text(&ITEMS)),
        ("title", text(&["Amber Archive", "Bitter Bridge", "Crimson Coast", "Distant Drum"])),
        ("category", text(&["art", "crime", "art", "drama"])),
        ("tags", text_lists(&[&["old", "slow"], &[], &["old"], &["new"]])),
        ("year", integers(&[1990, 2001, 2015, 2020])),
    ]
}

fn interactions() -> Vec<(&'static str, ArrayRef)> {
    vec![
        ("user_id", text(&["u", "u", "v", "v", "w"])),
        ("item_id", text(&["a", "b", "b", "a", "c"])),
        ("at", integers(&[10, 20, 30, 40, 50])),
        ("strength", numbers(&[1.0, 0.5, 1.0, 0.0, 2.0])),
    ]
}

/// `columns` with the one of that name replaced.
fn with(columns: Vec<(&'static str, ArrayRef)>, name: &str, array: ArrayRef) -> Vec<(&'static str, ArrayRef)> {
    assert!(columns.iter().any(|(n, _)| *n == name));
    columns.into_iter().map(|(n, old)| (n, if n == name { array.clone() } else { old })).collect()
}

fn renamed(columns: Vec<(&'static str, ArrayRef)>, from: &str, to: &'static str) -> Vec<(&'static str, ArrayRef)> {
    columns.into_iter().map(|(n, array)| (if n == from { to } else { n }, array)).collect()
}

const TOML: &str = r#"
name = "small"
[items]
category = "category"
title = "title"
[interactions]
timestamp = "at"
weight = "strength"
"#;

/// A dataset of four items and three users in a directory of its own.
struct Work(tempfile::TempDir);

impl Work {
    fn new() -> Self {
        let work = Work(tempfile::tempdir().unwrap());
        let data = work.data();
        std::fs::create_dir(&data).unwrap();
        std::fs::write(data.join("dataset.toml"), TOML).unwrap();
        parquet(&data.join("items.parquet"), &items());
        parquet(&data.join("users.parquet"), &[("user_id", text(&["u", "v", "w"])), ("age", integers(&[20, 30, 40]))]);
        parquet(&data.join("interactions.parquet"), &interactions());
        matrix(&data.join("item_embeddings.npy"), 4, &[0.5; 12]);
        matrix(&data.join("user_embeddings.npy"), 3, &[0.25; 9]);
        work
    }

    fn data(&self) -> PathBuf {
        self.0.path().join("data")
    }

    fn out(&self) -> PathBuf {
        self.0.path().join("bundle")
    }

    /// What lies beside the dataset.
    fn beside(&self) -> Vec<String> {
        names(self.0.path())
    }

    fn build(&self) -> Result<BuildReport, CatalogError> {
        build::build(&self.data(), &self.out(), &BuildOptions::default(), &Silent)
    }

    fn built(&self) -> (BuildReport, Generation) {
        let report = self.build().unwrap();
        (report, bundle::open(&self.out()).unwrap())
    }
}

fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    let mut names: Vec<String> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// A way to spoil a dataset, and what the error must say.
struct Case(&'static str, fn(&Path), &'static [&'static str]);

fn all_fail(cases: &[Case]) {
    for Case(what, spoil, says) in cases {
        let work = Work::new();
        spoil(&work.data());
        let error = match work.build() {
            Ok(report) => panic!("{what}: was built: {report}"),
            Err(error) => error.to_string(),
        };
        for part in *says {
            assert!(error.contains(part), "{what}: `{error}` does not say `{part}`");
        }
        assert_eq!(work.beside(), ["data"], "{what}: left something behind");
    }
}

fn toml(data: &Path, text: &str) {
    std::fs::write(data.join("dataset.toml"), text).unwrap();
}

fn ranker(data: &Path, manifest: &str) {
    std::fs::create_dir_all(data.join("rankers")).unwrap();
    std::fs::write(data.join("rankers/main.onnx"), "a model").unwrap();
    std::fs::write(data.join("rankers/main.toml"), manifest).unwrap();
}

#[test]
fn bad_items_are_named() {
    fn items_with(data: &Path, name: &str, array: ArrayRef) {
        parquet(&data.join("items.parquet"), &with(items(), name, array));
    }
    all_fail(&[
        Case(
            "no items",
            |d| std::fs::remove_file(d.join("items.parquet")).unwrap(),
            &["items.parquet", "No such file"],
        ),
        Case(
            "no id column",
            |d| parquet(&d.join("items.parquet"), &renamed(items(), "item_id", "itm_id")),
            &["items.parquet", "column `item_id`", "no such column; did you mean `itm_id`?"],
        ),
        Case(
            "ids of floats",
            |d| items_with(d, "item_id", numbers(&[1.0, 2.0, 3.0, 4.0])),
            &["items.parquet", "column `item_id`", "is Float32, expected strings or integers"],
        ),
        Case(
            "null id",
            |d| items_with(d, "item_id", Arc::new(StringArray::from(vec![Some("a"), Some("b"), None, Some("d")]))),
            &["items.parquet", "row 2", "column `item_id`", "null"],
        ),
        Case(
            "null integer id",
            |d| items_with(d, "item_id", Arc::new(Int64Array::from(vec![Some(1), None, Some(3), Some(4)]))),
            &["items.parquet", "row 1", "column `item_id`", "null"],
        ),
        Case(
            "null id in a dictionary",
            |d| items_with(d, "item_id", dictionary(&[Some("a"), Some("b"), Some("c"), None])),
            &["items.parquet", "row 3", "column `item_id`", "null"],
        ),
        Case(
            "nothing but nulls in a dictionary",
            |d| items_with(d, "item_id", dictionary(&[None; 4])),
            &["items.parquet", "row 0", "column `item_id`", "null"],
        ),
        Case(
            "duplicate id",
            |d| items_with(d, "item_id", text(&["a", "b", "c", "b"])),
            &["items.parquet", "row 3", "column `item_id`", "duplicate id `b`"],
        ),
        Case(
            "empty id",
            |d| items_with(d, "item_id", text(&["a", "", "c", "d"])),
            &["items.parquet", "row 1", "column `item_id`", "1 to 256 bytes"],
        ),
        Case(
            "long id",
            |d| items_with(d, "item_id", text(&["a", "b", "c", &"x".repeat(257)])),
            &["items.parquet", "row 3", "column `item_id`", "1 to 256 bytes"],
        ),
        Case(
            "two columns of one name",
            |d| parquet(&d.join("items.parquet"), &renamed(items(), "title", "category")),
            &["items.parquet", "column `category`", "two of this name"],
        ),
        Case(
            "garbage",
            |d| std::fs::write(d.join("items.parquet"), "PAR1 it is not").unwrap(),
            &["items.parquet", "not readable as Parquet"],
        ),
        Case(
            "an empty file",
            |d| std::fs::write(d.join("items.parquet"), "").unwrap(),
            &["items.parquet", "not readable as Parquet"],
        ),
        Case(
            "no rows",
            |d| parquet(&d.join("items.parquet"), &[("item_id", text(&[])), ("year", integers(&[]))]),
            &["items.parquet", "no items"],
        ),
    ]);
}

#[test]
fn bad_roles_and_settings_are_named() {
    all_fail(&[
        Case(
            "unknown key",
            |d| toml(d, "[items]\nctegory = \"category\"\n"),
            &["dataset.toml", "line 2", "unknown field `ctegory`"],
        ),
        Case("not TOML", |d| toml(d, "[items\n"), &["dataset.toml", "line 1"]),
        Case(
            "a role without its column",
            |d| toml(d, "[items]\ncategory = \"categry\"\n"),
            &["items.parquet", "column `categry`", "did you mean `category`?"],
        ),
        Case(
            "a role of numbers that wants strings",
            |d| toml(d, "[items]\ncreator = \"year\"\n"),
            &["items.parquet", "column `year`", "expected strings"],
        ),
        Case(
            "a role of strings that wants numbers",
            |d| toml(d, "[items]\nseries_position = \"title\"\n"),
            &["items.parquet", "column `title`", "expected numbers"],
        ),
        Case(
            "a text column that is missing",
            |d| toml(d, "[items]\ntext = [\"title\", \"titel\"]\n"),
            &["items.parquet", "column `titel`", "did you mean `title`?"],
        ),
        Case(
            "a text column of numbers",
            |d| toml(d, "[items]\ntext = [\"year\"]\n"),
            &["items.parquet", "column `year`", "expected strings or lists of strings"],
        ),
        Case(
            "a negative weight rule",
            |d| toml(d, "[[interactions.weight_rule]]\nweight = -1.0\n"),
            &["dataset.toml", "weight_rule 1", "0 or more"],
        ),
        Case(
            "a rule over a missing column",
            |d| toml(d, "[[interactions.weight_rule]]\nwhere = { strngth = 1 }\nweight = 1.0\n"),
            &["interactions.parquet", "column `strngth`", "did you mean `strength`?"],
        ),
        Case(
            "a half-life of nothing",
            |d| toml(d, "[interactions]\ntrending_half_life_days = 0.0\n"),
            &["dataset.toml", "trending_half_life_days", "above 0"],
        ),
        Case(
            "an unknown metric",
            |d| toml(d, "[embeddings]\nmetric = \"dot\"\n"),
            &["dataset.toml", "line 2", "unknown variant `dot`"],
        ),
    ]);
}

#[test]
fn files_that_are_named_must_exist() {
    all_fail(&[
        Case("users", |d| toml(d, "[users]\nfile = \"readers.parquet\"\n"), &["readers.parquet", "does not exist"]),
        Case(
            "interactions",
            |d| toml(d, "[interactions]\nfile = \"reads.parquet\"\n"),
            &["reads.parquet", "does not exist"],
        ),
        Case(
            "item vectors",
            |d| toml(d, "[embeddings]\nitems = \"towers/i.npy\"\n"),
            &["towers/i.npy", "does not exist"],
        ),
        Case("user vectors", |d| toml(d, "[embeddings]\nusers = \"u.npy\"\n"), &["u.npy", "does not exist"]),
    ]);
}

#[test]
fn bad_users_and_interactions_are_named() {
    fn with_interactions(data: &Path, name: &str, array: ArrayRef) {
        parquet(&data.join("interactions.parquet"), &with(interactions(), name, array));
    }
    all_fail(&[
        Case(
            "duplicate user",
            |d| parquet(&d.join("users.parquet"), &[("user_id", text(&["u", "v", "u"]))]),
            &["users.parquet", "row 2", "column `user_id`", "duplicate id `u`"],
        ),
        Case(
            "garbage users",
            |d| std::fs::write(d.join("users.parquet"), [7; 300]).unwrap(),
            &["users.parquet", "not readable"],
        ),
        Case(
            "no item column",
            |d| parquet(&d.join("interactions.parquet"), &renamed(interactions(), "item_id", "item")),
            &["interactions.parquet", "column `item_id`", "did you mean `item`?"],
        ),
        Case(
            "null user",
            |d| {
                let users = vec![Some("u"), Some("u"), None, Some("v"), Some("w")];
                with_interactions(d, "user_id", Arc::new(StringArray::from(users)));
            },
            &["interactions.parquet", "row 2", "column `user_id`", "null"],
        ),
        Case(
            "negative weight",
            |d| with_interactions(d, "strength", numbers(&[1.0, 1.0, 1.0, -0.5, 1.0])),
            &["interactions.parquet", "row 3", "column `strength`", "0 or more"],
        ),
        Case(
            "weight that is NaN",
            |d| with_interactions(d, "strength", numbers(&[1.0, f32::NAN, 1.0, 1.0, 1.0])),
            &["interactions.parquet", "row 1", "column `strength`", "finite"],
        ),
        Case(
            "weight beyond f32",
            |d| with_interactions(d, "strength", Arc::new(Float64Array::from(vec![1.0, 1.0, 1.0, 1.0, 1e300]))),
            &["interactions.parquet", "row 4", "column `strength`", "finite"],
        ),
        Case(
            "weight that is null",
            |d| {
                let weights = vec![None, Some(1.0), Some(1.0), Some(1.0), Some(1.0)];
                with_interactions(d, "strength", Arc::new(Float64Array::from(weights)));
            },
            &["interactions.parquet", "row 0", "column `strength`", "finite"],
        ),
        Case(
            "null timestamp",
            |d| {
                let times = vec![Some(1), Some(2), Some(3), Some(4), None];
                with_interactions(d, "at", Arc::new(Int64Array::from(times)));
            },
            &["interactions.parquet", "row 4", "column `at`", "null"],
        ),
        Case(
            "timestamps of strings",
            |d| with_interactions(d, "at", text(&["1", "2", "3", "4", "5"])),
            &["interactions.parquet", "column `at`", "expected numbers"],
        ),
    ]);
}

#[test]
fn bad_embeddings_are_named() {
    fn header(data: &Path, dictionary: &str, bytes: usize) {
        npy(&data.join("item_embeddings.npy"), dictionary, &vec![0; bytes]);
    }
    all_fail(&[
        Case(
            "NaN",
            |d| matrix(&d.join("item_embeddings.npy"), 4, &[1., 1., 1., 1., 1., f32::NAN, 1., 1., 1., 1., 1., 1.]),
            &["item_embeddings.npy", "row 1", "column `[2]`", "not a finite number"],
        ),
        Case(
            "infinity of a user",
            |d| matrix(&d.join("user_embeddings.npy"), 3, &[1., 1., 1., 1., 1., 1., f32::INFINITY, 1., 1.]),
            &["user_embeddings.npy", "row 2", "column `[0]`", "not a finite number"],
        ),
        Case(
            "too few rows",
            |d| matrix(&d.join("item_embeddings.npy"), 3, &[1.0; 9]),
            &["item_embeddings.npy", "3 rows, but items.parquet has 4"],
        ),
        Case(
            "too many rows of users",
            |d| matrix(&d.join("user_embeddings.npy"), 4, &[1.0; 12]),
            &["user_embeddings.npy", "4 rows, but users.parquet has 3"],
        ),
        Case(
            "users of another dimension",
            |d| matrix(&d.join("user_embeddings.npy"), 3, &[1.0; 6]),
            &["user_embeddings.npy", "dim is 2, but that of the items is 3"],
        ),
        Case(
            "Fortran order",
            |d| header(d, "{'descr': '<f4', 'fortran_order': True, 'shape': (4, 3), }", 48),
            &["item_embeddings.npy", "Fortran order"],
        ),
        Case(
            "f8",
            |d| header(d, "{'descr': '<f8', 'fortran_order': False, 'shape': (4, 3), }", 96),
            &["item_embeddings.npy", "dtype is '<f8'"],
        ),
        Case(
            "one dimension",
            |d| header(d, "{'descr': '<f4', 'fortran_order': False, 'shape': (4,), }", 16),
            &["item_embeddings.npy", "shape is (4,), expected (rows, dim)"],
        ),
        Case(
            "no dimension",
            |d| header(d, "{'descr': '<f4', 'fortran_order': False, 'shape': (4, 0), }", 0),
            &["item_embeddings.npy", "dim is 0"],
        ),
        Case(
            "an absurd dimension",
            |d| header(d, "{'descr': '<f4', 'fortran_order': False, 'shape': (4, 4611686018427387904), }", 48),
            &["item_embeddings.npy", "dim is 4611686018427387904, expected 1 to 8192"],
        ),
        Case(
            "more rows than a number can say",
            |d| header(d, "{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999999999999, 3), }", 48),
            &["item_embeddings.npy", "shape is (99999999999999999999999, 3)"],
        ),
        Case(
            "more shape than data",
            |d| header(d, "{'descr': '<f4', 'fortran_order': False, 'shape': (4, 8192), }", 48),
            &["item_embeddings.npy", "48 bytes of data, expected 4 x 8192 x 4"],
        ),
        Case(
            "garbage",
            |d| std::fs::write(d.join("item_embeddings.npy"), [1; 99]).unwrap(),
            &["item_embeddings.npy", "not an .npy file"],
        ),
    ]);
    let work = Work::new();
    let file = work.data().join("user_embeddings.npy");
    let bytes = std::fs::read(&file).unwrap();
    for len in (0..bytes.len()).step_by(7) {
        std::fs::write(&file, &bytes[..len]).unwrap();
        let error = work.build().unwrap_err().to_string();
        assert!(error.contains("user_embeddings.npy"), "{len} bytes: {error}");
    }
    assert_eq!(work.beside(), ["data"]);
}

#[test]
fn bad_lists_and_rankers_are_named() {
    fn lists(data: &Path, neighbours: ArrayRef, scores: ArrayRef) {
        let columns = [("item_id", text(&["a", "b"])), ("neighbours", neighbours), ("scores", scores)];
        parquet(&data.join("collaborative.parquet"), &columns);
    }
    all_fail(&[
        Case(
            "lists of different lengths",
            |d| lists(d, text_lists(&[&["b"], &["a", "c"]]), number_lists(&[&[Some(1.0)], &[Some(1.0)]])),
            &["collaborative.parquet", "row 1", "column `scores`", "differ in length"],
        ),
        Case(
            "a score that is infinite",
            |d| lists(d, text_lists(&[&["b"], &["a"]]), number_lists(&[&[Some(f32::INFINITY)], &[Some(1.0)]])),
            &["collaborative.parquet", "row 0", "column `scores`", "not a finite number"],
        ),
        Case(
            "a score that is null",
            |d| lists(d, text_lists(&[&["b"], &["a"]]), number_lists(&[&[Some(1.0)], &[None]])),
            &["collaborative.parquet", "row 1", "column `scores`", "not a finite number"],
        ),
        Case(
            "neighbours that are no lists",
            |d| lists(d, text(&["b", "a"]), number_lists(&[&[Some(1.0)], &[Some(1.0)]])),
            &["collaborative.parquet", "column `neighbours`", "expected lists of ids"],
        ),
        Case(
            "no scores",
            |d| {
                parquet(
                    &d.join("collaborative.parquet"),
                    &[("item_id", text(&["a"])), ("neighbours", text_lists(&[&["b"]]))],
                )
            },
            &["collaborative.parquet", "column `scores`", "no such column"],
        ),
        Case(
            "a ranker without manifest",
            |d| {
                ranker(d, "");
                std::fs::remove_file(d.join("rankers/main.toml")).unwrap();
            },
            &["rankers/main.toml", "No such file"],
        ),
        Case(
            "an unknown key",
            |d| ranker(d, "[output]\nname = \"s\"\n[[inputs]]\nname = \"x\"\ncolums = []\n"),
            &["rankers/main.toml", "unknown field `colums`"],
        ),
        Case("no inputs", |d| ranker(d, "[output]\nname = \"s\"\n"), &["rankers/main.toml", "no [[inputs]]"]),
        Case(
            "an input without columns",
            |d| ranker(d, "[output]\nname = \"s\"\n[[inputs]]\nname = \"x\"\ncolumns = []\n"),
            &["rankers/main.toml", "input `x` has no columns"],
        ),
    ]);
}

#[test]
fn cut_parquet_is_refused_at_every_length() {
    let work = Work::new();
    for name in ["items.parquet", "users.parquet", "interactions.parquet"] {
        let file = work.data().join(name);
        let bytes = std::fs::read(&file).unwrap();
        for len in (0..bytes.len()).step_by(bytes.len() / 40).chain(bytes.len() - 12..bytes.len()) {
            std::fs::write(&file, &bytes[..len]).unwrap();
            let error = work.build().unwrap_err().to_string();
            assert!(error.contains(name), "{len} bytes of {name}: {error}");
        }
        std::fs::write(&file, &bytes).unwrap();
    }
    assert_eq!(work.beside(), ["data"]);
    work.build().unwrap();
}

#[test]
fn every_optional_file_may_be_absent_or_empty() {
    let work = Work::new();
    let (report, generation) = work.built();
    assert_eq!((report.n_items, report.n_users, report.n_interactions), (4, 3, 5));
    assert!(report.warnings.is_empty(), "{:?}", report.warnings);
    let user = generation.users.ids.row("v").unwrap();
    let history: Vec<(u32, f32)> = generation.histories.of(user).map(|i| (i.row, i.weight)).collect();
    assert_eq!(history, [(1, 1.0), (0, 0.0)]);

    // Users come from the interactions, in the order in which they appear.
    let work = Work::new();
    std::fs::remove_file(work.data().join("users.parquet")).unwrap();
    let (report, generation) = work.built();
    assert_eq!((report.n_users, generation.users.columns.len()), (3, 0));
    assert_eq!(generation.users.ids.id(2), "w");

    let work = Work::new();
    std::fs::remove_file(work.data().join("interactions.parquet")).unwrap();
    let (report, generation) = work.built();
    assert_eq!((report.n_users, report.n_interactions), (3, 0));
    assert_eq!(&generation.trending.rows[..], [0, 1, 2, 3]);

    let work = Work::new();
    for file in ["users.parquet", "interactions.parquet", "user_embeddings.npy"] {
        std::fs::remove_file(work.data().join(file)).unwrap();
    }
    let (report, _) = work.built();
    assert_eq!(report.n_users, 0);

    let work = Work::new();
    let empty = [("user_id", text(&[])), ("age", integers(&[])), ("plan", dictionary(&[])), ("tags", text_lists(&[]))];
    parquet(&work.data().join("users.parquet"), &empty);
    let nobody: Vec<_> = interactions().into_iter().map(|(name, array)| (name, array.slice(0, 0))).collect();
    parquet(&work.data().join("interactions.parquet"), &nobody);
    std::fs::remove_file(work.data().join("user_embeddings.npy")).unwrap();
    let (report, generation) = work.built();
    assert_eq!((report.n_users, report.n_interactions, generation.users.columns.len()), (0, 0, 3));
}

#[test]
fn what_is_done_without_is_noted() {
    let note = |absent: &[&str]| {
        let work = Work::new();
        absent.iter().for_each(|file| std::fs::remove_file(work.data().join(file)).unwrap());
        let (report, _) = work.built();
        assert_eq!(report.warnings.len(), 1, "{absent:?}: {:?}", report.warnings);
        assert!(report.to_string().starts_with("note: "));
        report.warnings[0].clone()
    };
    assert!(note(&["user_embeddings.npy"]).contains("no user embeddings"));
    assert!(note(&["item_embeddings.npy"]).contains("without item embeddings"));
    assert!(note(&["item_embeddings.npy", "user_embeddings.npy"]).contains("no embeddings"));

    let work = Work::new();
    let items = with(interactions(), "item_id", text(&["a", "b", "nothing", "a", "nowhere"]));
    parquet(&work.data().join("interactions.parquet"), &items);
    let (report, _) = work.built();
    assert_eq!(report.n_interactions, 3);
    assert!(report.warnings[0].contains("interactions.parquet: 2 rows name an unknown"), "{:?}", report.warnings);

    let work = Work::new();
    let columns = with(items_with_floats(), "year", number_lists(&[&[Some(1.0)], &[], &[], &[]]));
    parquet(&work.data().join("items.parquet"), &columns);
    let (report, generation) = work.built();
    assert!(report.warnings[0].contains("items.parquet: column year (List("), "{:?}", report.warnings);
    assert!(generation.items.column("year").is_none());
    // Neither infinities nor what f32 can't hold become features.
    let floats = generation.items.column("floats").unwrap();
    assert_eq!((0..4).map(|row| floats.data.number(row).unwrap()).collect::<Vec<_>>(), [1.0, 2.0, 2.0, 3.0]);
}

fn items_with_floats() -> Vec<(&'static str, ArrayRef)> {
    let mut columns = items();
    columns.push(("floats", Arc::new(Float64Array::from(vec![1.0, f64::INFINITY, 1e300, 3.0]))));
    columns
}

#[test]
fn ids_of_every_kind() {
    // Integers, of different widths in different files.
    let work = Work::new();
    let ids = Arc::new(Int32Array::from(vec![10, 20, -30, 40]));
    parquet(&work.data().join("items.parquet"), &with(items(), "item_id", ids));
    let acts = with(interactions(), "item_id", integers(&[10, 20, 20, 10, -30]));
    parquet(&work.data().join("interactions.parquet"), &acts);
    let (report, generation) = work.built();
    assert_eq!(report.n_interactions, 5);
    assert!(generation.items.ids.integer && !generation.users.ids.integer);
    assert_eq!(generation.items.ids.row("-30"), Some(2));

    // Dictionaries, of ids and of values, with nulls.
    let work = Work::new();
    let columns = with(items(), "item_id", dictionary(&ITEMS.map(Some)));
    let columns = with(columns, "category", dictionary(&[Some("art"), None, Some("art"), Some("crime")]));
    let columns = with(columns, "title", dictionary(&[None; 4]));
    parquet(&work.data().join("items.parquet"), &columns);
    let acts = with(interactions(), "user_id", dictionary(&["u", "u", "v", "v", "w"].map(Some)));
    parquet(&work.data().join("interactions.parquet"), &acts);
    let (report, generation) = work.built();
    assert_eq!(report.n_interactions, 5);
    assert_eq!(generation.items.ids.row("d"), Some(3));
    let category = &generation.items.column("category").unwrap().data;
    assert_eq!((category.codes(0), category.codes(1), category.codes(3)), (&[0][..], &[][..], &[1][..]));
    assert!(generation.items.column("title").unwrap().data.codes(0).is_empty());

    // Names of columns that Parquet's own paths would split.
    let work = Work::new();
    parquet(&work.data().join("items.parquet"), &renamed(items(), "year", "year.of.print"));
    assert!(work.built().1.items.column("year.of.print").is_some());
}

#[test]
fn precomputed_lists_take_the_place_of_computed_ones() {
    let work = Work::new();
    let columns = [
        ("item_id", text(&["a", "c", "nobody"])),
        ("neighbours", text_lists(&[&["d", "nowhere", "a", "b"], &[], &["a"]])),
        ("scores", number_lists(&[&[Some(0.1), Some(9.0), Some(8.0), Some(0.7)], &[], &[Some(1.0)]])),
    ];
    parquet(&work.data().join("collaborative.parquet"), &columns);
    let (report, generation) = work.built();
    assert!(report.warnings[0].contains("collaborative.parquet: 1 rows name an unknown item"));
    assert_eq!(generation.collaborative.of(0), (&[1, 3][..], &[0.7, 0.1][..]));
    assert!(generation.collaborative.of(1).0.is_empty() && generation.collaborative.of(2).0.is_empty());
}

#[test]
fn half_precision_stays_half() {
    let work = Work::new();
    let data: Vec<u8> = (0..12).flat_map(|v| f16::from_f32(v as f32 / 4.0).to_le_bytes()).collect();
    let header = "{'descr': '<f2', 'fortran_order': False, 'shape': (4, 3), }";
    npy(&work.data().join("item_embeddings.npy"), header, &data);
    let (_, generation) = work.built();
    let embeddings = generation.item_embeddings.unwrap();
    assert!(matches!(embeddings.data, MatrixData::F16(_)));
    let mut row = Vec::new();
    embeddings.extend_row(3, &mut row);
    assert_eq!(row, [2.25, 2.5, 2.75]);
}

#[test]
fn every_kind_of_index_comes_back_as_it_was_built() {
    let work = Work::new();
    // Enough items for several lists.
    let (n, dim) = (200, 12);
    let ids: Vec<String> = (0..n).map(|at| format!("i{at}")).collect();
    parquet(&work.data().join("items.parquet"), &[("item_id", Arc::new(StringArray::from(ids.clone())) as ArrayRef)]);
    std::fs::remove_file(work.data().join("interactions.parquet")).unwrap();
    std::fs::remove_file(work.data().join("user_embeddings.npy")).unwrap();
    let values: Vec<f32> = (0..n * dim).map(|at| ((at * 7919) % 1009) as f32 / 1009.0 - 0.4).collect();
    matrix(&work.data().join("item_embeddings.npy"), n, &values);
    let ivf = |storage, n_lists| IvfOptions { storage, n_lists: Some(n_lists), ..Default::default() };
    let mut versions = Vec::new();
    for metric in ["inner_product", "cosine", "l2"] {
        toml(&work.data(), &format!("name = \"small\"\n[embeddings]\nmetric = \"{metric}\"\n"));
        for index in [
            IndexOptions::BruteForce {},
            IndexOptions::IvfFlat(ivf(None, 5)),
            IndexOptions::IvfFlat(ivf(Some(Storage::F16), 5)),
            IndexOptions::IvfFlat(ivf(Some(Storage::Bf16), 5)),
            IndexOptions::IvfPq(ivf(None, 5)),
            IndexOptions::IvfRabitq(ivf(None, 5)),
            IndexOptions::IvfRabitq(ivf(None, 200)),
            IndexOptions::of(IndexKind::Hnsw),
        ] {
            for partitions in [1, 3] {
                let options =
                    BuildOptions { overwrite: true, index: index.clone(), partitions, ..BuildOptions::default() };
                versions.push(build::build(&work.data(), &work.out(), &options, &Silent).unwrap().version);
                let info = bundle::describe(&work.out()).unwrap();
                assert_eq!(info.format_version, if partitions > 1 { 6 } else { 5 });
                assert_eq!(info.to_string().contains("in 3 partitions"), partitions > 1);
                let generation = bundle::open(&work.out()).unwrap();
                let (read, items) = (generation.index().unwrap(), generation.item_embeddings.as_ref().unwrap());
                assert_eq!((read.kind(), read.n_partitions()), (index.kind(), partitions));
                let (metric, params) = (generation.metric, SearchParams::default());
                let made = if partitions == 1 {
                    tastemaker::index::build(&index, items, metric, &|_, _, _| {}).unwrap()
                } else {
                    let places = place(ids.iter().map(String::as_str), partitions).unwrap();
                    Arc::new(Partitioned::build(&index, items, metric, places, params, &|_, _, _| {}).unwrap())
                };
                let (mut scratch, mut found) = (SearchScratch::default(), [Vec::new(), Vec::new()]);
                for query in values.chunks_exact(dim).step_by(17) {
                    for (index, found) in [&read, &made].into_iter().zip(&mut found) {
                        index.search(query, 30, Filter::ALL, &params, &mut scratch, found);
                    }
                }
                assert_eq!(found[0], found[1]);
                assert_eq!(found[0].len(), 30 * 12);
            }
        }
    }
    let all = versions.len();
    versions.sort();
    versions.dedup();
    assert_eq!(versions.len(), all);
    // Options that do not fit name themselves, and leave nothing behind.
    let index = IndexOptions::IvfPq(IvfOptions { pq_dim: Some(5), ..Default::default() });
    let options = BuildOptions { overwrite: true, index, ..BuildOptions::default() };
    let error = build::build(&work.data(), &work.out(), &options, &Silent).unwrap_err().to_string();
    assert!(error.contains("pq_dim = 5") && error.contains("item_embeddings.npy"), "{error}");
    assert_eq!(work.beside(), ["bundle", "data"]);
}

#[test]
fn the_version_names_the_content() {
    type Change = fn(&Path);
    fn with_text(columns: &str) -> String {
        TOML.replace("[items]", &format!("[items]\ntext = {columns}"))
    }
    let version = |change: Change| {
        let work = Work::new();
        change(&work.data());
        work.built().0.version
    };
    let same = version(|_| ());
    assert!(same.starts_with("small-") && same.len() == "small-".len() + 8, "{same}");
    assert_eq!(version(|_| ()), same);
    let title = version(|d| toml(d, &with_text("[\"title\"]")));
    let changes: [(&str, Change); 7] = [
        ("metric", |d| toml(d, &format!("{TOML}\n[embeddings]\nmetric = \"cosine\"\n"))),
        ("tags as text", |d| toml(d, &with_text("[\"tags\"]"))),
        ("text columns in another order", |d| toml(d, &with_text("[\"tags\", \"title\"]"))),
        ("role", |d| toml(d, &TOML.replace("title =", "creator ="))),
        ("ranker", |d| ranker(d, "[output]\nname = \"s\"\n[[inputs]]\nname = \"x\"\ncolumns = [\"a\"]\n")),
        ("one weight", |d| {
            let weights = numbers(&[1.0, 0.5, 1.0, 0.0, 2.5]);
            parquet(&d.join("interactions.parquet"), &with(interactions(), "strength", weights));
        }),
        ("text of an ignored column", |d| {
            let titles = text(&["Amber Archive", "Bitter Bridge", "Crimson Coast", "Distant Drums"]);
            parquet(&d.join("items.parquet"), &with(items(), "title", titles));
            toml(d, "name = \"small\"\n[items]\ntext = [\"title\"]\nignore = [\"title\"]\n");
        }),
    ];
    let mut versions = vec![("unchanged", same), ("title as text", title)];
    versions.push((
        "ignored column as text",
        version(|d| toml(d, "name = \"small\"\n[items]\ntext = [\"title\"]\nignore = [\"title\"]\n")),
    ));
    versions.extend(changes.map(|(what, change)| (what, version(change))));
    for (at, (what, one)) in versions.iter().enumerate() {
        for (other, another) in &versions[..at] {
            assert_ne!(one, another, "{what} and {other}");
        }
    }

    // Ids that read alike but are answered differently.
    let integers = version(|d| {
        let ids = Arc::new(Int64Array::from(vec![1, 2, 3, 4]));
        parquet(&d.join("items.parquet"), &with(items(), "item_id", ids));
    });
    let strings =
        version(|d| parquet(&d.join("items.parquet"), &with(items(), "item_id", text(&["1", "2", "3", "4"]))));
    assert_ne!(integers, strings);
}

#[test]
fn only_a_bundle_is_overwritten_and_only_when_asked() {
    let work = Work::new();
    let overwrite = BuildOptions { overwrite: true, ..BuildOptions::default() };
    let build = |options: &BuildOptions| build::build(&work.data(), &work.out(), options, &Silent);
    // With nothing there, there is nothing to replace.
    let first = build(&overwrite).unwrap().version;
    toml(&work.data(), &format!("{TOML}\n[embeddings]\nmetric = \"l2\"\n"));
    let refused = build(&BuildOptions::default()).unwrap_err();
    assert!(matches!(&refused, CatalogError::Exists { path, .. } if *path == work.out()), "{refused}");
    assert!(refused.to_string().contains("--overwrite"), "{refused}");
    assert_eq!(bundle::open(&work.out()).unwrap().version, first);

    // A served bundle stays readable while another takes its place.
    let served = bundle::open(&work.out()).unwrap();
    let second = build(&overwrite).unwrap().version;
    assert_ne!(second, first);
    let opened = bundle::open(&work.out()).unwrap();
    assert_eq!((opened.version, opened.metric), (second.clone(), Metric::L2));
    assert_eq!(served.items.ids.id(3), "d");
    assert_eq!(work.beside(), ["bundle", "data"]);

    // A build that fails leaves the old one.
    std::fs::write(work.data().join("users.parquet"), "garbage").unwrap();
    build(&overwrite).unwrap_err();
    assert_eq!(bundle::open(&work.out()).unwrap().version, second);
    assert_eq!(work.beside(), ["bundle", "data"]);

    // What is not a bundle is nobody's to delete: an empty folder, one with files, one of a web application, a file.
    let taken = work.0.path().join("taken");
    for files in [&[][..], &["notes.txt"], &["manifest.json", "index.html"]] {
        std::fs::create_dir(&taken).unwrap();
        files.iter().for_each(|file| std::fs::write(taken.join(file), "{}").unwrap());
        for options in [BuildOptions::default(), overwrite.clone()] {
            let error = build::build(&work.data(), &taken, &options, &Silent).unwrap_err();
            assert!(error.to_string().contains("is not a bundle"), "{error}");
        }
        assert_eq!(names(&taken).len(), files.len());
        std::fs::remove_dir_all(&taken).unwrap();
    }
    std::fs::write(&taken, "a file").unwrap();
    build::build(&work.data(), &taken, &overwrite, &Silent).unwrap_err();
    assert_eq!(std::fs::read(&taken).unwrap(), b"a file");
}

#[test]
fn an_overwritten_bundle_is_never_absent() {
    let work = Work::new();
    let overwrite = BuildOptions { overwrite: true, ..BuildOptions::default() };
    let build = || build::build(&work.data(), &work.out(), &overwrite, &Silent).unwrap();
    build();
    let (manifest, done) = (work.out().join("manifest.json"), std::sync::atomic::AtomicBool::new(false));
    let (looks, absences) = std::thread::scope(|scope| {
        let watch = scope.spawn(|| {
            let (mut looks, mut absences) = (0, 0);
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                looks += 1;
                absences += u32::from(!manifest.exists());
            }
            (looks, absences)
        });
        (0..10).for_each(|_| drop(build()));
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        watch.join().unwrap()
    });
    // Some file systems can't exchange directories (overlays); there a moment remains.
    let exchanges = {
        let (a, b) = (work.0.path().join("a"), work.0.path().join("b"));
        [&a, &b].into_iter().for_each(|folder| std::fs::create_dir(folder).unwrap());
        let flags = rustix::fs::RenameFlags::EXCHANGE;
        rustix::fs::renameat_with(rustix::fs::CWD, &a, rustix::fs::CWD, &b, flags).is_ok()
    };
    assert!(looks > 0 && (absences == 0 || !exchanges), "{absences} of {looks}");
}

/// Every file under `folder`.
fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let mut found: Vec<_> = entries.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect();
    found.sort();
    found
}

#[test]
fn a_damaged_bundle_is_refused() {
    let work = Work::new();
    toml(&work.data(), &TOML.replace("[items]", "[items]\ntext = [\"title\"]"));
    ranker(&work.data(), "[output]\nname = \"s\"\n[[inputs]]\nname = \"x\"\ncolumns = [\"a\"]\n");
    work.build().unwrap();
    let refused = |file: &Path, what: &str| {
        let Err(error) = bundle::open(&work.out()) else { panic!("{}: {what} was accepted", file.display()) };
        let text = error.to_string();
        assert!(text.contains(work.out().to_str().unwrap()), "{text}");
    };
    let mut tried = 0;
    for file in files(&work.out()).into_iter().filter(|f| f.extension().is_none_or(|e| e != "lock")) {
        let bytes = std::fs::read(&file).unwrap();
        let step = (bytes.len() / 60).max(1);
        for at in (0..bytes.len()).step_by(step) {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1 << (at % 8);
            std::fs::write(&file, &damaged).unwrap();
            refused(&file, &format!("another byte {at}"));
            std::fs::write(&file, &bytes[..at]).unwrap();
            refused(&file, &format!("a length of {at}"));
            tried += 2;
        }
        std::fs::write(&file, [&bytes[..], b"\0"].concat()).unwrap();
        refused(&file, "another byte at the end");
        std::fs::remove_file(&file).unwrap();
        refused(&file, "its absence");
        std::fs::write(&file, &bytes).unwrap();
    }
    assert!(tried > 500, "{tried}");
    bundle::open(&work.out()).unwrap();
    // An older or newer format says so instead of calling it damage.
    let manifest = work.out().join("manifest.json");
    let text = std::fs::read_to_string(&manifest).unwrap();
    std::fs::write(
        &manifest,
        text.replace(&format!("\"format_version\": {}", bundle::FORMAT_VERSION), "\"format_version\": 999"),
    )
    .unwrap();
    assert!(bundle::open(&work.out()).unwrap_err().to_string().contains("build it anew"));
    assert!(bundle::open(&work.data()).unwrap_err().to_string().contains("not a bundle"));
}
