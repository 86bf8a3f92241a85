//! Whether what is upserted fits the bundle's columns.

use super::change::{self, Change, Kind, Record, Value};
use super::event::Damaged;
use crate::catalog::conditions::hint;
use crate::catalog::generation::{Column, ColumnData, Generation};
use crate::error::{Code, Error};

/// Checks a change against the bundle.
///
/// # Errors
/// The first entry that does not fit; the text names entry and column, and the nearest column that there is.
pub fn check(generation: &Generation, record: &[u8]) -> Result<(), Error> {
    let Record::Change(kind, body) = Record::of(record).map_err(Wrong::from)? else {
        return Err(Wrong::from(Damaged).into());
    };
    let (columns, texts) = match kind {
        Kind::DeleteItems | Kind::DeleteUsers => return Ok(()),
        Kind::UpsertUsers => (&generation.users.columns, &[][..]),
        Kind::UpsertItems => (&generation.items.columns, &generation.text_columns[..]),
    };
    let mut at = 0;
    change::decode(body, |change| {
        let fits = fits(generation, columns, texts, change);
        at += 1;
        fits.map_err(|reason| Wrong(Error::new(Code::BadRequest, format!("{}[{}].{reason}", kind.entries(), at - 1))))
    })
    .map_err(|Wrong(error)| error)
}

struct Wrong(Error);

impl From<Damaged> for Wrong {
    fn from(_: Damaged) -> Self {
        Wrong(Error::fixed(Code::BadRequest, "not a change"))
    }
}

impl From<Wrong> for Error {
    fn from(Wrong(error): Wrong) -> Self {
        error
    }
}

/// `texts` are columns of which the bundle has no more than the words.
fn fits(generation: &Generation, columns: &[Column], texts: &[String], change: &Change<'_>) -> Result<(), String> {
    for (name, value) in change.columns {
        let wrong = |reason: String| format!("columns.{name}: {reason}");
        let Some(column) = columns.iter().find(|column| column.name == *name) else {
            if texts.iter().any(|column| column == name) {
                match value {
                    Value::Number(_) => return Err(wrong("is a number, but the column holds text".into())),
                    _ => continue,
                }
            }
            let names = columns.iter().map(|column| column.name.as_str()).chain(texts.iter().map(String::as_str));
            return Err(wrong(format!("the bundle has no such column{}", hint(name, names))));
        };
        value_fits(&column.data, value).map_err(wrong)?;
    }
    let Some(vector) = change.vector else { return Ok(()) };
    let Some(items) = &generation.item_embeddings else {
        return Err("embedding: the catalogue has no embeddings".into());
    };
    if vector.len() != items.dim {
        return Err(format!("embedding: has {} values, the catalogue's have {}", vector.len(), items.dim));
    }
    match vector.iter().position(|value| !value.is_finite()) {
        Some(at) => Err(format!("embedding: value {at} is not a finite number")),
        None => Ok(()),
    }
}

fn value_fits(column: &ColumnData, value: &Value<'_>) -> Result<(), String> {
    let expected = match (column, value) {
        (_, Value::Missing) => return Ok(()),
        (ColumnData::Number { .. }, Value::Number(number)) if (*number as f32).is_finite() => return Ok(()),
        (ColumnData::Number { .. }, Value::Number(_)) => return Err("is not a finite number".into()),
        (ColumnData::Category { .. }, Value::Text(_)) | (ColumnData::Tags { .. }, Value::List(_)) => return Ok(()),
        (ColumnData::Number { .. }, _) => "numbers",
        (ColumnData::Category { .. }, _) => "strings",
        (ColumnData::Tags { .. }, _) => "lists of strings",
    };
    Err(format!("is {}, but the column holds {expected}", value.kind()))
}

#[cfg(test)]
mod tests {
    use super::super::change::tests::record;
    use super::*;
    use crate::catalog::generation::{Entities, testing};

    #[test]
    fn errors_name_entry_and_column() {
        let mut generation = testing::with_embeddings(vec![1.0; 6], 2);
        testing::add_number(&mut generation, "age", &[1.0; 3]);
        testing::add_category(&mut generation, "country", &[0; 3]);
        testing::add_tags(&mut generation, "likes", &[vec![], vec![], vec![]]);
        generation.users = Entities { columns: generation.items.columns.clone(), ..Entities::default() };
        let said = |columns: &[(&str, Value<'_>)], vector: Option<&[f32]>| {
            let changes = [Change::of("a"), Change { columns, vector, ..Change::of("b") }];
            check(&generation, &record(Kind::UpsertUsers, &changes)).err().map(|error| error.message.into_owned())
        };
        let good = [("age", Value::Number(3.0)), ("country", Value::Text("fr")), ("likes", Value::List(vec!["x"]))];
        assert_eq!(said(&good, Some(&[1.0, 2.0])), None);
        assert_eq!(said(&[("age", Value::Missing), ("likes", Value::Missing)], None), None);
        let of = |columns| said(columns, None).unwrap();
        assert_eq!(
            of(&[("agee", Value::Number(3.0))]),
            "users[1].columns.agee: the bundle has no such column; did you mean `age`?"
        );
        assert_eq!(of(&[("age", Value::Text("3"))]), "users[1].columns.age: is a string, but the column holds numbers");
        assert!(of(&[("country", Value::Number(3.0))]).ends_with("is a number, but the column holds strings"));
        assert!(of(&[("likes", Value::Text("x"))]).ends_with("is a string, but the column holds lists of strings"));
        assert!(of(&[("age", Value::Number(1e300))]).ends_with("is not a finite number"));
        let of = |vector: &[f32]| said(&[], Some(vector)).unwrap();
        assert_eq!(of(&[1.0]), "users[1].embedding: has 1 values, the catalogue's have 2");
        assert_eq!(of(&[1.0, f32::NAN]), "users[1].embedding: value 1 is not a finite number");
    }
}
