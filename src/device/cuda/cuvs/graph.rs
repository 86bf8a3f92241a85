//! A graph that CAGRA makes on a GPU, for walks on the CPU: a build takes seconds of a GPU instead of minutes of a CPU.
#![allow(unsafe_code)] // Calls of cuVS, on memory that this module has, and a copy of what cuVS has.

use std::path::Path;
use std::sync::Arc;

use cudarc::driver::result;

use super::index::{Index, Options, Rows, Value};
use super::library::Cuvs;
use super::resources::{self, Resources};
use crate::catalog::generation::Metric;
use crate::device::DeviceError;
use crate::device::cuda::context::Context;
use crate::device::cuda::engine::mib;
use crate::device::cuda::kernels::{Image, image};
use crate::device::cuda::probe::{Gpu, probe};
use crate::device::cuda::stream::{Stream, Table};
use crate::index::{GraphMaker, HnswOptions, IndexOptions, Lifted, Rows as Vectors};

/// Values that begin at 16 bytes, where cuVS reads rows where they lie.
const ALIGNED: usize = 4;

/// A GPU with cuVS, for making graphs.
#[derive(Debug)]
pub struct CagraMaker {
    gpu: Gpu,
    cuvs: &'static Cuvs,
    image: Image,
}

impl CagraMaker {
    /// The GPU of that number, or the one with the most memory; `cuvs`: see [`Cuvs::load`].
    ///
    /// # Errors
    /// What is missing, for the operator.
    pub fn open(ordinal: Option<u32>, cuvs: Option<&Path>) -> Result<Self, String> {
        let gpu = probe(ordinal).map_err(|unfit| unfit.to_string())?;
        let image = image(gpu.capability, None).map_err(|error| error.to_string())?;
        Self::with_image(gpu, cuvs, image)
    }

    fn with_image(gpu: Gpu, cuvs: Option<&Path>, image: Image) -> Result<Self, String> {
        let cuvs = Cuvs::load(cuvs).map_err(|unavailable| unavailable.to_string())?;
        Ok(CagraMaker { gpu, cuvs, image })
    }

    /// The GPU.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    fn links(&self, spaced: &Spaced<'_>, options: Options) -> Result<(Vec<u32>, u32), Failure> {
        let (n, width) = (spaced.lifted.n_rows(), spaced.width);
        let context = Context::open(self.gpu.ordinal, self.image.bytes())?;
        let Options::Cagra { graph_degree, intermediate_graph_degree } = options else {
            return Err(Failure::Said("a graph is of kind hnsw".into()));
        };
        // The vectors, both graphs, and the longer one's distances.
        let needed = (n * width * 4) as u64
            + n as u64 * (u64::from(graph_degree) + 2 * u64::from(intermediate_graph_degree)) * 4;
        let (free, _) = context.memory()?;
        if needed > free {
            let (needed, free) = (mib(needed), mib(free));
            return Err(Failure::Said(format!("{n} vectors and their graph take {needed}, and {free} are free")));
        }
        let stream = Stream::new(&context)?;
        let mut row = Vec::new();
        let table = Table::new(&stream, n * width, |start, out: &mut [f32]| {
            for (at, out) in (start..).zip(out) {
                if at % width == 0 || row.is_empty() {
                    spaced.fill(at / width, &mut row);
                }
                *out = row[at % width];
            }
        })?;
        context.bind()?;
        let (address, owner) = (stream.of(&table.part(0..table.len())).0, Arc::new(table.clone()));
        // SAFETY: the stream is one of this context, which is current on this thread, and outlives the resources.
        let resources = &mut unsafe { Resources::new(self.cuvs, resources::Stream(stream.raw()), self.gpu.ordinal) }?;
        // SAFETY: a table of that size on this GPU, which is written, which nobody writes to, and which stays while its owner does.
        let rows = unsafe { Rows::new(address, [n as u64, width as u64], Value::F32, owner) }?;
        // SAFETY: the context is current, and the rows are written.
        let index = unsafe { Index::build(resources, options, Metric::L2, rows) }?;
        let graph = index.graph()?;
        if graph.n != n as u64 {
            return Err(Failure::Said(format!("cuVS made a graph of {} vectors, not of {n}", graph.n)));
        }
        let mut links = vec![0u32; n * graph.degree as usize];
        // SAFETY: the graph has as many links, and is the index's, which stays; the host's memory is not looked at before the stream is done.
        let copied = unsafe { result::memcpy_dtoh_async(&mut links, graph.address, stream.raw().cast()) };
        // Also where the copy was refused: nothing is under way when the links are freed.
        let waited = stream.synchronize();
        context.check("copying from the GPU", copied)?;
        waited?;
        Ok((links, graph.degree))
    }
}

/// Why there is no graph.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("{0}")]
    Said(String),
    #[error(transparent)]
    Index(#[from] super::Error),
    #[error(transparent)]
    Device(#[from] DeviceError),
}

/// Vectors as the CPU's own graphs compare them, `width` values each, zeros at the end.
struct Spaced<'a> {
    lifted: Lifted<'a>,
    is_product: bool,
    width: usize,
}

impl<'a> Spaced<'a> {
    fn new(rows: &'a Vectors, metric: Metric) -> Self {
        let is_product = metric == Metric::InnerProduct;
        let width = (rows.dim() + usize::from(is_product)).next_multiple_of(ALIGNED);
        Spaced { lifted: Lifted::new(rows, metric), is_product, width }
    }

