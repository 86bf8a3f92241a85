//! Any ONNX model, by an ONNX Runtime that is installed on the machine. Its library is opened when the first model wants it and
//! never linked, so that neither building nor serving needs one.

use std::error::Error as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ort::environment::Environment;
use ort::logging::LogLevel;
use ort::session::{Session, SessionInputValue};
use ort::value::{Outlet, TensorElementType, TensorRef, ValueType};
use parking_lot::Mutex;

use super::manifest::RankerManifest;
use super::precision::Report;
use super::wiring::{Wiring, one_per_row};
use super::{RankError, Ranker};

/// Names the library where the configuration does not; the `ort` crate's own convention.
const VARIABLE: &str = "ORT_DYLIB_PATH";
/// What the loader looks for where nothing names the library.
const LIBRARY: &str = "libonnxruntime.so";

/// The one library of the process, and where it came from.
static OPENED: Mutex<Option<(PathBuf, Environment)>> = Mutex::new(None);

/// The library, opened by the first that asks. `configured` may be empty: then `ORT_DYLIB_PATH`, then the loader's usual places.
///
/// # Errors
/// It is not there or too old, or another one is open already.
fn environment(configured: &str) -> Result<Environment, String> {
    let path = match configured {
        "" => PathBuf::from(std::env::var_os(VARIABLE).filter(|path| !path.is_empty()).unwrap_or(LIBRARY.into())),
        path => PathBuf::from(path),
    };
    let mut opened = OPENED.lock();
    if let Some((open, environment)) = opened.as_ref() {
        return match *open == path {
            true => Ok(environment.clone()),
            false => Err(format!("{} is asked for, but {} is open already", path.display(), open.display())),
        };
    }
    let builder = ort::init_from(&path).map_err(|e| {
        let hint = "`pipeline.onnxruntime` or ORT_DYLIB_PATH names an ONNX Runtime library, 1.24 or later";
        let cause = match &e {
            // The loader's own words, which `error` leaves out.
            ort::LoadDynamicError::Dlopen { error, .. } => error.source().map(|cause| format!(": {cause}")),
            _ => None,
        };
        format!("ONNX Runtime can't be used: {e}{}; {hint}", cause.unwrap_or_default())
    })?;
    let log = |level: LogLevel, _: &str, _: &str, place: &str, message: &str| match level {
        LogLevel::Fatal | LogLevel::Error => tracing::error!(place, "ONNX Runtime: {message}"),
        LogLevel::Warning => tracing::warn!(place, "ONNX Runtime: {message}"),
        _ => tracing::debug!(place, "ONNX Runtime: {message}"),
    };
    let builder = builder.with_name("tastemaker").with_telemetry(false).with_logger(Arc::new(log));
    let environment = builder.build().map_err(|e| format!("{}: {e}", path.display()))?;
    tracing::info!(library = %path.display(), "ONNX Runtime is open");
    *opened = Some((path, environment.clone()));
    Ok(environment)
}

/// What an input is made of, with room for the values where they are not passed on as they are.
enum Wanted {
    Float,
    Int32(Vec<i32>),
    Int64(Vec<i64>),
}

impl Wanted {
    /// # Errors
    /// A type that features don't become.
    fn of(outlet: &Outlet) -> Result<Self, String> {
        match outlet.dtype() {
            ValueType::Tensor { ty: TensorElementType::Float32, .. } => Ok(Wanted::Float),
            ValueType::Tensor { ty: TensorElementType::Int32, .. } => Ok(Wanted::Int32(Vec::new())),
            ValueType::Tensor { ty: TensorElementType::Int64, .. } => Ok(Wanted::Int64(Vec::new())),
            other => Err(format!("input `{}` is {other}, expected float32, int32 or int64", outlet.name())),
        }
    }

    /// The values `[n, width]` as the model wants them.
    fn tensor<'v>(&'v mut self, values: &'v [f32], shape: [usize; 2]) -> ort::Result<SessionInputValue<'v>> {
        Ok(match self {
            Wanted::Float => TensorRef::from_array_view((shape, values))?.into(),
            Wanted::Int32(whole) => {
                whole.clear();
                whole.extend(values.iter().map(|&v| v as i32));
                TensorRef::from_array_view((shape, whole.as_slice()))?.into()
            }
            Wanted::Int64(whole) => {
                whole.clear();
                whole.extend(values.iter().map(|&v| v as i64));
                TensorRef::from_array_view((shape, whole.as_slice()))?.into()
            }
        })
    }
}

