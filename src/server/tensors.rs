//! Bodies of the Open Inference Protocol v2: JSON, and its extension for binary tensors.
//!
//! A body is JSON alone, or JSON and after it the values of those tensors whose parameters give their size, one after another; the
//! header `Inference-Header-Content-Length` then says where the JSON ends.

use std::borrow::Cow;
use std::time::Duration;

use serde::de::{self, DeserializeSeed, Deserializer};
use serde::{Deserialize, Serialize};

use super::json;
use crate::api::InferInput;
use crate::error::{Code, Error};
use crate::pipeline::models::{Model, ModelInput};
use crate::pipeline::plan::MAX_K;
use crate::ranking::signature::Datatype;

/// Where the JSON of a body ends, in a header of request and response.
pub const HEADER_LENGTH: &str = "inference-header-content-length";

/// Integers up to it are f32 values: what rankers compute with.
const MAX_INTEGER: f64 = (1 << 24) as f64;

/// An inference, read and checked.
#[derive(Debug)]
pub struct InferRequest<'a> {
    /// The client's name for it.
    pub id: Option<Cow<'a, str>>,
    /// Rows.
    pub n: u32,
    /// As the model has them.
    pub inputs: Vec<InferInput<'a>>,
    /// Time budget.
    pub deadline: Option<Duration>,
    /// Whether the output comes back in binary.
    pub binary: bool,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Parameters<'a> {
    /// Microseconds.
    timeout: Option<u64>,
    binary_data: Option<bool>,
    binary_data_output: Option<bool>,
    binary_data_size: Option<u64>,
    classification: Option<u64>,
    #[serde(borrow)]
    shared_memory_region: Option<Cow<'a, str>>,
}

#[derive(Debug, Deserialize)]
struct Body<'a> {
    #[serde(default, borrow)]
    id: Option<Cow<'a, str>>,
    #[serde(default, borrow)]
    parameters: Parameters<'a>,
    #[serde(borrow)]
    inputs: Vec<InputBody<'a>>,
    #[serde(default, borrow)]
    outputs: Vec<OutputBody<'a>>,
}

#[derive(Debug, Deserialize)]
struct InputBody<'a> {
    #[serde(borrow)]
    name: Cow<'a, str>,
    #[serde(borrow)]
    datatype: Cow<'a, str>,
    shape: Vec<u64>,
    #[serde(default, borrow)]
    parameters: Parameters<'a>,
    #[serde(default)]
    data: Option<Numbers>,
}

#[derive(Debug, Deserialize)]
struct OutputBody<'a> {
    #[serde(borrow)]
    name: Cow<'a, str>,
    #[serde(default, borrow)]
    parameters: Parameters<'a>,
}

/// Numbers and booleans of arrays in arrays, flattened.
#[derive(Debug, Default)]
struct Numbers {
    values: Vec<f64>,
    booleans: usize,
}

impl<'de> Deserialize<'de> for Numbers {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut numbers = Numbers::default();
        (&mut numbers).deserialize(deserializer)?;
        Ok(numbers)
    }
}

impl<'de> DeserializeSeed<'de> for &mut Numbers {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> de::Visitor<'de> for &mut Numbers {
    type Value = ();

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("numbers or booleans in arrays")
    }

    fn visit_bool<E: de::Error>(self, v: bool) -> Result<(), E> {
        self.booleans += 1;
        self.values.push(f64::from(u8::from(v)));
        Ok(())
    }

    fn visit_i64<E: de::Error>(self, v: i64) -> Result<(), E> {
        self.values.push(v as f64);
        Ok(())
    }

    fn visit_u64<E: de::Error>(self, v: u64) -> Result<(), E> {
        self.values.push(v as f64);
        Ok(())
    }

    fn visit_f64<E: de::Error>(self, v: f64) -> Result<(), E> {
        self.values.push(v);
        Ok(())
    }

    fn visit_seq<A: de::SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        while seq.next_element_seed(&mut *self)?.is_some() {}
        Ok(())
    }
}

fn bad(message: impl Into<String>) -> Error {
    Error::new(Code::BadRequest, message)
}

