//! One packed value per entity: what a feature pipeline writes and the server reads. docs/PROTOCOL.md has the layout byte by byte.
//!
//! A value does not name its fields. It names its schema by a hash of the schema's text, which lies under a key of its own: a reader that has
//! not seen the text can't take one field for another, and one that has knows every field by name.

use std::fmt::Write as _;

use crate::state::change::{MAX_COLUMNS, MAX_LIST, MAX_TEXT};
use crate::wire::LIMITS;

/// The last byte is the format.
const MAGIC: [u8; 4] = *b"TSF\x01";
/// Before the fields: magic, checksum, schema, time of making.
const HEAD: usize = 4 + 4 + 8 + 8;
/// The length of a text that is missing.
const MISSING: u32 = u32::MAX;
/// Items that a history may hold.
pub const MAX_ITEMS: usize = 10_000;

/// What a field holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FieldKind {
    /// f32; NaN: missing.
    Number,
    /// A string, or none.
    Text,
    /// Strings.
    List,
    /// The entity's embedding, f32; empty: missing.
    Vector,
    /// What a user did with items, oldest first.
    Items,
}

impl FieldKind {
    const ALL: [FieldKind; 5] =
        [FieldKind::Number, FieldKind::Text, FieldKind::List, FieldKind::Vector, FieldKind::Items];

    /// The name in a schema.
    pub fn name(self) -> &'static str {
        match self {
            FieldKind::Number => "number",
            FieldKind::Text => "text",
            FieldKind::List => "list",
            FieldKind::Vector => "vector",
            FieldKind::Items => "items",
        }
    }
}

/// A field of a schema.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Field {
    /// 1 to 256 bytes, without a line break.
    pub name: String,
    /// What it holds.
    pub kind: FieldKind,
}

/// The fields of a value, in their order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Schema {
    fields: Vec<Field>,
    id: u64,
}

impl Schema {
    /// A schema of these fields.
    ///
    /// # Errors
    /// None or too many, a name that can't be one, a name twice.
    pub fn new(fields: Vec<Field>) -> Result<Self, String> {
        if !(1..=MAX_COLUMNS).contains(&fields.len()) {
            return Err(format!("{} fields, expected 1 to {MAX_COLUMNS}", fields.len()));
        }
        for (at, field) in fields.iter().enumerate() {
            if !(1..=LIMITS.id_bytes).contains(&field.name.len()) || field.name.contains('\n') {
                return Err(format!("field {at}: a name has 1 to {} bytes and no line break", LIMITS.id_bytes));
            }
            if fields[..at].iter().any(|other| other.name == field.name) {
                return Err(format!("field `{}` is there twice", field.name));
            }
        }
        let mut schema = Schema { fields, id: 0 };
        schema.id = fnv1a(schema.text().as_bytes());
        Ok(schema)
    }

    /// Reads what [`Self::text`] writes.
    ///
    /// # Errors
    /// The line that is wrong.
    pub fn parse(text: &str) -> Result<Self, String> {
        let field = |(at, line): (usize, &str)| {
            let (name, kind) = line.rsplit_once(':').ok_or(format!("line {}: expected NAME:KIND", at + 1))?;
            let kind = FieldKind::ALL.into_iter().find(|other| other.name() == kind);
            let kind = kind.ok_or(format!("line {}: a kind is number, text, list, vector or items", at + 1))?;
            Ok(Field { name: name.to_owned(), kind })
        };
        let fields: Result<_, String> =
            text.split_terminator('\n').take(MAX_COLUMNS + 1).enumerate().map(field).collect();
        Self::new(fields?)
    }

    /// A line `NAME:KIND` for each field.
    pub fn text(&self) -> String {
        let mut text = String::new();
        for field in &self.fields {
            let _ = writeln!(text, "{}:{}", field.name, field.kind.name());
        }
        text
    }

    /// The fields.
    pub fn fields(&self) -> &[Field] {
        &self.fields
    }

    /// What values name it by: FNV-1a, 64 bits, of [`Self::text`].
    pub fn id(&self) -> u64 {
        self.id
    }
}

/// FNV-1a, which is three lines in any language.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

