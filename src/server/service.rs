//! One shard's side of every call: cache, single flight, admission, plan, queue, finish. Both protocols come through here.

use std::ops::ControlFlow;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use smallvec::SmallVec;

use super::completions::{Completion, Completions};
use super::index::IndexAdmin;
use crate::api::{
    CacheStatus, Call, InferCall, Outcome, RankCall, RecommendCall, SearchBy, SearchCall, Slate, SlateItem, Ticket,
};
use crate::cache::CacheConfig;
use crate::cache::key::{self, CacheKey};
use crate::cache::memory::{Cached, ResultCache};
use crate::cache::precomputed::Precomputed;
use crate::cache::redis::RedisCache;
use crate::cache::singleflight::{Role, SingleFlight, Waiter};
use crate::cache::value;
use crate::catalog::generation::Generation;
use crate::catalog::live::{LiveItems, any_gone};
use crate::config::Config;
use crate::context::{Deadline, now_ms};
use crate::device::ring::JobQueue;
use crate::device::worker::JobSink;
use crate::device::{Counters, Job, Task};
use crate::error::{Code, Error};
use crate::link::{FoundSink, Link, Lookup, Values};
use crate::pipeline::models::Model;
use crate::pipeline::{self, FinishScratch, plan};
use crate::rerank::Reranker;
use crate::state::change::Record;
use crate::state::exposure::{self, Exposed, Exposure};
use crate::state::writer::{self, EventQueue, ReceiptSink, Submission};
use crate::state::{LiveState, schema};
use crate::store::items::ItemFollower;
use crate::store::{Asked, FeatureStore, Known, Learned};
use crate::telemetry::metrics::{Endpoint, Metrics, ShardMetrics};

/// What all shards share.
pub struct Shared {
    /// The bundle that serves.
    pub generation: Arc<Generation>,
    /// Compiled against it.
    pub reranker: Reranker,
    /// The rankers as models under `/v2`, and whether each was unloaded there.
    pub models: Vec<(Model, AtomicBool)>,
    /// As configured.
    pub config: Config,
    /// To the workers.
    pub jobs: JobQueue,
    /// To the shards, by shard.
    pub completions: Vec<Completions>,
    /// Results; `None` when off.
    pub cache: Option<ResultCache>,
    /// Results of all replicas; `None` when off.
    pub redis: Option<Arc<RedisCache>>,
    /// What other processes know of users; `None` when off.
    pub store: Option<FeatureStore>,
    /// What follows other processes' changes of items; `None` when off.
    pub items: Option<Arc<ItemFollower>>,
    /// All uses of Redis.
    pub links: Vec<Arc<Link>>,
    /// Of the configuration that shapes answers; replicas of another one must not share results.
    scope: String,
    /// Keys being computed.
    pub flights: SingleFlight,
    /// The index in partitions: who searches them, and its division into others.
    pub index: Arc<IndexAdmin>,
    /// Counters.
    pub metrics: Metrics,
    /// What events changed.
    pub live: Arc<LiveState>,
    /// Slates made ahead of time.
    pub precomputed: Option<Precomputed>,
    /// To the event log.
    pub events: Arc<EventQueue>,
    /// What became of the jobs of each device that may fail, where there are some.
    pub devices: OnceLock<Vec<Arc<Counters>>>,
}

impl Shared {
    /// For `n_shards` shards and as many workers.
    ///
    /// # Errors
    /// A rule that can't be compiled; no eventfd to be had.
    pub fn new(generation: Arc<Generation>, config: Config, n_shards: usize) -> anyhow::Result<Self> {
        let per_shard = config.server.max_in_flight as usize;
        let rankers = generation.rankers.iter().map(|r| r.name.clone()).collect();
        // Twice, so that a call that ran out of time and its slot's next one both fit.
        let completions = (0..n_shards).map(|_| Completions::new(2 * per_shard + 16)).collect::<Result<_, _>>();
        let live = LiveState::new(generation.clone(), config.events.clone(), config.state.clone());
        let models = Model::all(&generation).map_err(anyhow::Error::msg)?;
        let scope = key::scope(&generation.version, &config)?;
        let redis = RedisCache::new(&config.cache).map(Arc::new);
        let store = FeatureStore::new(&config.features, &generation);
        let live = Arc::new(live);
        let events = Arc::new(EventQueue::new(&live));
        let items = ItemFollower::new(&config.features, &live, &events).map(Arc::new);
        let of_results = redis.iter().map(|redis| redis.link.clone());
        let of_store = store.iter().map(|store| store.link.clone());
        Ok(Shared {
            links: of_results.chain(of_store).chain(items.iter().map(|items| items.link.clone())).collect(),
            store,
            items,
            precomputed: precomputed(&config.cache, &scope)?,
            models: models.into_iter().map(|model| (model, AtomicBool::new(false))).collect(),
            reranker: Reranker::compile(&config.rerank, &generation)?,
            jobs: JobQueue::new(per_shard * n_shards, n_shards),
            completions: completions.context("making an eventfd")?,
            cache: config.cache.enabled.then(|| ResultCache::new(&config.cache)),
            redis,
            scope,
            flights: SingleFlight::default(),
            index: Arc::new(IndexAdmin::new(generation.clone())),
            metrics: Metrics::new(n_shards, rankers),
            events,
            live,
            devices: OnceLock::new(),
            generation,
            config,
        })
    }
}

