//! The Open Inference Protocol v2: every ranker of the bundle as a model whose tensors the client fills. Stock clients work.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Instant;

use hyper::body::Incoming;
use hyper::header::{AUTHORIZATION, CONTENT_ENCODING, HeaderValue};
use hyper::{Method, Request};
use serde_json::{Value, json};

use super::http::{Answer, Failure, HttpState, body, only, respond, unexpected};
use super::service::Shared;
use super::tensors;
use crate::api::{InferCall, Outcome};
use crate::catalog::generation::Generation;
use crate::error::{Code, Error};
use crate::pipeline::models::Model;
use crate::pipeline::plan::MAX_K;
use crate::ranking::precision::Report;
use crate::telemetry::metrics::{Endpoint, InferStats};

/// Bodies of the admin port.
const ADMIN_BODY_BYTES: usize = 64 << 10;

const NO_SUCH_PATH: Error = Error::fixed(Code::NotFound, "no such path");

fn answered(value: &Value) -> Answer {
    Ok(respond(200, "application/json", value.to_string().into_bytes()))
}

fn empty() -> Answer {
    Ok(respond(200, "application/json", Vec::new()))
}

/// The parts of a path after `/v2`, their `%XX` resolved; what is no UTF-8 then becomes no name that anything has.
fn parts(path: &str) -> Vec<String> {
    let part = |part: &str| {
        let (mut bytes, mut rest) = (Vec::with_capacity(part.len()), part.as_bytes());
        while let [first, after @ ..] = rest {
            let hex = after.first_chunk::<2>().filter(|hex| *first == b'%' && hex.iter().all(u8::is_ascii_hexdigit));
            let value =
                hex.and_then(|hex| std::str::from_utf8(hex).ok()).and_then(|hex| u8::from_str_radix(hex, 16).ok());
            bytes.push(value.unwrap_or(*first));
            rest = if value.is_some() { &after[2..] } else { after };
        }
        String::from_utf8_lossy(&bytes).into_owned()
    };
    path.split('/').skip(2).filter(|p| !p.is_empty()).map(part).collect()
}

/// The position of a model, whether it is unloaded or not.
fn place(shared: &Shared, name: &str) -> Result<usize, Error> {
    let place = shared.models.iter().position(|(model, _)| model.name == name);
    place.ok_or_else(|| Error::new(Code::NotFound, format!("no model `{name}`")))
}

/// What is there under `/v2/models/NAME[/versions/VERSION]`.
fn found<'s>(shared: &'s Shared, name: &str, version: Option<&str>) -> Result<(usize, &'s Model), Error> {
    let place = place(shared, name)?;
    let serving = shared.generation.version.as_str();
    match version {
        Some(other) if other != serving => {
            Err(Error::new(Code::NotFound, format!("no version `{other}` of model `{name}`; `{serving}` is served")))
        }
        _ if shared.models[place].1.load(Relaxed) => {
            Err(Error::new(Code::Unavailable, format!("model `{name}` is unloaded")))
        }
        _ => Ok((place, &shared.models[place].0)),
    }
}

/// Answers on the HTTP port.
pub async fn api(request: Request<Incoming>, state: &HttpState) -> Answer {
    let path = parts(request.uri().path());
    let parts: Vec<&str> = path.iter().map(String::as_str).collect();
    let (name, version, what) = match parts[..] {
        ["models", name] => (name, None, ""),
        ["models", name, what] => (name, None, what),
        ["models", name, "versions", version] => (name, Some(version), ""),
        ["models", name, "versions", version, what] => (name, Some(version), what),
        _ => ("", None, ""),
    };
    if what == "infer" {
        let started = Instant::now();
        let answer = infer(request, state, name, version).await;
        if let Err(Failure::Refused(error)) = &answer {
            let outcome = Outcome::Failed(error.clone());
            state.service.borrow().metrics().record_outcome(Endpoint::Infer, &outcome, started.elapsed());
        }
        return answer;
    }
    only(request.method(), &Method::GET)?;
    let service = state.service.borrow();
    let shared = service.shared();
    match (&parts[..], what) {
        ([], _) => answered(&json!({
            "name": "tastemaker", "version": env!("CARGO_PKG_VERSION"),
            "extensions": ["binary_tensor_data", "model_configuration", "model_repository", "statistics"],
        })),
        (["health", "live"], _) => empty(),
        (["health", "ready"], _) if service.draining() => {
            Err(Error::fixed(Code::Unavailable, "the server is shutting down").into())
        }
        (["health", "ready"], _) => empty(),
        (["models", "stats"], _) => {
            let all = 0..shared.models.len();
            answered(&json!({ "model_stats": all.map(|place| stats(shared, place)).collect::<Vec<_>>() }))
        }
        (["models", ..], "ready") => found(shared, name, version).map_err(Failure::from).and_then(|_| empty()),
        (["models", ..], "stats") => {
            let (place, _) = found(shared, name, version)?;
            answered(&json!({ "model_stats": [stats(shared, place)] }))
        }
        (["models", ..], "config") => {
            let (place, model) = found(shared, name, version)?;
            answered(&config(model, shared, place))
        }
        (["models", _] | ["models", _, "versions", _], "") => {
            let (place, model) = found(shared, name, version)?;
            answered(&metadata(model, &shared.generation, place))
        }
        _ => Err(NO_SUCH_PATH.into()),
    }
}