/// What a user did with an item.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StoredItem<'a> {
    /// 1 to 256 bytes.
    pub id: &'a str,
    /// Strength of liking; 0: none. Finite, 0 or more.
    pub weight: f32,
    /// Whether it is not to be recommended again.
    pub seen: bool,
}

/// The content of a field.
#[derive(Clone, Debug, PartialEq)]
pub enum FieldValue<'a> {
    /// The entity has none.
    Missing,
    /// Of [`FieldKind::Number`].
    Number(f32),
    /// Of [`FieldKind::Text`].
    Text(&'a str),
    /// Of [`FieldKind::List`].
    List(Vec<&'a str>),
    /// Of [`FieldKind::Vector`].
    Vector(Vec<f32>),
    /// Of [`FieldKind::Items`].
    Items(Vec<StoredItem<'a>>),
}

/// Packs a value: one content for each field of the schema, made at `made_ms` (milliseconds since 1970).
///
/// # Errors
/// The field whose content does not fit it or is beyond a limit.
pub fn pack(schema: &Schema, made_ms: i64, values: &[FieldValue<'_>]) -> Result<Vec<u8>, String> {
    if values.len() != schema.fields.len() {
        return Err(format!("{} values, the schema has {} fields", values.len(), schema.fields.len()));
    }
    let mut out = Vec::with_capacity(HEAD + 8 * values.len());
    out.extend_from_slice(&MAGIC);
    out.extend_from_slice(&[0; 4]);
    out.extend_from_slice(&schema.id.to_le_bytes());
    out.extend_from_slice(&made_ms.to_le_bytes());
    for (field, value) in schema.fields.iter().zip(values) {
        put(field.kind, value, &mut out).map_err(|reason| format!("{}: {reason}", field.name))?;
    }
    let sum = crc32fast::hash(&out[8..]);
    out[4..8].copy_from_slice(&sum.to_le_bytes());
    Ok(out)
}

fn put(kind: FieldKind, value: &FieldValue<'_>, out: &mut Vec<u8>) -> Result<(), String> {
    let number = |n: usize, out: &mut Vec<u8>| out.extend_from_slice(&(n as u32).to_le_bytes());
    match (kind, value) {
        (FieldKind::Number, FieldValue::Missing) => out.extend_from_slice(&f32::NAN.to_le_bytes()),
        (FieldKind::Number, FieldValue::Number(value)) if value.is_infinite() => {
            return Err("is not a finite number".to_owned());
        }
        (FieldKind::Number, FieldValue::Number(value)) => out.extend_from_slice(&value.to_le_bytes()),
        (FieldKind::Text, FieldValue::Missing) => number(MISSING as usize, out),
        (FieldKind::List | FieldKind::Vector | FieldKind::Items, FieldValue::Missing) => number(0, out),
        (FieldKind::Text, FieldValue::Text(text)) => put_text(text, out)?,
        (FieldKind::List, FieldValue::List(texts)) => {
            if texts.len() > MAX_LIST {
                return Err(format!("{} strings, expected at most {MAX_LIST}", texts.len()));
            }
            number(texts.len(), out);
            texts.iter().try_for_each(|text| put_text(text, out))?;
        }
        (FieldKind::Vector, FieldValue::Vector(values)) => {
            if values.len() > LIMITS.vector_values || values.iter().any(|value| !value.is_finite()) {
                return Err(format!("expected at most {} finite numbers", LIMITS.vector_values));
            }
            number(values.len(), out);
            values.iter().for_each(|value| out.extend_from_slice(&value.to_le_bytes()));
        }
        (FieldKind::Items, FieldValue::Items(items)) => {
            if items.len() > MAX_ITEMS {
                return Err(format!("{} items, expected at most {MAX_ITEMS}", items.len()));
            }
            number(items.len(), out);
            for StoredItem { id, weight, seen } in items {
                if !is_item(id, *weight) {
                    return Err("an item has an id of 1 to 256 bytes and a finite weight of 0 or more".to_owned());
                }
                out.push(u8::from(*seen));
                out.extend_from_slice(&weight.to_le_bytes());
                put_text(id, out)?;
            }
        }
        (kind, _) => return Err(format!("is not what a field of kind {} holds", kind.name())),
    }
    Ok(())
}

fn is_item(id: &str, weight: f32) -> bool {
    (1..=LIMITS.id_bytes).contains(&id.len()) && weight.is_finite() && weight >= 0.0
}

fn put_text(text: &str, out: &mut Vec<u8>) -> Result<(), String> {
    if text.len() > MAX_TEXT {
        return Err(format!("a string is longer than {MAX_TEXT} bytes"));
    }
    out.extend_from_slice(&(text.len() as u32).to_le_bytes());
    out.extend_from_slice(text.as_bytes());
    Ok(())
}

/// A value that was damaged, is of another format, or is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a packed value")]
pub struct Unreadable;

/// A value whose checksum was verified.
#[derive(Clone, Copy, Debug)]
pub struct Packed<'a> {
    /// [`Schema::id`] of what it was written under.
    pub schema: u64,
    /// When it was made, milliseconds since 1970.
    pub made_ms: i64,
    body: &'a [u8],
}

impl<'a> Packed<'a> {
    /// Reads the beginning.
    ///
    /// # Errors
    /// See [`Unreadable`].
    pub fn of(bytes: &'a [u8]) -> Result<Self, Unreadable> {
        let (head, body) = bytes.split_first_chunk::<HEAD>().ok_or(Unreadable)?;
        let eight = |at: usize| std::array::from_fn(|byte| head[at + byte]);
        let sum = u32::from_le_bytes([head[4], head[5], head[6], head[7]]);
        if head[..4] != MAGIC || sum != crc32fast::hash(&bytes[8..]) {
            return Err(Unreadable);
        }
        Ok(Packed { schema: u64::from_le_bytes(eight(8)), made_ms: i64::from_le_bytes(eight(16)), body })
    }

    /// The fields, as bytes.
    pub fn body(&self) -> &'a [u8] {
        self.body
    }

    /// Hands every field to `take`, with its place in the schema.
    ///
    /// # Errors
    /// `schema` is not the value's, or the value does not follow it; fields before the place were handed over.
    pub fn read(&self, schema: &Schema, mut take: impl FnMut(usize, FieldValue<'a>)) -> Result<(), Unreadable> {
        if schema.id != self.schema {
            return Err(Unreadable);
        }
        let mut input = self.body;
        for (at, field) in schema.fields.iter().enumerate() {
            take(at, get(field.kind, &mut input)?);
        }
        if input.is_empty() { Ok(()) } else { Err(Unreadable) }
    }
}

fn get<'a>(kind: FieldKind, input: &mut &'a [u8]) -> Result<FieldValue<'a>, Unreadable> {
    Ok(match kind {
        FieldKind::Number => match f32::from_le_bytes(*bytes(input)?) {
            value if value.is_nan() => FieldValue::Missing,
            value if value.is_infinite() => return Err(Unreadable),
            value => FieldValue::Number(value),
        },
        FieldKind::Text => match number(input)? {
            MISSING => FieldValue::Missing,
            n => FieldValue::Text(text(n, input)?),
        },
        FieldKind::List => {
            let n = at_most(MAX_LIST, input)?;
            // Only as much memory as the bytes that came can fill.
            let mut texts = Vec::with_capacity(n.min(input.len() / 4));
            for _ in 0..n {
                let n = number(input)?;
                texts.push(text(n, input)?);
            }
            FieldValue::List(texts)
        }
        FieldKind::Vector => {
            let n = at_most(LIMITS.vector_values, input)?;
            let (values, rest) = input.split_at_checked(4 * n).ok_or(Unreadable)?;
            *input = rest;
            let values: Vec<f32> = values.as_chunks().0.iter().map(|&value| f32::from_le_bytes(value)).collect();
            if values.is_empty() { FieldValue::Missing } else { FieldValue::Vector(values) }
        }
        FieldKind::Items => {
            let n = at_most(MAX_ITEMS, input)?;
            let mut items = Vec::with_capacity(n.min(input.len() / 9));
            for _ in 0..n {
                let &[seen] = bytes(input)?;
                let weight = f32::from_le_bytes(*bytes(input)?);
                let n = number(input)?;
                let id = text(n, input)?;
                if seen > 1 || !is_item(id, weight) {
                    return Err(Unreadable);
                }
                items.push(StoredItem { id, weight, seen: seen == 1 });
            }
            FieldValue::Items(items)
        }
    })
}

