//! What was upserted of users, and users who are to be forgotten.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use xxhash_rust::xxh3::xxh3_64;

use super::change::{Change, Encoder, Kind, OwnedValue, Value};
use super::items::Changed;
use super::live::{Entry, LiveState};
use crate::catalog::generation::{ColumnData, Generation, Interaction};

/// What is known of a user beside the bundle and events. Immutable: a change makes another one.
#[derive(Clone, Debug, Default)]
pub struct Profile {
    /// By name, also of columns that this bundle does not have.
    columns: BTreeMap<Box<str>, OwnedValue>,
    /// Position of a number column of users and its value, NaN where it is missing; ascending.
    numbers: Vec<(u32, f32)>,
    vector: Option<Box<[f32]>>,
    /// What events had said when the vector came: it is taken to know that.
    known: Vec<Interaction>,
    /// Whether what the bundle knows of the user is not to be used.
    forgotten: bool,
    /// Names the content; not 0.
    digest: u64,
}

impl Profile {
    /// The value of the number column of users at `column`, NaN where it is missing; `None` where it was not upserted.
    pub fn number(&self, column: usize) -> Option<f32> {
        let at = self.numbers.binary_search_by_key(&(column as u32), |number| number.0).ok()?;
        Some(self.numbers[at].1)
    }

    /// The value of the column of that name, where one was upserted.
    pub fn value(&self, name: &str) -> Option<Value<'_>> {
        self.columns.get(name).map(OwnedValue::value)
    }

    /// The vector, f32 `[dim]`, where one was upserted.
    pub fn vector(&self) -> Option<&[f32]> {
        self.vector.as_deref()
    }

    /// What events had said when the vector came.
    pub fn known(&self) -> &[Interaction] {
        &self.known
    }

    /// Whether what the bundle knows of the user is not to be used.
    pub fn is_forgotten(&self) -> bool {
        self.forgotten
    }

    /// Whether something was upserted.
    pub fn is_known(&self) -> bool {
        self.vector.is_some() || !self.columns.is_empty()
    }

    /// Names the content: the same upserts make the same, in any process. Not 0.
    pub fn digest(&self) -> u64 {
        self.digest
    }

    /// Memory, bytes, about.
    pub fn bytes(&self) -> usize {
        let values: usize = self.columns.iter().map(|(name, value)| name.len() + value.bytes() + 48).sum();
        let vector = self.vector.as_ref().map_or(0, |vector| 4 * vector.len());
        size_of::<Self>() + values + 8 * (self.numbers.len() + self.known.len()) + vector
    }

    /// With a change on top; `events` is what events say now.
    fn with(&self, change: &Change<'_>, generation: &Generation, events: &[Entry]) -> Self {
        let mut made = if change.whole { Profile::default() } else { self.clone() };
        for (name, value) in change.columns {
            made.columns.insert((*name).into(), OwnedValue::of(value));
        }
        let dim = generation.item_embeddings.as_ref().map(|items| items.dim);
        if let Some(vector) = change.vector.filter(|vector| Some(vector.len()) == dim) {
            made.vector = Some(vector.into());
            made.known = events.iter().map(|entry| Interaction { row: entry.row, weight: entry.weight }).collect();
        }
        if let (true, Some(available)) = (change.whole, change.available) {
            made.forgotten = !available;
        }
        made.numbers.clear();
        for (at, column) in generation.users.columns.iter().enumerate() {
            let value = match (&column.data, made.columns.get(&*column.name)) {
                (ColumnData::Number { .. }, Some(OwnedValue::Number(value))) => *value as f32,
                (ColumnData::Number { .. }, Some(OwnedValue::Missing)) => f32::NAN,
                _ => continue,
            };
            made.numbers.push((at as u32, value));
        }
        made.seal();
        made
    }

    fn seal(&mut self) {
        let mut encoder = Encoder::carrying(Kind::UpsertUsers);
        self.carry("-", &mut encoder);
        self.digest = xxh3_64(&encoder.record()).max(1);
    }

    /// Appends all of it to a record that says it anew.
    pub fn carry(&self, id: &str, encoder: &mut Encoder) {
        let columns: Vec<_> = self.columns.iter().map(|(name, value)| (&**name, value.value())).collect();
        let vector = self.vector.as_deref();
        let change = Change { id, available: Some(!self.forgotten), whole: true, columns: &columns, vector };
        // What was within the limits once is so again.
        let _ = encoder.push(&change);
    }
}