/// An ONNX model on the CPU, one thread; a worker's own.
pub struct OnnxRuntimeRanker {
    name: String,
    session: Session,
    wiring: Wiring,
    /// The model's inputs: the place in the manifest, and how the model wants the values.
    order: Vec<(usize, Wanted)>,
    /// What keeps the model from another engine; none where this one was asked for.
    reason: Option<String>,
}

impl OnnxRuntimeRanker {
    /// Loads a model and warms it up. `library` may be empty; `widths[i]` is the number of values of the manifest's i-th input.
    ///
    /// # Errors
    /// No library, a file that can't be read, an operator that this version lacks, a wrong input or output; the text names it.
    pub fn load(
        name: &str,
        onnx: &Path,
        manifest: &RankerManifest,
        widths: &[usize],
        library: &str,
    ) -> Result<Self, RankError> {
        let wrong = |reason: String| RankError { ranker: name.to_owned(), reason };
        let session = environment(library).and_then(|environment| {
            open(&environment, onnx).map_err(|e| format!("{}: ONNX Runtime: {e}", onnx.display()))
        });
        let session = session.map_err(wrong)?;
        let names = |outlets: &[Outlet]| outlets.iter().map(|o| o.name().to_owned()).collect::<Vec<_>>();
        let wiring = Wiring::new(manifest, widths, &names(session.inputs()), &names(session.outputs()));
        let wiring = wiring.map_err(wrong)?;
        let mut order = Vec::new();
        for (at, outlet) in session.inputs().iter().enumerate() {
            let place = wiring.inputs.iter().position(|(input, _)| *input == at);
            order.extend(place.map(|place| Wanted::of(outlet).map(|w| (place, w))).transpose().map_err(wrong)?);
        }
        let mut ranker = OnnxRuntimeRanker { name: name.to_owned(), session, wiring, order, reason: None };
        Wiring::try_batches(&mut ranker, widths)?;
        Ok(ranker)
    }

    /// The same, with what keeps the model from another engine for its report.
    pub fn because(self, reason: Option<String>) -> Self {
        OnnxRuntimeRanker { reason, ..self }
    }
}

fn open(environment: &Environment, onnx: &Path) -> ort::Result<Session> {
    let mut builder = Session::builder(environment)?
        .with_intra_threads(1)?
        .with_inter_threads(1)?
        // Plans of memory are kept for every batch size that was seen, and there are as many as candidates.
        .with_memory_pattern(false)?;
    builder.commit_from_file(onnx)
}

impl Ranker for OnnxRuntimeRanker {
    fn name(&self) -> &str {
        &self.name
    }

    fn score(&mut self, inputs: &[Vec<f32>], n: usize, scores: &mut Vec<f32>) -> Result<(), RankError> {
        scores.clear();
        let OnnxRuntimeRanker { name, session, wiring, order, .. } = self;
        let wrong = |reason: String| RankError { ranker: name.clone(), reason };
        let mut values: Vec<SessionInputValue<'_>> = Vec::with_capacity(inputs.len());
        for (at, wanted) in order {
            let tensor = wanted.tensor(&inputs[*at], [n, wiring.inputs[*at].1]);
            values.push(tensor.map_err(|e| wrong(e.to_string()))?);
        }
        let answer = session.run(&values[..]).map_err(|e| wrong(e.to_string()))?;
        let mut outputs: Vec<&[f32]> = Vec::with_capacity(wiring.outputs.len());
        for &at in &wiring.outputs {
            let (shape, values) = answer[at].try_extract_tensor::<f32>().map_err(|e| wrong(e.to_string()))?;
            one_per_row(shape, n).map_err(wrong)?;
            outputs.push(values);
        }
        wiring.combine(&outputs, n, scores);
        Ok(())
    }

    fn report(&self) -> Report {
        Report::other("onnxruntime", self.reason.clone())
    }
}

