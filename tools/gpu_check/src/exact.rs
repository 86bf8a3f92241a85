//! Exact search by scores of all rows and a selection: scores by our own kernel, and by cuBLASLt where its library is there.

use std::ffi::c_void;
use std::mem::size_of;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use cudarc::cublaslt::{result, sys};
use half::bf16;
use tastemaker::catalog::generation::{Matrix, MatrixData, Metric};
use tastemaker::index::Filter;
use tastemaker_kernels as kernels;

use crate::machine::{Machine, Memory, get, put};
use crate::report::SearchSpeed;
use crate::search::{Shape, oracle, recall, rows_of};

/// What cuBLASLt may use beside: what NVIDIA recommends for Hopper.
const WORKSPACE_BYTES: usize = 32 << 20;
/// Scores that there is room for at a time.
const SCORE_BYTES: usize = 8 << 30;
/// Queries that recall is measured on.
const N_JUDGED: usize = 16;

/// What is measured.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The vectors.
    pub shape: Shape,
    /// Results.
    pub ks: Vec<u32>,
    /// Queries at a time.
    pub batches: Vec<usize>,
    /// For each.
    pub each: Duration,
    /// Nothing is begun after this.
    pub until: Instant,
}

/// In which numbers vectors lie, and are multiplied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Numbers {
    F32,
    /// f32 of which 10 bits of the fraction are multiplied.
    Tf32,
    Bf16,
}

/// What makes scores.
#[derive(Clone, Copy, Debug)]
enum Way {
    Ours(Numbers),
    CublasLt(Numbers),
}

const WAYS: [Way; 5] = [
    Way::Ours(Numbers::F32),
    Way::Ours(Numbers::Bf16),
    Way::CublasLt(Numbers::F32),
    Way::CublasLt(Numbers::Tf32),
    Way::CublasLt(Numbers::Bf16),
];

impl Way {
    fn name(self) -> String {
        let (of, numbers) = match self {
            Way::Ours(numbers) => ("our scores", numbers),
            Way::CublasLt(numbers) => ("cuBLASLt", numbers),
        };
        format!("{of}, {}", format!("{numbers:?}").to_lowercase())
    }

    /// The least recall that is no defect: sums in another order exchange neighbours, rounding more of them.
    fn floor(self) -> f64 {
        match self {
            Way::Ours(Numbers::F32) | Way::CublasLt(Numbers::F32) => 0.999,
            _ => 0.95,
        }
    }
}

/// cuBLASLt, opened.
struct CublasLt {
    handle: sys::cublasLtHandle_t,
    workspace: Memory,
}

impl CublasLt {
    fn open(machine: &mut dyn Machine) -> Result<Self> {
        // SAFETY: the library is the system's; what it runs on opening is trusted.
        ensure!(unsafe { sys::is_culib_present() }, "libcublasLt is not there");
        Ok(CublasLt {
            handle: result::create_handle().context("cublasLtCreate")?,
            workspace: machine.reserve(WORKSPACE_BYTES)?,
        })
    }
}

