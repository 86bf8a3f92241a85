//! What users did since the bundle was built, and what became of items.
//!
//! One thread writes, all read: users lie in stripes with a lock each, held for the copy of a history.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, AtomicUsize};
use std::time::Instant;

use parking_lot::{Mutex, RwLock};
use xxhash_rust::xxh3::xxh3_64;

use super::change::{self, Change, Kind, Record};
use super::event::{self, Damaged, Event};
use super::fold_in::FoldInParams;
use super::items::{Catalogue, Changed};
use super::log::{Logged, Place};
use super::trending::{Counts, LiveTrending};
use super::users::Profile;
use super::{EventsConfig, StateConfig};
use crate::catalog::generation::Generation;
use crate::catalog::live::LiveItems;
use crate::index::live::LiveIndex;

const STRIPES: usize = 256;

/// Everything that events changed.
pub struct LiveState {
    generation: Arc<Generation>,
    config: EventsConfig,
    limits: StateConfig,
    pub(super) stripes: Vec<Mutex<Stripe>>,
    n_users: AtomicUsize,
    n_entries: AtomicUsize,
    pub(super) n_profiles: AtomicUsize,
    pub(super) profile_bytes: AtomicUsize,
    changes: AtomicU64,
    trending: RwLock<Option<Arc<LiveTrending>>>,
    /// When it was made, milliseconds since 1970; 0: never.
    trending_ms: AtomicI64,
    counts: Mutex<Counts>,
    pub(super) catalogue: Mutex<Catalogue>,
    /// See [`LiveState::items`].
    items: RwLock<Option<Arc<LiveItems>>>,
    has_items: AtomicBool,
}

impl std::fmt::Debug for LiveState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "LiveState {{ users: {}, entries: {} }}", self.n_users(), self.n_entries())
    }
}

#[derive(Default)]
pub(super) struct Stripe {
    pub(super) users: HashMap<Arc<str>, LiveUser>,
    pub(super) profiles: HashMap<Arc<str>, Arc<Profile>>,
    /// Every user once, with the last change that it had when it was put here: those that did not change since go first.
    order: VecDeque<(Arc<str>, u64)>,
}

/// One user's events, reduced to what serving needs: 12 bytes an item, and 8 bytes for every id.
#[derive(Debug, Default)]
pub struct LiveUser {
    /// Oldest first; an item once.
    entries: Vec<Entry>,
    /// Hashes of the newest event ids.
    ids: VecDeque<u64>,
    /// Of everything that changed it, in order: the same events make the same, in any process.
    version: u64,
    /// Grows with every change of anybody.
    changed: u64,
}

/// What a user did last with an item.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Entry {
    /// Item row.
    pub row: u32,
    /// Strength of liking; 0: none.
    pub weight: f32,
    /// Whether the item is not to be recommended again.
    pub seen: bool,
}

impl LiveUser {
    /// Oldest first; an item once.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// See [`LiveState::version_of`].
    pub fn version(&self) -> u64 {
        self.version
    }
}

/// What an event did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// It changed the user.
    Applied,
    /// Its id was there already.
    Duplicate,
    /// The catalogue does not have the item.
    UnknownItem,
    /// Its kind changes nothing.
    Nothing,
}

/// What the events or changes of a call did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Receipt {
    /// Entries logged, all of them.
    pub accepted: u32,
    /// Of these, repetitions of an event id, without effect.
    pub duplicates: u32,
    /// Of these, without effect: events of items that the catalogue does not have; deletions of what nobody knows.
    pub unknown: u32,
    /// Of these, upserts of what was not known.
    pub created: u32,
    /// Whether they are on the disk.
    pub durable: bool,
}

impl LiveState {
    /// An empty state over a generation.
    pub fn new(generation: Arc<Generation>, config: EventsConfig, limits: StateConfig) -> Self {
        LiveState {
            counts: Mutex::new(Counts::new(config.trending_half_life_hours, &config.trending_context_keys)),
            catalogue: Mutex::new(Catalogue::new(&generation)),
            generation,
            config,
            limits,
            stripes: (0..STRIPES).map(|_| Mutex::default()).collect(),
            n_users: AtomicUsize::new(0),
            n_entries: AtomicUsize::new(0),
            n_profiles: AtomicUsize::new(0),
            profile_bytes: AtomicUsize::new(0),
            changes: AtomicU64::new(0),
            trending: RwLock::new(None),
            trending_ms: AtomicI64::new(0),
            items: RwLock::new(None),
            has_items: AtomicBool::new(false),
        }
    }

