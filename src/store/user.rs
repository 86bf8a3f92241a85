//! A user of the store, as this bundle understands it.

use xxhash_rust::xxh3::Xxh3;

use super::memory::Size;
use super::value::{Field, FieldKind, FieldValue, Packed, Schema, Unreadable};
use crate::catalog::conditions::hint;
use crate::catalog::generation::{Column, ColumnData, Generation, Interaction};
use crate::state::change::MAX_COLUMNS;
use crate::wire::LIMITS;

/// What users have beside columns.
pub const OF_USERS: [(&str, FieldKind); 2] = [("embedding", FieldKind::Vector), ("history", FieldKind::Items)];
/// What items have beside columns.
pub const OF_ITEMS: [(&str, FieldKind); 2] = [("embedding", FieldKind::Vector), (AVAILABLE, FieldKind::Number)];
/// Whether an item may be shown.
pub const AVAILABLE: &str = "available";

/// What a field of a schema is here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// The column at this place.
    Column(u32),
    /// The entity's embedding.
    Vector,
    /// The user's history.
    Items,
    /// Nothing that is used.
    Nothing,
}

/// A schema and what its fields are here.
#[derive(Debug)]
pub struct Mapping {
    schema: Schema,
    targets: Vec<Target>,
}

impl Mapping {
    /// The schema of the bundle's own columns.
    pub fn of_columns(generation: &Generation) -> Self {
        Self::new(schema_of(&generation.users.columns, &OF_USERS), generation).0
    }

    /// The schema.
    pub fn schema(&self) -> &Schema {
        &self.schema
    }

    /// Maps fields to the bundle's user columns, and says what can't be mapped: names that the bundle lacks, kinds that do not fit.
    pub fn new(schema: Schema, generation: &Generation) -> (Self, Vec<String>) {
        let mut complaints = Vec::new();
        let targets = targets(&schema, &generation.users.columns, &[], &mut complaints);
        (Mapping { schema, targets }, complaints)
    }
}

/// The schema of the columns of a kind of entity and of what else it has, whose names are made free.
pub fn schema_of(columns: &[Column], more: &[(&str, FieldKind)]) -> Schema {
    let kind = |data: &ColumnData| match data {
        ColumnData::Number { .. } => FieldKind::Number,
        ColumnData::Category { .. } => FieldKind::Text,
        ColumnData::Tags { .. } => FieldKind::List,
    };
    let fits = |column: &&Column| (1..=LIMITS.id_bytes).contains(&column.name.len()) && !column.name.contains('\n');
    let mut fields: Vec<Field> = Vec::new();
    for column in columns.iter().filter(fits) {
        if fields.len() + more.len() < MAX_COLUMNS && fields.iter().all(|field| field.name != column.name) {
            fields.push(Field { name: column.name.clone(), kind: kind(&column.data) });
        }
    }
    for &(name, kind) in more {
        let mut name = name.to_owned();
        while fields.iter().any(|field| field.name == name) {
            name.insert(0, '_');
        }
        fields.push(Field { name, kind });
    }
    Schema::new(fields).expect("names that fit and differ")
}

/// What the fields of a schema are, over the columns of a kind of entity; `others` are names that are no columns of the bundle and yet no mistake.
pub fn targets(schema: &Schema, columns: &[Column], others: &[String], complaints: &mut Vec<String>) -> Vec<Target> {
    let mut taken = Vec::new();
    let mut target = |name: &str, kind: FieldKind| -> Result<Target, String> {
        let special = match kind {
            FieldKind::Vector => Target::Vector,
            FieldKind::Items => Target::Items,
            FieldKind::Number | FieldKind::Text | FieldKind::List => {
                let Some(at) = columns.iter().position(|column| column.name == name) else {
                    if others.iter().any(|other| other == name) {
                        return Ok(Target::Nothing);
                    }
                    let names = columns.iter().map(|column| column.name.as_str());
                    return Err(format!("the bundle has no column `{name}`{}", hint(name, names)));
                };
                let fits = matches!(
                    (kind, &columns[at].data),
                    (FieldKind::Number, ColumnData::Number { .. })
                        | (FieldKind::Text, ColumnData::Category { .. })
                        | (FieldKind::List, ColumnData::Tags { .. })
                );
                return match fits {
                    true => Ok(Target::Column(at as u32)),
                    false => Err(format!("`{name}` is of kind {}, the bundle's column is of another", kind.name())),
                };
            }
        };
        match taken.contains(&special) {
            true => Err(format!("`{name}` is a second field of kind {}", kind.name())),
            false => {
                taken.push(special);
                Ok(special)
            }
        }
    };
    let each = schema.fields().iter().map(|field| {
        target(&field.name, field.kind).unwrap_or_else(|complaint| {
            complaints.push(complaint);
            Target::Nothing
        })
    });
    each.collect()
}