impl LiveState {
    /// Users of whom something was upserted, or who are to be forgotten.
    pub fn n_profiles(&self) -> usize {
        self.n_profiles.load(Relaxed)
    }

    /// Whether a user has a profile.
    pub fn has_profile(&self, id: &str) -> bool {
        self.n_profiles() > 0 && self.stripe(id).lock().profiles.contains_key(id)
    }

    /// Hands every profile over, in no order.
    pub fn each_profile(&self, mut take: impl FnMut(&str, &Profile)) {
        for stripe in &self.stripes {
            stripe.lock().profiles.iter().for_each(|(id, profile)| take(id, profile));
        }
    }

    pub(super) fn upsert_user(&self, change: &Change<'_>) -> Changed {
        let mut stripe = self.stripe(change.id).lock();
        let events = stripe.users.get(change.id);
        let before = stripe.profiles.get(change.id);
        let in_bundle = || self.generation().users.ids.row(change.id).is_some();
        let is_known = match before {
            Some(before) if before.forgotten => before.is_known(),
            Some(_) => true,
            None => in_bundle(),
        };
        let created = !is_known && events.is_none();
        let none = Profile::default();
        let entries = events.map_or(&[][..], |user| user.entries());
        let made = before.map_or(&none, |before| before).with(change, self.generation(), entries);
        self.put_profile(&mut stripe.profiles, change.id, Some(made));
        if created { Changed::Created } else { Changed::Applied }
    }

    /// Forgets a user; with `events_only`, what the profile says is newer than that.
    pub(super) fn delete_user(&self, id: &str, events_only: bool) -> Changed {
        let mut stripe = self.stripe(id).lock();
        let had_events = self.drop_events(&mut stripe, id);
        if events_only {
            return Changed::Applied;
        }
        let in_bundle = self.generation().users.ids.row(id).is_some();
        let before = stripe.profiles.get(id);
        let unknown = !had_events && !before.map_or(in_bundle, |profile| profile.is_known() || !profile.forgotten);
        let mut empty = Profile { forgotten: true, ..Profile::default() };
        empty.seal();
        self.put_profile(&mut stripe.profiles, id, in_bundle.then_some(empty));
        if unknown { Changed::Unknown } else { Changed::Applied }
    }