impl Drop for CublasLt {
    fn drop(&mut self) {
        // SAFETY: made by `open`, destroyed once; all that it gave the stream was waited for.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

/// A product that is planned: scores `[n_queries, n_rows]` of queries `[n_queries, dim]` and rows `[n_rows, dim]`, all row-major, which to
/// cuBLASLt are columns.
struct Product<'a> {
    library: &'a CublasLt,
    of: sys::cublasLtMatmulDesc_t,
    /// Rows, queries, scores.
    layouts: Vec<sys::cublasLtMatrixLayout_t>,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

impl<'a> Product<'a> {
    fn new(library: &'a CublasLt, numbers: Numbers, [n_queries, n_rows, dim]: [usize; 3]) -> Result<Self> {
        use sys::cublasComputeType_t::{CUBLAS_COMPUTE_32F, CUBLAS_COMPUTE_32F_FAST_TF32};
        use sys::cudaDataType::{CUDA_R_16BF, CUDA_R_32F};
        let kind = if numbers == Numbers::Bf16 { CUDA_R_16BF } else { CUDA_R_32F };
        let compute = if numbers == Numbers::Tf32 { CUBLAS_COMPUTE_32F_FAST_TF32 } else { CUBLAS_COMPUTE_32F };
        let of = result::create_matmul_desc(compute, CUDA_R_32F)?;
        // From here on it is dropped whole.
        // SAFETY: a plain structure of numbers, of which zeros are a value.
        let mut product = Product { library, of, layouts: Vec::new(), algorithm: unsafe { std::mem::zeroed() } };
        let (transposed, bytes) = (1i32, WORKSPACE_BYTES);
        let which = sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA;
        // SAFETY: the attribute has that type.
        unsafe { result::set_matmul_desc_attribute(of, which, (&raw const transposed).cast(), size_of::<i32>()) }?;
        let [q, n, d] = [n_queries, n_rows, dim].map(|n| n as u64);
        for (kind, rows, columns, stride) in [(kind, d, n, dim), (kind, d, q, dim), (CUDA_R_32F, n, q, n_rows)] {
            product.layouts.push(result::create_matrix_layout(kind, rows, columns, stride as i64)?);
        }
        let preference = result::create_matmul_pref()?;
        let which = sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
        let [a, b, c] = [0, 1, 2].map(|at| product.layouts[at]);
        // SAFETY: handles that were just made, an attribute of that type.
        let found = unsafe {
            let set =
                result::set_matmul_pref_attribute(preference, which, (&raw const bytes).cast(), size_of::<usize>());
            let found =
                set.and_then(|()| result::get_matmul_algo_heuristic(library.handle, of, a, b, c, c, preference));
            let _ = result::destroy_matmul_pref(preference);
            found
        };
        product.algorithm = found.context("no algorithm")?.algo;
        Ok(product)
    }

    /// Puts the product on the machine's stream.
    fn run(&self, machine: &dyn Machine, rows: Memory, queries: u64, scores: Memory) -> Result<()> {
        let (one, zero) = (1f32, 0f32);
        let [a, b, c] = [0, 1, 2].map(|at| self.layouts[at]);
        let at = |address: u64| address as *mut c_void;
        let workspace = self.library.workspace;
        // SAFETY: memory of the sizes that the layouts say, used on this stream alone; numbers are read during the call.
        let given = unsafe {
            result::matmul(
                self.library.handle,
                self.of,
                (&raw const one).cast(),
                (&raw const zero).cast(),
                at(rows.address),
                a,
                at(queries),
                b,
                at(scores.address),
                c,
                at(scores.address),
                c,
                &raw const self.algorithm,
                at(workspace.address),
                workspace.bytes,
                machine.stream().0.cast(),
            )
        };
        given.context("cublasLtMatmul")
    }
}

impl Drop for Product<'_> {
    fn drop(&mut self) {
        // SAFETY: made by `new`, destroyed once.
        unsafe {
            for layout in self.layouts.drain(..) {
                let _ = result::destroy_matrix_layout(layout);
            }
            let _ = result::destroy_matmul_desc(self.of);
        }
    }
}

/// Vectors and room on the machine.
struct Held {
    n_rows: usize,
    dim: usize,
    /// Of a row, in values: a multiple of 4.
    width: usize,
    rows: [Memory; 2],
    queries: [Memory; 2],
    scores: Memory,
    /// Queries whose scores there is room for.
    chunk: usize,
    parts: [Memory; 2],
    found: [Memory; 2],
}

impl Held {
    fn rows_of(&self, numbers: Numbers) -> Memory {
        self.rows[usize::from(numbers == Numbers::Bf16)]
    }

    /// Parts that rows are selected in.
    fn n_parts(&self, n: usize) -> usize {
        kernels::TopkSelect::n_parts(n, self.n_rows)
    }