    /// The generation that rows are of.
    pub fn generation(&self) -> &Arc<Generation> {
        &self.generation
    }

    /// The configuration.
    pub fn config(&self) -> &EventsConfig {
        &self.config
    }

    /// What may be upserted.
    pub fn limits(&self) -> &StateConfig {
        &self.limits
    }

    /// Memory of the profiles, bytes, about.
    pub fn profile_bytes(&self) -> usize {
        self.profile_bytes.load(Relaxed)
    }

    /// Users with events.
    pub fn n_users(&self) -> usize {
        self.n_users.load(Relaxed)
    }

    /// Items in their histories.
    pub fn n_entries(&self) -> usize {
        self.n_entries.load(Relaxed)
    }

    pub(super) fn stripe(&self, user_id: &str) -> &Mutex<Stripe> {
        // Other bits than the map's.
        &self.stripes[(xxh3_64(user_id.as_bytes()) >> 48) as usize % STRIPES]
    }

    /// Reads a user, if there were events.
    pub fn read<R>(&self, user_id: &str, read: impl FnOnce(&LiveUser) -> R) -> Option<R> {
        if self.n_users() == 0 {
            return None;
        }
        self.stripe(user_id).lock().users.get(user_id).map(read)
    }

    /// Reads what events and upserts say of a user.
    pub fn with_user<R>(&self, user_id: &str, read: impl FnOnce(Option<&LiveUser>, Option<&Arc<Profile>>) -> R) -> R {
        if self.n_users() == 0 && self.n_profiles() == 0 {
            return read(None, None);
        }
        let stripe = self.stripe(user_id).lock();
        read(stripe.users.get(user_id), stripe.profiles.get(user_id))
    }

    /// Names what is known of a user beside the bundle: changes with every event that has an effect and with every upsert, 0 without
    /// any.
    pub fn version_of(&self, user_id: &str) -> u64 {
        self.with_user(user_id, |events, profile| match (events.map_or(0, LiveUser::version), profile) {
            (events, None) => events,
            (events, Some(profile)) => {
                let both = [events.to_le_bytes(), profile.digest().to_le_bytes()];
                xxh3_64(both.as_flattened()).max(1)
            }
        })
    }

    /// Forgets what events said of a user; says whether there was something.
    pub(super) fn drop_events(&self, stripe: &mut Stripe, id: &str) -> bool {
        let Some(user) = stripe.users.remove(id) else { return false };
        stripe.order.retain(|(other, _)| **other != *id);
        self.n_users.fetch_sub(1, Relaxed);
        self.n_entries.fetch_sub(user.entries.len(), Relaxed);
        true
    }

    /// What is popular because of events; `None` before there are any.
    pub fn trending(&self) -> Option<Arc<LiveTrending>> {
        self.trending.read().clone()
    }

    /// Makes [`Self::trending`] anew where events came since the last call; `now_ms` is milliseconds since 1970.
    pub fn refresh_trending(&self, now_ms: i64) {
        let items = self.items();
        if let Some(fresh) = self.counts.lock().refresh(&self.generation, items.as_deref(), now_ms) {
            *self.trending.write() = Some(Arc::new(fresh));
            self.trending_ms.store(now_ms, Relaxed);
        }
    }

    /// When [`Self::trending`] was made, milliseconds since 1970; `None`: never.
    pub fn trending_ms(&self) -> Option<i64> {
        Some(self.trending_ms.load(Relaxed)).filter(|&ms| ms > 0)
    }

    /// Makes what computes users' vectors from their histories, where the generation has embeddings.
    pub fn prepare_fold_in(&self) {
        let started = Instant::now();
        let params =
            FoldInParams { alpha: self.config.fold_in_alpha, regularization: self.config.fold_in_regularization };
        if let Some(fold_in) = self.generation.fold_in(params) {
            let (agreement, ms) = (fold_in.agreement(), started.elapsed().as_millis() as u64);
            tracing::info!(agreement, ms, "users' vectors can be folded in from their histories");
        }
    }

    /// Items as they stand; `None` where all are as in the bundle.
    pub fn items(&self) -> Option<Arc<LiveItems>> {
        if self.has_items.load(Acquire) { self.items.read().clone() } else { None }
    }

    /// Items that came or changed; for the thread that applies changes.
    pub(super) fn n_live_items(&self) -> usize {
        self.catalogue.lock().len()
    }