impl Shared {
    /// The time that a call has.
    fn budget(&self, asked: Option<Duration>) -> Option<Duration> {
        let limits = &self.config.server;
        let longest = Duration::from_millis(u64::from(limits.max_deadline_ms));
        Some(asked.unwrap_or(Duration::from_millis(u64::from(limits.default_deadline_ms))).min(longest))
    }
}

impl Shared {
    /// A slate made ahead of time, while it is fresh.
    fn made_ahead(&self, key: CacheKey) -> Option<Slate> {
        let file = self.precomputed.as_ref()?;
        let age = (now_ms() / 1000).saturating_sub(file.made() as i64);
        if age > i64::from(self.config.cache.precomputed_max_age_seconds) {
            return None;
        }
        file.get(key, &self.generation)
    }

    /// What names the result of a recommendation.
    fn key(&self, user_id: &str, version: u64, job: &Job, query: &str, n_items: u32) -> CacheKey {
        let items = job.items.as_ref().map_or(0, |items| items.digest());
        key::recommend(&self.scope, user_id, version, items, &job.context, query, n_items)
    }

    /// Looks a result up in this process. `Break`: the answer. `Continue` with a slate: the answer, and the duty to compute it anew as the
    /// leader of its key; without: there is none.
    fn consult(
        &self,
        cache: &ResultCache,
        key: CacheKey,
        items: Option<&LiveItems>,
        now: Instant,
    ) -> ControlFlow<Outcome, Option<Arc<Slate>>> {
        let shown = |slate: &Slate| !any_gone(items, slate.items.iter().map(|item| item.row));
        match cache.get(key, now) {
            Some(Cached::Fault(fault)) => return ControlFlow::Break(Outcome::Failed(fault)),
            Some(Cached::Fresh(slate)) if shown(&slate) => {
                return ControlFlow::Break(Outcome::Slate(slate, CacheStatus::L1));
            }
            // Whoever meets it first computes it anew; the others have their answer.
            Some(Cached::Stale(slate)) if shown(&slate) => {
                return match self.flights.lead(key) {
                    true => ControlFlow::Continue(Some(slate)),
                    false => ControlFlow::Break(Outcome::Slate(slate, CacheStatus::Stale)),
                };
            }
            _ => {}
        }
        match self.made_ahead(key).filter(shown) {
            Some(slate) => ControlFlow::Break(Outcome::Slate(Arc::new(slate), CacheStatus::Precomputed)),
            None => ControlFlow::Continue(None),
        }
    }

    fn complete(&self, shard: u16, completion: Completion) {
        if let Some(completions) = self.completions.get(usize::from(shard)) {
            completions.push(completion);
        }
    }
}

/// Opens the file of slates, where one is configured.
fn precomputed(config: &CacheConfig, scope: &str) -> anyhow::Result<Option<Precomputed>> {
    if !config.enabled || config.precomputed.as_os_str().is_empty() {
        return Ok(None);
    }
    let file = Precomputed::open(&config.precomputed).context("cache.precomputed")?;
    let (slates, name) = (file.len(), config.precomputed.display());
    match file.scope() == key::of_scope(scope) {
        true => tracing::info!(file = %name, slates, "slates made ahead of time"),
        false => tracing::warn!(file = %name, "made for another bundle or configuration: none of its slates is served"),
    }
    Ok(Some(file))
}

/// Takes what the feature store has to the shards.
pub struct UserSink(pub Arc<Shared>);

impl FoundSink for UserSink {
    fn found(&self, lookup: Lookup, values: Option<Values>) {
        let learned = self.0.store.as_ref().and_then(|store| store.learn(lookup, values));
        if let Some((shard, ticket, learned)) = learned {
            self.0.complete(shard, Completion::Known { ticket, learned });
        }
    }
}

impl FoundSink for Shared {
    fn found(&self, Lookup { shard, ticket, .. }: Lookup, values: Option<Values>) {
        let value = values.and_then(|values| values.into_iter().next().flatten());
        self.complete(shard, Completion::Found { ticket, value });
    }
}

impl JobSink for Shared {
    fn deliver(&self, job: Box<Job>) {
        self.complete(job.shard, Completion::Job(job));
    }
}

impl ReceiptSink for Shared {
    fn deliver(&self, shard: u16, ticket: Ticket, result: writer::Result) {
        self.complete(shard, Completion::Received { ticket, result });
    }

    fn applied(&self, record: &[u8]) {
        if let Some(store) = &self.store {
            store.write_through(&self.live, record);
        }
    }
}

