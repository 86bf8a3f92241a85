//! From an ONNX model to an engine.

use trtx::builder_config::BuilderConfig;
use trtx::{Builder, DataType, MemoryPoolType, NetworkDefinition, OnnxParser, OptProfileSelector, Tensor, trtx_sys};

use crate::cache::{Cache, Found, Key};
use crate::library::{Library, NAME};
use crate::{Capability, Error, Input, Profiles};

/// What TensorRT may use of the GPU's memory beside weights and activations.
const WORKSPACE_BYTES: usize = 1 << 30;

/// A model, and what it is to become.
#[derive(Clone, Copy, Debug)]
pub struct Wanted<'a> {
    /// The ONNX file's bytes.
    pub model: &'a [u8],
    /// All of its inputs, in the order in which they are bound.
    pub inputs: &'a [Input],
    /// The name of the output that is the score, `[n]` or `[n, 1]`.
    pub output: &'a str,
    /// Numbers of rows.
    pub profiles: &'a Profiles,
    /// Of the GPU that it is for.
    pub capability: Capability,
}

/// What an input's values are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Values {
    /// As features are.
    Float32,
    /// The whole part of a feature.
    Int32,
    /// The whole part of a feature.
    Int64,
}

impl Values {
    /// # Errors
    /// A type that features don't become.
    pub(crate) fn of(name: &str, of: DataType) -> Result<Self, Error> {
        match of {
            DataType::kFLOAT => Ok(Values::Float32),
            DataType::kINT32 => Ok(Values::Int32),
            DataType::kINT64 => Ok(Values::Int64),
            other => Err(Error::Model(format!("input `{name}` is {other:?}, expected float32, int32 or int64"))),
        }
    }
}

impl Wanted<'_> {
    /// For the key: names and widths; types are the model's.
    fn shape(&self) -> String {
        let inputs: Vec<_> = self.inputs.iter().map(|input| format!("{}[{}]", input.name, input.width)).collect();
        format!("{} -> {}", inputs.join(", "), self.output)
    }

    /// Inputs of the network, checked: by input, its values.
    fn check(&self, network: &NetworkDefinition<'_>) -> Result<Vec<Values>, Error> {
        let named = |tensor: &Tensor<'_>| tensor.name(network).map_err(|error| Error::Model(error.to_string()));
        let tensors: Vec<Tensor<'_>> = network.inputs().collect();
        let names = tensors.iter().map(named).collect::<Result<Vec<_>, _>>()?;
        let known = names.join(", ");
        if names.len() != self.inputs.len() {
            let n = self.inputs.len();
            return Err(Error::Model(format!("{n} of the model's inputs are given: it has {known}")));
        }
        let inputs = self.inputs.iter().map(|Input { name, width }| {
            let at = names.iter().position(|known| known == name);
            let no_input = || Error::Model(format!("no input `{name}`; the model has {known}"));
            let tensor = &tensors[at.ok_or_else(no_input)?];
            let shape = tensor.dimensions(network).map_err(|error| Error::Model(error.to_string()))?;
            match shape[..] {
                [-1, columns] if columns == -1 || columns == *width as i64 => {
                    Values::of(name, tensor.data_type(network))
                }
                [-1, columns] => Err(Error::Model(format!("input `{name}` has {columns} columns, not {width}"))),
                [rows, _] => Err(Error::Model(format!("input `{name}` takes {rows} rows alone, expected any number"))),
                _ => Err(Error::Model(format!("input `{name}` is {shape:?}, expected [n, {width}]"))),
            }
        });
        let inputs = inputs.collect::<Result<Vec<_>, _>>()?;
        let output = self.output;
        let outputs: Vec<Tensor<'_>> = network.outputs().collect();
        let names = outputs.iter().map(named).collect::<Result<Vec<_>, _>>()?;
        let at = names.iter().position(|name| name == output);
        let no_output = || Error::Model(format!("no output `{output}`; the model has {}", names.join(", ")));
        let tensor = &outputs[at.ok_or_else(no_output)?];
        let shape = tensor.dimensions(network).map_err(|error| Error::Model(error.to_string()))?;
        match (&shape[..], tensor.data_type(network)) {
            ([-1] | [-1, 1 | -1], DataType::kFLOAT) => Ok(inputs),
            ([-1] | [-1, 1 | -1], other) => {
                Err(Error::Model(format!("output `{output}` is {other:?}, expected float32")))
            }
            _ => Err(Error::Model(format!("output `{output}` is {shape:?}, expected [n] or [n, 1]"))),
        }
    }
}

