//! From a call to a job: ids to rows, history, seen items, vector, canonical context, active rules.

use std::sync::Arc;
use std::time::{Duration, Instant};

use smallvec::SmallVec;

use super::PipelineConfig;
use crate::api::{InferCall, RankCall, RecommendCall, SearchBy, SearchCall, SearchFilter};
use crate::catalog::conditions::{self, Test, UnknownValue};
use crate::catalog::generation::{Generation, Interaction, NO_ROW};
use crate::catalog::live;
use crate::context::{Deadline, Degradation, Stage};
use crate::device::{Job, Task};
use crate::error::{Code, Error};
use crate::rerank::Reranker;
use crate::state::LiveState;
use crate::state::live::Entry;
use crate::state::users::Profile;
use crate::store::Known;
use crate::store::user::{Embedding, StoredUser};
use crate::wire::LIMITS;

/// Items that one search or rank may ask for.
pub const MAX_K: usize = 10_000;
/// Items that all queries of one search may ask for together, 64 x 512: a shard encodes them in one go, in some 2 ms.
pub const MAX_RESULTS: usize = 32_768;
/// Time for a call in process that names no deadline.
const NO_DEADLINE: Duration = Duration::from_secs(3600);

/// Plans a recommendation into a recycled job, whose `items` are set, all but its user: [`resolve_user`] is next. `job.context` and
/// `job.deadline` are set here too.
///
/// # Errors
/// A slate length out of range.
pub fn recommend(
    call: &RecommendCall<'_>,
    generation: &Arc<Generation>,
    live: Option<&LiveState>,
    reranker: &Reranker,
    config: &PipelineConfig,
    now: Instant,
    job: &mut Job,
) -> Result<(), Error> {
    check_n_items(call.n_items, config)?;
    begin(job, generation, call.deadline, now);
    job.context.assign(call.context);
    job.query.push_str(call.query.unwrap_or_default().trim());
    job.task = Task::Recommend { top_m: config.top_m(call.n_items), explain: call.explain };
    job.filter = reranker.hard_filter(&job.context, job.items.as_ref());
    job.trending = live.and_then(LiveState::trending);
    job.user.id.push_str(call.user_id);
    Ok(())
}

/// Whether a slate of that length may be asked for.
///
/// # Errors
/// It is 0 or longer than the configuration allows.
pub fn check_n_items(n_items: u32, config: &PipelineConfig) -> Result<(), Error> {
    match (1..=config.max_n_items).contains(&n_items) {
        true => Ok(()),
        false => {
            Err(Error::new(Code::BadRequest, format!("n_items is {n_items}, expected 1 to {}", config.max_n_items)))
        }
    }
}

/// Plans a search, all but its user: [`resolve_user`] is next.
///
/// # Errors
/// An unknown item or item column, a vector of another dimension, a condition that does not fit its column, a number out
/// of its range, a catalogue without what is asked for.
pub fn search(call: &SearchCall<'_>, generation: &Arc<Generation>, now: Instant, job: &mut Job) -> Result<(), Error> {
    let wrong = |message: String| Err(Error::new(Code::BadRequest, message));
    if call.k == 0 || call.k as usize > MAX_K {
        return wrong(format!("k is {}, expected 1 to {MAX_K}", call.k));
    }
    call.params.validate().map_err(|message| Error::new(Code::BadRequest, message))?;
    begin(job, generation, call.deadline, now);
    job.context.assign(&[]);
    job.search.params = call.params;
    let n_queries = match call.by {
        SearchBy::Vectors { n, .. } => Some(n),
        _ => None,
    };
    job.task = Task::Search { k: call.k, n_queries };
    match call.by {
        SearchBy::Text(words) => {
            job.query.push_str(words.trim());
            if job.query.is_empty() {
                return Err(Error::fixed(Code::BadRequest, "the query is empty"));
            }
        }
        by => start(by, call, generation, job)?,
    }
    restrict(&call.filter, generation, job)?;
    Ok(())
}