/// A call in flight.
struct Flight {
    /// The protocol's name for it.
    ticket: Ticket,
    plan: Plan,
    /// Whether the end of this call ends a single flight.
    leader: bool,
    /// Its planned job, while it waits for Redis or for an identical call.
    waiting: Option<Box<Job>>,
    deadline: Deadline,
    /// It ran out of time and was answered; its job is still out.
    answered: bool,
}

/// What is kept of a call whose answer is to be logged.
struct Shown {
    user_id: String,
    context: Vec<(String, String)>,
}

impl Flight {
    /// Takes over what `plan` is to be logged for.
    fn new(plan: &mut Plan, ticket: Ticket, deadline: Deadline) -> Self {
        let plan = Plan { shown: plan.shown.take(), ..*plan };
        Flight { ticket, plan, leader: false, waiting: None, deadline, answered: false }
    }
}

/// What becomes of a planned job's answer.
struct Plan {
    endpoint: Endpoint,
    started: Instant,
    /// Where the result goes; `None`: nowhere.
    key: Option<CacheKey>,
    /// Whether the result may come from the cache, and go there.
    cacheable: bool,
    n_items: u32,
    explain: bool,
    /// Whose answer is to be logged.
    shown: Option<Box<Shown>>,
}

impl Plan {
    fn of(endpoint: Endpoint, started: Instant) -> Self {
        Plan { endpoint, started, key: None, cacheable: false, n_items: 0, explain: false, shown: None }
    }
}

const DRAINING: Error = Error::fixed(Code::Unavailable, "the server is shutting down");

const FULL: Error = Error::fixed(Code::Overloaded, "too many calls in flight");
const QUEUE_FULL: Error = Error::fixed(Code::Overloaded, "the queue to the workers is full");
const LATE: Error = Error::fixed(Code::DeadlineExceeded, "the deadline passed");

/// Jobs for another use. They keep their buffers and let go of what would be old by then.
#[derive(Default)]
#[expect(clippy::vec_box, reason = "jobs travel boxed: a queue's place is one pointer")]
struct Pool(Vec<Box<Job>>);

impl Pool {
    fn push(&mut self, mut job: Box<Job>) {
        (job.items, job.trending, job.filter) = Default::default();
        (job.user.profile, job.user.stored) = Default::default();
        self.0.push(job);
    }

    fn pop(&mut self) -> Option<Box<Job>> {
        self.0.pop()
    }
}

#[derive(Default)]
struct Slot {
    reuse: u32,
    flight: Option<Flight>,
}

/// One shard's service; not shared between threads.
pub struct Service {
    shared: Arc<Shared>,
    shard: u16,
    slots: Vec<Slot>,
    free: Vec<u32>,
    pool: Pool,
    finish: FinishScratch,
    in_flight: usize,
    pushed: bool,
    draining: bool,
    next_sweep: Instant,
    /// Draws the sample of exposures.
    random: SmallRng,
}

/// How often calls are checked for having run out of time.
const SWEEP: Duration = Duration::from_millis(5);

impl Service {
    /// The service of shard `shard`.
    pub fn new(shared: Arc<Shared>, shard: u16) -> Self {
        let n = shared.config.server.max_in_flight;
        Service {
            shard,
            slots: (0..n).map(|_| Slot::default()).collect(),
            free: (0..n).rev().collect(),
            pool: Pool::default(),
            finish: FinishScratch::default(),
            in_flight: 0,
            pushed: false,
            draining: false,
            next_sweep: Instant::now(),
            random: SmallRng::from_os_rng(),
            shared,
        }
    }

    /// What all shards share.
    pub fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// The shard's counters.
    pub fn metrics(&self) -> &ShardMetrics {
        &self.shared.metrics.shards[usize::from(self.shard)]
    }

    fn inbox(&self) -> &Completions {
        &self.shared.completions[usize::from(self.shard)]
    }

    /// The shard's number.
    pub fn shard(&self) -> u16 {
        self.shard
    }

    /// Whether jobs were pushed since the last [`Self::kick`].
    pub fn pushed(&self) -> bool {
        self.pushed
    }

    /// Calls in flight.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Takes no further calls; those in flight finish.
    pub fn drain(&mut self) {
        self.draining = true;
    }

    /// Whether [`Self::drain`] was called.
    pub fn draining(&self) -> bool {
        self.draining
    }

