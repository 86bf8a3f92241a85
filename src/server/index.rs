//! The vector index on the admin port: its partitions, and their division into others while they serve.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use hyper::body::Incoming;
use hyper::{Method, Request};
use parking_lot::Mutex;
use serde_json::{Value, json};

use super::http::{Answer, HttpState, only, respond};
use super::{signals, v2};
use crate::catalog::generation::Generation;
use crate::error::{Code, Error};
use crate::index::partitions::{MAX_PARTITIONS, Piece, State};
use crate::index::{Searchers, VectorIndex};

/// How a division stands.
#[derive(Clone, Debug, Default)]
enum Rebalance {
    /// There was none.
    #[default]
    None,
    /// The new index is being built.
    Building { partitions: u32, since: Instant },
    /// It serves.
    Done { partitions: u32, took: Duration },
    /// The old one serves on.
    Failed { partitions: u32, reason: String },
}

/// Who searches the partitions of the index, and how its division stands.
pub struct IndexAdmin {
    generation: Arc<Generation>,
    searchers: OnceLock<Arc<Searchers>>,
    rebalance: Mutex<Rebalance>,
}

impl IndexAdmin {
    /// For a generation's index.
    pub fn new(generation: Arc<Generation>) -> Self {
        IndexAdmin { generation, searchers: OnceLock::new(), rebalance: Mutex::default() }
    }

    /// Lets `searchers` search its partitions, and those of every division to come.
    pub fn serve(&self, searchers: Arc<Searchers>) {
        if let Some(index) = self.generation.made_index()
            && let Some(whole) = index.partitioned()
        {
            whole.give(searchers.clone());
        }
        let _ = self.searchers.set(searchers);
    }

    /// What there is to say of each partition; none for an index of one piece.
    pub fn states(&self) -> Vec<State> {
        let index = self.generation.made_index();
        pieces(&index).iter().map(Piece::state).collect()
    }

    /// Begins to divide the index into `partitions`, on threads of its own that give way to all others.
    ///
    /// # Errors
    /// A number out of range, a catalogue without embeddings, or a division that is not done.
    pub fn rebalance(self: &Arc<Self>, partitions: u32) -> Result<(), Error> {
        if !(1..=MAX_PARTITIONS).contains(&partitions) {
            let message = format!("partitions is {partitions}, expected 1 to {MAX_PARTITIONS}");
            return Err(Error::new(Code::BadRequest, message));
        }
        if self.generation.item_embeddings.is_none() {
            return Err(Error::fixed(Code::BadRequest, "the catalogue has no embeddings"));
        }
        {
            let mut rebalance = self.rebalance.lock();
            if matches!(*rebalance, Rebalance::Building { .. }) {
                return Err(Error::fixed(Code::Unavailable, "the index is being rebalanced already"));
            }
            *rebalance = Rebalance::Building { partitions, since: Instant::now() };
        }
        tracing::info!(partitions, "rebalancing the index");
        let this = self.clone();
        let thread = std::thread::Builder::new().name("rebalance".into()).spawn(move || {
            let began = Instant::now();
            let state = match this.divide(partitions) {
                Ok(()) => {
                    tracing::info!(partitions, seconds = began.elapsed().as_secs_f64(), "the index is rebalanced");
                    Rebalance::Done { partitions, took: began.elapsed() }
                }
                Err(reason) => {
                    tracing::error!(partitions, reason, "rebalancing failed; the index is as it was");
                    Rebalance::Failed { partitions, reason }
                }
            };
            *this.rebalance.lock() = state;
        });
        thread.map(drop).map_err(|_| {
            *self.rebalance.lock() = Rebalance::None;
            Error::fixed(Code::Unavailable, "no thread could be started")
        })
    }

    fn divide(&self, partitions: u32) -> Result<(), String> {
        let none = || Searchers::start(0, |_| {}).map_err(|e| e.to_string());
        let searchers = self.searchers.get().cloned().map_or_else(none, Ok)?;
        let build = || self.generation.rebalance(partitions, &searchers, &|_, _, _| {});
        let pool = rayon::ThreadPoolBuilder::new()
            .thread_name(|at| format!("rebalance-{at}"))
            .start_handler(|_| signals::give_way())
            .build()
            .map_err(|e| e.to_string())?;
        let built = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| pool.install(build)));
        built.unwrap_or_else(|_| Err("building the index panicked".into()))
    }

    fn describe(&self) -> Value {
        let rebalance = match &*self.rebalance.lock() {
            Rebalance::None => json!({ "state": "none" }),
            Rebalance::Building { partitions, since } => {
                json!({ "state": "building", "partitions": partitions, "seconds": since.elapsed().as_secs_f64() })
            }
            Rebalance::Done { partitions, took } => {
                json!({ "state": "done", "partitions": partitions, "seconds": took.as_secs_f64() })
            }
            Rebalance::Failed { partitions, reason } => {
                json!({ "state": "failed", "partitions": partitions, "reason": reason })
            }
        };
        let index = self.generation.made_index();
        let described = |piece: &Piece| {
            let State { is_up, failures, latenesses } = piece.state();
            json!({ "n_items": piece.rows().len(), "up": is_up, "failed": failures, "late": latenesses })
        };
        let pieces: Vec<Value> = pieces(&index).iter().map(described).collect();
        json!({
            "kind": index.as_ref().map(|index| index.kind().name()),
            "bytes": index.as_ref().map(|index| index.bytes()),
            "partitions": pieces,
            "searchers": self.searchers.get().map_or(0, |searchers| searchers.n_threads()),
            "rebalance": rebalance,
        })
    }
}

/// None for an index of one piece.
fn pieces(index: &Option<Arc<dyn VectorIndex>>) -> &[Piece] {
    index.as_ref().and_then(|index| index.partitioned()).map_or(&[], |whole| whole.pieces())
}

/// Answers `/index…` on the admin port.
pub async fn admin(request: Request<Incoming>, state: &HttpState) -> Answer {
    let shared = state.service.borrow().shared().clone();
    let status = match request.uri().path() {
        "/index" => {
            only(request.method(), &Method::GET)?;
            200
        }
        "/index/rebalance" => {
            only(request.method(), &Method::POST)?;
            v2::authorised(&request, &shared.config.server.admin_token)?;
            let options = v2::options(request).await?;
            if let Some(other) = options.as_object().and_then(|o| o.keys().find(|key| *key != "partitions")) {
                return Err(
                    Error::new(Code::BadRequest, format!("unknown field `{other}`, expected `partitions`")).into()
                );
            }
            let partitions = options.get("partitions").and_then(Value::as_u64);
            let partitions = partitions.and_then(|n| u32::try_from(n).ok());
            let message = "`partitions` is missing or not a number";
            shared.index.rebalance(partitions.ok_or(Error::fixed(Code::BadRequest, message))?)?;
            202
        }
        _ => return Err(Error::fixed(Code::NotFound, "no such path; there are /index and /index/rebalance").into()),
    };
    Ok(respond(status, "application/json", shared.index.describe().to_string().into_bytes()))
}
