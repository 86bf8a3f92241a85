//! What makes two requests the same.

use xxhash_rust::xxh3::{Xxh3, xxh3_64, xxh3_128};

use crate::config::Config;
use crate::device::Context;
use crate::state::EventsConfig;

/// 128 bits of xxh3 over an unambiguous encoding of the request. Two of a billion different keys collide with a
/// probability of about 1e-21; the hash is not keyed, so it is no defence against somebody who makes collisions on purpose.
pub type CacheKey = u128;

/// Names everything but the request and the user that shapes an answer: the bundle, and what of the configuration matters.
///
/// # Errors
/// A configuration that can't be written down; there is none.
pub fn scope(generation: &str, config: &Config) -> serde_json::Result<String> {
    // Where events are kept and carried to differs from replica to replica.
    let EventsConfig {
        history_per_user,
        kinds,
        trending_half_life_hours,
        trending_context_keys,
        fold_in_alpha,
        fold_in_regularization,
        ..
    } = &config.events;
    let trending = (trending_half_life_hours, trending_context_keys);
    let events = (history_per_user, kinds, trending, fold_in_alpha, fold_in_regularization);
    let shaping = serde_json::to_string(&(&config.pipeline, &config.rerank, events))?;
    Ok(format!("{generation} {:016x}", xxh3_64(shaping.as_bytes())))
}

/// The key of a scope itself.
pub fn of_scope(scope: &str) -> CacheKey {
    xxh3_128(scope.as_bytes())
}

/// The key of a recommendation. `generation` names the bundle and everything else that shapes the answer; `user_version` what is
/// known of the user, so that an event puts whatever was cached before it out of reach, and `items` what was upserted of items.
pub fn recommend(
    generation: &str,
    user_id: &str,
    user_version: u64,
    items: u64,
    context: &Context,
    query: &str,
    n_items: u32,
) -> CacheKey {
    let mut hash = Xxh3::new();
    let mut text = |text: &str| {
        hash.update(&(text.len() as u32).to_le_bytes());
        hash.update(text.as_bytes());
    };
    text(generation);
    text(user_id);
    text(query);
    for (key, value) in context.iter() {
        text(key);
        text(value);
    }
    hash.update(&n_items.to_le_bytes());
    hash.update(&user_version.to_le_bytes());
    hash.update(&items.to_le_bytes());
    hash.digest128()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn context(pairs: &[(&str, &str)]) -> Context {
        let mut context = Context::default();
        context.assign(pairs);
        context
    }

    proptest! {
        #[test]
        fn order_of_context_does_not_matter(pairs in prop::collection::btree_map("[a-c]{1,2}", "[a-c]{0,2}", 0..5)) {
            let forward: Vec<(&str, &str)> = pairs.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
            let backward: Vec<(&str, &str)> = forward.iter().rev().copied().collect();
            let key = |pairs| recommend("g", "u", 0, 0, &context(pairs), "q", 10);
            prop_assert_eq!(key(&forward), key(&backward));
        }
    }

    #[test]
    fn every_part_matters() {
        let keys = [
            recommend("g", "u", 0, 0, &context(&[]), "", 10),
            recommend("h", "u", 0, 0, &context(&[]), "", 10),
            recommend("g", "v", 0, 0, &context(&[]), "", 10),
            recommend("g", "u", 0, 0, &context(&[("a", "b")]), "", 10),
            recommend("g", "u", 0, 0, &context(&[("ab", "")]), "", 10),
            recommend("g", "u", 0, 0, &context(&[]), "q", 10),
            recommend("g", "u", 0, 0, &context(&[]), "", 11),
            recommend("g", "u", 1, 0, &context(&[]), "", 10),
            recommend("g", "", 0, 0, &context(&[]), "u", 10),
            recommend("g", "u", 0, 1, &context(&[]), "", 10),
        ];
        let distinct: std::collections::HashSet<_> = keys.iter().collect();
        assert_eq!(distinct.len(), keys.len());
    }

    #[test]
    fn a_repeated_key_keeps_its_last_value() {
        assert_eq!(context(&[("a", "1"), ("b", "2"), ("a", "3")]), context(&[("b", "2"), ("a", "3")]));
    }
}
