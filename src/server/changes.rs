//! Upserts and deletions of items and users over HTTP.

use std::borrow::Cow;
use std::time::Duration;

use hyper::body::Incoming;
use hyper::{Method, Request};
use serde::Deserialize;
use serde::de::{self, Deserializer};

use super::http::{Answer, HttpState, body, respond, unexpected};
use super::json::{self, Bounded, Text, VectorBody, Word};
use crate::api::{Call, Change, ChangeCall, Kind, Outcome, Value};
use crate::error::{Code, Error};
use crate::state::change::{Encoder, MAX_CHANGES, MAX_COLUMNS, MAX_LIST};
use crate::telemetry::metrics::Endpoint;
use crate::wire::LIMITS;

/// A value of a column.
#[derive(Debug)]
pub enum ValueBody<'a> {
    /// `null`
    Missing,
    /// A number, or a boolean as 1 or 0.
    Number(f64),
    /// A string.
    Text(Cow<'a, str>),
    /// A list of strings.
    List(Bounded<Word<'a>, MAX_LIST>),
}

impl<'de: 'a, 'a> Deserialize<'de> for ValueBody<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'de> de::Visitor<'de> for Visitor {
            type Value = ValueBody<'de>;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a number, a boolean, a string, a list of strings or null")
            }
            fn visit_unit<E: de::Error>(self) -> Result<Self::Value, E> {
                Ok(ValueBody::Missing)
            }
            fn visit_borrowed_str<E: de::Error>(self, v: &'de str) -> Result<Self::Value, E> {
                Ok(ValueBody::Text(Cow::Borrowed(v)))
            }
            fn visit_str<E: de::Error>(self, v: &str) -> Result<Self::Value, E> {
                Ok(ValueBody::Text(Cow::Owned(v.to_owned())))
            }
            fn visit_i64<E: de::Error>(self, v: i64) -> Result<Self::Value, E> {
                Ok(ValueBody::Number(v as f64))
            }
            fn visit_u64<E: de::Error>(self, v: u64) -> Result<Self::Value, E> {
                Ok(ValueBody::Number(v as f64))
            }
            fn visit_f64<E: de::Error>(self, v: f64) -> Result<Self::Value, E> {
                Ok(ValueBody::Number(v))
            }
            fn visit_bool<E: de::Error>(self, v: bool) -> Result<Self::Value, E> {
                Ok(ValueBody::Number(f64::from(u8::from(v))))
            }
            fn visit_seq<A: de::SeqAccess<'de>>(self, list: A) -> Result<Self::Value, A::Error> {
                Bounded::deserialize(de::value::SeqAccessDeserializer::new(list)).map(ValueBody::List)
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

impl ValueBody<'_> {
    fn value(&self) -> Value<'_> {
        match self {
            ValueBody::Missing => Value::Missing,
            ValueBody::Number(number) => Value::Number(*number),
            ValueBody::Text(text) => Value::Text(text),
            ValueBody::List(list) => Value::List(list.0.iter().map(|word| &*word.0).collect()),
        }
    }
}

/// Columns and their values, of which one more is kept than allowed.
#[derive(Debug, Default)]
pub struct ColumnsBody<'a>(pub Vec<(Cow<'a, str>, ValueBody<'a>)>);

impl<'de: 'a, 'a> Deserialize<'de> for ColumnsBody<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'de> de::Visitor<'de> for Visitor {
            type Value = ColumnsBody<'de>;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("columns and their values")
            }
            fn visit_map<A: de::MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut kept = Vec::new();
                while kept.len() <= MAX_COLUMNS {
                    let Some(Word(column)) = map.next_key::<Word<'de>>()? else { return Ok(ColumnsBody(kept)) };
                    let value = map.next_value().map_err(|e| {
                        // The place is added again to whatever leaves here.
                        let reason = e.to_string();
                        let reason = reason.split(" at line ").next().unwrap_or_default();
                        let column: String = column.chars().take(LIMITS.id_bytes).collect();
                        de::Error::custom(format!("columns.{column}: {reason}"))
                    })?;
                    kept.push((column, value));
                }
                while map.next_entry::<de::IgnoredAny, de::IgnoredAny>()?.is_some() {}
                Ok(ColumnsBody(kept))
            }
        }
        deserializer.deserialize_map(Visitor)
    }
}

