//! A made-up catalogue for demonstrations and tests, written as a dataset like any other.
//!
//! Items belong to clusters of a latent space, as the output of a two-tower model would: an item's category is its
//! cluster, its creator and series stay within it. Users mix a few clusters. What a user does follows
//! `softmax(<u, x> + popularity)` over a random sample of the catalogue, at times that grow denser towards the end.

use std::f32::consts::TAU;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use arrow_array::builder::{ListBuilder, StringBuilder};
use arrow_array::{ArrayRef, Float32Array, Int32Array, Int64Array, RecordBatch, StringArray};
use parquet::arrow::ArrowWriter;
use parquet::basic::Compression;
use parquet::file::properties::WriterProperties;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use rayon::prelude::*;

use super::{CatalogError, npy};

/// How much to make up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SyntheticOptions {
    /// Default 20,000.
    pub n_items: usize,
    /// Default 2,000.
    pub n_users: usize,
    /// Of the embeddings; default 64.
    pub dim: usize,
    /// The same seed gives the same files.
    pub seed: u64,
}

impl Default for SyntheticOptions {
    fn default() -> Self {
        SyntheticOptions { n_items: 20_000, n_users: 2_000, dim: 64, seed: 1 }
    }
}

const CATEGORIES: [&str; 24] = [
    "adventure",
    "art",
    "biography",
    "classics",
    "comics",
    "cooking",
    "crime",
    "drama",
    "essays",
    "fantasy",
    "garden",
    "history",
    "horror",
    "humor",
    "music",
    "mystery",
    "nature",
    "philosophy",
    "poetry",
    "romance",
    "science",
    "science fiction",
    "sports",
    "travel",
];
const ADJECTIVES: [&str; 40] = [
    "Amber",
    "Ancient",
    "Bitter",
    "Bright",
    "Broken",
    "Burning",
    "Crimson",
    "Distant",
    "Early",
    "Electric",
    "Empty",
    "Endless",
    "Fallen",
    "Forgotten",
    "Frozen",
    "Gentle",
    "Golden",
    "Hidden",
    "Hollow",
    "Iron",
    "Last",
    "Little",
    "Lost",
    "Northern",
    "Painted",
    "Pale",
    "Quiet",
    "Restless",
    "Rising",
    "Salt",
    "Scarlet",
    "Second",
    "Secret",
    "Silent",
    "Silver",
    "Slow",
    "Stolen",
    "Velvet",
    "Wandering",
    "Wild",
];
const NOUNS: [&str; 48] = [
    "Archive",
    "Atlas",
    "Bridge",
    "Canyon",
    "Cathedral",
    "City",
    "Clock",
    "Coast",
    "Compass",
    "Crown",
    "Engine",
    "Feast",
    "Field",
    "Forest",
    "Garden",
    "Ghost",
    "Harbor",
    "Harvest",
    "House",
    "Island",
    "Journey",
    "Kingdom",
    "Ladder",
    "Lantern",
    "Letter",
    "Library",
    "Map",
    "Mirror",
    "Moon",
    "Mountain",
    "Night",
    "Ocean",
    "Orchard",
    "Palace",
    "Promise",
    "River",
    "Road",
    "Sea",
    "Shadow",
    "Song",
    "Star",
    "Storm",
    "Summer",
    "Tower",
    "Valley",
    "Voyage",
    "Winter",
    "Wolf",
];
const GIVEN: [&str; 24] = [
    "Ada", "Bela", "Chidi", "Dalia", "Emil", "Farah", "Goran", "Hana", "Ines", "Jun", "Kofi", "Lena", "Mateo", "Nadia",
    "Omar", "Priya", "Quinn", "Rosa", "Sven", "Tomas", "Uma", "Vera", "Wanda", "Yusuf",
];
const FAMILY: [&str; 32] = [
    "Abara",
    "Bergman",
    "Castillo",
    "Dietrich",
    "Eriksen",
    "Fontaine",
    "Gallo",
    "Haddad",
    "Ibsen",
    "Jansen",
    "Kowalski",
    "Laurent",
    "Moreau",
    "Nakamura",
    "Okafor",
    "Petrov",
    "Quiroga",
    "Rossi",
    "Sato",
    "Tanaka",
    "Ueda",
    "Varga",
    "Weber",
    "Xu",
    "Yamada",
    "Zeman",
    "Lindqvist",
    "Mbeki",
    "Novak",
    "Silva",
    "Costa",
    "Dubois",
];
const COUNTRIES: [&str; 8] = ["BR", "DE", "FR", "IN", "JP", "KE", "SE", "US"];
const DEVICES: [&str; 3] = ["phone", "tablet", "web"];
/// Interactions end here: 2025-01-01 00:00 UTC.
const END: i64 = 1_735_689_600;
/// They reach back this long.
const SPAN_SECONDS: f64 = 180.0 * 86_400.0;
/// Candidates that a user chooses from.
const CONSIDERED: usize = 1500;