    fn fill(&self, at: usize, row: &mut Vec<f32>) {
        let further = self.lifted.read(at, row);
        row.extend(self.is_product.then_some(further));
        row.resize(self.width, 0.0);
    }
}

impl GraphMaker for CagraMaker {
    fn name(&self) -> String {
        format!("CAGRA on cuda:{}", self.gpu.ordinal)
    }

    fn make(&self, rows: &Vectors, metric: Metric, options: &HnswOptions) -> Result<(Vec<u32>, u32), String> {
        let made = Options::of(&IndexOptions::Hnsw(options.clone()), rows.n_rows(), rows.dim());
        let links = made.map_err(Failure::from).and_then(|made| self.links(&Spaced::new(rows, metric), made));
        links.map_err(|failure| format!("no graph by {}: {failure}", self.name()))
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::fake;
    use super::*;
    use crate::catalog::generation::Matrix;
    use crate::device::cuda::emulated::{Emulated, IMAGE, tell};
    use crate::index::{Exact, Filter, Hnsw, Kernel, SearchParams, SearchScratch};

    /// `n` vectors around a few points, of lengths that differ.
    fn matrix(n: usize, dim: usize) -> Matrix {
        let mut noise = crate::testing::noise(11);
        let centers: Vec<f32> = (0..20 * dim).map(|_| noise()).collect();
        let mut values = Vec::with_capacity(n * dim);
        for at in 0..n {
            let length = 1.0 + noise();
            values.extend((0..dim).map(|d| length * (centers[at % 20 * dim + d] + 0.8 * noise())));
        }
        Matrix { dim, data: crate::catalog::generation::MatrixData::F32(values.into()) }
    }

    fn maker(folder: &Path) -> CagraMaker {
        CagraMaker::with_image(probe(Some(0)).unwrap(), Some(folder), Image::Embedded(IMAGE)).unwrap()
    }

    #[test]
    fn the_cpu_finds_nearly_all_in_a_graph_of_the_gpu_s_whatever_the_metric() {
        let Some(folder) = &fake(&["-DEMULATED"]) else { return };
        let Some(_emulated) = Emulated::open("seed=8,delay_us=100") else { return };
        let (n, dim, k) = (1200usize, 11, 10usize);
        let (matrix, options) = (matrix(n, dim), HnswOptions { graph_degree: 24, ..HnswOptions::default() });
        for metric in [Metric::InnerProduct, Metric::Cosine, Metric::L2] {
            let exact = || Exact::new(matrix.clone(), metric, Kernel::detect());
            let (links, degree) = maker(folder.path()).make(exact().rows(), metric, &options).unwrap();
            assert_eq!((links.len(), degree), (n * 24, 24));
            let walked = Hnsw::from_graph(links.into(), degree, exact()).unwrap();
            let scanned = crate::index::BruteForce::over(exact());
            let mut noise = crate::testing::noise(12);
            let (mut found, mut scratch) = (0, SearchScratch::default());
            for _ in 0..50 {
                let query: Vec<f32> = (0..dim).map(|_| noise()).collect();
                let mut rows = |index: &dyn crate::index::VectorIndex, params: &SearchParams| {
                    let mut out = Vec::new();
                    index.search(&query, k, Filter::ALL, params, &mut scratch, &mut out);
                    out.into_iter().map(|found| found.row).collect::<Vec<_>>()
                };
                let want = rows(&scanned, &SearchParams::default());
                let got = rows(&walked, &SearchParams { ef_search: Some(150), ..SearchParams::default() });
                found += want.iter().filter(|row| got.contains(row)).count();
            }
            let recall = found as f64 / (50 * k) as f64;
            println!("{metric:?}: recall@{k} {recall:.4}");
            assert!(recall >= 0.95, "{metric:?}: {recall}");
        }
    }

    #[test]
    fn what_is_in_the_way_is_told() {
        let Some(folder) = &fake(&["-DEMULATED"]) else { return };
        let Some(emulated) = Emulated::open("delay_us=0") else { return };
        let (matrix, options, maker) = (matrix(1200, 11), HnswOptions::default(), maker(folder.path()));
        let refused = |matrix: &Matrix| {
            let exact = Exact::new(matrix.clone(), Metric::L2, Kernel::detect());
            maker.make(exact.rows(), Metric::L2, &options).unwrap_err()
        };
        emulated.script("delay_us=0,memory=1000000");
        let said = refused(&matrix);
        let (start, end) =
            ("no graph by CAGRA on cuda:0: 1200 vectors and their graph take 2.0 MiB, and ", " are free");
        assert!(said.starts_with(start) && said.ends_with(end), "{said}");
        emulated.script("delay_us=0");
        let library = folder.path().join("libcuvs_c.so");
        tell(&library, c"fake_script", "cuvsCagraBuild@1=cudaErrorIllegalInstruction");
        let text = "no graph by CAGRA on cuda:0: cuvsCagraBuild: cudaErrorIllegalInstruction";
        let said = refused(&matrix);
        assert!(said.starts_with(text), "{said}");
        tell(&library, c"fake_script", "");
        let nowhere = CagraMaker::with_image(maker.gpu.clone(), Some(Path::new("/nowhere")), Image::Embedded(IMAGE));
        assert!(nowhere.unwrap_err().starts_with("no cuVS: "));
    }
}
