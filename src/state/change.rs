//! Changes of items and users, and the records of the log: what a shard makes of a call, and what the writer and a replay read.
//!
//! Columns go by their names, so that a record means the same over another bundle.

use super::event::{Damaged, bytes, put, text};
use crate::error::{Code, Error};
use crate::wire::LIMITS;

/// Entries that one call may carry.
pub const MAX_CHANGES: usize = 1000;
/// Columns of an entry.
pub const MAX_COLUMNS: usize = 256;
/// Strings of a list.
pub const MAX_LIST: usize = 1024;
/// Longest string, bytes.
pub const MAX_TEXT: usize = 64 << 10;
/// Longest record, bytes; half of what the log takes.
const MAX_BYTES: usize = super::log::MAX_RECORD / 2;

/// What a change does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// Items come or change.
    UpsertItems = 2,
    /// Items go.
    DeleteItems = 3,
    /// Users come or change.
    UpsertUsers = 4,
    /// Users are forgotten.
    DeleteUsers = 5,
}

/// What a record of the log is of, and the rest of it: its first byte, from format 2 on, is one of these numbers or a [`Kind`]'s. Nothing
/// is renumbered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Record<'a> {
    /// See [`super::event`].
    Events(&'a [u8]),
    /// Items or users.
    Change(Kind, &'a [u8]),
    /// See [`super::exposure`].
    Exposure(&'a [u8]),
}

impl<'a> Record<'a> {
    /// What a record of events begins with.
    pub const EVENTS: u8 = 1;
    /// What a record of an exposure begins with.
    pub const EXPOSURE: u8 = 6;

    /// What a record is of.
    ///
    /// # Errors
    /// It is empty or of nothing known.
    pub fn of(record: &'a [u8]) -> Result<Self, Damaged> {
        let (&first, rest) = record.split_first().ok_or(Damaged)?;
        Ok(match first {
            Self::EVENTS => Record::Events(rest),
            Self::EXPOSURE => Record::Exposure(rest),
            _ => Record::Change(Kind::ALL.into_iter().find(|kind| *kind as u8 == first).ok_or(Damaged)?, rest),
        })
    }
}

impl Kind {
    /// All of them.
    pub const ALL: [Kind; 4] = [Kind::UpsertItems, Kind::DeleteItems, Kind::UpsertUsers, Kind::DeleteUsers];

    /// The name in metrics.
    pub fn name(self) -> &'static str {
        match self {
            Kind::UpsertItems => "upsert_items",
            Kind::DeleteItems => "delete_items",
            Kind::UpsertUsers => "upsert_users",
            Kind::DeleteUsers => "delete_users",
        }
    }

    /// Whether it is of items.
    pub fn is_of_items(self) -> bool {
        matches!(self, Kind::UpsertItems | Kind::DeleteItems)
    }

    /// What a call names its entries.
    pub fn entries(self) -> &'static str {
        match self {
            Kind::UpsertItems | Kind::DeleteItems => "items",
            Kind::UpsertUsers | Kind::DeleteUsers => "users",
        }
    }
}

/// A value of a column.
#[derive(Clone, Debug, PartialEq)]
pub enum Value<'a> {
    /// The column has none.
    Missing,
    /// Of a number column; a boolean is 1 or 0, a time seconds since 1970.
    Number(f64),
    /// Of a category column.
    Text(&'a str),
    /// Of a list column.
    List(Vec<&'a str>),
}

impl Value<'_> {
    /// For messages.
    pub fn kind(&self) -> &'static str {
        match self {
            Value::Missing => "no value",
            Value::Number(_) => "a number",
            Value::Text(_) => "a string",
            Value::List(_) => "a list",
        }
    }
}

/// A value that outlives its call.
#[derive(Clone, Debug, PartialEq)]
pub enum OwnedValue {
    /// See [`Value`].
    Missing,
    /// See [`Value`].
    Number(f64),
    /// See [`Value`].
    Text(Box<str>),
    /// See [`Value`].
    List(Box<[Box<str>]>),
}