struct Item {
    category: usize,
    tags: Vec<usize>,
    creator: usize,
    series: Option<(String, f32)>,
    title: String,
    year: i32,
    price: Option<f32>,
    /// Natural logarithm.
    popularity: f32,
}

/// Writes a dataset directory: `dataset.toml`, `items.parquet`, `users.parquet`, `interactions.parquet`,
/// `item_embeddings.npy`, `user_embeddings.npy`. Files of those names are replaced.
///
/// # Errors
/// A count or dimension of 0; those of the file system.
pub fn generate(directory: &Path, options: &SyntheticOptions) -> Result<(), CatalogError> {
    let SyntheticOptions { n_items, n_users, dim, seed } = *options;
    if n_items == 0 || n_users == 0 || dim == 0 || dim > npy::MAX_DIM {
        let reason = format!("items and users must be above 0, dim from 1 to {}", npy::MAX_DIM);
        return Err(CatalogError::file(directory, reason));
    }
    std::fs::create_dir_all(directory).map_err(|e| CatalogError::io(directory, e))?;
    let mut rng = SmallRng::seed_from_u64(seed);
    let centres: Vec<Vec<f32>> = CATEGORIES.iter().map(|_| direction(&mut rng, dim)).collect();
    let creators: Vec<String> = (0..(n_items / 12).max(1)).map(|at| creator_name(at, &mut rng)).collect();
    let items = items(n_items, creators.len(), &mut rng);
    let item_vectors: Vec<f32> =
        items.iter().flat_map(|i| near(&mut rng, &[(&centres[i.category], 1.0)], dim)).collect();
    let tastes: Vec<[(usize, f32); 3]> =
        (0..n_users).map(|_| [1.0, 0.6, 0.3].map(|share| (rng.random_range(0..CATEGORIES.len()), share))).collect();
    let user_vectors: Vec<f32> = tastes
        .iter()
        .flat_map(|taste| near(&mut rng, &taste.map(|(category, share)| (&centres[category], share)), dim))
        .collect();

    write_items(directory, &items, &creators)?;
    let actions: Vec<Vec<(u32, i64, f32)>> = (0..n_users)
        .into_par_iter()
        .map(|user| {
            let mut rng = SmallRng::seed_from_u64(seed ^ (user as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
            actions(&user_vectors[user * dim..(user + 1) * dim], &items, &item_vectors, &mut rng)
        })
        .collect();
    write_users(directory, n_users, &mut rng)?;
    write_interactions(directory, &actions)?;
    for (name, values) in [("item_embeddings.npy", &item_vectors), ("user_embeddings.npy", &user_vectors)] {
        let file = directory.join(name);
        npy::write_f32(&file, values, dim).map_err(|e| CatalogError::io(&file, e))?;
    }
    let file = directory.join("dataset.toml");
    std::fs::write(&file, DATASET_TOML).map_err(|e| CatalogError::io(&file, e))
}

const DATASET_TOML: &str = r#"name = "synthetic"

[items]
text = ["title", "creator", "tags"]
title = "title"
category = "category"
creator = "creator"
series = "series"
series_position = "series_position"

[interactions]
timestamp = "timestamp"
weight = "weight"

[embeddings]
metric = "inner_product"
"#;

/// From the standard normal distribution.
fn normal(rng: &mut SmallRng) -> f32 {
    let radius = (-2.0 * (1.0 - rng.random::<f32>()).max(f32::MIN_POSITIVE).ln()).sqrt();
    radius * (TAU * rng.random::<f32>()).cos()
}

/// A random vector of length 1.
fn direction(rng: &mut SmallRng, dim: usize) -> Vec<f32> {
    unit((0..dim).map(|_| normal(rng)).collect())
}

fn unit(mut vector: Vec<f32>) -> Vec<f32> {
    let length = vector.iter().map(|v| v * v).sum::<f32>().sqrt().max(1e-6);
    vector.iter_mut().for_each(|v| *v /= length);
    vector
}

/// A vector of length 1 near the weighted centres.
fn near(rng: &mut SmallRng, centres: &[(&Vec<f32>, f32)], dim: usize) -> Vec<f32> {
    let spread = 0.7 / (dim as f32).sqrt();
    unit((0..dim).map(|at| centres.iter().map(|(c, w)| c[at] * w).sum::<f32>() + spread * normal(rng)).collect())
}

fn creator_name(at: usize, rng: &mut SmallRng) -> String {
    let (given, family) = (at % GIVEN.len(), (at / GIVEN.len()) % FAMILY.len());
    match at / (GIVEN.len() * FAMILY.len()) {
        0 => format!("{} {}", GIVEN[given], FAMILY[family]),
        _ => {
            let other = FAMILY[rng.random_range(0..FAMILY.len())];
            format!("{} {}-{other}", GIVEN[given], FAMILY[family])
        }
    }
}

/// Items in runs: standing alone, or a series by one creator.
fn items(n_items: usize, n_creators: usize, rng: &mut SmallRng) -> Vec<Item> {
    let mut items = Vec::with_capacity(n_items);
    while items.len() < n_items {
        // A creator's works lie in one cluster.
        let creator = rng.random_range(0..n_creators);
        let category = creator % CATEGORIES.len();
        let length = if rng.random_bool(0.1) { rng.random_range(2..8) } else { 1 };
        let series = (length > 1).then(|| format!("The {}", name(rng)));
        let first_year = rng.random_range(1950..2024);
        let popularity = normal(rng);
        for position in 1..=length.min(n_items - items.len()) {
            let mut tags = vec![category];
            (0..rng.random_range(0..3)).for_each(|_| tags.push(rng.random_range(0..CATEGORIES.len())));
            tags.dedup();
            items.push(Item {
                category,
                tags,
                creator,
                series: series.clone().map(|name| (name, position as f32)),
                title: if rng.random_bool(0.5) {
                    format!("The {}", name(rng))
                } else {
                    format!("{} of {}", name(rng), noun(rng))
                },
                year: (first_year + position as i32 - 1).min(2024),
                price: rng.random_bool(0.95).then(|| rng.random_range(300..4000) as f32 / 100.0),
                popularity: popularity - 0.15 * (position - 1) as f32,
            });
        }
    }
    items
}

fn noun(rng: &mut SmallRng) -> &'static str {
    NOUNS[rng.random_range(0..NOUNS.len())]
}

fn name(rng: &mut SmallRng) -> String {
    format!("{} {}", ADJECTIVES[rng.random_range(0..ADJECTIVES.len())], noun(rng))
}

/// What one user did: item, time, weight; oldest first.
fn actions(user: &[f32], items: &[Item], vectors: &[f32], rng: &mut SmallRng) -> Vec<(u32, i64, f32)> {
    let dim = user.len();
    // The n largest of score + Gumbel noise are a draw without replacement from the softmax of the scores.
    let mut drawn: Vec<(f32, f32, u32)> = rand::seq::index::sample(rng, items.len(), CONSIDERED.min(items.len()))
        .into_iter()
        .map(|row| {
            let vector = &vectors[row * dim..(row + 1) * dim];
            let dot: f32 = user.iter().zip(vector).map(|(u, x)| u * x).sum();
            let gumbel = -(-(1.0 - rng.random::<f32>()).max(f32::MIN_POSITIVE).ln()).max(f32::MIN_POSITIVE).ln();
            (6.0 * dot + items[row].popularity + gumbel, dot, row as u32)
        })
        .collect();
    drawn.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.2.cmp(&b.2)));
    drawn.truncate(((normal(rng) * 0.8 + 3.2).exp() as usize).clamp(5, 300));
    let mut actions: Vec<(u32, i64, f32)> = drawn
        .into_iter()
        .map(|(_, dot, row)| {
            let age = SPAN_SECONDS * f64::from(rng.random::<f32>()).powi(2);
            let weight = if rng.random::<f32>() < 0.1 - 0.1 * dot { 0.0 } else { 1.0 };
            (row, END - age as i64, weight)
        })
        .collect();
    actions.sort_by_key(|&(row, time, _)| (time, row));
    actions
}