/// An entry of a stored history.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StoredEntry {
    /// Row and weight.
    pub interaction: Interaction,
    /// Whether the item is not to be recommended again.
    pub seen: bool,
}

/// What the store says of a user. Immutable.
#[derive(Debug)]
pub struct StoredUser {
    /// When it was made, milliseconds since 1970.
    pub made_ms: i64,
    /// Position of a number column of users and its value; ascending.
    numbers: Box<[(u32, f32)]>,
    vector: Option<Box<[f32]>>,
    /// Oldest first, an item once.
    history: Box<[StoredEntry]>,
    /// Whether the value says anything of a history, be it that there is none.
    has_history: bool,
    /// The rows and weights of [`Self::history`].
    interactions: Box<[Interaction]>,
    digest: u64,
}

impl StoredUser {
    /// Reads a value. Items that the catalogue lacks are left out, and so is a vector of another dimension than the catalogue's.
    ///
    /// # Errors
    /// It does not follow its schema, or holds a vector with values that are not finite.
    pub fn of(packed: &Packed<'_>, mapping: &Mapping, generation: &Generation) -> Result<Self, Unreadable> {
        let dim = generation.item_embeddings.as_ref().map(|items| items.dim);
        let (mut numbers, mut vector, mut history) = (Vec::new(), None, Vec::<StoredEntry>::new());
        let mut finite = true;
        packed.read(&mapping.schema, |at, value| match (mapping.targets[at], value) {
            (Target::Column(column), FieldValue::Number(value)) => numbers.push((column, value)),
            (Target::Vector, FieldValue::Vector(values)) => {
                finite &= values.iter().all(|value| value.is_finite());
                vector = Some(values.into_boxed_slice()).filter(|values| Some(values.len()) == dim);
            }
            (Target::Items, FieldValue::Items(items)) => {
                let row = |id: &str| generation.items.ids.row(id);
                history.extend(items.iter().rev().filter_map(|item| {
                    let interaction = Interaction { row: row(item.id)?, weight: item.weight };
                    Some(StoredEntry { interaction, seen: item.seen })
                }));
            }
            _ => {}
        })?;
        if !finite {
            return Err(Unreadable);
        }
        // Newest first so far: of an item that came again the newest stays.
        let mut rows = std::collections::HashSet::with_capacity(history.len());
        history.retain(|entry| rows.insert(entry.interaction.row));
        history.reverse();
        numbers.sort_unstable_by_key(|number| number.0);
        let mut digest = Xxh3::new();
        digest.update(&packed.schema.to_le_bytes());
        digest.update(packed.body());
        Ok(StoredUser {
            made_ms: packed.made_ms,
            numbers: numbers.into(),
            vector,
            has_history: mapping.targets.contains(&Target::Items),
            interactions: history.iter().map(|entry| entry.interaction).collect(),
            history: history.into(),
            digest: digest.digest().max(1),
        })
    }

    /// The value of the number column of users at `column`; `None` where the store has none.
    pub fn number(&self, column: usize) -> Option<f32> {
        let at = self.numbers.binary_search_by_key(&(column as u32), |number| number.0).ok()?;
        Some(self.numbers[at].1)
    }

    /// The embedding, f32 `[dim]`.
    pub fn vector(&self) -> Option<&[f32]> {
        self.vector.as_deref()
    }

    /// Oldest first, an item once.
    pub fn history(&self) -> &[StoredEntry] {
        &self.history
    }

    /// Whether the value says what its vector knows.
    pub fn has_history(&self) -> bool {
        self.has_history
    }

    /// What the vector is taken to know.
    pub fn interactions(&self) -> &[Interaction] {
        &self.interactions
    }

    /// Names the content, whenever it was made. Not 0.
    pub fn digest(&self) -> u64 {
        self.digest
    }
}

impl Size for StoredUser {
    fn bytes(&self) -> usize {
        let vector = self.vector.as_ref().map_or(0, |vector| 4 * vector.len());
        size_of::<Self>() + 8 * self.numbers.len() + (12 + 8) * self.history.len() + vector
    }
}

/// A vector that an external encoder made, f32 `[dim]`. Immutable.
#[derive(Debug, PartialEq)]
pub struct Embedding {
    values: Box<[f32]>,
    digest: u64,
}

impl Embedding {
    /// Reads f32 little-endian, one after another; `None` where there are not `dim`, or one is not finite.
    pub fn of(bytes: &[u8], dim: usize) -> Option<Self> {
        let (values, []) = bytes.as_chunks() else { return None };
        let values: Box<[f32]> = values.iter().map(|&value| f32::from_le_bytes(value)).collect();
        let fits = values.len() == dim && values.iter().all(|value| value.is_finite());
        fits.then(|| Embedding { values, digest: xxhash_rust::xxh3::xxh3_64(bytes).max(1) })
    }