    /// The `k` best of scores of `n` queries, to the `first`-th list on.
    fn select(&self, machine: &mut dyn Machine, [first, n, k]: [usize; 3]) -> Result<()> {
        let n_parts = self.n_parts(n);
        let at = |memory: Memory| memory.address + (4 * first * k) as u64;
        let [rows, scores] = self.found.map(at);
        let [to_rows, to_scores] = if n_parts == 1 { [rows, scores] } else { self.parts.map(|memory| memory.address) };
        let select = kernels::TopkSelect {
            scores: self.scores.address,
            ids: None,
            lengths: None,
            n_rows: n as u32,
            n_cols: self.n_rows as u32,
            stride: self.n_rows as u32,
            n_parts: n_parts as u32,
            k: k as u32,
            out_rows: to_rows,
            out_scores: to_scores,
        };
        machine.launch(&select.launch()?)?;
        if n_parts == 1 {
            return Ok(());
        }
        let merge = kernels::PartitionMerge {
            rows: to_rows,
            scores: to_scores,
            offsets: None,
            n_queries: n as u32,
            n_parts: n_parts as u32,
            width: k as u32,
            k: k as u32,
            out_rows: rows,
            out_scores: scores,
        };
        machine.launch(&merge.launch()?)
    }

    /// Our scores of `n` queries from the `first` on.
    fn score(&self, machine: &mut dyn Machine, numbers: Numbers, [first, n]: [usize; 2]) -> Result<()> {
        let shape = kernels::Scores {
            queries: self.queries[0].address + (4 * first * self.width) as u64,
            n_queries: n as u32,
            table: self.rows_of(numbers).address,
            n_rows: self.n_rows as u32,
            width: self.width as u32,
            // Not read for inner products.
            terms: self.rows[0].address,
            by: kernels::ScoreBy::InnerProduct,
            available: None,
            scores: self.scores.address,
            stride: self.n_rows as u32,
        };
        let launch = match numbers {
            Numbers::Bf16 => kernels::ScoresBf16(shape).launch()?,
            _ => kernels::ScoresF32(shape).launch()?,
        };
        machine.launch(&launch)
    }
}

/// What was found.
#[derive(Debug, Default)]
pub struct Found {
    /// Speeds and recall.
    pub speeds: Vec<SearchSpeed>,
    /// What finds too little: a defect.
    pub wrong: Vec<String>,
    /// What was left out, and why.
    pub notes: Vec<String>,
}

/// Speed of exact search for inner products, and its recall against the CPU's, in every way that there is.
///
/// # Errors
/// What the machine says. What cuBLASLt says is in the notes.
pub fn bench(machine: &mut dyn Machine, plan: &Plan, seed: u64) -> Result<Found> {
    let Shape { n: n_rows, dim, .. } = plan.shape;
    let largest = plan.batches.iter().copied().max().unwrap_or(1);
    let most = plan.ks.iter().copied().max().unwrap_or(1) as usize;
    let (values, queries) = plan.shape.draw(largest.max(N_JUDGED), seed);
    // As the engine has them.
    let width = dim.next_multiple_of(8);
    let padded = |values: &[f32]| -> Vec<f32> {
        let row = |row: &[f32]| row.iter().copied().chain(std::iter::repeat(0.0)).take(width).collect::<Vec<_>>();
        values.chunks_exact(dim).flat_map(row).collect()
    };
    let narrow = |values: &[f32]| -> Vec<u16> { values.iter().map(|&value| bf16::from_f32(value).to_bits()).collect() };
    let (rows, asked) = (padded(&values), padded(&queries));
    let matrix = Matrix { dim, data: MatrixData::F32(values.into()) };
    let judged = &queries[..N_JUDGED * dim];
    let best = rows_of(&oracle(&matrix, Metric::InnerProduct, judged, Filter::ALL, most));
    drop(matrix);

    let chunk = (SCORE_BYTES / (4 * n_rows)).clamp(1, largest);
    let lists = |machine: &mut dyn Machine, n: usize| -> Result<[Memory; 2]> {
        Ok([machine.reserve(4 * n)?, machine.reserve(4 * n)?])
    };
    let n_parts = (1..=chunk).map(|n| n * kernels::TopkSelect::n_parts(n, n_rows)).max().unwrap_or(1);
    let held = Held {
        n_rows,
        dim: width,
        width,
        rows: [put(machine, &rows)?, put(machine, &narrow(&rows))?],
        queries: [put(machine, &asked)?, put(machine, &narrow(&asked))?],
        scores: machine.reserve(4 * n_rows * chunk)?,
        chunk,
        parts: lists(machine, n_parts * most)?,
        found: lists(machine, largest.max(N_JUDGED) * most)?,
    };
    drop((rows, asked));
    let mut found = Found::default();
    let library = match CublasLt::open(machine) {
        Ok(library) => Some(library),
        Err(error) => {
            found.notes.push(format!("exact search by cuBLASLt: not run: {error:#}"));
            None
        }
    };
    for way in WAYS {
        let measured = measure(machine, (plan, &held, &best), (way, library.as_ref()), &mut found);
        if let Err(error) = measured {
            found.notes.push(format!("exact search by {}: {error:#}", way.name()));
        }
    }
    drop(library);
    machine.clear()?;
    Ok(found)
}

fn measure(
    machine: &mut dyn Machine,
    (plan, held, best): (&Plan, &Held, &[Vec<u32>]),
    (way, library): (Way, Option<&CublasLt>),
    found: &mut Found,
) -> Result<()> {
    let product = |numbers, n| match library {
        Some(library) => Product::new(library, numbers, [n, held.n_rows, held.dim]).map(Some),
        None => Ok(None),
    };
    if library.is_none() && matches!(way, Way::CublasLt(_)) {
        return Ok(());
    }
    // The batch by which recall is judged comes with the first k.
    for &k in &plan.ks {
        let mut share = f64::NAN;
        for &batch in [N_JUDGED].iter().chain(&plan.batches) {
            if Instant::now() > plan.until {
                found.notes.push(format!("exact search by {}, k {k}: the time is over", way.name()));
                return Ok(());
            }
            // Whole chunks alike, and what is left.
            let chunks: Vec<[usize; 2]> =
                (0..batch).step_by(held.chunk).map(|first| [first, held.chunk.min(batch - first)]).collect();
            let products = match way {
                Way::Ours(_) => Vec::new(),
                Way::CublasLt(numbers) => {
                    chunks.iter().map(|&[_, n]| product(numbers, n)).collect::<Result<Vec<_>>>()?
                }
            };
            let mut run = |machine: &mut dyn Machine| -> Result<()> {
                for (at, &[first, n]) in chunks.iter().enumerate() {
                    match way {
                        Way::Ours(numbers) => held.score(machine, numbers, [first, n])?,
                        Way::CublasLt(numbers) => {
                            let of = usize::from(numbers == Numbers::Bf16);
                            let value = if of == 1 { 2 } else { 4 };
                            let queries = held.queries[of].address + (value * first * held.width) as u64;
                            let product = products.get(at).and_then(Option::as_ref).context("no product")?;
                            product.run(machine, held.rows_of(numbers), queries, held.scores)?;
                        }
                    }
                    held.select(machine, [first, n, k as usize])?;
                }
                Ok(())
            };
            // The first loads what is of this shape alone.
            machine.seconds(&mut run)?;
            if share.is_nan() {
                let rows = get::<u32>(machine, held.found[0], N_JUDGED * k as usize)?;
                let rows: Vec<i64> = rows.into_iter().map(i64::from).collect();
                let wanted: Vec<Vec<u32>> = best.iter().map(|list| list[..k as usize].to_vec()).collect();
                share = recall(rows.chunks(k as usize), &wanted);
                if share < way.floor() {
                    found.wrong.push(format!("exact search by {}, k {k}: recall {share:.4}", way.name()));
                }
                continue;
            }
            let (mut times, end) = (Vec::new(), Instant::now() + plan.each);
            while times.len() < 3 || (Instant::now() < end && times.len() < 2000) {
                let begun = Instant::now();
                // Waits for the end.
                machine.seconds(&mut run)?;
                times.push(begun.elapsed().as_secs_f64());
            }
            times.sort_by(f64::total_cmp);
            let seconds = times[times.len() / 2];
            found.speeds.push(SearchSpeed {
                dataset: format!("{} x {}", held.n_rows, plan.shape.dim),
                kind: format!("exact, {}", way.name()),
                k,
                effort: "inner products of all rows".into(),
                batch,
                recall: share,
                seconds,
                queries_per_second: batch as f64 / seconds,
                build_seconds: 0.0,
            });
        }
    }
    Ok(())
}