fn write_items(directory: &Path, items: &[Item], creators: &[String]) -> Result<(), CatalogError> {
    let mut tags = ListBuilder::new(StringBuilder::new());
    for item in items {
        item.tags.iter().for_each(|&tag| tags.values().append_value(CATEGORIES[tag]));
        tags.append(true);
    }
    let columns: Vec<(&str, ArrayRef)> = vec![
        ("item_id", Arc::new(StringArray::from_iter_values((0..items.len()).map(|row| format!("item-{row}"))))),
        ("title", Arc::new(StringArray::from_iter_values(items.iter().map(|i| &i.title)))),
        ("category", Arc::new(StringArray::from_iter_values(items.iter().map(|i| CATEGORIES[i.category])))),
        ("tags", Arc::new(tags.finish())),
        ("creator", Arc::new(StringArray::from_iter_values(items.iter().map(|i| &creators[i.creator])))),
        ("series", Arc::new(StringArray::from_iter(items.iter().map(|i| i.series.as_ref().map(|s| s.0.as_str()))))),
        ("series_position", Arc::new(Float32Array::from_iter(items.iter().map(|i| i.series.as_ref().map(|s| s.1))))),
        ("year", Arc::new(Int32Array::from_iter_values(items.iter().map(|i| i.year)))),
        ("price", Arc::new(Float32Array::from_iter(items.iter().map(|i| i.price)))),
    ];
    write(&directory.join("items.parquet"), columns)
}