    /// Starts a call: answered at once (cache hit, error, shed), or later through [`Self::poll`] under `ticket`.
    pub fn submit(&mut self, call: &Call<'_>, ticket: Ticket, now: Instant) -> Option<Outcome> {
        let endpoint = match call {
            Call::Recommend(_) => Endpoint::Recommend,
            Call::Search(_) => Endpoint::Search,
            Call::Rank(_) => Endpoint::Rank,
            Call::Events(_) => Endpoint::Events,
            Call::Change(call) => match Record::of(call.record) {
                Ok(Record::Change(kind, _)) if !kind.is_of_items() => Endpoint::Users,
                _ => Endpoint::Items,
            },
        };
        let outcome = match call {
            _ if self.draining => Some(Outcome::Failed(DRAINING)),
            Call::Events(call) => self.receive(call.record, call.durable, call.deadline, endpoint, ticket, now),
            Call::Change(call) => match schema::check(&self.shared.generation, call.record) {
                Ok(()) => self.receive(call.record, call.durable, call.deadline, endpoint, ticket, now),
                Err(error) => Some(Outcome::Failed(error)),
            },
            call => self.begin(call, endpoint, ticket, now),
        };
        if let Some(outcome) = &outcome {
            self.metrics().record_outcome(endpoint, outcome, now.elapsed());
            if let (Outcome::Slate(slate, cache), Call::Recommend(call)) = (outcome, call)
                && self.shown()
            {
                self.expose(call.user_id, call.context, slate, *cache);
            }
        }
        outcome
    }

    /// Whether what is answered now belongs to the sample that is logged.
    fn shown(&mut self) -> bool {
        let rate = self.shared.config.events.exposure_rate;
        rate > 0.0 && self.random.random::<f32>() < rate
    }

    fn expose(&self, user_id: &str, context: &[(&str, &str)], slate: &Slate, cache: CacheStatus) {
        let ids = &slate.generation.items.ids;
        let exposed =
            |item: &SlateItem| Exposed { item_id: ids.id(item.row), score: item.score, sources: item.sources.0 };
        let last = |at: usize| context[at + 1..].iter().all(|(key, _)| *key != context[at].0);
        self.shared.events.expose(exposure::encode(&Exposure {
            time_ms: now_ms(),
            user_id,
            model_version: &slate.generation.version,
            cache: cache.name(),
            context: (0..context.len()).filter(|&at| last(at)).map(|at| context[at]).collect(),
            items: slate.items.iter().map(exposed).collect(),
        }));
    }

    /// As [`Self::submit`], for a ranker's own inference.
    pub fn infer(&mut self, call: &InferCall<'_>, ticket: Ticket, now: Instant) -> Option<Outcome> {
        let outcome = match self.draining {
            true => Some(Outcome::Failed(DRAINING)),
            false => {
                let mut job = self.job();
                let call = InferCall { deadline: self.shared.budget(call.deadline), ..*call };
                plan::infer(&call, &self.shared.generation, now, &mut job);
                self.launch(job, &mut Plan::of(Endpoint::Infer, now), ticket, now)
            }
        };
        if let Some(outcome) = &outcome {
            self.metrics().record_outcome(Endpoint::Infer, outcome, now.elapsed());
        }
        outcome
    }

    fn job(&mut self) -> Box<Job> {
        let mut job = self.pool.pop().unwrap_or_else(|| Box::new(Job::new(self.shared.generation.clone())));
        job.items = self.shared.live.items();
        job
    }

