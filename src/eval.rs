//! Offline quality of a pipeline: recall, NDCG and coverage of its slates against held-out interactions.

use std::collections::{BTreeMap, HashSet};
use std::path::Path;

use anyhow::{Context as _, bail, ensure};
use arrow_array::cast::AsArray;
use arrow_array::types::{Float64Type, Int64Type};
use arrow_array::{Array as _, ArrayRef};
use arrow_schema::DataType;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;

/// A comparison over a numeric column of the test file, as in `rating>=4`.
#[derive(Clone, Debug, PartialEq)]
pub struct Relevance {
    column: String,
    op: Op,
    value: f64,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Op {
    Eq,
    Ge,
    Gt,
    Le,
    Lt,
}

impl std::str::FromStr for Relevance {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        for (symbol, op) in [(">=", Op::Ge), ("<=", Op::Le), (">", Op::Gt), ("<", Op::Lt), ("=", Op::Eq)] {
            if let Some((column, value)) = text.split_once(symbol) {
                let value = value.trim().parse().map_err(|_| format!("`{}` is not a number", value.trim()))?;
                return Ok(Relevance { column: column.trim().to_owned(), op, value });
            }
        }
        Err("expected COLUMN>=NUMBER, or with <=, >, <, =".to_owned())
    }
}

impl Relevance {
    fn holds(&self, value: f64) -> bool {
        match self.op {
            Op::Eq => value == self.value,
            Op::Ge => value >= self.value,
            Op::Gt => value > self.value,
            Op::Le => value <= self.value,
            Op::Lt => value < self.value,
        }
    }
}

/// Relevant item ids by user id.
pub type Truth = BTreeMap<String, HashSet<String>>;

/// One row of a file of interactions.
#[derive(Clone, Debug, PartialEq)]
pub struct Interaction {
    /// The item.
    pub item: String,
    /// Whether it is what a recommendation should find.
    pub relevant: bool,
    /// As of a rating; `None` where the file says nothing or 0.
    pub value: Option<f32>,
}

/// The columns of a file of interactions.
#[derive(Clone, Copy, Debug)]
pub struct Columns<'a> {
    /// Ids of users.
    pub user: &'a str,
    /// Ids of items.
    pub item: &'a str,
    /// Values, where there are any.
    pub value: Option<&'a str>,
}

/// Reads the test file. A row is relevant when any of `relevant` holds, or always when there are none.
///
/// # Errors
/// As [`read_interactions`]; no relevant row.
pub fn read_truth(file: &Path, user: &str, item: &str, relevant: &[Relevance]) -> anyhow::Result<Truth> {
    let interactions = read_interactions(file, Columns { user, item, value: None }, relevant)?;
    let relevant = |(user, rows): (String, Vec<Interaction>)| {
        let items: HashSet<String> = rows.into_iter().filter(|row| row.relevant).map(|row| row.item).collect();
        (!items.is_empty()).then_some((user, items))
    };
    let truth: Truth = interactions.into_iter().filter_map(relevant).collect();
    ensure!(!truth.is_empty(), "{}: no relevant rows", file.display());
    Ok(truth)
}

/// Reads interactions by user, in the file's order.
///
/// # Errors
/// A missing file or column, a column of another type, a null: named with its row.
pub fn read_interactions(
    file: &Path,
    columns: Columns<'_>,
    relevant: &[Relevance],
) -> anyhow::Result<BTreeMap<String, Vec<Interaction>>> {
    let reader = std::fs::File::open(file).with_context(|| file.display().to_string())?;
    let reader = ParquetRecordBatchReaderBuilder::try_new(reader)
        .and_then(|builder| builder.build())
        .with_context(|| file.display().to_string())?;
    let mut by_user: BTreeMap<String, Vec<Interaction>> = BTreeMap::new();
    let mut first = 0;
    for batch in reader {
        let batch = batch.with_context(|| file.display().to_string())?;
        let column =
            |name: &str| batch.column_by_name(name).with_context(|| format!("{}: no column `{name}`", file.display()));
        let numbers = |name: &str| {
            arrow_cast::cast(column(name)?, &DataType::Float64)
                .with_context(|| format!("{}: column `{name}`", file.display()))
        };
        let users = ids(column(columns.user)?, file, columns.user, first)?;
        let items = ids(column(columns.item)?, file, columns.item, first)?;
        let mut keep = vec![relevant.is_empty(); batch.num_rows()];
        for rule in relevant {
            let values = numbers(&rule.column)?;
            let values = values.as_primitive::<Float64Type>();
            for (row, keep) in keep.iter_mut().enumerate() {
                *keep |= values.is_valid(row) && rule.holds(values.value(row));
            }
        }
        let values = columns.value.map(numbers).transpose()?;
        let values = values.as_ref().map(|values| values.as_primitive::<Float64Type>());
        for (row, (user, item)) in users.into_iter().zip(items).enumerate() {
            let value = values.filter(|values| values.is_valid(row)).map(|values| values.value(row) as f32);
            let value = value.filter(|value| *value != 0.0);
            by_user.entry(user).or_default().push(Interaction { item, relevant: keep[row], value });
        }
        first += batch.num_rows();
    }
    Ok(by_user)
}