/// The vectors that a search starts from.
fn start(by: SearchBy<'_>, call: &SearchCall<'_>, generation: &Generation, job: &mut Job) -> Result<(), Error> {
    let Some(items) = &generation.item_embeddings else {
        return Err(Error::fixed(Code::BadRequest, "the catalogue has no embeddings"));
    };
    let vectors = &mut job.search.vectors;
    match by {
        SearchBy::Vector(values) => {
            if values.len() != items.dim {
                let message = format!("the vector has {} values, the catalogue's have {}", values.len(), items.dim);
                return Err(Error::new(Code::BadRequest, message));
            }
            vectors.extend_from_slice(values);
        }
        SearchBy::Vectors { values, n } => {
            let (k, n) = (call.k as usize, n as usize);
            if !(1..=LIMITS.vectors).contains(&n) {
                return Err(Error::new(Code::BadRequest, format!("{n} vectors, expected 1 to {}", LIMITS.vectors)));
            }
            if k * n > MAX_RESULTS {
                let message = format!("{n} vectors of k {k} each are {} items, expected at most {MAX_RESULTS}", k * n);
                return Err(Error::new(Code::BadRequest, message));
            }
            if values.len() != n * items.dim {
                let (all, dim) = (values.len(), items.dim);
                let message = format!("{n} vectors have {all} values, the catalogue's have {dim} each");
                return Err(Error::new(Code::BadRequest, message));
            }
            vectors.extend_from_slice(values);
        }
        SearchBy::Item(id) => {
            let row = live::row_of(&generation.items.ids, job.items.as_deref(), id)
                .ok_or(Error::fixed(Code::NotFound, "no such item"))?;
            if !live::extend_vector(generation, job.items.as_deref(), row, vectors) {
                return Err(Error::fixed(Code::NotFound, "the item has no embedding"));
            }
            job.search.exclude = Some(row);
        }
        // The device searches by the user's vector, which events may have moved.
        SearchBy::User(id) => {
            job.user.id.push_str(id);
            job.search.by_user = true;
        }
        SearchBy::Text(_) => {}
    }
    match vectors.iter().all(|value| value.is_finite()) {
        true => Ok(()),
        false => Err(Error::fixed(Code::BadRequest, "the vector holds a value that is not finite")),
    }
}

/// What a search may return.
fn restrict(filter: &SearchFilter<'_>, generation: &Generation, job: &mut Job) -> Result<(), Error> {
    let items = &generation.items;
    for (name, demand) in filter.conditions {
        let wrong = |reason| Error::new(Code::BadRequest, format!("filter.{name}: {reason}"));
        let at = conditions::column(items, name).map_err(wrong)?;
        let test = Test::resolve(&items.columns[at].data, demand, UnknownValue::Ignore).map_err(wrong)?;
        job.search.tests.push((at as u32, test));
    }
    // Thousands of ids would take a shard too long to look up.
    filter.exclude.iter().for_each(|id| job.search.exclude_ids.push(id));
    if filter.exclude_seen.is_some() && !job.search.by_user {
        return Err(Error::fixed(Code::BadRequest, "exclude_seen goes with user_id only"));
    }
    job.search.with_seen = filter.exclude_seen == Some(false);
    Ok(())
}

/// Plans a ranking of given items, all but its user: [`resolve_user`] is next. Unknown items keep their place and get no score.
///
/// # Errors
/// No items or too many, an unknown ranker, a bundle without rankers.
pub fn rank(call: &RankCall<'_>, generation: &Arc<Generation>, now: Instant, job: &mut Job) -> Result<(), Error> {
    if call.item_ids.is_empty() || call.item_ids.len() > MAX_K {
        let message = format!("{} items, expected 1 to {MAX_K}", call.item_ids.len());
        return Err(Error::new(Code::BadRequest, message));
    }
    let ranker = match call.ranker {
        None if generation.rankers.is_empty() => {
            return Err(Error::fixed(Code::NotFound, "the bundle has no ranker"));
        }
        None => 0,
        Some(name) => {
            let at = generation.rankers.iter().position(|r| r.name == name);
            at.ok_or(Error::fixed(Code::NotFound, "no such ranker"))? as u16
        }
    };
    begin(job, generation, call.deadline, now);
    job.context.assign(call.context);
    let row = |id: &&str| live::row_of(&generation.items.ids, job.items.as_deref(), id).unwrap_or(NO_ROW);
    let rows = call.item_ids.iter().map(row).collect();
    job.task = Task::Rank { rows, ranker };
    job.user.id.push_str(call.user_id);
    Ok(())
}