    fn begin(&mut self, call: &Call<'_>, endpoint: Endpoint, ticket: Ticket, now: Instant) -> Option<Outcome> {
        let shown = matches!(call, Call::Recommend(_)) && self.shown();
        let mut job = self.job();
        let Service { shared, pool, shard, .. } = self;
        let metrics = &shared.metrics.shards[usize::from(*shard)];
        let live = Some(&*shared.live);
        let budget = |asked| shared.budget(asked);
        let (generation, config) = (&shared.generation, &shared.config.pipeline);
        let mut plan = Plan::of(endpoint, now);
        let (mut version, mut wait, mut known, mut stale) = (0, None, None, None);
        let user = match call {
            Call::Recommend(RecommendCall { user_id, .. }) | Call::Rank(RankCall { user_id, .. }) => user_id,
            Call::Search(SearchCall { by: SearchBy::User(user_id), .. }) => user_id,
            _ => "",
        };
        if let Some(store) = shared.store.as_ref().filter(|_| !user.is_empty()) {
            let now_ms = now_ms();
            version = shared.live.version_of(user);
            match store.user(user, version, now, now_ms) {
                Asked::Wait(keys) => wait = Some(keys),
                Asked::Ready(of_user) => {
                    metrics.record_known(&of_user, now_ms);
                    known = Some(of_user);
                }
            }
        }
        let planned = match call {
            Call::Recommend(call) => {
                let mut call = RecommendCall { deadline: budget(call.deadline), ..*call };
                if call.n_items == 0 {
                    call.n_items = config.default_n_items;
                }
                (plan.n_items, plan.explain) = (call.n_items, call.explain);
                plan.cacheable = !call.no_cache && !call.explain;
                if let Some(cache) = shared.cache.as_ref().filter(|_| plan.cacheable && wait.is_none()) {
                    job.context.assign(call.context);
                    let version = match &known {
                        Some(known) => known.version(version),
                        None => shared.live.version_of(user),
                    };
                    let query = call.query.unwrap_or_default().trim();
                    let key = shared.key(user, version, &job, query, call.n_items);
                    match shared.consult(cache, key, job.items.as_deref(), now) {
                        ControlFlow::Continue(past) => stale = past,
                        ControlFlow::Break(outcome) => {
                            pool.push(job);
                            return Some(outcome);
                        }
                    }
                    plan.key = Some(key);
                }
                if shown {
                    let owned = |&(key, value): &(&str, &str)| (key.to_owned(), value.to_owned());
                    let context = call.context.iter().map(owned).collect();
                    plan.shown = Some(Box::new(Shown { user_id: call.user_id.to_owned(), context }));
                }
                plan::recommend(&call, generation, live, &shared.reranker, config, now, &mut job)
            }
            Call::Search(call) => {
                let call = SearchCall { deadline: budget(call.deadline), ..*call };
                plan::search(&call, generation, now, &mut job)
            }
            Call::Rank(call) => {
                let call = RankCall { deadline: budget(call.deadline), ..*call };
                plan::rank(&call, generation, now, &mut job)
            }
            Call::Events(_) | Call::Change(_) => Err(Error::fixed(Code::Internal, "this is no job")),
        };
        if let Err(error) = planned {
            self.pool.push(job);
            if stale.is_some() {
                self.pass_on(plan.key);
            }
            return Some(Outcome::Failed(error));
        }
        let (Some(keys), Some(store)) = (wait, &self.shared.store) else {
            return self.depart(job, &mut plan, known.as_ref(), stale, ticket, now);
        };
        let Some(slot) = self.free.pop() else {
            self.pool.push(job);
            return Some(Outcome::Failed(FULL));
        };
        if store.ask(keys, self.shard, self.internal(slot), version, now) {
            let mut flight = Flight::new(&mut plan, ticket, job.deadline);
            flight.waiting = Some(job);
            self.fly(slot, flight);
            return None;
        }
        self.free.push(slot);
        let now_ms = now_ms();
        let known = store.after(user, version, None, now, now_ms);
        self.metrics().record_known(&known, now_ms);
        self.proceed(job, &mut plan, Some(&known), version, ticket, now)
    }

    /// Computes a result for the cache, as the leader of its key: nobody waits for it here.
    fn refresh(&mut self, mut job: Box<Job>, plan: &Plan) {
        let Some(slot) = self.free.pop() else {
            self.pool.push(job);
            return self.pass_on(plan.key);
        };
        (job.shard, job.ticket) = (self.shard, self.internal(slot));
        // Who is shown the answer is the caller's to log.
        let mut flight = Flight::new(&mut Plan { shown: None, ..*plan }, Ticket(0), job.deadline);
        (flight.leader, flight.answered) = (true, true);
        match self.shared.jobs.push(job) {
            Ok(()) => {
                self.pushed = true;
                self.fly(slot, flight);
            }
            Err(job) => {
                self.pool.push(job);
                self.free.push(slot);
                self.pass_on(plan.key);
            }
        }
    }

    /// Takes a slot for a planned job and sends it on its way, or lets it wait for an identical one.
    fn launch(&mut self, mut job: Box<Job>, plan: &mut Plan, ticket: Ticket, now: Instant) -> Option<Outcome> {
        let key = plan.key;
        let Some(slot) = self.free.pop() else {
            self.pool.push(job);
            return Some(Outcome::Failed(FULL));
        };
        let internal = self.internal(slot);
        let Service { shared, pool, .. } = self;
        (job.shard, job.ticket) = (self.shard, internal);
        let mut flight = Flight::new(plan, ticket, job.deadline);
        let role = key.map(|key| shared.flights.join(key, Waiter { shard: self.shard, ticket: internal }));
        if role == Some(Role::Follower) {
            flight.waiting = Some(job);
        } else {
            flight.leader = role == Some(Role::Leader);
            if let (Some(redis), Some(key)) = (&shared.redis, key)
                && redis.get(key, self.shard, internal, now)
            {
                flight.waiting = Some(job);
                self.fly(slot, flight);
                return None;
            }
            if let Err(job) = shared.jobs.push(job) {
                pool.push(job);
                self.free.push(slot);
                if flight.leader {
                    self.pass_on(key);
                }
                return Some(Outcome::Failed(QUEUE_FULL));
            }
            self.pushed = true;
        }
        self.fly(slot, flight);
        None
    }

    /// Sends events or changes to the log.
    fn receive(
        &mut self,
        record: &[u8],
        durable: bool,
        deadline: Option<Duration>,
        endpoint: Endpoint,
        ticket: Ticket,
        now: Instant,
    ) -> Option<Outcome> {
        let Some(slot) = self.free.pop() else {
            return Some(Outcome::Failed(FULL));
        };
        let internal = self.internal(slot);
        let submission = Submission { record: record.to_vec(), durable, shard: self.shard, ticket: internal };
        if let Err(error) = self.shared.events.push(submission) {
            self.free.push(slot);
            return Some(Outcome::Failed(error));
        }
        let budget = self.shared.budget(deadline).unwrap_or_default();
        self.fly(slot, Flight::new(&mut Plan::of(endpoint, now), ticket, Deadline(now + budget)));
        None
    }