/// Reads and checks a body. `json_length` is the header's value.
///
/// # Errors
/// What is wrong, naming the tensor: `bad_request`.
pub fn decode<'a>(body: &'a [u8], json_length: Option<usize>, model: &Model) -> Result<InferRequest<'a>, Error> {
    let (text, mut rest) = match json_length {
        None => (body, &[][..]),
        Some(length) => body
            .split_at_checked(length)
            .ok_or_else(|| bad(format!("{HEADER_LENGTH} is {length}, but the body has {} bytes", body.len())))?,
    };
    let Body { id, parameters, inputs: given, outputs } = json::parse(text)?;

    let mut n = None;
    let mut inputs: Vec<Option<InferInput<'a>>> = vec![None; model.inputs.len()];
    for input in given {
        let of = |message: String| bad(format!("input `{}`: {message}", input.name));
        let place = model.inputs.iter().position(|wanted| wanted.name == input.name);
        let place = place.ok_or_else(|| of(format!("the model has {}", names(&model.inputs))))?;
        if inputs[place].is_some() {
            return Err(of("is there twice".into()));
        }
        let wanted = &model.inputs[place];
        if input.datatype != wanted.datatype.name() {
            return Err(of(format!("datatype is {}, expected {}", input.datatype, wanted.datatype.name())));
        }
        let rows = match input.shape[..] {
            [rows, width] if width == wanted.width as u64 && (1..=MAX_K as u64).contains(&rows) => rows as usize,
            _ => {
                let expected = format!("expected [1 to {MAX_K}, {}]", wanted.width);
                return Err(of(format!("shape is {:?}, {expected}", input.shape)));
            }
        };
        if *n.get_or_insert(rows) != rows {
            return Err(of(format!("has {rows} rows where another input has {}", n.unwrap_or_default())));
        }
        let count = rows * wanted.width;
        if input.parameters.shared_memory_region.is_some() {
            return Err(of("shared memory is not supported".into()));
        }
        inputs[place] = Some(match (input.data, input.parameters.binary_data_size) {
            (Some(data), None) => InferInput::Values(convert(data, count, wanted).map_err(of)?),
            (None, Some(size)) => {
                let expected = count * wanted.datatype.size();
                if size != expected as u64 {
                    return Err(of(format!("binary_data_size is {size}, expected {expected}")));
                }
                let (bytes, after) = rest.split_at_checked(expected).ok_or_else(|| {
                    of(format!("binary_data_size is {size}, but {} bytes are left of the body", rest.len()))
                })?;
                rest = after;
                convert_bytes(bytes, wanted.datatype).map_err(of)?
            }
            (Some(_), Some(_)) => return Err(of("has both data and binary_data_size".into())),
            (None, None) => return Err(of("has neither data nor binary_data_size".into())),
        });
    }
    if !rest.is_empty() {
        return Err(bad(format!("{} bytes after the last tensor", rest.len())));
    }
    let lacking = model.inputs.iter().zip(&inputs).find(|(_, input)| input.is_none());
    if let Some((lacking, _)) = lacking {
        return Err(bad(format!("input `{}` is missing", lacking.name)));
    }

    let mut binary = parameters.binary_data_output.unwrap_or(false);
    for (at, output) in outputs.iter().enumerate() {
        let of = |message: &str| bad(format!("output `{}`: {message}", output.name));
        if output.name != model.output.name {
            return Err(of(&format!("the model has {}", model.output.name)));
        }
        if at > 0 {
            return Err(of("is there twice"));
        }
        if output.parameters.shared_memory_region.is_some() || output.parameters.classification.is_some_and(|k| k > 0) {
            return Err(of("shared memory and classification are not supported"));
        }
        binary = output.parameters.binary_data.unwrap_or(binary);
    }
    Ok(InferRequest {
        id,
        n: n.unwrap_or_default() as u32,
        inputs: inputs.into_iter().flatten().collect(),
        deadline: parameters.timeout.filter(|&us| us > 0).map(Duration::from_micros),
        binary,
    })
}

fn names(inputs: &[ModelInput]) -> String {
    inputs.iter().map(|input| input.name.as_str()).collect::<Vec<_>>().join(", ")
}

