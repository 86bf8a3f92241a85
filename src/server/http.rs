//! HTTP/1.1 by hyper on glommio: the JSON API and the admin port.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::future::{Future, poll_fn};
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{FromRawFd, IntoRawFd};
use std::panic::AssertUnwindSafe;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Context, Poll, Waker, ready};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_lite::{AsyncRead, AsyncWrite, FutureExt};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::header::{CONNECTION, CONTENT_TYPE, HeaderValue, RETRY_AFTER};
use hyper::{Method, Request, Response};

use super::json::{self, ConditionBody, EventsBody, RankBody, RecommendBody, SearchBody, VectorBody};
use super::service::Service;
use super::{changes, index, tensors, v2};
use crate::api::{
    Call, Event, EventsCall, Outcome, RankCall, RecommendCall, SearchBy, SearchCall, SearchFilter, Ticket,
};
use crate::catalog::conditions::Demand;
use crate::context::now_ms;
use crate::error::{Code, Error};
use crate::index::SearchParams;
use crate::state::event;
use crate::telemetry::metrics::{Endpoint, Gauges};
use crate::wire::LIMITS;

/// Marks a ticket as an HTTP call's.
const HTTP_TICKET: u64 = 1 << 63;
/// Headers must be whole within this time.
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);
/// A body must be whole within this time.
const BODY_TIMEOUT: Duration = Duration::from_secs(10);
/// HTTP connections per shard and port.
const MAX_CONNECTIONS: usize = 1024;

/// Which port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Routes {
    /// `/v1/…`, `/v2/…`
    Api,
    /// `/metrics`, `/healthz`, `/readyz`, `/generations`, `/index`, `/v2/repository/…`
    Admin,
}

/// Calls that wait for their outcome.
#[derive(Default)]
pub struct HttpCalls {
    slots: RefCell<Vec<CallSlot>>,
    free: RefCell<Vec<u32>>,
}

#[derive(Default)]
struct CallSlot {
    reuse: u32,
    outcome: Option<Outcome>,
    waker: Option<Waker>,
}

impl HttpCalls {
    fn open(&self) -> Ticket {
        let mut slots = self.slots.borrow_mut();
        let slot = self.free.borrow_mut().pop().unwrap_or_else(|| {
            slots.push(CallSlot::default());
            slots.len() as u32 - 1
        });
        let reuse = u64::from(slots[slot as usize].reuse & 0x7fff_ffff);
        Ticket(HTTP_TICKET | reuse << 32 | u64::from(slot))
    }

    fn close(&self, ticket: Ticket) {
        let slot = ticket.0 as u32;
        let mut slots = self.slots.borrow_mut();
        let reuse = slots[slot as usize].reuse.wrapping_add(1);
        slots[slot as usize] = CallSlot { reuse, ..CallSlot::default() };
        self.free.borrow_mut().push(slot);
    }

    /// Hands an outcome to the call that waits for it; dropped if its client is gone.
    pub fn deliver(&self, ticket: Ticket, outcome: Outcome) {
        let mut slots = self.slots.borrow_mut();
        let slot = slots.get_mut(ticket.0 as u32 as usize);
        let reuse = (ticket.0 >> 32) as u32 & 0x7fff_ffff;
        if let Some(slot) = slot.filter(|s| s.reuse & 0x7fff_ffff == reuse) {
            slot.outcome = Some(outcome);
            if let Some(waker) = slot.waker.take() {
                waker.wake();
            }
        }
    }
}

/// Waits for one outcome; frees the slot when dropped, also when the client went away.
struct Waiting {
    calls: Rc<HttpCalls>,
    ticket: Ticket,
}