fn bytes<'a, const N: usize>(input: &mut &'a [u8]) -> Result<&'a [u8; N], Unreadable> {
    let (head, rest) = input.split_first_chunk().ok_or(Unreadable)?;
    *input = rest;
    Ok(head)
}

fn number(input: &mut &[u8]) -> Result<u32, Unreadable> {
    bytes(input).map(|&four| u32::from_le_bytes(four))
}

fn at_most(most: usize, input: &mut &[u8]) -> Result<usize, Unreadable> {
    let n = number(input)? as usize;
    if n <= most { Ok(n) } else { Err(Unreadable) }
}

fn text<'a>(n: u32, input: &mut &'a [u8]) -> Result<&'a str, Unreadable> {
    let (head, rest) = input.split_at_checked(n as usize).ok_or(Unreadable)?;
    if head.len() > MAX_TEXT {
        return Err(Unreadable);
    }
    *input = rest;
    std::str::from_utf8(head).map_err(|_| Unreadable)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    pub fn schema(fields: &[(&str, FieldKind)]) -> Schema {
        Schema::new(fields.iter().map(|&(name, kind)| Field { name: name.into(), kind }).collect()).unwrap()
    }

    fn read(bytes: &[u8], schema: &Schema) -> Result<Vec<String>, Unreadable> {
        let mut all = Vec::new();
        Packed::of(bytes)?.read(schema, |at, value| all.push(format!("{at} {value:?}")))?;
        Ok(all)
    }

    #[derive(Clone, Debug)]
    enum Owned {
        Number(Option<f32>),
        Text(Option<String>),
        List(Vec<String>),
        Vector(Vec<f32>),
        Items(Vec<(String, f32, bool)>),
    }

    impl Owned {
        fn field(&self) -> (FieldKind, FieldValue<'_>) {
            match self {
                Owned::Number(n) => (FieldKind::Number, n.map_or(FieldValue::Missing, FieldValue::Number)),
                Owned::Text(t) => (FieldKind::Text, t.as_deref().map_or(FieldValue::Missing, FieldValue::Text)),
                Owned::List(l) => (FieldKind::List, FieldValue::List(l.iter().map(String::as_str).collect())),
                Owned::Vector(v) if v.is_empty() => (FieldKind::Vector, FieldValue::Missing),
                Owned::Vector(v) => (FieldKind::Vector, FieldValue::Vector(v.clone())),
                Owned::Items(items) => {
                    let items = items.iter().map(|(id, weight, seen)| StoredItem { id, weight: *weight, seen: *seen });
                    (FieldKind::Items, FieldValue::Items(items.collect()))
                }
            }
        }
    }

    fn any_field() -> impl Strategy<Value = Owned> {
        prop_oneof![
            prop::option::of(-9f32..9.0).prop_map(Owned::Number),
            prop::option::of("[a-zß]{0,6}").prop_map(Owned::Text),
            prop::collection::vec("[a-zß]{0,5}", 0..4).prop_map(Owned::List),
            prop::collection::vec(-9f32..9.0, 0..5).prop_map(Owned::Vector),
            prop::collection::vec(("[a-z]{1,5}", 0f32..9.0, any::<bool>()), 0..5).prop_map(Owned::Items),
        ]
    }

    proptest! {
        #[test]
        fn what_goes_in_comes_out_and_damage_does_not(
            fields in prop::collection::vec(any_field(), 1..7), made_ms in any::<i64>(), bit in 0u8..8,
        ) {
            let fields: Vec<_> = fields.iter().map(Owned::field).collect();
            let names: Vec<String> = (0..fields.len()).map(|at| format!("f{at}")).collect();
            let schema = schema(&names.iter().zip(&fields).map(|(name, field)| (&**name, field.0)).collect::<Vec<_>>());
            prop_assert_eq!(&Schema::parse(&schema.text()).unwrap(), &schema);
            let values: Vec<_> = fields.into_iter().map(|field| field.1).collect();
            let packed = pack(&schema, made_ms, &values).unwrap();
            prop_assert_eq!(Packed::of(&packed).unwrap().made_ms, made_ms);
            let want: Vec<String> = values.iter().enumerate().map(|(at, value)| format!("{at} {value:?}")).collect();
            prop_assert_eq!(read(&packed, &schema).unwrap(), want);
            // Every truncation, and every bit flipped: no value, never another one.
            for cut in 0..packed.len() {
                prop_assert_eq!(read(&packed[..cut], &schema), Err(Unreadable));
            }
            for at in 0..packed.len() {
                let mut damaged = packed.clone();
                damaged[at] ^= 1 << bit;
                prop_assert_eq!(read(&damaged, &schema), Err(Unreadable), "byte {}", at);
            }
            // Something after it.
            prop_assert_eq!(read(&[&packed[..], &[0]].concat(), &schema), Err(Unreadable));
            // Read by another schema: the same kinds under other names.
            let other = Schema::parse(&schema.text().replace('f', "g")).unwrap();
            prop_assert_eq!(read(&packed, &other), Err(Unreadable));
        }

        #[test]
        fn a_body_that_does_not_follow_the_schema_is_refused(
            body in prop::collection::vec(any::<u8>(), 0..60), kinds in prop::collection::vec(0usize..5, 1..5),
        ) {
            let names: Vec<String> = (0..kinds.len()).map(|at| format!("f{at}")).collect();
            let fields: Vec<_> = names.iter().zip(&kinds).map(|(name, &kind)| (&**name, FieldKind::ALL[kind])).collect();
            let schema = schema(&fields);
            // With a checksum that is right: whatever is read can be packed again, to the same.
            let packed = Packed { schema: schema.id(), made_ms: 0, body: &body };
            let mut values = Vec::new();
            if packed.read(&schema, |_, value| values.push(value)).is_ok() && finite(&values) {
                let again = pack(&schema, 0, &values).unwrap();
                let mut second = Vec::new();
                Packed::of(&again).unwrap().read(&schema, |_, value| second.push(value)).unwrap();
                prop_assert_eq!(second, values);
            }
        }
    }

    fn finite(values: &[FieldValue<'_>]) -> bool {
        values.iter().all(|value| !matches!(value, FieldValue::Vector(v) if v.iter().any(|v| !v.is_finite())))
    }

    #[test]
    fn golden_bytes_of_another_writer() {
        let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/features");
        let text = std::fs::read_to_string(dir.join("user.schema")).unwrap();
        let bytes = std::fs::read(dir.join("user.packed")).unwrap();
        let schema = Schema::parse(&text).unwrap();
        assert_eq!((schema.text(), schema.id()), (text, 0x81ae_061a_e777_264d));
        let item = |id, weight, seen| StoredItem { id, weight, seen };
        let values = [
            FieldValue::Number(31.0),
            FieldValue::Text("fr"),
            FieldValue::List(vec!["a", "ß"]),
            FieldValue::Vector(vec![0.5, -2.0]),
            FieldValue::Items(vec![item("17", 0.5, false), item("3", 1.0, true)]),
        ];
        assert_eq!(pack(&schema, 1_764_144_000_000, &values).unwrap(), bytes);
        let mut back = Vec::new();
        Packed::of(&bytes).unwrap().read(&schema, |_, value| back.push(value)).unwrap();
        assert_eq!(back, values);
    }

    #[test]
    fn what_can_not_be_packed_is_named() {
        let schema = schema(&[("age", FieldKind::Number), ("v", FieldKind::Vector), ("h", FieldKind::Items)]);
        let wrong = |values: [FieldValue<'_>; 3]| pack(&schema, 0, &values).unwrap_err();
        let none = FieldValue::Missing;
        assert!(wrong([FieldValue::Number(f32::INFINITY), none.clone(), none.clone()]).starts_with("age: "));
        assert!(wrong([FieldValue::Text("31"), none.clone(), none.clone()]).contains("number"));
        assert!(wrong([none.clone(), FieldValue::Vector(vec![f32::NAN]), none.clone()]).starts_with("v: "));
        let item = StoredItem { id: "", weight: 1.0, seen: false };
        assert!(wrong([none.clone(), none.clone(), FieldValue::Items(vec![item])]).starts_with("h: "));
        assert!(pack(&schema, 0, &[]).unwrap_err().contains("3 fields"));
        for (text, reason) in
            [("", "0 fields"), ("age", "line 1"), ("age:int\n", "line 1"), ("a:text\na:text\n", "twice")]
        {
            assert!(Schema::parse(text).unwrap_err().contains(reason), "{text}");
        }
    }
}