/// Where `.ci/run` says that a library is, for tests; without one they say that they are skipped.
#[cfg(test)]
pub(crate) fn library_for_tests() -> Option<String> {
    let library = std::env::var("TASTEMAKER_ONNXRUNTIME").ok().filter(|path| !path.is_empty());
    if library.is_none() {
        // Not by `println!`, which the test harness keeps to itself.
        let _ = std::io::Write::write_fmt(
            &mut std::io::stderr(),
            format_args!("SKIPPED: TASTEMAKER_ONNXRUNTIME names no library of ONNX Runtime\n"),
        );
    }
    library
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use rten::ThreadPool;

    use super::*;
    use crate::index::Kernel;
    use crate::ranking::dense::{DenseRanker, Model};
    use crate::ranking::onnx::OnnxRanker;
    use crate::ranking::{manifest, recognise, trial_rows};

    fn demo() -> (PathBuf, RankerManifest, [usize; 1]) {
        let engines = Path::new(env!("CARGO_MANIFEST_DIR")).join("engines");
        let manifest: RankerManifest =
            toml::from_str(&std::fs::read_to_string(engines.join("demo.toml")).unwrap()).unwrap();
        let widths = [manifest.inputs[0].columns.len()];
        (engines.join("demo.onnx"), manifest, widths)
    }

    #[test]
    fn a_library_that_is_not_there_is_named() {
        let (onnx, manifest, widths) = demo();
        let error = OnnxRuntimeRanker::load("demo", &onnx, &manifest, &widths, "/nowhere/libonnxruntime.so");
        let error = error.err().unwrap().to_string();
        assert!(error.contains("`demo`") && error.contains("/nowhere/libonnxruntime.so"), "{error}");
        assert!(error.contains("cannot open shared object file") || error.contains("is open already"), "{error}");
    }

    #[test]
    fn it_scores_as_the_engines_of_this_build() {
        let Some(library) = library_for_tests() else { return };
        let (onnx, manifest, widths) = demo();
        let mut combined = manifest.clone();
        combined.output = manifest::RankerOutput { name: String::new(), score: "sigmoid(score) - score / 3".into() };
        for manifest in [manifest.clone(), combined] {
            let mut theirs = OnnxRuntimeRanker::load("demo", &onnx, &manifest, &widths, &library).unwrap();
            assert_eq!(theirs.report().to_string(), "onnxruntime, f32");
            let pool = Arc::new(ThreadPool::with_num_threads(1));
            let mut rten = OnnxRanker::load("demo", &onnx, &manifest, &widths, pool).unwrap();
            let graph = recognise(&mut rten, &onnx, &manifest).unwrap();
            let mut dense = DenseRanker::new(Arc::new(Model::plain("demo", &graph, Kernel::detect())));
            for n in [1, 7, 64, 900] {
                let features = trial_rows(&widths, n);
                let mut scores = [Vec::new(), Vec::new(), Vec::new()];
                let engines: [&mut dyn Ranker; 3] = [&mut theirs, &mut rten, &mut dense];
                for (engine, scores) in engines.into_iter().zip(&mut scores) {
                    engine.score(&features, n, scores).unwrap();
                }
                let [want, rest @ ..] = &scores;
                assert_eq!(want.len(), n);
                let size = want.iter().fold(1f32, |most, v| most.max(v.abs()));
                for other in rest {
                    assert!(want.iter().zip(other).all(|(a, b)| (a - b).abs() <= 1e-4 * size), "{want:?} {other:?}");
                }
            }
        }
    }

    #[test]
    fn what_it_cannot_run_is_named() {
        let Some(library) = library_for_tests() else { return };
        let (onnx, manifest, widths) = demo();
        let load = |onnx: &Path, manifest: &RankerManifest, library: &str| {
            OnnxRuntimeRanker::load("demo", onnx, manifest, &widths, library).err().unwrap().to_string()
        };
        let mut bytes = std::fs::read(&onnx).unwrap();
        let at = bytes.windows(4).position(|w| w == b"Relu").unwrap();
        bytes[at..at + 4].copy_from_slice(b"Rolu");
        let folder = tempfile::tempdir().unwrap();
        let other = folder.path().join("other.onnx");
        std::fs::write(&other, bytes).unwrap();
        let error = load(&other, &manifest, &library);
        assert!(error.contains("`demo`") && error.contains("other.onnx") && error.contains("Rolu"), "{error}");
        let mut nowhere = manifest.clone();
        nowhere.output.name = "nowhere".into();
        assert!(load(&onnx, &nowhere, &library).contains("no output `nowhere`; the model has score"));
        let wide = OnnxRuntimeRanker::load("demo", &onnx, &manifest, &[widths[0] + 1], &library);
        assert!(wide.err().unwrap().to_string().contains("features"));
        assert!(load(&onnx, &manifest, "/another/libonnxruntime.so").contains("is open already"));
    }
}