impl Future for Waiting {
    type Output = Outcome;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Outcome> {
        let mut slots = self.calls.slots.borrow_mut();
        let slot = &mut slots[self.ticket.0 as u32 as usize];
        match slot.outcome.take() {
            Some(outcome) => Poll::Ready(outcome),
            None => {
                slot.waker = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.calls.close(self.ticket);
    }
}

/// What all connections of a shard share.
pub struct HttpState {
    pub(super) service: Rc<RefCell<Service>>,
    calls: Rc<HttpCalls>,
    /// By number, what wakes an open connection; it then ends as soon as it owes no answer.
    connections: RefCell<BTreeMap<u64, Option<Waker>>>,
    next_connection: Cell<u64>,
    ending: Cell<bool>,
}

/// Takes a connection off the list, however it ends.
struct Open<'a> {
    state: &'a HttpState,
    number: u64,
    /// Open connections of its port.
    of_port: Rc<Cell<usize>>,
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.of_port.set(self.of_port.get() - 1);
        self.state.connections.borrow_mut().remove(&self.number);
    }
}

impl HttpState {
    /// The state of one shard's HTTP side.
    pub fn new(service: Rc<RefCell<Service>>, calls: Rc<HttpCalls>) -> Self {
        HttpState {
            service,
            calls,
            connections: RefCell::default(),
            next_connection: Cell::new(0),
            ending: Cell::new(false),
        }
    }

    fn open(&self, of_port: Rc<Cell<usize>>) -> Open<'_> {
        of_port.set(of_port.get() + 1);
        let number = self.next_connection.get();
        self.next_connection.set(number + 1);
        self.connections.borrow_mut().insert(number, None);
        Open { state: self, number, of_port }
    }

    /// Lets every connection finish what it was asked, and end.
    pub fn end(&self) {
        self.ending.set(true);
        self.connections.borrow_mut().values_mut().filter_map(Option::take).for_each(Waker::wake);
    }

    /// Whether no connection is open.
    pub fn idle(&self) -> bool {
        self.connections.borrow().is_empty()
    }

    /// Makes a call and waits for its outcome.
    pub(super) async fn call(&self, call: &Call<'_>) -> Outcome {
        self.start(|service, ticket| service.submit(call, ticket, Instant::now())).await
    }

    /// Starts what is answered under a ticket, and waits for the outcome.
    pub(super) async fn start(&self, start: impl FnOnce(&mut Service, Ticket) -> Option<Outcome>) -> Outcome {
        let ticket = self.calls.open();
        let waiting = Waiting { calls: self.calls.clone(), ticket };
        let submitted = {
            let mut service = self.service.borrow_mut();
            let outcome = start(&mut service, ticket);
            service.kick();
            outcome
        };
        match submitted {
            Some(outcome) => outcome,
            // The service answers every call by its deadline.
            None => waiting.await,
        }
    }
}

/// A listening socket with `SO_REUSEPORT`, so that each shard has its own on the same address.
///
/// # Errors
/// The address is not ours.
pub fn listen_again(addr: SocketAddr) -> io::Result<TcpListener> {
    let socket = bound(addr, true)?;
    socket.listen(1024)?;
    Ok(socket.into())
}

/// As [`listen_again`], but only if nobody listens there yet: `SO_REUSEPORT` alone would let a second server take a share
/// of the first one's clients.
///
/// # Errors
/// The address is taken or not ours.
pub fn listen(addr: SocketAddr) -> io::Result<TcpListener> {
    drop(bound(addr, false)?);
    listen_again(addr)
}

fn bound(addr: SocketAddr, shared: bool) -> io::Result<socket2::Socket> {
    let socket = socket2::Socket::new(socket2::Domain::for_address(addr), socket2::Type::STREAM, None)?;
    socket.set_reuse_port(shared)?;
    socket.set_reuse_address(true)?;
    socket.bind(&addr.into())?;
    Ok(socket)
}