    /// Whether other replicas may have a slate: rows of items that came later differ there.
    fn can_share(&self, slate: &Slate) -> bool {
        let n = self.shared.generation.items.len();
        slate.degraded.is_empty() && slate.items.iter().all(|item| (item.row as usize) < n)
    }

    /// Whether a slate has items that went.
    fn any_gone(&self, slate: &Slate) -> bool {
        any_gone(self.shared.live.items().as_deref(), slate.items.iter().map(|item| item.row))
    }

    /// The shard's own name for the call in a slot.
    fn internal(&self, slot: u32) -> Ticket {
        Ticket(u64::from(self.slots[slot as usize].reuse) << 32 | u64::from(slot))
    }

    fn fly(&mut self, slot: u32, flight: Flight) {
        self.slots[slot as usize].flight = Some(flight);
        self.in_flight += 1;
        self.metrics().in_flight.store(self.in_flight as u64, Relaxed);
    }

    /// Wakes sleeping workers if jobs were pushed since the last call.
    pub fn kick(&mut self) {
        if std::mem::take(&mut self.pushed) {
            self.shared.jobs.kick();
        }
    }

    /// Takes what came in; calls `deliver` for every call that is answered. Returns how many completions there were.
    pub fn poll(&mut self, now: Instant, deliver: &mut dyn FnMut(Ticket, Outcome)) -> usize {
        let mut n = 0;
        while let Some(completion) = self.inbox().pop() {
            n += 1;
            match completion {
                Completion::Job(job) => self.job_back(job, now, deliver),
                // What went since the slate was made must not come out of it.
                Completion::Shared { ticket, result: Ok(slate) } if self.any_gone(&slate) => {
                    self.retry(ticket, deliver)
                }
                Completion::Shared { ticket, result } => {
                    if let Some(mut flight) = self.take(ticket) {
                        flight.waiting.take().into_iter().for_each(|job| self.pool.push(job));
                        self.metrics().record_shared();
                        let slate = |slate| Outcome::Slate(slate, CacheStatus::Miss);
                        self.answer(&flight, result.map_or_else(Outcome::Failed, slate), deliver);
                    }
                }
                Completion::Lead { ticket, key } => self.lead(ticket, key, now, deliver),
                Completion::Known { ticket, learned } => self.user_known(ticket, learned, now, deliver),
                Completion::Found { ticket, value } => self.found(ticket, value, now, deliver),
                Completion::Received { ticket, result } => {
                    if let Some(flight) = self.take(ticket) {
                        let received = match flight.plan.endpoint {
                            Endpoint::Events => Outcome::Received,
                            _ => Outcome::Changed,
                        };
                        let outcome = result.map_or_else(Outcome::Failed, received);
                        self.answer(&flight, outcome, deliver);
                    }
                }
            }
        }
        if now >= self.next_sweep {
            self.next_sweep = now + SWEEP;
            if self.in_flight > 0 {
                self.sweep(now, deliver);
            }
        }
        n
    }

    /// The slot that an internal ticket is of, if that is still its call's.
    fn slot(&mut self, ticket: Ticket) -> Option<&mut Slot> {
        let (slot, reuse) = (ticket.0 as u32, (ticket.0 >> 32) as u32);
        self.slots.get_mut(slot as usize).filter(|s| s.reuse == reuse)
    }

    /// The flight of an internal ticket, taken out of its slot.
    fn take(&mut self, ticket: Ticket) -> Option<Flight> {
        let slot = self.slot(ticket)?;
        let flight = slot.flight.take()?;
        slot.reuse = slot.reuse.wrapping_add(1);
        self.free.push(ticket.0 as u32);
        self.in_flight -= 1;
        self.metrics().in_flight.store(self.in_flight as u64, Relaxed);
        Some(flight)
    }

    fn answer(&self, flight: &Flight, outcome: Outcome, deliver: &mut dyn FnMut(Ticket, Outcome)) {
        if !flight.answered {
            if let (Outcome::Slate(slate, cache), Some(call)) = (&outcome, &flight.plan.shown) {
                let context: SmallVec<[_; 8]> =
                    call.context.iter().map(|(key, value)| (&key[..], &value[..])).collect();
                self.expose(&call.user_id, &context, slate, *cache);
            }
            self.metrics().record_outcome(flight.plan.endpoint, &outcome, flight.plan.started.elapsed());
            deliver(flight.ticket, outcome);
        }
    }