impl OwnedValue {
    /// A copy.
    pub fn of(value: &Value<'_>) -> Self {
        match value {
            Value::Missing => OwnedValue::Missing,
            Value::Number(number) => OwnedValue::Number(*number),
            Value::Text(text) => OwnedValue::Text((*text).into()),
            Value::List(list) => OwnedValue::List(list.iter().map(|text| (*text).into()).collect()),
        }
    }

    /// The value.
    pub fn value(&self) -> Value<'_> {
        match self {
            OwnedValue::Missing => Value::Missing,
            OwnedValue::Number(number) => Value::Number(*number),
            OwnedValue::Text(text) => Value::Text(text),
            OwnedValue::List(list) => Value::List(list.iter().map(|text| &**text).collect()),
        }
    }

    /// Memory beyond its own size, bytes, about.
    pub fn bytes(&self) -> usize {
        match self {
            OwnedValue::Missing | OwnedValue::Number(_) => 0,
            OwnedValue::Text(text) => text.len(),
            OwnedValue::List(list) => list.iter().map(|text| text.len() + 16).sum(),
        }
    }
}

/// One entry of a call.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Change<'a> {
    /// 1 to 256 bytes.
    pub id: &'a str,
    /// Items: whether it may be shown; absent: an upsert makes it so.
    pub available: Option<bool>,
    /// Whether it takes the place of all that was upserted before, the vector too; else it adds to that, column by column.
    pub whole: bool,
    /// By name.
    pub columns: &'a [(&'a str, Value<'a>)],
    /// f32 `[dim]`.
    pub vector: Option<&'a [f32]>,
}

impl<'a> Change<'a> {
    /// The entry of a deletion.
    pub fn of(id: &'a str) -> Self {
        Change { id, ..Change::default() }
    }
}

const AVAILABLE_GIVEN: u8 = 1;
const AVAILABLE: u8 = 2;
const WHOLE: u8 = 4;
const VECTOR: u8 = 8;

/// Checks the entries of a call and makes a record of them.
#[derive(Debug)]
pub struct Encoder {
    kind: Kind,
    n: usize,
    record: Vec<u8>,
}

impl Encoder {
    /// For a call of `n` entries.
    ///
    /// # Errors
    /// None or too many.
    pub fn new(kind: Kind, n: usize) -> Result<Self, Error> {
        let code = match n {
            1..=MAX_CHANGES => return Ok(Self::carrying(kind)),
            0 => Code::BadRequest,
            _ => Code::TooLarge,
        };
        Err(Error::new(code, format!("{n} {}, expected 1 to {MAX_CHANGES}", kind.entries())))
    }

    /// For any number of entries.
    pub fn carrying(kind: Kind) -> Self {
        Encoder { kind, n: 0, record: vec![kind as u8] }
    }

    /// Appends an entry.
    ///
    /// # Errors
    /// It is beyond a limit; the text names its place.
    pub fn push(&mut self, change: &Change<'_>) -> Result<(), Error> {
        let Self { kind, n, record } = self;
        check(change).map_err(|(code, reason)| Error::new(code, format!("{}[{n}]{reason}", kind.entries())))?;
        let flag = |is: bool, flag: u8| if is { flag } else { 0 };
        record.push(
            flag(change.available.is_some(), AVAILABLE_GIVEN)
                | flag(change.available == Some(true), AVAILABLE)
                | flag(change.whole, WHOLE)
                | flag(change.vector.is_some(), VECTOR),
        );
        put(change.id, record);
        record.extend_from_slice(&(change.columns.len() as u16).to_le_bytes());
        for (name, value) in change.columns {
            put(name, record);
            match value {
                Value::Missing => record.push(0),
                Value::Number(number) => {
                    record.push(1);
                    record.extend_from_slice(&number.to_le_bytes());
                }
                Value::Text(text) => {
                    record.push(2);
                    put_long(text, record);
                }
                Value::List(list) => {
                    record.push(3);
                    record.extend_from_slice(&(list.len() as u16).to_le_bytes());
                    list.iter().for_each(|text| put_long(text, record));
                }
            }
        }
        if let Some(vector) = change.vector {
            record.extend_from_slice(&(vector.len() as u32).to_le_bytes());
            vector.iter().for_each(|value| record.extend_from_slice(&value.to_le_bytes()));
        }
        if record.len() > MAX_BYTES {
            return Err(Error::fixed(Code::TooLarge, "the call is larger than the log takes"));
        }
        *n += 1;
        Ok(())
    }