/// The engine from its file, or built and kept.
///
/// # Errors
/// As [`build`].
pub fn load(library: &'static Library, wanted: &Wanted<'_>, cache: &Cache) -> Result<(Vec<u8>, Found), Error> {
    let (version, inputs) = (&library.version, wanted.shape());
    let Wanted { model, profiles, capability, .. } = *wanted;
    let key = Key { model, flavour: NAME, version, capability, profiles, inputs: &inputs };
    cache.get(&key, || build(library, wanted))
}

/// Builds an engine, which takes seconds to minutes; one at a time in a process.
///
/// # Errors
/// The model has an operator that TensorRT lacks, other inputs or another output than its manifest says, a number of rows that is fixed;
/// a GPU that TensorRT does not build for; whatever else it says.
pub fn build(library: &'static Library, wanted: &Wanted<'_>) -> Result<Vec<u8>, Error> {
    let _alone = library.building.lock();
    library.listen();
    let refused = |what: &'static str| move |_: trtx::Error| library.refused(what);
    // What is made later is given up before, as TensorRT wants it.
    let mut builder = Builder::new(&library.logger).map_err(refused("a builder"))?;
    let network = builder.create_network(0).map_err(refused("a network"))?;
    let mut parser = OnnxParser::new(network, &library.logger).map_err(refused("a parser"))?;
    parser.parse(wanted.model).map_err(refused("reading the model"))?;
    let network = parser.network_mut();
    wanted.check(network)?;
    let mut config = builder.create_config().map_err(refused("a configuration"))?;
    config.set_memory_pool_limit(MemoryPoolType::kWORKSPACE, WORKSPACE_BYTES);
    aim(&mut config, wanted.capability).map_err(|said| Error::Refused { what: "the GPU", said: vec![said] })?;
    for &rows in wanted.profiles.rows() {
        // A profile is the builder's, which frees it; dropping this would free it twice.
        let mut profile =
            std::mem::ManuallyDrop::new(builder.creata_optimization_profile().map_err(refused("a profile"))?);
        for Input { name, width } in wanted.inputs {
            let selected = [OptProfileSelector::kMIN, OptProfileSelector::kOPT, OptProfileSelector::kMAX];
            for (select, rows) in selected.into_iter().zip([1, rows, rows]) {
                let shape = trtx_sys::Dims64::new_2d(rows as i64, *width as i64);
                profile.set_dimensions(name, select, &shape).map_err(refused("a profile's shape"))?;
            }
        }
        config.add_optimization_profile(&mut profile).map_err(refused("adding a profile"))?;
    }
    let plan = builder.build_serialized_network(network, &mut config).map_err(refused("building the engine"))?;
    Ok(plan.to_vec())
}

/// TensorRT-RTX builds for a GPU that need not be there.
#[cfg(not(feature = "tensorrt"))]
fn aim(config: &mut BuilderConfig<'_>, capability: Capability) -> Result<(), String> {
    use trtx::ComputeCapability::{kSM75, kSM80, kSM86, kSM89, kSM120, kSM121};
    let known = [kSM75, kSM80, kSM86, kSM89, kSM120, kSM121].into_iter();
    let Capability(major, minor) = capability;
    let found = known.into_iter().find(|known| *known as u32 == 10 * major + minor);
    let found = found.ok_or_else(|| format!("{NAME} builds no engines for compute capability {capability}"))?;
    let set = config.set_nb_compute_capabilities(1).and_then(|()| config.set_compute_capability(found, 0));
    set.map_err(|error| error.to_string())
}

/// TensorRT builds for the GPU that is current.
#[cfg(feature = "tensorrt")]
fn aim(_: &mut BuilderConfig<'_>, _: Capability) -> Result<(), String> {
    Ok(())
}
