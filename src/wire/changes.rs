//! Changes of items and users as messages.

use flatbuffers::{FlatBufferBuilder, ForwardsUOffset, UnionWIPOffset, Vector, WIPOffset};
use smallvec::SmallVec;

use super::request::us;
use super::schema::{self, Body};
use crate::api::{Change, ChangeCall, Kind, Value};
use crate::error::{Code, Error};
use crate::state::change::{self, Encoder, MAX_COLUMNS, MAX_LIST, Record};
use crate::state::event::Damaged;

type Columns<'a> = Vector<'a, ForwardsUOffset<schema::ColumnValue<'a>>>;

/// The record of a message that changes something, whether it is to be durable, and its budget in microseconds; `None` for other
/// messages. Limits are checked where entries become a record, for both protocols the same.
///
/// # Errors
/// An entry beyond a limit; the text names its place.
pub(super) fn record(message: &schema::Message<'_>) -> Result<Option<(Vec<u8>, bool, u32)>, Error> {
    Ok(Some(if let Some(call) = message.body_as_upsert_items() {
        let mut encoder = Encoder::new(Kind::UpsertItems, call.items().len())?;
        for item in call.items() {
            let available = (!item.available()).then_some(false);
            push(&mut encoder, item.item_id(), available, item.columns(), item.embedding())?;
        }
        (encoder.record(), call.durable(), call.deadline_us())
    } else if let Some(call) = message.body_as_upsert_users() {
        let mut encoder = Encoder::new(Kind::UpsertUsers, call.users().len())?;
        for user in call.users() {
            push(&mut encoder, user.user_id(), None, user.columns(), user.embedding())?;
        }
        (encoder.record(), call.durable(), call.deadline_us())
    } else if let Some(call) = message.body_as_delete_items() {
        (of_ids(Kind::DeleteItems, call.item_ids())?, call.durable(), call.deadline_us())
    } else if let Some(call) = message.body_as_delete_users() {
        (of_ids(Kind::DeleteUsers, call.user_ids())?, call.durable(), call.deadline_us())
    } else {
        return Ok(None);
    }))
}

fn of_ids(kind: Kind, ids: Vector<'_, ForwardsUOffset<&str>>) -> Result<Vec<u8>, Error> {
    let mut encoder = Encoder::new(kind, ids.len())?;
    ids.iter().try_for_each(|id| encoder.push(&Change::of(id)))?;
    Ok(encoder.record())
}

fn push(
    encoder: &mut Encoder,
    id: &str,
    available: Option<bool>,
    columns: Option<Columns<'_>>,
    embedding: Option<Vector<'_, f32>>,
) -> Result<(), Error> {
    // One more than is allowed is enough to be told.
    let columns = columns.into_iter().flatten().take(MAX_COLUMNS + 1);
    let columns = columns.map(|column| Ok((column.column(), value(&column)?)));
    let columns: Vec<_> = columns.collect::<Result<_, Error>>()?;
    let vector: Option<SmallVec<[f32; 256]>> = embedding.map(|values| values.iter().collect());
    encoder.push(&Change { id, available, whole: false, columns: &columns, vector: vector.as_deref() })
}

fn value<'a>(column: &schema::ColumnValue<'a>) -> Result<Value<'a>, Error> {
    match (column.number(), column.text(), column.list()) {
        (None, None, None) => Ok(Value::Missing),
        (Some(number), None, None) => Ok(Value::Number(number)),
        (None, Some(text), None) => Ok(Value::Text(text)),
        (None, None, Some(list)) => Ok(Value::List(list.iter().take(MAX_LIST + 1).collect())),
        _ => {
            let message = format!("column `{}`: takes one of number, text and list", column.column());
            Err(Error::new(Code::BadRequest, message))
        }
    }
}