/// How a model is computed, in words; empty before a worker has loaded it.
fn computed(generation: &Generation, place: usize) -> String {
    generation.ranker_report(place).map(Report::to_string).unwrap_or_default()
}

fn metadata(model: &Model, generation: &Generation, place: usize) -> Value {
    let inputs: Vec<Value> = model
        .inputs
        .iter()
        .map(|i| json!({ "name": i.name, "datatype": i.datatype.name(), "shape": [-1, i.width as i64] }))
        .collect();
    let shape: &[i64] = if model.output.flat { &[-1] } else { &[-1, 1] };
    json!({
        "name": model.name, "versions": [generation.version], "platform": "tastemaker_onnx", "inputs": inputs,
        "outputs": [{ "name": model.output.name, "datatype": "FP32", "shape": shape }],
        "properties": { "computed": computed(generation, place) },
    })
}

fn config(model: &Model, shared: &Shared, place: usize) -> Value {
    let inputs: Vec<Value> = model
        .inputs
        .iter()
        .map(|i| json!({ "name": i.name, "data_type": format!("TYPE_{}", i.datatype.name()), "dims": [i.width] }))
        .collect();
    // The batch is a dimension of its own here, which leaves none to a flat output; the form wants one, of which it then is.
    let mut output = json!({ "name": model.output.name, "data_type": "TYPE_FP32", "dims": [1] });
    if model.output.flat {
        output["reshape"] = json!({ "shape": [] });
    }
    json!({
        "name": model.name, "platform": "tastemaker_onnx", "backend": "tastemaker", "max_batch_size": MAX_K,
        "version_policy": { "latest": { "num_versions": 1 } }, "input": inputs, "output": [output],
        "instance_group": [{ "name": model.name, "kind": "KIND_CPU", "count": shared.completions.len() }],
        "parameters": { "computed": { "string_value": computed(&shared.generation, place) } },
    })
}

fn stats(shared: &Shared, place: usize) -> Value {
    let InferStats { rows, succeeded, succeeded_ns, failed, failed_ns, executions, queue_ns, compute_ns, last_ms } =
        shared.metrics.infer_stats(place);
    let times = |count: u64, ns: u64| json!({ "count": count, "ns": ns });
    json!({
        "name": shared.models[place].0.name, "version": shared.generation.version, "last_inference": last_ms,
        "inference_count": rows, "execution_count": executions,
        "inference_stats": {
            "success": times(succeeded, succeeded_ns), "fail": times(failed, failed_ns), "queue": times(succeeded, queue_ns),
            "compute_input": times(0, 0), "compute_infer": times(succeeded, compute_ns), "compute_output": times(0, 0),
            "cache_hit": times(0, 0), "cache_miss": times(0, 0),
        },
        "batch_stats": [],
    })
}

async fn infer(request: Request<Incoming>, state: &HttpState, name: &str, version: Option<&str>) -> Answer {
    only(request.method(), &Method::POST)?;
    let shared = state.service.borrow().shared().clone();
    let (place, model) = found(&shared, name, version)?;
    if let Some(encoding) = request.headers().get(CONTENT_ENCODING).filter(|value| *value != "identity") {
        return Err(Error::new(Code::BadRequest, format!("content-encoding {encoding:?} is not supported")).into());
    }
    let json_length = match request.headers().get(tensors::HEADER_LENGTH) {
        None => None,
        Some(value) => {
            let length = value.to_str().ok().and_then(|value| value.parse().ok());
            let message = "inference-header-content-length is not a number";
            Some(length.ok_or(Error::fixed(Code::BadRequest, message))?)
        }
    };
    let bytes = body(request, shared.config.server.max_frame_bytes as usize).await?;
    let request = tensors::decode(&bytes, json_length, model)?;
    let call = InferCall { ranker: place as u16, n: request.n, inputs: &request.inputs, deadline: request.deadline };
    match state.start(|service, ticket| service.infer(&call, ticket, Instant::now())).await {
        Outcome::Inferred(scores) => {
            let (body, json_length) = tensors::encode(&request, model, &shared.generation.version, &scores);
            Ok(match json_length {
                None => respond(200, "application/json", body),
                Some(length) => {
                    let mut response = respond(200, "application/octet-stream", body);
                    response.headers_mut().insert(tensors::HEADER_LENGTH, HeaderValue::from(length));
                    response
                }
            })
        }
        other => unexpected(other),
    }
}