    /// Bytes so far.
    pub fn len(&self) -> usize {
        self.record.len()
    }

    /// Whether there is no entry.
    pub fn is_empty(&self) -> bool {
        self.n == 0
    }

    /// What the log takes.
    pub fn record(self) -> Vec<u8> {
        self.record
    }
}

fn put_long(text: &str, out: &mut Vec<u8>) {
    out.extend_from_slice(&(text.len() as u32).to_le_bytes());
    out.extend_from_slice(text.as_bytes());
}

/// The place of an error within the entry, and what it is.
fn check(change: &Change<'_>) -> Result<(), (Code, String)> {
    let within = |text: &str| (1..=LIMITS.id_bytes).contains(&text.len());
    if !within(change.id) {
        return Err((Code::BadRequest, ": the id is empty or longer than 256 bytes".into()));
    }
    if change.columns.len() > MAX_COLUMNS {
        return Err((Code::TooLarge, format!(": more than {MAX_COLUMNS} columns")));
    }
    if change.vector.is_some_and(|vector| vector.len() > LIMITS.vector_values) {
        return Err((Code::TooLarge, ".embedding: more than 8192 values".into()));
    }
    for (at, (name, value)) in change.columns.iter().enumerate() {
        if !within(name) {
            return Err((Code::BadRequest, ".columns: a name is empty or longer than 256 bytes".into()));
        }
        if change.columns[..at].iter().any(|(other, _)| other == name) {
            return Err((Code::BadRequest, format!(".columns.{name}: is given twice")));
        }
        let (n, longest) = match value {
            Value::Text(text) => (1, text.len()),
            Value::List(list) => (list.len(), list.iter().map(|text| text.len()).max().unwrap_or(0)),
            Value::Missing | Value::Number(_) => continue,
        };
        if n > MAX_LIST || longest > MAX_TEXT {
            let reason = format!(".columns.{name}: more than {MAX_LIST} strings, or one longer than {MAX_TEXT} bytes");
            return Err((Code::TooLarge, reason));
        }
    }
    Ok(())
}

/// Hands every entry of what follows a record's kind to `take`, until that fails.
///
/// # Errors
/// [`Damaged`], where it is not what [`Encoder`] makes, or what `take` says; entries before the place were handed over.
pub fn decode<E: From<Damaged>>(mut body: &[u8], mut take: impl FnMut(&Change<'_>) -> Result<(), E>) -> Result<(), E> {
    let input = &mut body;
    let mut vector = Vec::new();
    while !input.is_empty() {
        let &[flags] = bytes(input)?;
        let id = text(input)?;
        let n = u16::from_le_bytes(*bytes(input)?);
        let mut columns = Vec::with_capacity(usize::from(n.min(64)));
        for _ in 0..n {
            columns.push((text(input)?, value(input)?));
        }
        vector.clear();
        if flags & VECTOR > 0 {
            let n = u32::from_le_bytes(*bytes(input)?) as usize;
            let (values, rest) = input.split_at_checked(n.saturating_mul(4)).ok_or(Damaged)?;
            *input = rest;
            vector.extend(values.as_chunks().0.iter().map(|&value| f32::from_le_bytes(value)));
        }
        take(&Change {
            id,
            available: (flags & AVAILABLE_GIVEN > 0).then_some(flags & AVAILABLE > 0),
            whole: flags & WHOLE > 0,
            columns: &columns,
            vector: (flags & VECTOR > 0).then_some(&vector[..]),
        })?;
    }
    Ok(())
}

fn value<'a>(input: &mut &'a [u8]) -> Result<Value<'a>, Damaged> {
    let &[tag] = bytes(input)?;
    Ok(match tag {
        0 => Value::Missing,
        1 => Value::Number(f64::from_le_bytes(*bytes(input)?)),
        2 => Value::Text(long(input)?),
        3 => {
            let n = u16::from_le_bytes(*bytes(input)?);
            Value::List((0..n).map(|_| long(input)).collect::<Result<_, _>>()?)
        }
        _ => return Err(Damaged),
    })
}