/// Plans a ranker's own inference; the tensors are checked already.
pub fn infer(call: &InferCall<'_>, generation: &Arc<Generation>, now: Instant, job: &mut Job) {
    begin(job, generation, call.deadline, now);
    // The last job's buffers, where it was of this kind.
    let mut inputs = match &mut job.task {
        Task::Infer { inputs, .. } => std::mem::take(inputs),
        _ => Vec::new(),
    };
    inputs.resize_with(call.inputs.len(), Vec::new);
    call.inputs.iter().zip(&mut inputs).for_each(|(from, to)| from.write_to(to));
    job.task = Task::Infer { ranker: call.ranker, n: call.n, inputs };
    job.enqueued = job.timings.lap(Stage::Plan, now);
}

fn begin(job: &mut Job, generation: &Arc<Generation>, deadline: Option<Duration>, now: Instant) {
    job.reset();
    if !Arc::ptr_eq(&job.generation, generation) {
        job.generation = generation.clone();
    }
    job.deadline = Deadline(now + deadline.unwrap_or(NO_DEADLINE));
    job.enqueued = now;
}

/// The user of a planned job: as trained, upserted or stored, and what events added. Of what several know, the feature store's word goes before
/// that of upserts, and theirs before the bundle's; an item that came again stands where it came last, events being the newest. `known`
/// is what the feature store says, where there is one.
///
/// # Errors
/// A search that starts from a user of whom there is no vector.
pub fn resolve_user(
    generation: &Generation,
    of_state: Option<&LiveState>,
    known: Option<&Known>,
    config: &PipelineConfig,
    job: &mut Job,
) -> Result<(), Error> {
    let user = &mut job.user;
    user.clear();
    if user.id.is_empty() {
        job.enqueued = job.timings.lap(Stage::Plan, job.enqueued);
        return Ok(());
    }
    user.row = generation.users.ids.row(&user.id);
    let mut events: SmallVec<[Entry; 128]> = SmallVec::new();
    // Of items that came after the call's view of them.
    let n_rows = live::n_rows(generation, job.items.as_deref());
    if let Some(state) = of_state {
        state.with_user(&user.id, |of_events, profile| {
            events.extend_from_slice(of_events.map_or(&[], |user| user.entries()));
            user.profile = profile.cloned();
        });
        events.retain(|entry| (entry.row as usize) < n_rows);
    }
    if let Some(away) = known.and_then(|known| known.away) {
        job.degraded.push(Degradation { stage: Stage::Features, reason: away });
    }
    user.stored = known.and_then(|known| known.user.clone());
    let stored = user.stored.as_deref();
    let (profile, encoded) = (user.profile.as_deref(), known.and_then(|known| known.embedding.as_deref()));
    if profile.is_some_and(Profile::is_forgotten) {
        user.row = None;
    }
    user.encoded = encoded.is_some();
    let given = encoded.map(Embedding::values);
    let given = given.or(stored.and_then(StoredUser::vector)).or(profile.and_then(Profile::vector));
    user.vector.extend_from_slice(given.unwrap_or_default());
    let of_store = stored.map_or(&[][..], StoredUser::history);
    // Of an encoder's vector, and of a stored one without a history, nobody says what it knows: it stays as it is.
    let as_it_is = encoded.is_some() || stored.is_some_and(|stored| stored.vector().is_some() && !stored.has_history());
    user.fold_in = !(as_it_is || events.is_empty() && of_store.is_empty());
    let of_store = of_store.iter().filter(|entry| (entry.interaction.row as usize) < n_rows);
    // Newest first: events, what the store has beside them, what the bundle has beside both.
    let most = config.history_length as usize;
    let mut again: SmallVec<[u32; 128]> = events.iter().map(|entry| entry.row).collect();
    again.sort_unstable();
    let newest = events.iter().rev().map(|entry| Interaction { row: entry.row, weight: entry.weight });
    user.history.extend(newest.take(most));
    user.seen.extend(events.iter().filter(|entry| entry.seen).map(|entry| entry.row));
    if stored.is_some() {
        let beside = of_store.clone().map(|entry| entry.interaction).filter(|i| again.binary_search(&i.row).is_err());
        user.history.extend(beside.rev().take(most - user.history.len()));
        user.seen.extend(of_store.clone().filter(|entry| entry.seen).map(|entry| entry.interaction.row));
        again.extend(of_store.map(|entry| entry.interaction.row));
        again.sort_unstable();
    }
    if let Some(row) = user.row {
        if let Some(matrix) = &generation.user_embeddings
            && generation.item_embeddings.is_some()
            && given.is_none()
        {
            matrix.extend_row(row, &mut user.vector);
        }
        user.seen.extend(generation.histories.of(row).map(|entry| entry.row));
        let trained = generation.histories.of(row).filter(|entry| again.binary_search(&entry.row).is_err());
        user.history.extend(trained.rev().take(most - user.history.len()));
    }
    user.history.reverse();
    user.seen.sort_unstable();
    if job.search.with_seen {
        user.seen.clear();
    }
    job.enqueued = job.timings.lap(Stage::Plan, job.enqueued);
    match job.search.by_user && !user.fold_in && user.vector.is_empty() {
        false => Ok(()),
        true if !user.is_known() => Err(Error::fixed(Code::NotFound, "no such user")),
        true => Err(Error::fixed(Code::BadRequest, "the catalogue has no user embeddings")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::generation::{Entities, Histories, IdTable, testing};
    use crate::state::event::Event;
    use crate::state::{EventsConfig, StateConfig};

    #[test]
    fn a_history_is_the_newest_of_training_and_events() {
        let mut generation = testing::plain(9);
        generation.users = Entities { ids: IdTable::build(["u"].iter(), false).unwrap(), columns: Vec::new() };
        generation.histories =
            Histories { offsets: vec![0, 5].into(), rows: vec![0, 1, 2, 3, 4].into(), weights: vec![1.0; 5].into() };
        let generation = Arc::new(generation);
        let resolved = |live: &LiveState, id: &str, history_length| {
            let (mut job, config) =
                (Job::new(generation.clone()), PipelineConfig { history_length, ..PipelineConfig::default() });
            job.user.id.push_str(id);
            resolve_user(&generation, Some(live), None, &config, &mut job).unwrap();
            (job.user.history.iter().map(|entry| entry.row).collect::<Vec<_>>(), job.user.seen)
        };
        let live = LiveState::new(generation.clone(), EventsConfig::default(), StateConfig::default());
        assert_eq!(resolved(&live, "u", 3), (vec![2, 3, 4], vec![0, 1, 2, 3, 4]));
        assert_eq!(resolved(&live, "v", 3), (vec![], vec![]));
        for item in ["2", "7"] {
            live.apply(&Event::new("u", item, "view"));
            live.apply(&Event::new("v", item, "view"));
        }
        for (length, history) in [(9, vec![0, 1, 3, 4, 2, 7]), (3, vec![4, 2, 7]), (2, vec![2, 7]), (1, vec![7])] {
            assert_eq!(resolved(&live, "u", length).0, history);
        }
        // Seen is what was seen, however short the history.
        assert_eq!(resolved(&live, "u", 1).1, [0, 1, 2, 2, 3, 4, 7]);
        assert_eq!(resolved(&live, "v", 1), (vec![7], vec![2, 7]));
    }

    #[test]
    fn what_the_store_says_lies_between_the_bundle_and_events() {
        use crate::store::Level;
        use crate::store::user::tests::stored;
        use crate::store::value::{FieldValue, StoredItem};
        let mut generation = crate::store::user::tests::generation();
        generation.histories =
            Histories { offsets: vec![0, 3].into(), rows: vec![0, 1, 2].into(), weights: vec![1.0; 3].into() };
        generation.user_embeddings = generation.item_embeddings.clone();
        let generation = Arc::new(generation);
        let live = LiveState::new(generation.clone(), EventsConfig::default(), StateConfig::default());
        let resolved = |id: &str, known: &Known| {
            let (mut job, config) =
                (Job::new(generation.clone()), PipelineConfig { history_length: 4, ..PipelineConfig::default() });
            job.user.id.push_str(id);
            resolve_user(&generation, Some(&live), Some(known), &config, &mut job).unwrap();
            job
        };
        let rows = |job: &Job| job.user.history.iter().map(|entry| entry.row).collect::<Vec<_>>();
        let item = |id, seen| StoredItem { id, weight: 1.0, seen };
        let schema = "age:number\nv:vector\nh:items\n";
        let known = |age: FieldValue<'static>, vector: Option<[f32; 2]>| {
            let vector = vector.map_or(FieldValue::Missing, |vector| FieldValue::Vector(vector.into()));
            let items = FieldValue::Items(vec![item("1", true), item("7", true), item("8", false)]);
            let user = stored(&generation, schema, &[age, vector, items]).unwrap();
            Known { user: Some(Arc::new(user)), levels: [Level::Redis, Level::Off], ..Known::default() }
        };
        let with = known(FieldValue::Number(20.0), Some([3.0, 4.0]));
        let job = resolved("a", &with);
        assert_eq!((rows(&job), job.user.seen.clone()), (vec![2, 1, 7, 8], vec![0, 1, 1, 2, 7]));
        assert_eq!((job.user.vector.clone(), job.user.fold_in, job.user.number(0)), (vec![3.0, 4.0], true, Some(20.0)));
        assert_eq!(job.user.vector_knows().len(), 3);
        // Without a vector there the trained one is moved by the history; without a number the bundle's counts.
        let job = resolved("a", &known(FieldValue::Missing, None));
        assert_eq!((job.user.vector.clone(), job.user.fold_in, job.user.number(0)), (vec![1.0, 1.0], true, None));
        assert!(job.user.vector_knows().is_empty());
        // Events come last, and once.
        live.apply(&Event::new("a", "7", "like"));
        live.apply(&Event::new("nobody", "9", "like"));
        assert_eq!(rows(&resolved("a", &with)), [2, 1, 8, 7]);
        let nobody = resolved("nobody", &with);
        assert_eq!((rows(&nobody), nobody.user.is_known()), (vec![1, 7, 8, 9], true));
        assert!(!resolved("nobody", &Known::default()).user.is_known());
        // Of whose vector nobody says what it knows, it stays as it is.
        let user = stored(&generation, "v:vector\n", &[FieldValue::Vector(vec![3.0, 4.0])]).unwrap();
        let job = resolved("a", &Known { user: Some(Arc::new(user)), ..Known::default() });
        assert_eq!((job.user.vector.clone(), job.user.fold_in), (vec![3.0, 4.0], false));
        let embedding = Embedding::of(&[5f32.to_le_bytes(), 6f32.to_le_bytes()].concat(), 2).map(Arc::new);
        let job = resolved("a", &Known { embedding, ..with.clone() });
        assert_eq!((job.user.vector.clone(), job.user.fold_in, rows(&job)), (vec![5.0, 6.0], false, vec![2, 1, 8, 7]));
        // What should be known and is not is said.
        let job = resolved("a", &Known { away: Some(crate::context::Reason::Failed), ..Known::default() });
        assert_eq!(job.degraded[..], [Degradation { stage: Stage::Features, reason: crate::context::Reason::Failed }]);
    }
}