/// Answers on the admin port: the repository.
pub async fn admin(request: Request<Incoming>, state: &HttpState) -> Answer {
    let path = parts(request.uri().path());
    let parts: Vec<&str> = path.iter().map(String::as_str).collect();
    let shared = state.service.borrow().shared().clone();
    match parts[..] {
        ["repository", "index"] => {
            only(request.method(), &Method::POST)?;
            let options = options(request).await?;
            let ready_only = options.get("ready").and_then(Value::as_bool).unwrap_or(false);
            let listed: Vec<Value> = shared
                .models
                .iter()
                .map(|(model, unloaded)| (model, unloaded.load(Relaxed)))
                .filter(|(_, unloaded)| !(ready_only && *unloaded))
                .map(|(model, unloaded)| {
                    let (status, reason) = if unloaded { ("UNAVAILABLE", "unloaded") } else { ("READY", "") };
                    let version = &shared.generation.version;
                    json!({ "name": model.name, "version": version, "state": status, "reason": reason })
                })
                .collect();
            answered(&Value::Array(listed))
        }
        ["repository", "models", name, "load"] => set_unloaded(request, &shared, name, false).await,
        ["repository", "models", name, "unload"] => set_unloaded(request, &shared, name, true).await,
        _ => Err(NO_SUCH_PATH.into()),
    }
}

async fn set_unloaded(request: Request<Incoming>, shared: &Shared, name: &str, unloaded: bool) -> Answer {
    only(request.method(), &Method::POST)?;
    authorised(&request, &shared.config.server.admin_token)?;
    let options = options(request).await?;
    let parameters = options.get("parameters").and_then(Value::as_object);
    // A client that unloads sends this one always; there is nothing that depends on a ranker.
    if let Some(other) = parameters.and_then(|p| p.keys().find(|key| *key != "unload_dependents")) {
        let message = format!("parameter `{other}` is not supported: a bundle's models are as they were built");
        return Err(Error::new(Code::BadRequest, message).into());
    }
    let (_, flag): &(Model, AtomicBool) = &shared.models[place(shared, name)?];
    if flag.swap(unloaded, Relaxed) != unloaded {
        tracing::info!(model = name, unloaded, "a model under /v2 was loaded or unloaded");
    }
    empty()
}

/// The options of a repository call: an object, or nothing.
pub(super) async fn options(request: Request<Incoming>) -> Result<Value, Error> {
    let bytes = body(request, ADMIN_BODY_BYTES).await?;
    if bytes.iter().all(u8::is_ascii_whitespace) {
        return Ok(Value::Null);
    }
    let options: Value = super::json::parse(&bytes)?;
    match options.is_object() {
        true => Ok(options),
        false => Err(Error::fixed(Code::BadRequest, "the body is not an object")),
    }
}

/// Whether a request carries the token, compared in a time that does not depend on where they differ.
pub(super) fn authorised(request: &Request<Incoming>, token: &str) -> Result<(), Error> {
    if token.is_empty() {
        return Err(Error::fixed(
            Code::Unauthorized,
            "server.admin_token is not set, so that nothing may change state",
        ));
    }
    let given = request.headers().get(AUTHORIZATION).map(HeaderValue::as_bytes).unwrap_or_default();
    let given = given.strip_prefix(b"Bearer ").unwrap_or_default();
    let differ = given.iter().zip(token.as_bytes()).fold(given.len() ^ token.len(), |d, (a, b)| d | usize::from(a ^ b));
    match differ {
        0 => Ok(()),
        _ => Err(Error::fixed(Code::Unauthorized, "this needs `Authorization: Bearer` and the server's admin_token")),
    }
}

#[cfg(test)]
mod tests {
    use super::parts;

    #[test]
    fn paths_are_resolved() {
        assert_eq!(parts("/v2"), [""; 0]);
        assert_eq!(parts("/v2/models/my%20m%C3%A4%2Fx/infer/"), ["models", "my m\u{e4}/x", "infer"]);
        assert_eq!(parts("/v2/a%/b%2/c%zz/%+1"), ["a%", "b%2", "c%zz", "%+1"]);
        assert_eq!(parts("/v2/%ff"), ["\u{fffd}"]);
    }
}
