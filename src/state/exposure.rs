//! What was shown to whom: records of the log that change nothing and are carried to where models are trained.

use smallvec::SmallVec;

use super::change::Record;
use super::event::{Damaged, bytes, put, text};

/// An answered recommendation.
#[derive(Clone, Debug, PartialEq)]
pub struct Exposure<'a> {
    /// When it was answered, milliseconds since 1970.
    pub time_ms: i64,
    /// As in the call.
    pub user_id: &'a str,
    /// [`crate::catalog::generation::Generation::version`]
    pub model_version: &'a str,
    /// [`crate::api::CacheStatus::name`]
    pub cache: &'a str,
    /// The context of the call, the last of a repeated key.
    pub context: SmallVec<[(&'a str, &'a str); 8]>,
    /// In order.
    pub items: SmallVec<[Exposed<'a>; 32]>,
}

/// One place of a slate.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Exposed<'a> {
    /// As answered.
    pub item_id: &'a str,
    /// As answered.
    pub score: f32,
    /// As answered: a set of bits, 1 ann, 2 collaborative, 4 trending, 8 search.
    pub sources: u8,
}

/// The record of an exposure. Items beyond 65,535 and pairs of context beyond 255 are left out; there are none.
pub fn encode(exposure: &Exposure<'_>) -> Vec<u8> {
    let mut out = Vec::with_capacity(64 + 24 * exposure.items.len());
    out.push(Record::EXPOSURE);
    out.extend_from_slice(&exposure.time_ms.to_le_bytes());
    for text in [exposure.user_id, exposure.model_version, exposure.cache] {
        put(text, &mut out);
    }
    let pairs = &exposure.context[..exposure.context.len().min(255)];
    out.push(pairs.len() as u8);
    for (key, value) in pairs {
        put(key, &mut out);
        put(value, &mut out);
    }
    let items = &exposure.items[..exposure.items.len().min(65_535)];
    out.extend_from_slice(&(items.len() as u16).to_le_bytes());
    for item in items {
        put(item.item_id, &mut out);
        out.extend_from_slice(&item.score.to_le_bytes());
        out.push(item.sources);
    }
    out
}

/// The exposure of what follows a record's kind.
///
/// # Errors
/// It is none.
pub fn decode_body(mut body: &[u8]) -> Result<Exposure<'_>, Damaged> {
    let input = &mut body;
    let time_ms = i64::from_le_bytes(*bytes(input)?);
    let [user_id, model_version, cache] = [text(input)?, text(input)?, text(input)?];
    let mut exposure =
        Exposure { time_ms, user_id, model_version, cache, context: SmallVec::new(), items: SmallVec::new() };
    let &[pairs] = bytes(input)?;
    for _ in 0..pairs {
        exposure.context.push((text(input)?, text(input)?));
    }
    for _ in 0..u16::from_le_bytes(*bytes(input)?) {
        let (item_id, score) = (text(input)?, f32::from_le_bytes(*bytes(input)?));
        let &[sources] = bytes(input)?;
        exposure.items.push(Exposed { item_id, score, sources });
    }
    if input.is_empty() { Ok(exposure) } else { Err(Damaged) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn check(record: &[u8], want: &Exposure<'_>) {
        let Record::Exposure(body) = Record::of(record).unwrap() else { panic!("no exposure") };
        assert_eq!(format!("{:?}", decode_body(body).unwrap()), format!("{want:?}"));
        assert!((0..body.len()).all(|len| decode_body(&body[..len]).is_err()));
    }

    proptest! {
        #[test]
        fn what_goes_in_comes_out(
            texts in prop::collection::vec("[a-zé]{0,9}", 3), time_ms in any::<i64>(),
            context in prop::collection::vec(("[a-z]{1,3}", "[a-z]{0,3}"), 0..5),
            items in prop::collection::vec(("[a-z0-9]{1,9}", -9f32..9.0, 0u8..16), 0..40),
        ) {
            let exposure = Exposure {
                time_ms, user_id: &texts[0], model_version: &texts[1], cache: &texts[2],
                context: context.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect(),
                items: items.iter().map(|(id, score, sources)| Exposed { item_id: id, score: *score, sources: *sources }).collect(),
            };
            let record = encode(&exposure);
            check(&record, &exposure);
        }

        #[test]
        fn damage_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode_body(&bytes);
        }
    }
}
