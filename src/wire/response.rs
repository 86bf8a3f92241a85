//! Answers, encoded with a builder that is reused.

use flatbuffers::{FlatBufferBuilder, ForwardsUOffset, UnionWIPOffset, Vector, WIPOffset};
use smallvec::SmallVec;

use super::schema::{self, Body};
use crate::api::{CacheStatus, Outcome, Receipt, ScoredItems, Slate, SlateItem};
use crate::candidates::Source;
use crate::catalog::generation::NO_ROW;
use crate::context::{Degradation, Stage, StageTimings};
use crate::error::{Code, Error};

pub(super) fn finish<'b>(
    builder: &'b mut FlatBufferBuilder<'static>,
    request_id: u64,
    kind: Body,
    body: WIPOffset<UnionWIPOffset>,
) -> &'b [u8] {
    let args = schema::MessageArgs { request_id, body_type: kind, body: Some(body) };
    let message = schema::Message::create(builder, &args);
    schema::finish_message_buffer(builder, message);
    builder.finished_data()
}

/// The message that answers a call. `timings` says whether the client asked for them.
pub fn encode<'b>(
    builder: &'b mut FlatBufferBuilder<'static>,
    request_id: u64,
    outcome: &Outcome,
    timings: bool,
) -> &'b [u8] {
    match outcome {
        Outcome::Slate(slate, cache) => encode_slate(builder, request_id, slate, *cache, timings),
        Outcome::Scored(scored) => encode_scored(builder, request_id, scored),
        Outcome::Failed(failure) => error(builder, request_id, failure),
        Outcome::Received(receipt) => encode_receipt(builder, request_id, *receipt),
        Outcome::Changed(receipt) => encode_changed(builder, request_id, *receipt),
        // No frame asks for it.
        Outcome::Inferred(_) => error(builder, request_id, &Error::fixed(Code::Internal, "no answer of this protocol")),
    }
}

/// The message of an error.
pub fn error<'b>(builder: &'b mut FlatBufferBuilder<'static>, request_id: u64, error: &Error) -> &'b [u8] {
    builder.reset();
    let args = schema::ErrorArgs {
        code: error.code.status(),
        name: Some(builder.create_string(error.code.name())),
        message: Some(builder.create_string(&error.message)),
        retryable: error.code.retryable(),
    };
    let body = schema::Error::create(builder, &args).as_union_value();
    finish(builder, request_id, Body::Error, body)
}

/// The message that answers a health request.
pub fn health<'b>(
    builder: &'b mut FlatBufferBuilder<'static>,
    request_id: u64,
    ready: bool,
    version: &str,
) -> &'b [u8] {
    builder.reset();
    let args = schema::HealthStatusArgs { ready, model_version: Some(builder.create_string(version)) };
    let body = schema::HealthStatus::create(builder, &args).as_union_value();
    finish(builder, request_id, Body::HealthStatus, body)
}

fn encode_receipt<'b>(builder: &'b mut FlatBufferBuilder<'static>, request_id: u64, receipt: Receipt) -> &'b [u8] {
    builder.reset();
    let Receipt { accepted, duplicates, unknown: unknown_items, durable, .. } = receipt;
    let args = schema::EventsReceiptArgs { accepted, duplicates, unknown_items, durable };
    let body = schema::EventsReceipt::create(builder, &args).as_union_value();
    finish(builder, request_id, Body::EventsReceipt, body)
}

fn encode_changed<'b>(builder: &'b mut FlatBufferBuilder<'static>, request_id: u64, receipt: Receipt) -> &'b [u8] {
    builder.reset();
    let Receipt { accepted, created, unknown, durable, .. } = receipt;
    let args = schema::ChangeReceiptArgs { accepted, created, unknown, durable };
    let body = schema::ChangeReceipt::create(builder, &args).as_union_value();
    finish(builder, request_id, Body::ChangeReceipt, body)
}