    /// Whether an upsert would change nothing.
    pub fn holds_item(&self, change: &Change<'_>) -> bool {
        self.catalogue.lock().holds(&self.generation, change)
    }

    /// Values of categories and lists that the bundle does not have.
    pub fn n_live_values(&self) -> usize {
        let vocabularies = self.generation.items.columns.iter().filter_map(|column| column.data.vocabulary());
        vocabularies.map(|vocabulary| vocabulary.more.len() as usize).sum()
    }

    /// Whether an upsert of the item takes no further room.
    pub(super) fn has_item(&self, id: &str) -> bool {
        self.catalogue.lock().has(&self.generation, id)
    }

    /// The index over the vectors that came.
    pub(super) fn live_index(&self) -> Option<Arc<LiveIndex>> {
        self.catalogue.lock().index().cloned()
    }

    /// Shows the changes of items since the last call to all calls that begin from now on; for one thread alone.
    pub fn publish(&self) {
        if let Some(fresh) = self.catalogue.lock().take_changed() {
            let before = self.items.write().replace(Arc::new(fresh));
            self.has_items.store(true, Release);
            drop(before);
        }
    }

    /// Applies a record; changes of items are seen after [`Self::publish`]. For one thread alone.
    ///
    /// # Errors
    /// It is none; entries before the damage took effect.
    pub fn apply_record(&self, record: &[u8]) -> Result<Receipt, Damaged> {
        self.apply_content(Record::of(record)?)
    }