    fn job_back(&mut self, mut job: Box<Job>, now: Instant, deliver: &mut dyn FnMut(Ticket, Outcome)) {
        let Some(flight) = self.take(job.ticket) else {
            self.pool.push(job);
            return;
        };
        let live = self.shared.live.items();
        let outcome = match flight.plan.endpoint {
            Endpoint::Recommend => {
                let reranker = &self.shared.reranker;
                pipeline::finish_recommend(
                    &mut job,
                    reranker,
                    live.as_ref(),
                    flight.plan.n_items,
                    flight.plan.explain,
                    &mut self.finish,
                )
                .map(|slate| {
                    let status = if flight.plan.key.is_some() { CacheStatus::Miss } else { CacheStatus::Bypass };
                    Outcome::Slate(Arc::new(slate), status)
                })
            }
            Endpoint::Search | Endpoint::Rank => {
                pipeline::finish_scored(&mut job, live.as_deref()).map(|scored| Outcome::Scored(Arc::new(scored)))
            }
            Endpoint::Events | Endpoint::Items | Endpoint::Users => Err(Error::fixed(Code::Internal, "this is no job")),
            Endpoint::Infer => match job.failure.take() {
                Some(failure) => Err(failure),
                None => Ok(Outcome::Inferred(job.ranked.scores.as_slice().into())),
            },
        };
        if let Task::Infer { ranker, n, .. } = job.task {
            let (ok, latency) = (outcome.is_ok(), now.saturating_duration_since(flight.plan.started));
            self.metrics().record_infer(ranker, n, &job, ok, latency);
        }
        self.metrics().record_job(&job);
        let outcome = outcome.unwrap_or_else(Outcome::Failed);
        let slate = match &outcome {
            Outcome::Slate(slate, _) => Some(slate),
            _ => None,
        };
        let fault = match &outcome {
            Outcome::Failed(error) if error.code == Code::Internal => Some(error),
            _ => None,
        };
        if let (Some(cache), Some(key), Some(fault)) = (&self.shared.cache, flight.plan.key, fault) {
            cache.put_fault(key, fault, now);
        }
        if let (Some(cache), Some(key), Some(slate)) = (&self.shared.cache, flight.plan.key, slate) {
            // Before the followers are let go: whoever comes after them finds it.
            cache.put(key, slate, now);
            if let Some(redis) = self.shared.redis.as_ref().filter(|_| self.can_share(slate)) {
                redis.set(key, &value::encode(slate));
            }
        }
        if flight.leader {
            match (slate, fault) {
                (Some(slate), _) => self.release_followers(flight.plan.key, Ok(slate)),
                // Each of those that waited would meet it, too.
                (None, Some(fault)) => self.release_followers(flight.plan.key, Err(fault)),
                (None, None) => self.pass_on(flight.plan.key),
            }
        }
        self.answer(&flight, outcome, deliver);
        self.pool.push(job);
    }

    /// The second level of the cache has answered: so is the call, or it is computed.
    fn found(
        &mut self,
        ticket: Ticket,
        value: Option<Vec<u8>>,
        now: Instant,
        deliver: &mut dyn FnMut(Ticket, Outcome),
    ) {
        let slate = value.and_then(|bytes| {
            let slate = value::decode(&bytes, &self.shared.generation);
            if let (None, Some(redis)) = (&slate, &self.shared.redis) {
                redis.link.counters.unreadable.fetch_add(1, Relaxed);
            }
            slate.filter(|slate| !self.any_gone(slate))
        });
        let Some(slate) = slate.map(Arc::new) else { return self.retry(ticket, deliver) };
        let Some(mut flight) = self.take(ticket) else { return };
        flight.waiting.take().into_iter().for_each(|job| self.pool.push(job));
        if let (Some(cache), Some(key)) = (&self.shared.cache, flight.plan.key) {
            cache.put(key, &slate, now);
        }
        if flight.leader {
            self.release_followers(flight.plan.key, Ok(&slate));
        }
        self.answer(&flight, Outcome::Slate(slate, CacheStatus::L2), deliver);
    }

    /// Ends a single flight: hands its end to whoever waited.
    fn release_followers(&self, key: Option<CacheKey>, result: Result<&Arc<Slate>, &Error>) {
        let Some(key) = key else { return };
        for Waiter { shard, ticket } in self.shared.flights.finish(key) {
            let result = result.map(Arc::clone).map_err(Error::clone);
            self.shared.complete(shard, Completion::Shared { ticket, result });
        }
    }

    /// A single flight's leader has no answer for the others, as when its own time was up: one of them leads from now on, and the rest go on
    /// waiting.
    fn pass_on(&self, key: Option<CacheKey>) {
        let Some(key) = key else { return };
        if let Some(Waiter { shard, ticket }) = self.shared.flights.pass_on(key) {
            self.shared.complete(shard, Completion::Lead { ticket, key });
        }
    }

    /// A call that waited leads.
    fn lead(&mut self, ticket: Ticket, key: CacheKey, now: Instant, deliver: &mut dyn FnMut(Ticket, Outcome)) {
        match self.slot(ticket).and_then(|slot| slot.flight.as_mut()) {
            Some(flight) if !flight.answered && !flight.deadline.passed(now) => {
                flight.leader = true;
                self.retry(ticket, deliver);
            }
            // It needs no answer, or will get its own in time.
            _ => {
                self.pass_on(Some(key));
                self.abandon(ticket, deliver);
            }
        }
    }