/// Numbers of a JSON tensor as the model takes them.
fn convert(data: Numbers, count: usize, wanted: &ModelInput) -> Result<Vec<f32>, String> {
    if data.values.len() != count {
        return Err(format!("has {} values, expected {count}", data.values.len()));
    }
    if data.booleans > 0 && wanted.datatype != Datatype::Bool {
        return Err(format!("has booleans where {} is expected", wanted.datatype.name()));
    }
    data.values.iter().map(|&value| number(value, wanted.datatype)).collect()
}

fn number(value: f64, datatype: Datatype) -> Result<f32, String> {
    let fits = match datatype {
        Datatype::Bool => value == 0.0 || value == 1.0,
        Datatype::Int32 | Datatype::Int64 => value.fract() == 0.0 && value.abs() <= MAX_INTEGER,
        Datatype::Fp32 | Datatype::Fp64 => (value as f32).is_finite(),
    };
    match fits {
        true => Ok(value as f32),
        false => Err(format!("{value} is not a value of {} that rankers take", datatype.name())),
    }
}

/// Values of a binary tensor, little-endian. NaN and infinities are what they are.
fn convert_bytes(bytes: &[u8], datatype: Datatype) -> Result<InferInput<'_>, String> {
    let values: Result<Vec<f32>, String> = match datatype {
        Datatype::Fp32 => return Ok(InferInput::Bytes(bytes)),
        Datatype::Fp64 => Ok(bytes.as_chunks().0.iter().map(|&v| f64::from_le_bytes(v) as f32).collect()),
        Datatype::Bool => bytes.iter().map(|&v| number(f64::from(v), datatype)).collect(),
        Datatype::Int32 => {
            bytes.as_chunks().0.iter().map(|&v| number(f64::from(i32::from_le_bytes(v)), datatype)).collect()
        }
        Datatype::Int64 => {
            bytes.as_chunks().0.iter().map(|&v| number(i64::from_le_bytes(v) as f64, datatype)).collect()
        }
    };
    Ok(InferInput::Values(values?))
}

/// The body that answers an inference, and where its JSON ends if values follow it.
pub fn encode(request: &InferRequest<'_>, model: &Model, version: &str, scores: &[f32]) -> (Vec<u8>, Option<usize>) {
    #[derive(Serialize)]
    struct Answer<'a> {
        model_name: &'a str,
        model_version: &'a str,
        #[serde(skip_serializing_if = "Option::is_none")]
        id: Option<&'a str>,
        outputs: [Output<'a>; 1],
    }
    #[derive(Serialize)]
    struct Output<'a> {
        name: &'a str,
        datatype: &'static str,
        shape: &'a [usize],
        #[serde(skip_serializing_if = "Option::is_none")]
        parameters: Option<Size>,
        #[serde(skip_serializing_if = "Option::is_none")]
        data: Option<&'a [f32]>,
    }
    #[derive(Serialize)]
    struct Size {
        binary_data_size: usize,
    }
    let output = Output {
        name: &model.output.name,
        datatype: Datatype::Fp32.name(),
        shape: if model.output.flat { &[scores.len()] } else { &[scores.len(), 1] },
        parameters: request.binary.then_some(Size { binary_data_size: size_of_val(scores) }),
        data: (!request.binary).then_some(scores),
    };
    let answer =
        Answer { model_name: &model.name, model_version: version, id: request.id.as_deref(), outputs: [output] };
    let mut body = Vec::with_capacity(256 + 16 * scores.len());
    // Writing to memory can't fail, and NaN becomes null.
    let _ = serde_json::to_writer(&mut body, &answer);
    let json_length = request.binary.then_some(body.len());
    if request.binary {
        body.extend(scores.iter().flat_map(|score| score.to_le_bytes()));
    }
    (body, json_length)
}