    /// The same for a record of the log as it is read again.
    ///
    /// # Errors
    /// As [`Self::apply_record`].
    pub fn replay(&self, record: Logged<'_>) -> Result<Receipt, Damaged> {
        match (record.content()?, record.place) {
            // Events of before are read again, and the profile knows of later upserts.
            (Record::Change(Kind::DeleteUsers, body), Place::Before) => {
                change::decode(body, |change: &Change<'_>| {
                    self.delete_user(change.id, true);
                    Ok(())
                })?;
                Ok(Receipt::default())
            }
            (Record::Change(..), Place::Before) => Ok(Receipt::default()),
            (content, _) => self.apply_content(content),
        }
    }

    fn apply_content(&self, content: Record<'_>) -> Result<Receipt, Damaged> {
        match content {
            Record::Events(body) => self.apply_events(body),
            Record::Change(kind, body) => self.apply_changes(kind, body),
            Record::Exposure(_) => Ok(Receipt::default()),
        }
    }

    /// Hands over records that say anew all that is in force of items and users; for the thread that applies changes.
    pub(super) fn carry(&self, take: &mut dyn FnMut(&[u8])) {
        const BYTES: usize = 256 << 10;
        self.catalogue.lock().carry(&self.generation, BYTES, |record| take(&record));
        let mut encoder = change::Encoder::carrying(Kind::UpsertUsers);
        self.each_profile(|id, profile| {
            profile.carry(id, &mut encoder);
            if encoder.len() >= BYTES {
                take(&std::mem::replace(&mut encoder, change::Encoder::carrying(Kind::UpsertUsers)).record());
            }
        });
        if !encoder.is_empty() {
            take(&encoder.record());
        }
    }

    fn apply_events(&self, body: &[u8]) -> Result<Receipt, Damaged> {
        let mut receipt = Receipt::default();
        event::decode_body(body, |event| {
            receipt.accepted += 1;
            match self.apply(event) {
                Effect::Duplicate => receipt.duplicates += 1,
                Effect::UnknownItem => receipt.unknown += 1,
                Effect::Applied | Effect::Nothing => {}
            }
        })?;
        Ok(receipt)
    }

    fn apply_changes(&self, kind: Kind, body: &[u8]) -> Result<Receipt, Damaged> {
        let mut receipt = Receipt::default();
        let mut catalogue = self.catalogue.lock();
        change::decode(body, |change: &Change<'_>| {
            receipt.accepted += 1;
            let changed = match kind {
                Kind::UpsertItems => catalogue.upsert(&self.generation, change),
                Kind::DeleteItems => catalogue.delete(&self.generation, change),
                Kind::UpsertUsers => self.upsert_user(change),
                Kind::DeleteUsers => self.delete_user(change.id, false),
            };
            receipt.unknown += u32::from(changed == Changed::Unknown);
            receipt.created += u32::from(changed == Changed::Created);
            Ok(())
        })?;
        Ok(receipt)
    }

    /// Applies an event; for one thread alone.
    pub fn apply(&self, event: &Event<'_>) -> Effect {
        let Some(kind) = self.config.kinds.get(event.kind) else { return Effect::Nothing };
        let in_bundle = |row: u32| (row as usize) < self.generation.items.len();
        let is_there = |row: &u32| in_bundle(*row) || self.catalogue.lock().knows(&self.generation, *row);
        let Some(row) = self.generation.items.ids.row(event.item_id).filter(is_there) else {
            return Effect::UnknownItem;
        };
        let weight = kind.weight_of(event.value);
        if weight <= 0.0 && !kind.seen {
            return Effect::Nothing;
        }
        // A value and a dislike are the user's word; a view after a purchase is not.
        let replaces = !kind.values.is_empty() || weight <= 0.0;
        let most = self.config.history_per_user as usize;
        let mut stripe = self.stripe(event.user_id).lock();
        let Stripe { users, order, .. } = &mut *stripe;
        if !users.contains_key(event.user_id) {
            let id: Arc<str> = event.user_id.into();
            order.push_back((id.clone(), 0));
            users.insert(id, LiveUser::default());
            self.n_users.fetch_add(1, Relaxed);
        }
        let Some(user) = users.get_mut(event.user_id) else { return Effect::Nothing };
        if !event.event_id.is_empty() {
            let id = xxh3_64(event.event_id.as_bytes());
            if user.ids.contains(&id) {
                return Effect::Duplicate;
            }
            if user.ids.len() >= most {
                user.ids.pop_front();
            }
            user.ids.push_back(id);
        }
        let before = user.entries.len();
        let mut entry = Entry { row, weight, seen: kind.seen };
        if let Some(at) = user.entries.iter().position(|e| e.row == row) {
            let old = user.entries.remove(at);
            entry.seen |= old.seen;
            if !replaces {
                entry.weight = entry.weight.max(old.weight);
            }
        } else if before >= most {
            user.entries.remove(0);
        }
        user.entries.push(entry);
        self.n_entries.fetch_add(user.entries.len() - before, Relaxed);
        user.changed = 1 + self.changes.fetch_add(1, Relaxed);
        let mut change = [0; 17];
        change[..8].copy_from_slice(&user.version.to_le_bytes());
        // Rows of items that came later differ between replicas; ids do not.
        let named = if in_bundle(row) { row } else { xxh3_64(event.item_id.as_bytes()) as u32 };
        change[8..12].copy_from_slice(&named.to_le_bytes());
        change[12..16].copy_from_slice(&entry.weight.to_le_bytes());
        change[16] = u8::from(entry.seen);
        user.version = xxh3_64(&change).max(1);
        self.evict(&mut stripe);
        drop(stripe);
        if weight > 0.0 {
            self.counts.lock().add(row, weight, event.time_ms, event.context);
        }
        Effect::Applied
    }

    /// Forgets users of a stripe that holds more than its share, those first that did not change since they were last looked at.
    fn evict(&self, Stripe { users, order, .. }: &mut Stripe) {
        let share = (self.config.max_users as usize).div_ceil(STRIPES);
        while users.len() > share {
            let Some((id, seen)) = order.pop_front() else { return };
            let changed = users.get(&id).map_or(0, |user| user.changed);
            if changed > seen {
                order.push_back((id, changed));
            } else if let Some(user) = users.remove(&id) {
                self.n_users.fetch_sub(1, Relaxed);
                self.n_entries.fetch_sub(user.entries.len(), Relaxed);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::event::tests::record;
    use super::*;
    use crate::catalog::generation::testing;
    use proptest::prelude::*;

    fn state(config: EventsConfig) -> LiveState {
        LiveState::new(Arc::new(testing::plain(10)), config, StateConfig::default())
    }

    fn rows(state: &LiveState, user: &str) -> Vec<u32> {
        state.read(user, |u| u.entries().iter().map(|e| e.row).collect()).unwrap_or_default()
    }

    #[test]
    fn events_make_a_history_and_versions() {
        let state = state(EventsConfig::default());
        assert_eq!((state.version_of("a"), rows(&state, "a")), (0, vec![]));
        assert_eq!(state.apply(&Event::new("a", "3", "view")), Effect::Applied);
        let first = state.version_of("a");
        assert_eq!(state.apply(&Event::new("b", "3", "view")), Effect::Applied);
        assert!(first > 0 && state.version_of("a") == first);
        let other = self::state(EventsConfig::default());
        other.apply(&Event::new("b", "5", "view"));
        other.apply(&Event::new("a", "3", "view"));
        assert_eq!(other.version_of("a"), first, "the same events are the same in every process");
        assert_ne!(other.version_of("b"), first);
        assert_eq!(state.apply(&Event::new("a", "nope", "view")), Effect::UnknownItem);
        assert_eq!(state.apply(&Event::new("a", "4", "hovered")), Effect::Nothing);
        assert_eq!(state.version_of("a"), first);
        state.apply(&Event::new("a", "4", "purchase"));
        state.apply(&Event::new("a", "3", "view"));
        assert_eq!(rows(&state, "a"), [4, 3]);
        assert_eq!((state.n_users(), state.n_entries()), (2, 3));
    }

    #[test]
    fn an_event_id_takes_effect_once() {
        let state = state(EventsConfig::default());
        let first = Event { event_id: "e1", ..Event::new("a", "3", "like") };
        let other = Event { event_id: "e1", ..Event::new("b", "3", "like") };
        assert_eq!(
            [&first, &first, &other].map(|e| state.apply(e)),
            [Effect::Applied, Effect::Duplicate, Effect::Applied]
        );
        let again = record(&[first, Event { event_id: "e2", ..Event::new("a", "x", "like") }], 1);
        let receipt = state.apply_record(&again).unwrap();
        assert_eq!(receipt, Receipt { accepted: 2, duplicates: 1, unknown: 1, ..Receipt::default() });
    }

    #[test]
    fn the_users_word_replaces_what_a_view_only_raises() {
        let state = state(EventsConfig::default());
        let weight = || state.read("a", |u| u.entries().last().unwrap().weight).unwrap();
        state.apply(&Event::new("a", "1", "purchase"));
        state.apply(&Event::new("a", "1", "view"));
        assert_eq!(weight(), 1.0);
        state.apply(&Event { value: 3.5, ..Event::new("a", "1", "rating") });
        assert_eq!(weight(), 0.5);
        state.apply(&Event::new("a", "1", "dislike"));
        assert_eq!(weight(), 0.0);
        state.apply(&Event::new("a", "1", "rating"));
        assert_eq!(weight(), 0.2);
    }

    #[test]
    fn memory_is_bounded() {
        let config = EventsConfig { history_per_user: 3, max_users: STRIPES as u32, ..EventsConfig::default() };
        let state = state(config);
        for item in 0..10 {
            state.apply(&Event::new("a", &item.to_string(), "view"));
        }
        assert_eq!(rows(&state, "a"), [7, 8, 9]);
        let users: Vec<String> = (0..3000).map(|n| format!("u{n}")).collect();
        for user in &users {
            state.apply(&Event::new(user, "1", "view"));
            assert_eq!(rows(&state, user), [1], "{user}: the newest stays");
        }
        assert!(state.n_users() <= STRIPES, "{}", state.n_users());
        let entries = state.stripes.iter().map(|s| s.lock().users.values().map(|u| u.entries.len()).sum::<usize>());
        assert_eq!(entries.sum::<usize>(), state.n_entries());
        let ordered = state.stripes.iter().map(|s| s.lock()).all(|s| s.order.len() == s.users.len());
        assert!(ordered, "the order of a stripe grows");
    }

    proptest! {
        #[test]
        fn equals_the_obvious_version(events in prop::collection::vec((0u32..3, 0u32..6, 0usize..6), 0..60)) {
            let kinds = ["view", "click", "like", "dislike", "rating", "other"];
            let state = state(EventsConfig { history_per_user: 4, ..EventsConfig::default() });
            let mut want: HashMap<u32, Vec<(u32, f32)>> = HashMap::new();
            for (user, item, kind) in events {
                state.apply(&Event::new(&user.to_string(), &item.to_string(), kinds[kind]));
                if kind == 5 { continue; }
                let weight = [0.2, 0.5, 1.0, 0.0, 0.2][kind];
                let list = want.entry(user).or_default();
                let old = list.iter().position(|e| e.0 == item).map(|at| list.remove(at).1);
                let weight: f32 = if kind >= 3 { weight } else { weight.max(old.unwrap_or(0.0)) };
                list.push((item, weight));
                if list.len() > 4 { list.remove(0); }
            }
            for (user, list) in want {
                let got = state.read(&user.to_string(), |u| u.entries().iter().map(|e| (e.row, e.weight)).collect::<Vec<_>>());
                prop_assert_eq!(got.unwrap(), list);
            }
        }
    }
}