fn write_users(directory: &Path, n_users: usize, rng: &mut SmallRng) -> Result<(), CatalogError> {
    let mut pick = |from: &[&'static str]| -> Vec<&'static str> {
        (0..n_users).map(|_| from[rng.random_range(0..from.len())]).collect()
    };
    let (countries, devices) = (pick(&COUNTRIES), pick(&DEVICES));
    let ages = (0..n_users).map(|_| rng.random_bool(0.9).then(|| rng.random_range(16..80)));
    let columns: Vec<(&str, ArrayRef)> = vec![
        ("age", Arc::new(Int32Array::from_iter(ages))),
        ("country", Arc::new(StringArray::from(countries))),
        ("device", Arc::new(StringArray::from(devices))),
        ("user_id", Arc::new(StringArray::from_iter_values((0..n_users).map(|row| format!("user-{row}"))))),
    ];
    write(&directory.join("users.parquet"), columns)
}

fn write_interactions(directory: &Path, actions: &[Vec<(u32, i64, f32)>]) -> Result<(), CatalogError> {
    let of_users = || actions.iter().enumerate().flat_map(|(user, list)| list.iter().map(move |action| (user, action)));
    let users = of_users().map(|(user, _)| format!("user-{user}"));
    let rows = of_users().map(|(_, (row, ..))| format!("item-{row}"));
    let columns: Vec<(&str, ArrayRef)> = vec![
        ("user_id", Arc::new(StringArray::from_iter_values(users))),
        ("item_id", Arc::new(StringArray::from_iter_values(rows))),
        ("timestamp", Arc::new(Int64Array::from_iter_values(of_users().map(|(_, (_, time, _))| *time)))),
        ("weight", Arc::new(Float32Array::from_iter_values(of_users().map(|(_, (_, _, weight))| *weight)))),
    ];
    write(&directory.join("interactions.parquet"), columns)
}

fn write(file: &Path, columns: Vec<(&str, ArrayRef)>) -> Result<(), CatalogError> {
    let wrong = |e: &dyn std::fmt::Display| CatalogError::file(file, e.to_string());
    let batch = RecordBatch::try_from_iter(columns).map_err(|e| wrong(&e))?;
    let open = File::create(file).map_err(|e| CatalogError::io(file, e))?;
    let properties = WriterProperties::builder().set_compression(Compression::SNAPPY).build();
    let mut writer = ArrowWriter::try_new(open, batch.schema(), Some(properties)).map_err(|e| wrong(&e))?;
    writer.write(&batch).map_err(|e| wrong(&e))?;
    writer.close().map(|_| ()).map_err(|e| wrong(&e))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::{build, bundle};

    #[test]
    fn makes_a_dataset_that_builds_and_whose_taste_shows() {
        let dir = tempfile::tempdir().unwrap();
        let options = SyntheticOptions { n_items: 600, n_users: 80, dim: 16, seed: 5 };
        generate(&dir.path().join("data"), &options).unwrap();
        let out = dir.path().join("bundle");
        let report =
            build::build(&dir.path().join("data"), &out, &build::BuildOptions::default(), &build::Silent).unwrap();
        assert_eq!((report.n_items, report.n_users), (600, 80));
        assert!(report.warnings.is_empty(), "{:?}", report.warnings);
        let generation = bundle::open(&out).unwrap();
        assert!(generation.roles.series_position.is_some() && generation.roles.title.is_some());
        // What a user did is nearer to its vector than the catalogue is on average.
        let (mut near, mut all, mut n) = (0.0, 0.0, 0);
        let (users, items) = (generation.user_embeddings.unwrap(), generation.item_embeddings.unwrap());
        let dot = |user: u32, item: u32| {
            let (mut u, mut x) = (Vec::new(), Vec::new());
            users.extend_row(user, &mut u);
            items.extend_row(item, &mut x);
            u.iter().zip(&x).map(|(u, x)| u * x).sum::<f32>()
        };
        for user in 0..80 {
            for entry in generation.histories.of(user) {
                near += dot(user, entry.row);
                all += dot(user, (entry.row * 7 + 13) % 600);
                n += 1;
            }
        }
        assert!(near / n as f32 > all / n as f32 + 0.1, "{near} {all} {n}");
    }

    #[test]
    fn the_same_seed_gives_the_same_files() {
        let dir = tempfile::tempdir().unwrap();
        let options = SyntheticOptions { n_items: 200, n_users: 30, dim: 8, seed: 9 };
        for name in ["a", "b"] {
            generate(&dir.path().join(name), &options).unwrap();
        }
        generate(&dir.path().join("c"), &SyntheticOptions { seed: 10, ..options }).unwrap();
        let read = |name: &str, file: &str| std::fs::read(dir.path().join(name).join(file)).unwrap();
        for file in ["items.parquet", "users.parquet", "interactions.parquet", "item_embeddings.npy"] {
            assert_eq!(read("a", file), read("b", file), "{file}");
            assert_ne!(read("a", file), read("c", file), "{file}");
        }
        assert!(generate(dir.path(), &SyntheticOptions { dim: 0, ..options }).is_err());
    }
}
