//! TensorRT as an engine of rankers: what of the configuration and of manifests asks for it, and whether it is there.
//! [`assembled`] makes the whole rows that it takes, whatever scores them, and `engine` is TensorRT as what does.

pub mod assembled;
#[cfg(any(feature = "tensorrt", feature = "tensorrt-rtx"))]
pub mod engine;

use std::path::{Path, PathBuf};

use tastemaker_tensorrt as bindings;

use super::pipeline::ranker::Made;
use super::probe::{self, Gpu, Unfit};
use super::stream::Stream;
use crate::catalog::generation::Generation;
use crate::device::cpu::Whole;
use crate::pipeline::PipelineConfig;
use crate::ranking::manifest::Engine;

/// Why TensorRT can't rank here.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unavailable {
    /// Neither feature.
    #[error("this program was built without TensorRT: the cargo feature `tensorrt` has it")]
    NotBuilt,
    /// Its libraries.
    #[error("{0}; `pipeline.tensorrt` names the folder of its libraries")]
    Library(bindings::Error),
    /// TensorRT answers anything without a GPU, and crashes after that.
    #[error("TensorRT needs a GPU: {0}")]
    NoGpu(Unfit),
    /// There may be a GPU, but it is not what computes.
    #[error("TensorRT needs a GPU, and the CPU computes")]
    Cpu,
}

/// Whether there is all that it takes: the feature, the library, a GPU.
///
/// # Errors
/// The first that is missing.
pub fn available(config: &PipelineConfig) -> Result<(), Unavailable> {
    opened(config)?;
    probe::probe(None).map(drop).map_err(Unavailable::NoGpu)
}

#[cfg(any(feature = "tensorrt", feature = "tensorrt-rtx"))]
fn opened(config: &PipelineConfig) -> Result<(), Unavailable> {
    bindings::library::Library::open(&config.tensorrt).map(drop).map_err(Unavailable::Library)
}

#[cfg(not(any(feature = "tensorrt", feature = "tensorrt-rtx")))]
fn opened(_: &PipelineConfig) -> Result<(), Unavailable> {
    Err(Unavailable::NotBuilt)
}

/// The rankers that shall be TensorRT's and nobody else's, by position.
pub fn asked<'a>(config: &'a PipelineConfig, generation: &'a Generation) -> impl Iterator<Item = usize> + 'a {
    let rankers = generation.rankers.iter().enumerate();
    rankers.filter(|(_, model)| config.engine(&model.name, &model.manifest) == Engine::TensorRt).map(|(at, _)| at)
}

/// Whether those that are asked for can be had: `computes` says what does.
///
/// # Errors
/// The first ranker that can't be, and why.
pub fn check(config: &PipelineConfig, generation: &Generation, on_gpu: bool) -> Result<(), String> {
    let Some(at) = asked(config, generation).next() else { return Ok(()) };
    let name = &generation.rankers[at].name;
    let there = available(config).and(if on_gpu { Ok(()) } else { Err(Unavailable::Cpu) });
    there.map_err(|reason| format!("ranker `{name}`: not on engine `tensorrt`: {reason}"))
}

/// Makes a ranker that wants whole rows one of the GPU's, for batches of up to so many requests of `width` candidates; `left` is what of the
/// GPU's memory may be taken.
#[cfg(any(feature = "tensorrt", feature = "tensorrt-rtx"))]
pub(super) fn make(
    stream: &Stream,
    gpu: &Gpu,
    config: &PipelineConfig,
    whole: &Whole,
    (requests, width, left): (&[usize], usize, u64),
) -> Made {
    match bindings::Profiles::new(requests, width) {
        Ok(profiles) => engine::make(stream, gpu, config, whole, (&profiles, left)),
        Err(error) => Ok(Err(error.to_string())),
    }
}

/// As it is without the feature.
#[cfg(not(any(feature = "tensorrt", feature = "tensorrt-rtx")))]
pub(super) fn make(_: &Stream, _: &Gpu, _: &PipelineConfig, _: &Whole, _: (&[usize], usize, u64)) -> Made {
    Ok(Err(format!("no engine for GPUs computes it: {}", Unavailable::NotBuilt)))
}

/// Where engines are kept: as configured, or beside the bundle that the model is of, for all bundles there.
pub fn folder(config: &PipelineConfig, onnx: &Path) -> PathBuf {
    match &config.tensorrt_cache[..] {
        // BUNDLE/rankers/NAME.onnx
        "" => onnx.ancestors().nth(3).unwrap_or(Path::new("")).join(".tensorrt"),
        folder => PathBuf::from(folder),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::generation::{RankerModel, testing};

    #[test]
    fn engines_lie_beside_the_bundle_or_as_configured() {
        let mut config = PipelineConfig::default();
        let onnx = Path::new("/srv/bundles/monday/rankers/main.onnx");
        assert_eq!(folder(&config, onnx), Path::new("/srv/bundles/.tensorrt"));
        assert_eq!(folder(&config, Path::new("monday/rankers/main.onnx")), Path::new(".tensorrt"));
        config.tensorrt_cache = "/var/cache/engines".to_owned();
        assert_eq!(folder(&config, onnx), Path::new("/var/cache/engines"));
    }

    #[test]
    fn who_asks_for_it_by_name_is_told_what_is_missing() {
        let mut generation = testing::plain(3);
        let model = |name: &str| RankerModel { name: name.into(), manifest: Default::default(), onnx: "x.onnx".into() };
        generation.rankers = vec![model("main"), model("other")];
        let mut config = PipelineConfig { tensorrt: "/nowhere".into(), ..PipelineConfig::default() };
        assert_eq!(check(&config, &generation, false), Ok(()));
        generation.rankers[1].manifest.engine = Engine::TensorRt;
        let error = check(&config, &generation, false).unwrap_err();
        assert!(error.starts_with("ranker `other`: not on engine `tensorrt`: "), "{error}");
        match bindings::FLAVOUR {
            None => assert!(error.ends_with("the cargo feature `tensorrt` has it"), "{error}"),
            Some(_) => assert!(error.contains("/nowhere") && error.contains("`pipeline.tensorrt`"), "{error}"),
        }
        config.engines.insert("other".to_owned(), Engine::Auto);
        assert_eq!(check(&config, &generation, true), Ok(()));
        config.engines.insert("main".to_owned(), Engine::TensorRt);
        assert_eq!(asked(&config, &generation).collect::<Vec<_>>(), [0]);
        assert!(check(&config, &generation, true).unwrap_err().contains("ranker `main`"));
    }
}