    /// Ends a call that waited and has no time left.
    fn abandon(&mut self, ticket: Ticket, deliver: &mut dyn FnMut(Ticket, Outcome)) {
        if let Some(mut flight) = self.take(ticket) {
            flight.waiting.take().into_iter().for_each(|job| self.pool.push(job));
            self.answer(&flight, Outcome::Failed(LATE), deliver);
        }
    }

    /// The feature store has looked for the user of a call, which goes on.
    fn user_known(
        &mut self,
        ticket: Ticket,
        learned: Option<Learned>,
        now: Instant,
        deliver: &mut dyn FnMut(Ticket, Outcome),
    ) {
        let Some(mut flight) = self.take(ticket) else { return };
        let (Some(job), Some(store)) = (flight.waiting.take(), &self.shared.store) else { return };
        if flight.answered || flight.deadline.passed(now) {
            self.pool.push(job);
            return self.answer(&flight, Outcome::Failed(LATE), deliver);
        }
        let version = self.shared.live.version_of(&job.user.id);
        let now_ms = now_ms();
        let known = store.after(&job.user.id, version, learned, now, now_ms);
        self.metrics().record_known(&known, now_ms);
        if let Some(outcome) = self.proceed(job, &mut flight.plan, Some(&known), version, flight.ticket, now) {
            self.answer(&flight, outcome, deliver);
        }
    }

    /// A planned call goes on, of whose user all is known.
    fn proceed(
        &mut self,
        job: Box<Job>,
        plan: &mut Plan,
        known: Option<&Known>,
        version: u64,
        ticket: Ticket,
        now: Instant,
    ) -> Option<Outcome> {
        let Service { shared, pool, .. } = self;
        let mut stale = None;
        // Else the cache was asked before it was planned.
        if let (true, None, Some(cache)) = (plan.cacheable, plan.key, &shared.cache) {
            let version = known.map_or(version, |known| known.version(version));
            let key = shared.key(&job.user.id, version, &job, &job.query, plan.n_items);
            match shared.consult(cache, key, job.items.as_deref(), now) {
                ControlFlow::Continue(past) => stale = past,
                ControlFlow::Break(outcome) => {
                    pool.push(job);
                    return Some(outcome);
                }
            }
            plan.key = Some(key);
        }
        self.depart(job, plan, known, stale, ticket, now)
    }

    /// A planned call of which the cache has no answer, or one that is stale, as the leader of its key.
    fn depart(
        &mut self,
        mut job: Box<Job>,
        plan: &mut Plan,
        known: Option<&Known>,
        stale: Option<Arc<Slate>>,
        ticket: Ticket,
        now: Instant,
    ) -> Option<Outcome> {
        let Shared { generation, live, config, .. } = &*self.shared;
        if let Err(error) = plan::resolve_user(generation, Some(live), known, &config.pipeline, &mut job) {
            self.pool.push(job);
            if stale.is_some() {
                self.pass_on(plan.key);
            }
            return Some(Outcome::Failed(error));
        }
        if let Some(slate) = stale {
            self.refresh(job, plan);
            return Some(Outcome::Slate(slate, CacheStatus::Stale));
        }
        self.launch(job, plan, ticket, now)
    }

    /// Sends a job that waited to the workers.
    fn retry(&mut self, ticket: Ticket, deliver: &mut dyn FnMut(Ticket, Outcome)) {
        let flight = self.slot(ticket).and_then(|slot| slot.flight.as_mut());
        let Some(job) = flight.and_then(|flight| flight.waiting.take()) else { return };
        match self.shared.jobs.push(job) {
            Ok(()) => self.pushed = true,
            Err(job) => {
                self.pool.push(job);
                if let Some(flight) = self.take(ticket) {
                    if flight.leader {
                        self.pass_on(flight.plan.key);
                    }
                    self.answer(&flight, Outcome::Failed(QUEUE_FULL), deliver);
                }
            }
        }
    }

    /// Answers calls that ran out of time. Their slots stay taken until their jobs come back.
    fn sweep(&mut self, now: Instant, deliver: &mut dyn FnMut(Ticket, Outcome)) {
        for slot in 0..self.slots.len() {
            let Some(flight) = &mut self.slots[slot].flight else { continue };
            if flight.answered || !flight.deadline.passed(now) {
                continue;
            }
            let outcome = Outcome::Failed(LATE);
            let latency = now.saturating_duration_since(flight.plan.started);
            let (ticket, endpoint) = (flight.ticket, flight.plan.endpoint);
            flight.answered = true;
            self.metrics().record_outcome(endpoint, &outcome, latency);
            deliver(ticket, outcome);
        }
    }
}