/// One entry of [`ItemsBody`].
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ItemBody<'a> {
    #[serde(borrow)]
    pub item_id: Text<'a>,
    #[serde(default, borrow)]
    pub columns: ColumnsBody<'a>,
    #[serde(default)]
    pub embedding: Option<VectorBody>,
    #[serde(default)]
    pub available: Option<bool>,
}

/// `POST /v1/items`
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ItemsBody<'a> {
    #[serde(borrow)]
    pub items: Bounded<ItemBody<'a>, MAX_CHANGES>,
    #[serde(default)]
    pub durable: bool,
    #[serde(default)]
    pub deadline_ms: Option<u64>,
}

/// One entry of [`UsersBody`].
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UserBody<'a> {
    #[serde(borrow)]
    pub user_id: Text<'a>,
    #[serde(default, borrow)]
    pub columns: ColumnsBody<'a>,
    #[serde(default)]
    pub embedding: Option<VectorBody>,
}

/// `POST /v1/users`
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UsersBody<'a> {
    #[serde(borrow)]
    pub users: Bounded<UserBody<'a>, MAX_CHANGES>,
    #[serde(default)]
    pub durable: bool,
    #[serde(default)]
    pub deadline_ms: Option<u64>,
}

/// `POST /v1/items/delete`
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeleteItemsBody<'a> {
    #[serde(borrow)]
    pub item_ids: Bounded<Text<'a>, MAX_CHANGES>,
    #[serde(default)]
    pub durable: bool,
    #[serde(default)]
    pub deadline_ms: Option<u64>,
}

/// `POST /v1/users/delete`
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeleteUsersBody<'a> {
    #[serde(borrow)]
    pub user_ids: Bounded<Text<'a>, MAX_CHANGES>,
    #[serde(default)]
    pub durable: bool,
    #[serde(default)]
    pub deadline_ms: Option<u64>,
}

/// What a path asks for.
pub(super) enum Route {
    /// The kind that the body is of.
    Body(Kind),
    /// The id in the path goes.
    One(Kind, String, bool),
}

impl Route {
    pub fn endpoint(&self) -> Endpoint {
        let (Route::Body(kind) | Route::One(kind, ..)) = self;
        if kind.is_of_items() { Endpoint::Items } else { Endpoint::Users }
    }
}

/// The route of a request under `/v1/items` or `/v1/users`; `None` for other paths.
///
/// # Errors
/// Another verb than there is, an id that is no text.
pub(super) fn route(request: &Request<Incoming>) -> Option<Result<Route, Error>> {
    let (method, path) = (request.method(), request.uri().path());
    let (rest, upsert, delete) = match path.strip_prefix("/v1/items") {
        Some(rest) => (rest, Kind::UpsertItems, Kind::DeleteItems),
        None => (path.strip_prefix("/v1/users")?, Kind::UpsertUsers, Kind::DeleteUsers),
    };
    let allow = |verbs| Err(Error::new(Code::MethodNotAllowed, format!("only {verbs} is allowed here")));
    Some(match (rest, rest.strip_prefix('/')) {
        ("", _) if matches!(*method, Method::POST | Method::PUT) => Ok(Route::Body(upsert)),
        ("", _) => allow("POST or PUT"),
        ("/delete", _) if *method == Method::POST => Ok(Route::Body(delete)),
        (_, Some(id)) if *method == Method::DELETE => id_of(id).and_then(|id| {
            let durable = match request.uri().query() {
                None | Some("durable=false") => false,
                Some("durable=true") => true,
                Some(_) => return Err(Error::fixed(Code::BadRequest, "the only parameter is durable=true")),
            };
            Ok(Route::One(delete, id, durable))
        }),
        (_, Some(_)) => allow("DELETE"),
        _ => return None,
    })
}