    fn put_profile(
        &self,
        profiles: &mut std::collections::HashMap<Arc<str>, Arc<Profile>>,
        id: &str,
        profile: Option<Profile>,
    ) {
        let added = profile.as_ref().map_or(0, Profile::bytes);
        let before = match profile {
            Some(profile) => profiles.insert(id.into(), Arc::new(profile)),
            None => profiles.remove(id),
        };
        let after = profiles.contains_key(id);
        match (before.is_some(), after) {
            (false, true) => drop(self.n_profiles.fetch_add(1, Relaxed)),
            (true, false) => drop(self.n_profiles.fetch_sub(1, Relaxed)),
            _ => {}
        }
        self.profile_bytes.fetch_add(added, Relaxed);
        self.profile_bytes.fetch_sub(before.map_or(0, |profile| profile.bytes()), Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::super::change::tests::record;
    use super::super::event::Event;
    use super::super::{EventsConfig, StateConfig};
    use super::*;
    use crate::catalog::generation::{Column, Entities, IdTable, testing};

    fn state() -> LiveState {
        let mut generation = testing::with_embeddings(vec![1.0; 6], 2);
        let age = ColumnData::Number { values: vec![30.0, 40.0].into(), default: 35.0 };
        generation.users = Entities {
            ids: IdTable::build(["a", "b"].iter(), false).unwrap(),
            columns: vec![Column { name: "age".into(), data: age }],
        };
        LiveState::new(Arc::new(generation), EventsConfig::default(), StateConfig::default())
    }

    fn profile(state: &LiveState, id: &str) -> Arc<Profile> {
        state.with_user(id, |_, profile| profile.cloned()).unwrap()
    }

    #[test]
    fn what_is_given_goes_over_what_is_known() {
        let state = state();
        let upsert = |columns: &[(&str, Value<'_>)], vector: Option<&[f32]>, id: &str| {
            let change = Change { columns, vector, ..Change::of(id) };
            state.apply_record(&record(Kind::UpsertUsers, &[change])).unwrap()
        };
        assert_eq!(state.version_of("new"), 0);
        assert_eq!(upsert(&[("age", Value::Number(20.0))], None, "new").created, 1);
        let first = state.version_of("new");
        assert_eq!(upsert(&[("city", Value::Text("x"))], Some(&[1.0, 2.0]), "new").created, 0);
        assert_eq!(upsert(&[], None, "a").created, 0);
        let new = profile(&state, "new");
        assert_eq!((new.number(0), new.vector(), new.is_known()), (Some(20.0), Some(&[1.0, 2.0][..]), true));
        assert!(first != 0 && state.version_of("new") != first);
        upsert(&[("age", Value::Missing)], None, "new");
        assert!(profile(&state, "new").number(0).unwrap().is_nan());
        // The same content is the same, however it came about.
        let other = self::state();
        let columns = [("age", Value::Missing), ("city", Value::Text("x"))];
        let change = Change { columns: &columns, vector: Some(&[1.0, 2.0]), ..Change::of("new") };
        other.apply_record(&record(Kind::UpsertUsers, &[change])).unwrap();
        assert_eq!(other.version_of("new"), state.version_of("new"));
        assert_eq!(state.n_profiles(), 2);
        // And it can be carried.
        let mut encoder = Encoder::carrying(Kind::UpsertUsers);
        state.each_profile(|id, profile| profile.carry(id, &mut encoder));
        let carried = self::state();
        carried.apply_record(&encoder.record()).unwrap();
        assert_eq!(carried.version_of("new"), state.version_of("new"));
    }

    #[test]
    fn a_vector_knows_the_events_before_it() {
        let state = state();
        state.apply(&Event::new("new", "1", "like"));
        state
            .apply_record(&record(Kind::UpsertUsers, &[Change { vector: Some(&[0.0, 1.0]), ..Change::of("new") }]))
            .unwrap();
        state.apply(&Event::new("new", "2", "like"));
        assert_eq!(profile(&state, "new").known(), [Interaction { row: 1, weight: 1.0 }]);
    }

    #[test]
    fn who_is_deleted_is_forgotten() {
        let state = state();
        let delete = |id: &str| state.apply_record(&record(Kind::DeleteUsers, &[Change::of(id)])).unwrap().unknown;
        assert_eq!((delete("nobody"), state.n_profiles()), (1, 0));
        state.apply(&Event::new("new", "1", "like"));
        state.apply(&Event::new("a", "1", "like"));
        assert_eq!((delete("new"), delete("a"), delete("a")), (0, 0, 1));
        assert_eq!((state.n_users(), state.n_entries(), state.n_profiles()), (0, 0, 1));
        assert!(profile(&state, "a").is_forgotten() && state.version_of("a") != 0 && state.version_of("new") == 0);
        // What comes later counts.
        let change = Change { columns: &[("age", Value::Number(9.0))], ..Change::of("a") };
        assert_eq!(state.apply_record(&record(Kind::UpsertUsers, &[change])).unwrap().created, 1);
        let a = profile(&state, "a");
        assert!(a.is_forgotten() && a.number(0) == Some(9.0));
    }
}