fn long<'a>(input: &mut &'a [u8]) -> Result<&'a str, Damaged> {
    let len = u32::from_le_bytes(*bytes(input)?) as usize;
    let (head, rest) = input.split_at_checked(len).ok_or(Damaged)?;
    *input = rest;
    std::str::from_utf8(head).map_err(|_| Damaged)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// One record of the entries.
    pub fn record(kind: Kind, changes: &[Change<'_>]) -> Vec<u8> {
        let mut encoder = Encoder::new(kind, changes.len()).unwrap();
        changes.iter().for_each(|change| encoder.push(change).unwrap());
        encoder.record()
    }

    fn described(body: &[u8]) -> Result<Vec<String>, Damaged> {
        let mut all = Vec::new();
        decode::<Damaged>(body, |change| {
            all.push(format!("{change:?}"));
            Ok(())
        })?;
        Ok(all)
    }

    proptest! {
        #[test]
        fn what_goes_in_comes_out(
            entries in prop::collection::vec(
                ("[a-zä]{1,9}", any::<Option<bool>>(), any::<bool>(), prop::option::of(prop::collection::vec(-9f32..9.0, 0..5)),
                 prop::collection::btree_map("[a-z]{1,4}", (0u8..4, -9f64..9.0, prop::collection::vec("[a-zß]{0,5}", 0..4)), 0..5)),
                1..6),
            cut in any::<prop::sample::Index>(),
        ) {
            let columns: Vec<Vec<(&str, Value<'_>)>> = entries.iter().map(|entry| {
                entry.4.iter().map(|(name, (kind, number, texts))| (name.as_str(), match kind {
                    0 => Value::Missing,
                    1 => Value::Number(*number),
                    2 => Value::Text(texts.first().map_or("", |text| text)),
                    _ => Value::List(texts.iter().map(String::as_str).collect()),
                })).collect()
            }).collect();
            let changes: Vec<Change<'_>> = entries.iter().zip(&columns).map(|((id, available, whole, vector, _), columns)| Change {
                id, available: *available, whole: *whole, columns, vector: vector.as_deref(),
            }).collect();
            for kind in [Kind::UpsertItems, Kind::UpsertUsers] {
                let record = record(kind, &changes);
                let Record::Change(found, body) = Record::of(&record).unwrap() else { panic!("no change") };
                prop_assert_eq!(found, kind);
                let want: Vec<String> = changes.iter().map(|change| format!("{change:?}")).collect();
                prop_assert_eq!(described(body).unwrap(), want);
                // Cut anywhere but between entries it is damaged, and never panics.
                let _ = described(&body[..cut.index(body.len())]);
            }
        }

        #[test]
        fn damage_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(Record::Events(body) | Record::Change(_, body) | Record::Exposure(body)) = Record::of(&bytes) {
                let _ = described(body);
            }
            let _ = described(&bytes);
        }
    }

    #[test]
    fn errors_name_the_place() {
        let refused = |change: Change<'_>| {
            let mut encoder = Encoder::new(Kind::UpsertUsers, 2).unwrap();
            encoder.push(&Change::of("good")).unwrap();
            encoder.push(&change).unwrap_err().to_string()
        };
        assert_eq!(refused(Change::of("")), "bad_request: users[1]: the id is empty or longer than 256 bytes");
        let twice = [("a", Value::Missing), ("a", Value::Number(1.0))];
        assert_eq!(
            refused(Change { columns: &twice, ..Change::of("u") }),
            "bad_request: users[1].columns.a: is given twice"
        );
        let long = "x".repeat(MAX_TEXT + 1);
        let columns = [("bio", Value::Text(&long))];
        assert!(
            refused(Change { columns: &columns, ..Change::of("u") }).starts_with("too_large: users[1].columns.bio")
        );
        let vector = vec![0.0; 8193];
        assert!(
            refused(Change { vector: Some(&vector), ..Change::of("u") }).starts_with("too_large: users[1].embedding")
        );
        assert_eq!(Encoder::new(Kind::DeleteItems, 0).unwrap_err().message, "0 items, expected 1 to 1000");
        assert_eq!(Encoder::new(Kind::DeleteItems, 1001).unwrap_err().code, Code::TooLarge);
    }
}