/// A path segment as text.
fn id_of(segment: &str) -> Result<String, Error> {
    let wrong = || Error::fixed(Code::BadRequest, "the id in the path is not percent-encoded UTF-8");
    let mut bytes = Vec::with_capacity(segment.len());
    let mut rest = segment.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'%' => {
                let mut digit = || rest.next().and_then(|digit| char::from(digit).to_digit(16)).ok_or_else(wrong);
                (digit()? * 16 + digit()?) as u8
            }
            byte => byte,
        });
    }
    String::from_utf8(bytes).map_err(|_| wrong())
}

/// Makes a record of a request and hands it on.
pub(super) async fn answer(route: Route, request: Request<Incoming>, state: &HttpState) -> Answer {
    let (record, durable, deadline_ms) = match route {
        Route::One(kind, id, durable) => (of_ids(kind, 1, std::iter::once(&*id))?, durable, None),
        Route::Body(kind) => {
            let limit = state.service.borrow().shared().config.server.max_frame_bytes as usize;
            read(kind, &body(request, limit).await?)?
        }
    };
    let call = ChangeCall { record: &record, durable, deadline: deadline_ms.map(Duration::from_millis) };
    match state.call(&Call::Change(call)).await {
        Outcome::Changed(receipt) => Ok(respond(200, "application/json", json::changed(receipt))),
        other => unexpected(other),
    }
}

fn of_ids<'a>(kind: Kind, n: usize, ids: impl Iterator<Item = &'a str>) -> Result<Vec<u8>, Error> {
    let mut encoder = Encoder::new(kind, n)?;
    for id in ids {
        encoder.push(&Change::of(id))?;
    }
    Ok(encoder.record())
}

/// The record of a body, whether it is to be durable, and its budget in milliseconds.
fn read(kind: Kind, body: &[u8]) -> Result<(Vec<u8>, bool, Option<u64>), Error> {
    Ok(match kind {
        Kind::DeleteUsers => {
            let body: DeleteUsersBody<'_> = json::parse(body)?;
            let ids = body.user_ids.0.iter().map(|id| &*id.0);
            (of_ids(kind, ids.len(), ids)?, body.durable, body.deadline_ms)
        }
        Kind::UpsertUsers => {
            let body: UsersBody<'_> = json::parse(body)?;
            let mut encoder = Encoder::new(kind, body.users.0.len())?;
            for user in &body.users.0 {
                push(&mut encoder, &user.user_id.0, None, &user.columns, user.embedding.as_ref())?;
            }
            (encoder.record(), body.durable, body.deadline_ms)
        }
        Kind::UpsertItems => {
            let body: ItemsBody<'_> = json::parse(body)?;
            let mut encoder = Encoder::new(kind, body.items.0.len())?;
            for item in &body.items.0 {
                let available = item.available.filter(|available| !available);
                push(&mut encoder, &item.item_id.0, available, &item.columns, item.embedding.as_ref())?;
            }
            (encoder.record(), body.durable, body.deadline_ms)
        }
        Kind::DeleteItems => {
            let body: DeleteItemsBody<'_> = json::parse(body)?;
            let ids = body.item_ids.0.iter().map(|id| &*id.0);
            (of_ids(kind, ids.len(), ids)?, body.durable, body.deadline_ms)
        }
    })
}

fn push(
    encoder: &mut Encoder,
    id: &str,
    available: Option<bool>,
    columns: &ColumnsBody<'_>,
    embedding: Option<&VectorBody>,
) -> Result<(), Error> {
    let columns: Vec<(&str, Value<'_>)> = columns.0.iter().map(|(name, value)| (&**name, value.value())).collect();
    let vector = embedding.map(|vector| &vector.0[..]);
    encoder.push(&Change { id, available, whole: false, columns: &columns, vector })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_in_paths_are_decoded() {
        assert_eq!(id_of("item-1").as_deref(), Ok("item-1"));
        assert_eq!(id_of("a%2Fb%C3%A4").as_deref(), Ok("a/bä"));
        for wrong in ["%", "%2", "%zz", "%ff"] {
            assert!(id_of(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_wrong_value_names_its_column() {
        let error =
            json::parse::<ItemsBody<'_>>(br#"{"items":[{"item_id":1,"columns":{"price":{"a":1}}}]}"#).unwrap_err();
        assert!(error.message.contains("columns.price: invalid type: map, expected a number"), "{}", error.message);
    }
}