/// The body of an error, as this protocol has it.
pub fn error(error: &Error) -> Vec<u8> {
    serde_json::json!({ "error": error.message }).to_string().into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pipeline::models::ModelOutput;
    use proptest::prelude::*;

    fn model() -> Model {
        let input = |name: &str, datatype, width| ModelInput { name: name.into(), datatype, width };
        Model {
            name: "m".into(),
            inputs: vec![
                input("x", Datatype::Fp32, 3),
                input("ids", Datatype::Int64, 1),
                input("flags", Datatype::Bool, 2),
            ],
            output: ModelOutput { name: "score".into(), flat: false },
        }
    }

    const X: &str = r#"{"name":"x","datatype":"FP32","shape":[2,3],"data":[[1,2.5,-3],[4,5e0,6]]}"#;
    const IDS: &str = r#"{"name":"ids","datatype":"INT64","shape":[2,1],"data":[7,16777216]}"#;
    const FLAGS: &str = r#"{"name":"flags","datatype":"BOOL","shape":[2,2],"data":[true,false,1,0]}"#;

    #[test]
    fn json_and_binary_say_the_same() {
        let text = format!(r#"{{"id":"q","inputs":[{FLAGS},{X},{IDS}],"parameters":{{"timeout":1500,"other":1}}}}"#);
        let json = decode(text.as_bytes(), None, &model()).unwrap();
        let values = |values: &[f32]| InferInput::Values(values.to_vec());
        assert_eq!(json.inputs[0], values(&[1.0, 2.5, -3.0, 4.0, 5.0, 6.0]));
        assert_eq!(json.inputs[1..], [values(&[7.0, 16_777_216.0]), values(&[1.0, 0.0, 1.0, 0.0])]);
        assert_eq!((json.n, json.id.as_deref(), json.binary), (2, Some("q"), false));
        assert_eq!(json.deadline, Some(Duration::from_micros(1500)));

        let text = r#"{"inputs":[{"name":"x","datatype":"FP32","shape":[2,3],"parameters":{"binary_data_size":24}},
            {"name":"ids","datatype":"INT64","shape":[2,1],"parameters":{"binary_data_size":16}},
            {"name":"flags","datatype":"BOOL","shape":[2,2],"parameters":{"binary_data_size":4}}],
            "parameters":{"binary_data_output":true}}"#;
        let mut body = text.as_bytes().to_vec();
        body.extend([1.0f32, 2.5, -3.0, 4.0, 5.0, 6.0].iter().flat_map(|v| v.to_le_bytes()));
        body.extend([7i64, 16_777_216].iter().flat_map(|v| v.to_le_bytes()));
        body.extend([1u8, 0, 1, 0]);
        let binary = decode(&body, Some(text.len()), &model()).unwrap();
        assert!(binary.binary);
        let mut out = vec![9.0];
        for (a, b) in json.inputs.iter().zip(&binary.inputs) {
            b.write_to(&mut out);
            assert_eq!(*a, InferInput::Values(out.clone()));
        }
    }

    #[test]
    fn what_is_wrong_is_said() {
        let with = |x: &str| format!(r#"{{"inputs":[{x},{IDS},{FLAGS}]}}"#);
        let cases = [
            ("", None, "EOF"),
            ("[]", None, "invalid length"),
            ("{}", None, "missing field `inputs`"),
            (&with(X)[..], Some(9999), "inference-header-content-length is 9999, but the body has"),
            (&with(X).replace("FP32", "FP64"), None, "input `x`: datatype is FP64, expected FP32"),
            (&with(X).replace("[2,3]", "[2,4]"), None, "input `x`: shape is [2, 4], expected [1 to 10000, 3]"),
            (&with(X).replace("[2,3]", "[0,3]"), None, "input `x`: shape is [0, 3]"),
            (&with(X).replace("[2,3]", "[6]"), None, "input `x`: shape is [6]"),
            (
                &with(X).replace("[2,3]", "[18446744073709551615,3]"),
                None,
                "input `x`: shape is [18446744073709551615, 3]",
            ),
            (&with(X).replace("[2,3]", "[-2,3]"), None, "invalid value"),
            (&with(X).replace("[2,3]", "[1,3]"), None, "input `x`: has 6 values, expected 3"),
            (&with(X).replace("5e0", "5e99"), None, "is not a value of FP32"),
            (&with(X).replace("5e0", "null"), None, "numbers or booleans in arrays"),
            (&with(X).replace("5e0", "true"), None, "input `x`: has booleans where FP32"),
            (&with(X).replace("\"x\"", "\"y\""), None, "input `y`: the model has x, ids, flags"),
            (&with(IDS), None, "input `ids`: is there twice"),
            (&with(X).replace("16777216", "16777217"), None, "input `ids`: 16777217 is not a value of INT64"),
            (&with(X).replace("16777216", "0.5"), None, "input `ids`: 0.5 is not a value of INT64"),
            (&with(X).replace("1,0]", "1,2]"), None, "input `flags`: 2 is not a value of BOOL"),
            (&format!(r#"{{"inputs":[{X}]}}"#), None, "input `ids` is missing"),
            (r#"{"inputs":[{"name":"x","datatype":"FP32","shape":[2,3]}]}"#, None, "neither data nor"),
            (
                r#"{"inputs":[{"name":"x","datatype":"FP32","shape":[2,3],"parameters":{"shared_memory_region":"r"}}]}"#,
                None,
                "shared memory",
            ),
            (
                r#"{"inputs":[{"name":"x","datatype":"FP32","shape":[2,3],"parameters":{"binary_data_size":20}}]}"#,
                None,
                "binary_data_size is 20, expected 24",
            ),
            (
                r#"{"inputs":[{"name":"x","datatype":"FP32","shape":[2,3],"parameters":{"binary_data_size":24}}]}"#,
                None,
                "but 0 bytes are left",
            ),
            (&format!("{}junk", with(X)), Some(with(X).len()), "4 bytes after the last tensor"),
            (&with(X).replace("]}]}", r#"]}],"outputs":[{"name":"z"}]}"#), None, "output `z`: the model has score"),
        ];
        for (body, json_length, says) in cases {
            let error = decode(body.as_bytes(), json_length, &model()).unwrap_err();
            assert_eq!(error.code, Code::BadRequest);
            assert!(error.message.contains(says), "{} does not say {says}: {body}", error.message);
        }
    }

    #[test]
    fn one_input_of_other_rows_is_refused() {
        let body = format!(r#"{{"inputs":[{X},{},{FLAGS}]}}"#, IDS.replace("[2,1]", "[1,1]").replace(",16777216", ""));
        let error = decode(body.as_bytes(), None, &model()).unwrap_err();
        assert!(error.message.contains("input `ids`: has 1 rows where another input has 2"), "{}", error.message);
    }

    proptest! {
        #[test]
        fn damage_never_panics(
            places in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
            cut in any::<prop::sample::Index>(), length in prop::option::of(0usize..400),
        ) {
            let mut body = format!(r#"{{"inputs":[{X},{IDS},{FLAGS}],"outputs":[{{"name":"score"}}]}}"#).into_bytes();
            for (place, value) in places {
                let place = place.index(body.len());
                body[place] = value;
            }
            body.truncate(cut.index(2 * body.len()).max(1));
            match decode(&body, length, &model()) {
                Ok(request) => prop_assert_eq!((request.n, request.inputs.len()), (2, 3)),
                Err(error) => prop_assert!(error.code == Code::BadRequest && !error.message.is_empty()),
            }
        }

        #[test]
        fn answers_hold_the_scores(scores in prop::collection::vec(any::<f32>(), 1..50), binary in any::<bool>()) {
            let request = InferRequest { id: None, n: scores.len() as u32, inputs: vec![], deadline: None, binary };
            let (body, json_length) = encode(&request, &model(), "v", &scores);
            let json: serde_json::Value = serde_json::from_slice(&body[..json_length.unwrap_or(body.len())]).unwrap();
            let output = &json["outputs"][0];
            prop_assert_eq!(&output["shape"], &serde_json::json!([scores.len(), 1]));
            let got: Vec<u32> = match json_length {
                Some(end) => {
                    prop_assert_eq!(output["parameters"]["binary_data_size"].as_u64(), Some(4 * scores.len() as u64));
                    body[end..].as_chunks().0.iter().map(|&v| u32::from_le_bytes(v)).collect()
                }
                None => output["data"].as_array().unwrap().iter()
                    .map(|v| v.as_f64().map_or(f32::NAN, |v| v as f32).to_bits()).collect(),
            };
            for (got, score) in got.iter().zip(&scores) {
                let both_odd = !score.is_finite() && !binary;
                prop_assert!(both_odd || *got == score.to_bits());
            }
        }
    }
}