/// Accepts and serves until cancelled.
pub async fn serve(listener: TcpListener, state: Rc<HttpState>, routes: Routes) {
    #[allow(unsafe_code)]
    // SAFETY: the descriptor is given away by its owner and taken by glommio's listener.
    let listener = unsafe { glommio::net::TcpListener::from_raw_fd(listener.into_raw_fd()) };
    let of_port = Rc::new(Cell::new(0));
    loop {
        let stream = match listener.accept().await {
            Ok(stream) => stream,
            Err(error) => {
                // Out of descriptors, most likely: trying again at once would be a loop at full speed.
                tracing::warn!(%error, "accepting an HTTP connection failed");
                glommio::timer::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        if of_port.get() >= MAX_CONNECTIONS {
            continue;
        }
        let (state, of_port) = (state.clone(), of_port.clone());
        glommio::spawn_local(async move {
            let open = state.open(of_port);
            // A panic in one connection must not end the shard.
            if AssertUnwindSafe(connection(stream, &open, routes)).catch_unwind().await.is_err() {
                tracing::error!("an HTTP connection panicked");
            }
        })
        .detach();
    }
}

async fn connection(stream: glommio::net::TcpStream, open: &Open<'_>, routes: Routes) {
    // Latency is all that it changes.
    let _ = stream.set_nodelay(true);
    let state = open.state;
    let service =
        hyper::service::service_fn(|request| async move { Ok::<_, Infallible>(answer(request, state, routes).await) });
    let mut served = pin!(
        hyper::server::conn::http1::Builder::new()
            .timer(GlommioTimer)
            .header_read_timeout(HEADER_TIMEOUT)
            .max_headers(64)
            .max_buf_size(64 << 10)
            .serve_connection(GlommioIo(stream), service)
    );
    let mut told = false;
    let served = poll_fn(|cx| {
        if !state.ending.get() {
            if let Some(waker) = state.connections.borrow_mut().get_mut(&open.number)
                && waker.as_ref().is_none_or(|waker| !waker.will_wake(cx.waker()))
            {
                *waker = Some(cx.waker().clone());
            }
        } else if !std::mem::replace(&mut told, true) {
            served.as_mut().graceful_shutdown();
        }
        served.as_mut().poll(cx)
    });
    if let Err(error) = served.await {
        tracing::debug!(%error, "an HTTP connection ended");
    }
}

pub(super) fn respond(code: u16, content_type: &'static str, body: Vec<u8>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = hyper::StatusCode::from_u16(code).unwrap_or(hyper::StatusCode::INTERNAL_SERVER_ERROR);
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

fn failed(error: &Error, v2: bool) -> Response<Full<Bytes>> {
    let body = if v2 { tensors::error(error) } else { json::error(error) };
    let mut response = respond(error.code.status(), "application/json", body);
    if matches!(error.code, Code::Overloaded | Code::Unavailable) {
        response.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("1"));
    }
    response
}

async fn answer(request: Request<Incoming>, state: &HttpState, routes: Routes) -> Response<Full<Bytes>> {
    let v2 = request.uri().path().strip_prefix("/v2").is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
    let result = match routes {
        Routes::Api if v2 => v2::api(request, state).await,
        Routes::Api => api(request, state).await,
        Routes::Admin if v2 => v2::admin(request, state).await,
        Routes::Admin if request.uri().path().starts_with("/index") => index::admin(request, state).await,
        Routes::Admin => admin(&request, state),
    };
    let mut response = match result {
        Ok(response) => response,
        Err(Failure::Refused(error) | Failure::Failed(error)) => failed(&error, v2),
    };
    if state.service.borrow().draining() {
        response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

pub(super) type Answer = Result<Response<Full<Bytes>>, Failure>;

/// Why there is no answer but an error.
pub(super) enum Failure {
    /// The request did not become a call, which counts here.
    Refused(Error),
    /// The call failed; the service has counted it.
    Failed(Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Failure::Refused(error)
    }
}

pub(super) fn only(method: &Method, allowed: &Method) -> Result<(), Error> {
    match method == allowed {
        true => Ok(()),
        false => Err(Error::new(Code::MethodNotAllowed, format!("only {allowed} is allowed here"))),
    }
}

async fn api(request: Request<Incoming>, state: &HttpState) -> Answer {
    let started = Instant::now();
    if let Some(route) = changes::route(&request) {
        let route = route?;
        let endpoint = route.endpoint();
        return recorded(changes::answer(route, request, state).await, endpoint, state, started);
    }
    let endpoint = match request.uri().path() {
        "/v1/recommend" => Endpoint::Recommend,
        "/v1/search" => Endpoint::Search,
        "/v1/rank" => Endpoint::Rank,
        "/v1/events" => Endpoint::Events,
        _ => {
            let message =
                "no such path; there are /v1/recommend, /v1/search, /v1/rank, /v1/events, /v1/items, /v1/users and /v2";
            return Err(Error::fixed(Code::NotFound, message).into());
        }
    };
    let answer = async {
        only(request.method(), &Method::POST)?;
        let limit = state.service.borrow().shared().config.server.max_frame_bytes as usize;
        let body = body(request, limit).await?;
        match endpoint {
            Endpoint::Recommend => recommend(&body, state).await,
            Endpoint::Search => search(&body, state).await,
            Endpoint::Events => events(&body, state).await,
            _ => rank(&body, state).await,
        }
    };
    recorded(answer.await, endpoint, state, started)
}

/// Counts what did not become a call.
fn recorded(answer: Answer, endpoint: Endpoint, state: &HttpState, started: Instant) -> Answer {
    if let Err(Failure::Refused(error)) = &answer {
        let outcome = Outcome::Failed(error.clone());
        state.service.borrow().metrics().record_outcome(endpoint, &outcome, started.elapsed());
    }
    answer
}

pub(super) async fn body(request: Request<Incoming>, limit: usize) -> Result<Bytes, Error> {
    let collected = Limited::new(request.into_body(), limit).collect();
    let late = async {
        glommio::timer::sleep(BODY_TIMEOUT).await;
        Err(Error::fixed(Code::DeadlineExceeded, "the body took too long"))
    };
    let read = async {
        match collected.await {
            Ok(body) => Ok(body.to_bytes()),
            Err(e) if e.is::<http_body_util::LengthLimitError>() => {
                Err(Error::new(Code::TooLarge, format!("the body is larger than {limit} bytes")))
            }
            Err(_) => Err(Error::fixed(Code::BadRequest, "the body could not be read")),
        }
    };
    read.or(late).await
}

async fn recommend(body: &[u8], state: &HttpState) -> Answer {
    let body: RecommendBody<'_> = json::parse(body)?;
    check_id(&body.user_id.0, "user_id")?;
    let context = context(&body.context)?;
    if body.query.as_ref().is_some_and(|q| q.len() > LIMITS.query_bytes) {
        return Err(Error::fixed(Code::TooLarge, "query is longer than 1024 bytes").into());
    }
    if body.n_items == Some(0) {
        return Err(Error::fixed(Code::BadRequest, "n_items is 0, expected 1 or more").into());
    }
    let call = RecommendCall {
        user_id: &body.user_id.0,
        context: &context,
        n_items: body.n_items.unwrap_or(0),
        query: body.query.as_deref(),
        explain: body.explain,
        timings: body.timings,
        no_cache: body.no_cache,
        deadline: body.deadline_ms.map(Duration::from_millis),
    };
    match state.call(&Call::Recommend(call)).await {
        Outcome::Slate(slate, cache) => Ok(respond(200, "application/json", json::slate(&slate, cache, body.timings))),
        other => unexpected(other),
    }
}

async fn search(body: &[u8], state: &HttpState) -> Answer {
    let body: SearchBody<'_> = json::parse(body)?;
    let mut flat = Vec::new();
    let by = match (&body.vector, &body.vectors, &body.item_id, &body.user_id, &body.text) {
        (Some(vector), None, None, None, None) => SearchBy::Vector(&vector.0),
        (None, Some(vectors), None, None, None) => several(&vectors.0, &mut flat)?,
        (None, None, Some(item), None, None) => SearchBy::Item(&item.0),
        (None, None, None, Some(user), None) => SearchBy::User(&user.0),
        (None, None, None, None, Some(text)) if text.len() <= LIMITS.query_bytes => SearchBy::Text(text),
        (None, None, None, None, Some(_)) => {
            return Err(Error::fixed(Code::TooLarge, "text is longer than 1024 bytes").into());
        }
        _ => {
            let message = "a search takes exactly one of vector, vectors, item_id, user_id, text";
            return Err(Error::fixed(Code::BadRequest, message).into());
        }
    };
    match by {
        SearchBy::Item(id) => check_id(id, "item_id")?,
        SearchBy::User(id) => check_id(id, "user_id")?,
        SearchBy::Vector(values) if values.len() > LIMITS.vector_values => {
            return Err(Error::fixed(Code::TooLarge, "a vector has more than 8192 values").into());
        }
        SearchBy::Vector(_) | SearchBy::Vectors { .. } | SearchBy::Text(_) => {}
    }
    let exclude = item_ids(&body.exclude_item_ids.0)?;
    let filter = &body.filter.0;
    if filter.len() > LIMITS.conditions {
        return Err(Error::fixed(Code::TooLarge, "more than 32 conditions").into());
    }
    let mut values: Vec<&str> = Vec::new();
    for (column, condition) in filter {
        check_id(&column.0, "a condition's column")?;
        if let ConditionBody::Values(words) = condition {
            values.extend(words.0.iter().map(|word| &*word.0));
        }
    }
    if values.len() > LIMITS.condition_values {
        return Err(Error::fixed(Code::TooLarge, "conditions have more than 256 values").into());
    }
    let mut rest = &values[..];
    let conditions: Vec<(&str, Demand<'_>)> = filter
        .iter()
        .map(|(column, condition)| {
            let demand = match condition {
                ConditionBody::Number(number) => Demand::Number(*number),
                ConditionBody::Values(words) => {
                    let (own, others) = rest.split_at(words.0.len());
                    rest = others;
                    Demand::Values(own)
                }
                ConditionBody::Compare(compare) => Demand::Compare(*compare),
            };
            (&*column.0, demand)
        })
        .collect();
    let call = SearchCall {
        by,
        k: body.k.unwrap_or(10),
        filter: SearchFilter { conditions: &conditions, exclude: &exclude, exclude_seen: body.exclude_seen },
        params: SearchParams { n_probes: body.n_probes, refine_ratio: body.refine_ratio, ef_search: body.ef_search },
        deadline: body.deadline_ms.map(Duration::from_millis),
    };
    match state.call(&Call::Search(call)).await {
        Outcome::Scored(scored) => Ok(respond(200, "application/json", json::scored(&scored))),
        other => unexpected(other),
    }
}

/// Puts vectors one after another.
fn several<'a>(vectors: &[VectorBody], flat: &'a mut Vec<f32>) -> Result<SearchBy<'a>, Error> {
    if vectors.len() > LIMITS.vectors {
        return Err(Error::fixed(Code::TooLarge, "more than 64 vectors"));
    }
    let dim = vectors.first().map_or(0, |first| first.0.len());
    for (at, vector) in vectors.iter().enumerate() {
        if vector.0.len() > LIMITS.vector_values {
            return Err(Error::fixed(Code::TooLarge, "a vector has more than 8192 values"));
        }
        if vector.0.len() != dim {
            let message = format!("vectors[{at}] has {} values, the first one has {dim}", vector.0.len());
            return Err(Error::new(Code::BadRequest, message));
        }
        flat.extend_from_slice(&vector.0);
    }
    Ok(SearchBy::Vectors { values: flat, n: vectors.len() as u32 })
}

fn item_ids<'a>(ids: &'a [json::Text<'_>]) -> Result<Vec<&'a str>, Error> {
    if ids.len() > LIMITS.items {
        return Err(Error::fixed(Code::TooLarge, "more than 10000 items"));
    }
    let ids: Vec<&str> = ids.iter().map(|id| &*id.0).collect();
    ids.iter().try_for_each(|id| check_id(id, "an item id"))?;
    Ok(ids)
}

async fn rank(body: &[u8], state: &HttpState) -> Answer {
    let body: RankBody<'_> = json::parse(body)?;
    check_id(&body.user_id.0, "user_id")?;
    let context = context(&body.context)?;
    let item_ids = item_ids(&body.item_ids.0)?;
    let call = RankCall {
        user_id: &body.user_id.0,
        context: &context,
        item_ids: &item_ids,
        ranker: body.ranker.as_deref(),
        deadline: body.deadline_ms.map(Duration::from_millis),
    };
    match state.call(&Call::Rank(call)).await {
        Outcome::Scored(scored) => Ok(respond(200, "application/json", json::scored(&scored))),
        other => unexpected(other),
    }
}

async fn events(body: &[u8], state: &HttpState) -> Answer {
    let body: EventsBody<'_> = json::parse(body)?;
    let mut encoder = event::Encoder::new(body.events.0.len(), now_ms())?;
    for event in &body.events.0 {
        let context: Pairs<'_> = event.context.iter().map(|(key, value)| (&**key, &*value.0)).collect();
        encoder.push(&Event {
            event_id: event.event_id.as_ref().map_or("", |id| &id.0),
            user_id: &event.user_id.0,
            item_id: &event.item_id.0,
            kind: &event.kind,
            value: event.value.unwrap_or(f32::NAN),
            time_ms: event.time_ms.unwrap_or(0),
            context: &context,
        })?;
    }
    let record = encoder.record();
    let deadline = body.deadline_ms.map(Duration::from_millis);
    match state.call(&Call::Events(EventsCall { record: &record, durable: body.durable, deadline })).await {
        Outcome::Received(receipt) => Ok(respond(200, "application/json", json::receipt(receipt))),
        other => unexpected(other),
    }
}

pub(super) fn unexpected(outcome: Outcome) -> Answer {
    Err(Failure::Failed(match outcome {
        Outcome::Failed(error) => error,
        _ => Error::fixed(Code::Internal, "the answer does not fit the question"),
    }))
}

fn check_id(id: &str, field: &str) -> Result<(), Error> {
    match (1..=LIMITS.id_bytes).contains(&id.len()) {
        true => Ok(()),
        false => Err(Error::new(Code::BadRequest, format!("{field} is empty or longer than 256 bytes"))),
    }
}

type Pairs<'a> = smallvec::SmallVec<[(&'a str, &'a str); 16]>;

fn context<'a>(
    context: &'a std::collections::BTreeMap<std::borrow::Cow<'_, str>, json::Text<'_>>,
) -> Result<Pairs<'a>, Error> {
    if context.len() > LIMITS.context_pairs {
        return Err(Error::fixed(Code::TooLarge, "context has more than 64 pairs"));
    }
    let pairs: Pairs<'a> = context.iter().map(|(key, value)| (&**key, &*value.0)).collect();
    match pairs.iter().map(|(k, v)| k.len() + v.len()).sum::<usize>() <= LIMITS.context_bytes {
        true => Ok(pairs),
        false => Err(Error::fixed(Code::TooLarge, "context is longer than 4096 bytes")),
    }
}

fn admin(request: &Request<Incoming>, state: &HttpState) -> Answer {
    let path = request.uri().path();
    if !matches!(path, "/metrics" | "/healthz" | "/readyz" | "/generations") {
        let message = "no such path; there are /metrics, /healthz, /readyz, /generations, /index and /v2/repository";
        return Err(Error::fixed(Code::NotFound, message).into());
    }
    only(request.method(), &Method::GET)?;
    let service = state.service.borrow();
    let shared = service.shared();
    match path {
        "/metrics" => {
            let pieces = shared.index.states();
            let gauges = Gauges {
                sinks: shared.events.sinks.get().map_or(&[], |sinks| &sinks[..]),
                partitions: pieces.len(),
                partitions_down: pieces.iter().filter(|state| !state.is_up).count(),
                partition_failures: pieces.iter().map(|state| state.failures).sum(),
                partition_latenesses: pieces.iter().map(|state| state.latenesses).sum(),
                queue_depth: shared.jobs.len(),
                cache_bytes: shared.cache.as_ref().map_or(0, |c| c.bytes()),
                cache_entries: shared.cache.as_ref().map_or(0, |c| c.len()),
                filter_cache_bytes: shared.generation.filter_bytes(),
                live_users: shared.live.n_users(),
                live_entries: shared.live.n_entries(),
                items: shared.live.items(),
                live_values: shared.live.n_live_values(),
                live_profiles: shared.live.n_profiles(),
                profile_bytes: shared.live.profile_bytes(),
                trending_ms: shared.live.trending_ms(),
                precomputed_ms: shared.precomputed.as_ref().map(|file| file.made() as i64 * 1000),
                events: Some(&shared.events.counters),
                links: &shared.links,
                store: shared.store.as_ref(),
                followed: shared.items.as_ref().map(|items| &items.counters),
                devices: shared.devices.get().map_or(&[], Vec::as_slice),
                generation: &shared.generation.version,
            };
            let text = shared.metrics.render(&gauges);
            Ok(respond(200, "text/plain; version=0.0.4; charset=utf-8", text.into_bytes()))
        }
        "/generations" => {
            let generation = &shared.generation;
            let rankers: Vec<&str> = generation.rankers.iter().map(|r| r.name.as_str()).collect();
            let body = serde_json::json!([{
                "version": generation.version, "serving": true, "n_items": generation.items.len(),
                "n_users": generation.users.len(), "rankers": rankers,
            }]);
            Ok(respond(200, "application/json", body.to_string().into_bytes()))
        }
        "/healthz" => Ok(respond(200, "text/plain", b"ok\n".to_vec())),
        _ if service.draining() => Err(Error::fixed(Code::Unavailable, "draining").into()),
        _ => Ok(respond(200, "text/plain", b"ready\n".to_vec())),
    }
}

/// glommio's stream as hyper wants it.
struct GlommioIo(glommio::net::TcpStream);

impl hyper::rt::Read for GlommioIo {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        mut buffer: hyper::rt::ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        let mut chunk = [0; 8192];
        let room = buffer.remaining().min(chunk.len());
        let n = ready!(Pin::new(&mut self.0).poll_read(cx, &mut chunk[..room]))?;
        buffer.put_slice(&chunk[..n]);
        Poll::Ready(Ok(()))
    }
}

impl hyper::rt::Write for GlommioIo {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_close(cx)
    }
}

/// hyper asks for `Send + Sync` sleeps, though everything here stays on one executor; `SendWrapper` checks that.
struct Sleep(send_wrapper::SendWrapper<glommio::timer::Timer>);

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        Pin::new(&mut *self.0).poll(cx).map(|_| ())
    }
}

impl hyper::rt::Sleep for Sleep {}

#[derive(Clone, Copy)]
struct GlommioTimer;

impl hyper::rt::Timer for GlommioTimer {
    fn sleep(&self, duration: Duration) -> Pin<Box<dyn hyper::rt::Sleep>> {
        Box::pin(Sleep(send_wrapper::SendWrapper::new(glommio::timer::Timer::new(duration))))
    }

    fn sleep_until(&self, deadline: Instant) -> Pin<Box<dyn hyper::rt::Sleep>> {
        self.sleep(deadline.saturating_duration_since(Instant::now()))
    }
}