    /// The vector.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// Names it; not 0.
    pub fn digest(&self) -> u64 {
        self.digest
    }
}

impl Size for Embedding {
    fn bytes(&self) -> usize {
        size_of::<Self>() + 4 * self.values.len()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::super::value::{StoredItem, pack};
    use super::*;
    use crate::catalog::generation::{Entities, IdTable, testing};

    /// Ten items in the plane, and users "a" with an age and a city.
    pub fn generation() -> Generation {
        let mut generation = testing::with_embeddings(vec![1.0; 20], 2);
        let age = ColumnData::Number { values: vec![30.0].into(), default: 35.0 };
        let vocabulary = std::sync::Arc::new(IdTable::build(["x"].iter(), false).unwrap());
        let city = ColumnData::Category { codes: vec![0].into(), vocabulary };
        let column = |name: &str, data| Column { name: name.into(), data };
        generation.users = Entities {
            ids: IdTable::build(["a"].iter(), false).unwrap(),
            columns: vec![column("age", age), column("city", city)],
        };
        generation
    }

    /// A value as the server reads it.
    pub fn stored(generation: &Generation, schema: &str, values: &[FieldValue<'_>]) -> Result<StoredUser, Unreadable> {
        let schema = Schema::parse(schema).unwrap();
        let bytes = pack(&schema, 5, values).unwrap();
        StoredUser::of(&Packed::of(&bytes)?, &Mapping::new(schema, generation).0, generation)
    }

    #[test]
    fn fields_are_taken_by_name_and_what_does_not_fit_is_named() {
        let generation = generation();
        let schema = "v:vector\nagee:number\ncity:number\nage:number\nv2:vector\nh:items\n";
        let (mapping, complaints) = Mapping::new(Schema::parse(schema).unwrap(), &generation);
        use Target::{Column, Items, Nothing, Vector};
        assert_eq!(mapping.targets, [Vector, Nothing, Nothing, Column(0), Nothing, Items]);
        assert_eq!(complaints.len(), 3);
        assert!(complaints[0].contains("no column `agee`; did you mean `age`?"), "{complaints:?}");
        assert!(complaints[1].contains("`city` is of kind number"), "{complaints:?}");
        assert!(complaints[2].contains("`v2` is a second field of kind vector"), "{complaints:?}");
        let items = ["3", "?", "4", "3"].map(|id| StoredItem { id, weight: 0.5, seen: id == "3" });
        let number = |n| FieldValue::Number(n);
        let none = FieldValue::Missing;
        let values = [
            FieldValue::Vector(vec![1.0, 2.0]),
            number(1.0),
            number(2.0),
            number(3.0),
            none.clone(),
            FieldValue::Items(items.into()),
        ];
        let user = stored(&generation, schema, &values).unwrap();
        assert_eq!((user.number(0), user.number(1), user.vector()), (Some(3.0), None, Some(&[1.0, 2.0][..])));
        let rows: Vec<_> = user.history().iter().map(|entry| (entry.interaction.row, entry.seen)).collect();
        assert_eq!((rows, user.has_history(), user.made_ms), (vec![(4, false), (3, true)], true, 5));
        // A vector of another catalogue is none; the rest of the value counts.
        let other =
            stored(&generation, "v:vector\nage:number\n", &[FieldValue::Vector(vec![1.0; 3]), number(4.0)]).unwrap();
        assert_eq!((other.vector(), other.number(0), other.has_history()), (None, Some(4.0), false));
        // Missing values are nothing that the store says.
        assert_eq!(stored(&generation, "age:number\n", &[none]).unwrap().number(0), None);
    }

    #[test]
    fn an_embedding_has_the_catalogues_length_and_finite_values() {
        let bytes: Vec<u8> = [1.5f32, -2.0].iter().flat_map(|value| value.to_le_bytes()).collect();
        assert_eq!(Embedding::of(&bytes, 2).unwrap().values(), [1.5, -2.0]);
        assert!(Embedding::of(&bytes, 3).is_none() && Embedding::of(&bytes[1..], 2).is_none());
        for cut in 0..bytes.len() {
            assert!(Embedding::of(&bytes[..cut], 2).is_none());
        }
        for wrong in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let bytes = [1.5f32.to_le_bytes(), wrong.to_le_bytes()].concat();
            assert!(Embedding::of(&bytes, 2).is_none());
        }
    }

    #[test]
    fn the_schema_of_columns_maps_to_them() {
        let mut generation = generation();
        generation.users.columns[1].name = "history".into();
        let mapping = Mapping::of_columns(&generation);
        assert_eq!(mapping.schema().text(), "age:number\nhistory:text\nembedding:vector\n_history:items\n");
        use Target::{Column, Items, Vector};
        assert_eq!(mapping.targets, [Column(0), Column(1), Vector, Items]);
    }
}