/// The message of the entries that `each` hands over.
pub(super) fn offset(
    builder: &mut FlatBufferBuilder<'static>,
    kind: Kind,
    each: impl FnOnce(&mut dyn FnMut(&Change<'_>)),
    durable: bool,
    deadline_us: u32,
) -> (Body, WIPOffset<UnionWIPOffset>) {
    match kind {
        Kind::DeleteItems | Kind::DeleteUsers => {
            let mut ids = Vec::new();
            each(&mut |change| ids.push(builder.create_string(change.id)));
            let ids = Some(builder.create_vector(&ids));
            if kind == Kind::DeleteUsers {
                let args = schema::DeleteUsersArgs { user_ids: ids, durable, deadline_us };
                return (Body::DeleteUsers, schema::DeleteUsers::create(builder, &args).as_union_value());
            }
            let args = schema::DeleteItemsArgs { item_ids: ids, durable, deadline_us };
            (Body::DeleteItems, schema::DeleteItems::create(builder, &args).as_union_value())
        }
        Kind::UpsertUsers => {
            let mut users = Vec::new();
            each(&mut |change| {
                let args = schema::UserArgs {
                    user_id: Some(builder.create_string(change.id)),
                    columns: columns_offset(builder, change.columns),
                    embedding: change.vector.map(|values| builder.create_vector(values)),
                };
                users.push(schema::User::create(builder, &args));
            });
            let users = Some(builder.create_vector(&users));
            let args = schema::UpsertUsersArgs { users, durable, deadline_us };
            (Body::UpsertUsers, schema::UpsertUsers::create(builder, &args).as_union_value())
        }
        Kind::UpsertItems => {
            let mut items = Vec::new();
            each(&mut |change| {
                let args = schema::ItemArgs {
                    item_id: Some(builder.create_string(change.id)),
                    columns: columns_offset(builder, change.columns),
                    embedding: change.vector.map(|values| builder.create_vector(values)),
                    available: change.available != Some(false),
                };
                items.push(schema::Item::create(builder, &args));
            });
            let items = Some(builder.create_vector(&items));
            let args = schema::UpsertItemsArgs { items, durable, deadline_us };
            (Body::UpsertItems, schema::UpsertItems::create(builder, &args).as_union_value())
        }
    }
}

/// The message of a call; what is no record becomes what the server refuses.
pub(super) fn offset_of(
    builder: &mut FlatBufferBuilder<'static>,
    call: &ChangeCall<'_>,
) -> (Body, WIPOffset<UnionWIPOffset>) {
    let (kind, body) = match Record::of(call.record) {
        Ok(Record::Change(kind, body)) => (kind, body),
        _ => (Kind::DeleteItems, &[][..]),
    };
    let each = |take: &mut dyn FnMut(&Change<'_>)| {
        let _ = change::decode::<Damaged>(body, |change| {
            take(change);
            Ok(())
        });
    };
    offset(builder, kind, each, call.durable, us(call.deadline))
}

type ColumnsOffset<'a> = WIPOffset<Vector<'a, ForwardsUOffset<schema::ColumnValue<'a>>>>;

fn columns_offset<'a>(builder: &mut FlatBufferBuilder<'a>, columns: &[(&str, Value<'_>)]) -> Option<ColumnsOffset<'a>> {
    if columns.is_empty() {
        return None;
    }
    let mut offsets: SmallVec<[_; 8]> = SmallVec::new();
    for (name, value) in columns {
        let mut args =
            schema::ColumnValueArgs { column: Some(builder.create_string(name)), number: None, text: None, list: None };
        match value {
            Value::Missing => {}
            Value::Number(number) => args.number = Some(*number),
            Value::Text(text) => args.text = Some(builder.create_string(text)),
            Value::List(list) => {
                let list: Vec<_> = list.iter().map(|text| builder.create_string(text)).collect();
                args.list = Some(builder.create_vector(&list));
            }
        }
        offsets.push(schema::ColumnValue::create(builder, &args));
    }
    Some(builder.create_vector(&offsets))
}