fn ids(column: &ArrayRef, file: &Path, name: &str, first: usize) -> anyhow::Result<Vec<String>> {
    if let Some(row) = (0..column.len()).find(|&row| column.is_null(row)) {
        bail!("{}: row {}: column `{name}` is null", file.display(), first + row);
    }
    match column.data_type() {
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View => {
            let column = arrow_cast::cast(column, &DataType::Utf8)?;
            Ok(column.as_string::<i32>().iter().flatten().map(String::from).collect())
        }
        kind if kind.is_integer() => {
            let column = arrow_cast::cast(column, &DataType::Int64)?;
            Ok(column.as_primitive::<Int64Type>().values().iter().map(i64::to_string).collect())
        }
        kind => bail!("{}: column `{name}` is {kind}, expected strings or integers", file.display()),
    }
}

/// Means over users, for each cut-off k.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct Quality {
    /// Users measured.
    pub users: usize,
    /// Found / relevant.
    pub recall: BTreeMap<usize, f64>,
    /// Binary gains, `1 / log2(rank + 1)`, over the best possible within k.
    pub ndcg: BTreeMap<usize, f64>,
    /// Distinct items in anybody's first k / items of the catalogue.
    pub coverage: BTreeMap<usize, f64>,
}

/// Accumulates [`Quality`] user by user.
#[derive(Debug)]
pub struct Meter {
    ks: Vec<usize>,
    users: usize,
    recall: Vec<f64>,
    ndcg: Vec<f64>,
    shown: Vec<HashSet<u32>>,
}

impl Meter {
    /// A meter for the given cut-offs.
    pub fn new(ks: &[usize]) -> Self {
        Meter {
            ks: ks.to_vec(),
            users: 0,
            recall: vec![0.0; ks.len()],
            ndcg: vec![0.0; ks.len()],
            shown: vec![HashSet::new(); ks.len()],
        }
    }

    /// Adds one user: the rows answered, best first, and the relevant rows (`n_relevant` counts those that the
    /// catalogue lacks, too).
    pub fn add(&mut self, answered: &[u32], relevant: &HashSet<u32>, n_relevant: usize) {
        self.users += 1;
        for (at, &k) in self.ks.iter().enumerate() {
            let hits = answered.iter().take(k).enumerate().filter(|(_, row)| relevant.contains(row));
            let (mut found, mut gain) = (0usize, 0.0);
            for (rank, _) in hits {
                found += 1;
                gain += 1.0 / (rank as f64 + 2.0).log2();
            }
            let ideal: f64 = (0..n_relevant.min(k)).map(|rank| 1.0 / (rank as f64 + 2.0).log2()).sum();
            self.recall[at] += found as f64 / n_relevant as f64;
            self.ndcg[at] += gain / ideal;
            self.shown[at].extend(answered.iter().take(k));
        }
    }

    /// The means.
    pub fn quality(&self, n_items: usize) -> Quality {
        let users = self.users.max(1) as f64;
        let by_k = |values: &[f64]| self.ks.iter().copied().zip(values.iter().map(|v| v / users)).collect();
        Quality {
            users: self.users,
            recall: by_k(&self.recall),
            ndcg: by_k(&self.ndcg),
            coverage: self
                .ks
                .iter()
                .copied()
                .zip(self.shown.iter().map(|shown| shown.len() as f64 / n_items.max(1) as f64))
                .collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn relevance_parses_and_compares() {
        let rule: Relevance = "rating >= 4".parse().unwrap();
        assert!(rule.holds(4.0) && !rule.holds(3.0));
        let rule: Relevance = "kind=2".parse().unwrap();
        assert!(rule.holds(2.0) && !rule.holds(1.0));
        assert!("rating".parse::<Relevance>().is_err());
        assert!("rating>=x".parse::<Relevance>().unwrap_err().contains("`x`"));
    }

    #[test]
    fn quality_by_hand() {
        let mut meter = Meter::new(&[1, 3]);
        meter.add(&[5, 1, 2], &HashSet::from([1, 2]), 4);
        meter.add(&[1], &HashSet::from([1]), 1);
        let quality = meter.quality(10);
        assert_eq!(quality.users, 2);
        assert_eq!(quality.recall[&1], 0.5);
        assert_eq!(quality.recall[&3], (0.5 + 1.0) / 2.0);
        let ideal = 1.0 + 1.0 / 3f64.log2() + 0.5;
        let first = (1.0 / 3f64.log2() + 0.5) / ideal;
        assert!((quality.ndcg[&3] - (first + 1.0) / 2.0).abs() < 1e-12);
        assert_eq!(quality.coverage[&1], 0.2);
        assert_eq!(quality.coverage[&3], 0.3);
    }
}