fn encode_slate<'b>(
    builder: &'b mut FlatBufferBuilder<'static>,
    request_id: u64,
    slate: &Slate,
    cache: CacheStatus,
    timings: bool,
) -> &'b [u8] {
    builder.reset();
    let mut items: SmallVec<[_; 32]> = SmallVec::with_capacity(slate.items.len());
    for item in &slate.items {
        let args = schema::SlateItemArgs {
            item_id: Some(builder.create_string(slate.generation.items.ids.id(item.row))),
            score: item.score,
            sources: item.sources.0,
            explanation: explanation(builder, item),
        };
        items.push(schema::SlateItem::create(builder, &args));
    }
    let args = schema::SlateArgs {
        items: Some(builder.create_vector(&items)),
        model_version: Some(builder.create_string(&slate.generation.version)),
        cache: match cache {
            CacheStatus::Miss => schema::Cache::Miss,
            CacheStatus::L1 => schema::Cache::L1,
            CacheStatus::L2 => schema::Cache::L2,
            CacheStatus::Precomputed => schema::Cache::Precomputed,
            CacheStatus::Stale => schema::Cache::Stale,
            CacheStatus::Bypass => schema::Cache::Bypass,
        },
        degraded: degraded(builder, &slate.degraded),
        timings: if timings { stage_times(builder, &slate.timings) } else { None },
        known_user: slate.known_user,
        coverage: slate.coverage,
    };
    let body = schema::Slate::create(builder, &args).as_union_value();
    finish(builder, request_id, Body::Slate, body)
}

fn explanation<'a>(
    builder: &mut FlatBufferBuilder<'a>,
    item: &SlateItem,
) -> Option<WIPOffset<schema::ItemExplanation<'a>>> {
    let explanation = item.explanation.as_ref()?;
    let mut evidence = Vec::new();
    for source in Source::ALL {
        if let (Some(score), Some(rank)) =
            (explanation.source_scores[source as usize], explanation.source_ranks[source as usize])
        {
            let args = schema::SourceEvidenceArgs {
                source: Some(builder.create_string(source.name())),
                score,
                rank: u32::from(rank),
            };
            evidence.push(schema::SourceEvidence::create(builder, &args));
        }
    }
    let rules: Vec<_> = explanation.rules.iter().map(|r| builder.create_string(r)).collect();
    let args = schema::ItemExplanationArgs {
        evidence: Some(builder.create_vector(&evidence)),
        ranker_score: explanation.ranker_score,
        ranker_rank: explanation.ranker_rank,
        rules: Some(builder.create_vector(&rules)),
        backfill: explanation.backfill,
    };
    Some(schema::ItemExplanation::create(builder, &args))
}

fn encode_scored<'b>(builder: &'b mut FlatBufferBuilder<'static>, request_id: u64, scored: &ScoredItems) -> &'b [u8] {
    builder.reset();
    let mut items = Vec::with_capacity(scored.items.len());
    for item in &scored.items {
        let known = item.row != NO_ROW;
        let id = if known { scored.generation.items.ids.id(item.row) } else { "" };
        let args = schema::ScoredItemArgs { item_id: Some(builder.create_string(id)), score: item.score, known };
        items.push(schema::ScoredItem::create(builder, &args));
    }
    let args = schema::ScoredItemsArgs {
        items: Some(builder.create_vector(&items)),
        model_version: Some(builder.create_string(&scored.generation.version)),
        ranker: Some(builder.create_string(&scored.ranker)),
        degraded: degraded(builder, &scored.degraded),
        result_lengths: match &scored.result_lengths[..] {
            [] => None,
            lengths => Some(builder.create_vector(lengths)),
        },
        coverage: scored.coverage,
    };
    let body = schema::ScoredItems::create(builder, &args).as_union_value();
    finish(builder, request_id, Body::ScoredItems, body)
}

type Offsets<'a, T> = WIPOffset<Vector<'a, ForwardsUOffset<T>>>;

fn degraded<'a>(
    builder: &mut FlatBufferBuilder<'a>,
    degraded: &[Degradation],
) -> Option<Offsets<'a, schema::Degraded<'a>>> {
    if degraded.is_empty() {
        return None;
    }
    let mut entries: SmallVec<[_; 8]> = SmallVec::new();
    for entry in degraded {
        let args = schema::DegradedArgs {
            stage: Some(builder.create_string(entry.stage.name())),
            reason: Some(builder.create_string(entry.reason.name())),
        };
        entries.push(schema::Degraded::create(builder, &args));
    }
    Some(builder.create_vector(&entries))
}

fn stage_times<'a>(
    builder: &mut FlatBufferBuilder<'a>,
    timings: &StageTimings,
) -> Option<Offsets<'a, schema::StageTime<'a>>> {
    let mut entries: SmallVec<[_; Stage::COUNT]> = SmallVec::new();
    for stage in Stage::ALL.into_iter().filter(|&s| !timings.get(s).is_zero()) {
        let us = timings.get(stage).as_nanos() as f32 / 1000.0;
        let args = schema::StageTimeArgs { stage: Some(builder.create_string(stage.name())), us };
        entries.push(schema::StageTime::create(builder, &args));
    }
    Some(builder.create_vector(&entries))
}
