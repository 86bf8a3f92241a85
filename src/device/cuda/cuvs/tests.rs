//! Against a stand-in for cuVS that works on the host's memory (fake.c), and what of the real library needs no GPU, where
//! `TASTEMAKER_CUVS` names the folder that it was installed in.
#![allow(unsafe_code)] // Calls of cuVS's functions, and of functions whose callers vouch for memory.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use half::f16;
use tempfile::TempDir;

use super::resources::{Owned, call, owned};
use super::sys::*;
use super::*;
use crate::catalog::generation::{Matrix, MatrixData, Metric};
use crate::index::{Exact, Filter, Hnsw, IndexOptions, Kernel, SearchParams, SearchScratch, VectorIndex};

const METRICS: [Metric; 3] = [Metric::InnerProduct, Metric::Cosine, Metric::L2];
const NO_STREAM: Stream = Stream(std::ptr::null_mut());

/// Not by `eprintln!`, which the test harness keeps to itself.
fn skipped(why: &str) {
    let _ = writeln!(std::io::stderr(), "SKIPPED: {why}");
}

/// A folder with a library of cuVS's name; `None`, visibly, where there is no C compiler.
pub(in super::super) fn fake(macros: &[&str]) -> Option<TempDir> {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("fake.c");
    // Part of this program, which may run where its sources are not.
    std::fs::write(&source, include_str!("fake.c")).unwrap();
    let cc = std::env::var("CC").unwrap_or_else(|_| "cc".into());
    let ran = Command::new(&cc)
        .args(["-shared", "-fPIC", "-w", "-O1"])
        .args(macros)
        .arg(source)
        .arg("-o")
        .arg(folder.path().join("libcuvs_c.so"))
        .args(["-lm", "-ldl"])
        .output();
    match ran {
        Ok(ran) => assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr)),
        Err(error) => {
            skipped(&format!("{cc}: {error}"));
            return None;
        }
    }
    Some(folder)
}

/// The folder of the real one; fails where `.ci/run` says that there is one.
fn real() -> Option<PathBuf> {
    let folder = std::env::var_os("TASTEMAKER_CUVS").filter(|folder| !folder.is_empty());
    if folder.is_none() {
        assert!(
            std::env::var_os("TASTEMAKER_REQUIRE_CUVS").is_none(),
            "cuVS is required, and TASTEMAKER_CUVS is not set"
        );
        skipped("TASTEMAKER_CUVS names no folder with cuVS");
    }
    folder.map(PathBuf::from)
}

#[test]
fn each_outcome_of_opening_has_its_line() {
    let load = |folder: &TempDir| Cuvs::load(Some(folder.path())).map(|cuvs| cuvs.version).map_err(|e| e.to_string());
    let missing = "no cuVS: libcuvs_c.so is not there; the Python package libcuvs-cu13==26.10.* has it";
    let empty = tempfile::tempdir().unwrap();
    assert_eq!(load(&empty), Err(missing.into()));
    std::fs::write(empty.path().join("libcuvs_c.so"), "not a library").unwrap();
    let said = load(&empty).unwrap_err();
    assert!(said.starts_with("cuVS can't be opened: ") && said.ends_with("file too short"), "{said}");

    let Some(folder) = fake(&[]) else { return };
    assert_eq!(load(&folder), Ok((26, 10, 7)));
    let wrong: &[(&[&str], &str)] = &[
        (&["-DMINOR=12"], "cuVS 26.12.7 is there; 26.10 is needed"),
        (&["-DMAJOR=25", "-DWITHOUT_CAGRA"], "cuVS 25.10.7 is there; 26.10 is needed"),
        (&["-DWITHOUT_CAGRA"], "libcuvs_c.so is not cuVS 26.10: it has no cuvsCagraSearch"),
        (&["-DWITHOUT_VERSION"], "libcuvs_c.so is not cuVS 26.10: it has no cuvsVersionGet"),
    ];
    for (macros, line) in wrong {
        assert_eq!(load(&fake(macros).unwrap()), Err((*line).into()), "{macros:?}");
    }

    // One that needs another, which then goes; and one whose function nobody has.
    let folder = fake(&[]).unwrap();
    let library = |name: &str, more: &[&str], text: &str| {
        let source = folder.path().join("library.c");
        std::fs::write(&source, text).unwrap();
        let mut cc = Command::new(std::env::var("CC").unwrap_or_else(|_| "cc".into()));
        let cc = cc.args(["-shared", "-fPIC"]).arg(&source).arg("-o").arg(folder.path().join(name)).args(more);
        assert!(cc.status().unwrap().success());
    };
    let at = format!("-L{}", folder.path().display());
    library("libneeded.so.3", &["-Wl,-soname,libneeded.so.3"], "int needed() { return 1; }");
    library("libcuvs_c.so", &[&at, "-l:libneeded.so.3"], "int needed(); int f() { return needed(); }");
    std::fs::remove_file(folder.path().join("libneeded.so.3")).unwrap();
    assert_eq!(load(&folder), Err("cuVS can't be opened: libneeded.so.3 is not there".into()));
    library("libcuvs_c.so", &[], "int nowhere(); int f() { return nowhere(); }");
    let said = load(&folder).unwrap_err();
    assert!(said.starts_with("cuVS can't be opened: ") && said.ends_with("undefined symbol: nowhere"), "{said}");
    // Of the libraries beside it that is opened first.
    std::fs::write(folder.path().join("librmm.so"), "not a library").unwrap();
    let said = load(&folder).unwrap_err();
    assert!(said.contains("librmm.so: file too short"), "{said}");
}

/// Vectors, in memory that is the stand-in's device's.
struct Held {
    matrix: Matrix,
    rows: Rows,
}

fn held(values: &[f32], dim: usize, value: Value) -> Held {
    let n = (values.len() / dim) as u64;
    match value {
        Value::F32 => {
            let data: Arc<Vec<f32>> = Arc::new(values.to_vec());
            let at = data.as_ptr() as u64;
            let matrix = Matrix { dim, data: MatrixData::F32(values.to_vec().into()) };
            // SAFETY: the values lie there as long as the vector, which is handed over and which nobody changes.
            Held { matrix, rows: unsafe { Rows::new(at, [n, dim as u64], value, data) }.unwrap() }
        }
        Value::F16 => {
            let data: Arc<Vec<f16>> = Arc::new(values.iter().map(|&v| f16::from_f32(v)).collect());
            let at = data.as_ptr() as u64;
            let matrix = Matrix { dim, data: MatrixData::F16(data.to_vec().into()) };
            // SAFETY: as above.
            Held { matrix, rows: unsafe { Rows::new(at, [n, dim as u64], value, data) }.unwrap() }
        }
    }
}

/// The stand-in, which needs nothing else for its files.
pub(in super::super) fn with_files(folder: &TempDir) -> &'static Cuvs {
    let loaded = Cuvs::load(Some(folder.path())).unwrap();
    Box::leak(Box::new(Cuvs { files: Ok(()), ..*loaded }))
}

fn resources(folder: &TempDir) -> Resources {
    // SAFETY: the stand-in has no streams.
    unsafe { Resources::new(with_files(folder), NO_STREAM, 0) }.unwrap()
}

/// Searches `queries` (f32, of `index`'s dimension) as the index's type wants them; results as rows with scores.
fn search(
    index: &Index,
    resources: &mut Resources,
    queries: &[f32],
    value: Value,
    filter: Option<&[u32]>,
    (k, params, walk): (u32, &SearchParams, Walk),
) -> Result<Vec<Vec<(i64, f32)>>, Error> {
    let n_queries = queries.len() / index.dim() as usize;
    let halves: Vec<f16> = queries.iter().map(|&v| f16::from_f32(v)).collect();
    let queries = if value == Value::F16 { halves.as_ptr() as u64 } else { queries.as_ptr() as u64 };
    let mut rows = vec![-1i64; n_queries * k as usize];
    let mut distances = vec![f32::NAN; n_queries * k as usize];
    let out = Neighbors { rows: rows.as_mut_ptr() as u64, distances: distances.as_mut_ptr() as u64 };
    let filter = filter.map(|words| words.as_ptr() as u64);
    let asked = Search { queries, n_queries: n_queries as u32, k, params, walk, filter };
    // SAFETY: the buffers have these sizes, and the stand-in is done when it returns.
    unsafe { index.search(resources, &asked, out) }?;
    resources.synchronize()?;
    let scale = Scale::of(index.metric());
    let found = rows.iter().zip(&distances).map(|(&row, &distance)| (row, scale.score(distance)));
    Ok(found.collect::<Vec<_>>().chunks(k as usize).map(<[_]>::to_vec).collect())
}

/// What the CPU finds, exactly.
fn oracle(matrix: &Matrix, metric: Metric, queries: &[f32], filter: Filter<'_>, k: usize) -> Vec<Vec<(i64, f32)>> {
    let index = crate::index::BruteForce::over(Exact::new(matrix.clone(), metric, Kernel::detect()));
    let (mut scratch, params) = (SearchScratch::default(), SearchParams::default());
    let one = |query: &[f32]| {
        let mut out = Vec::new();
        index.search(query, k, filter, &params, &mut scratch, &mut out);
        out.into_iter().map(|found| (i64::from(found.row), found.score)).collect()
    };
    queries.chunks(matrix.dim).map(one).collect()
}

/// Rows and, but for rounding, scores.
fn same(got: &[Vec<(i64, f32)>], want: &[Vec<(i64, f32)>], n: i64) {
    for (got, want) in got.iter().zip(want) {
        let found: Vec<_> = got.iter().filter(|(row, _)| (0..n).contains(row)).collect();
        assert_eq!(found.iter().map(|f| f.0).collect::<Vec<_>>(), want.iter().map(|f| f.0).collect::<Vec<_>>());
        assert!(found.iter().zip(want).all(|(a, b)| (a.1 - b.1).abs() < 1e-3 * (1.0 + b.1.abs())), "{got:?} {want:?}");
    }
    assert_eq!(got.len(), want.len());
}

#[test]
fn every_kind_answers_as_the_cpu_does() {
    let Some(folder) = fake(&[]) else { return };
    let resources = &mut resources(&folder);
    resources.pool(1 << 20).unwrap();
    let (n, n_more, n_queries) = (300usize, 40, 5);
    // One dimension for which rows begin at multiples of 16 bytes, and one for which they do not.
    for (dim, value) in [(16usize, Value::F32), (16, Value::F16), (13, Value::F32), (9, Value::F16)] {
        let mut noise = crate::testing::noise(5 + dim as u64);
        let mut draw = |n: usize| -> Vec<f32> { (0..n).map(|_| f16::from_f32(noise()).to_f32()).collect() };
        let (values, queries) = (draw((n + n_more) * dim), draw(n_queries * dim));
        let first = held(&values[..n * dim], dim, value);
        let whole = held(&values, dim, value);
        let words: Vec<u32> = (0..(n + n_more).div_ceil(32) as u32).map(|word| 0x8421_1248 << (word % 4)).collect();
        let admits = |row: u32| words[row as usize / 32] >> (row % 32) & 1 == 1;
        let every = [
            Options::BruteForce,
            Options::IvfFlat { n_lists: 7, kmeans_n_iters: 3 },
            Options::IvfPq { n_lists: 9, kmeans_n_iters: 3, pq_dim: 4, pq_bits: 6 },
            Options::Cagra { graph_degree: 8, intermediate_graph_degree: 16 },
        ];
        for (options, metric) in every.into_iter().flat_map(|options| METRICS.map(|metric| (options, metric))) {
            // SAFETY: the stand-in has no context and no stream.
            let mut index = unsafe { Index::build(resources, options, metric, first.rows.clone()) }.unwrap();
            assert_eq!((index.kind(), index.n(), index.dim() as usize), (options.kind(), n as u64, dim));
            let params = SearchParams { n_probes: Some(1000), ..Default::default() };
            for k in [1u32, 10, 300] {
                let asked = (k, &params, Walk::Auto);
                let got = search(&index, resources, &queries, value, None, asked).unwrap();
                same(&got, &oracle(&first.matrix, metric, &queries, Filter::ALL, k as usize), n as i64);
                let got = search(&index, resources, &queries, value, Some(&words[..n.div_ceil(32)]), asked);
                if options.kind().filters() {
                    let want = oracle(&first.matrix, metric, &queries, Filter::predicate(&admits), k as usize);
                    same(&got.unwrap(), &want, n as i64);
                } else {
                    assert_eq!(got, Err(Error::Unsupported("filter for ivf_pq")));
                }
            }
            let ids: Vec<i64> = (n as i64..(n + n_more) as i64).collect();
            // SAFETY: the ids are as many as the new rows.
            unsafe { index.extend(resources, whole.rows.clone(), ids.as_ptr() as u64) }.unwrap();
            assert_eq!(index.n(), (n + n_more) as u64);
            let asked = (20, &params, Walk::SeveralBlocks);
            let want = oracle(&whole.matrix, metric, &queries, Filter::ALL, 20);
            same(&search(&index, resources, &queries, value, None, asked).unwrap(), &want, (n + n_more) as i64);

            let path = folder.path().join("index");
            if options == Options::BruteForce {
                let refused = Err(Error::Unsupported("file for brute_force"));
                assert_eq!(index.store(resources, &path), refused);
                continue;
            }
            index.store(resources, &path).unwrap();
            // SAFETY: the stand-in has no context and no stream.
            let load = |resources: &mut Resources, rows: &Rows, path: &Path| unsafe {
                Index::load(resources, options.kind(), metric, rows.clone(), path)
            };
            let loaded = load(resources, &whole.rows, &path).unwrap();
            same(&search(&loaded, resources, &queries, value, None, asked).unwrap(), &want, (n + n_more) as i64);
            // Of fewer rows; not there; none of cuVS's.
            if options.kind() != Kind::IvfFlat {
                let said = load(resources, &first.rows, &path).unwrap_err().to_string();
                assert!(said.ends_with("n_rows is 340, expected 300 to 300"), "{said}");
            }
            let said = load(resources, &whole.rows, &folder.path().join("none")).unwrap_err().to_string();
            assert!(
                said.ends_with("Deserialize: Cannot open file") || said.contains("DeserializeGraph: Cannot"),
                "{said}"
            );
            std::fs::write(&path, "garbage").unwrap();
            let said = load(resources, &whole.rows, &path).unwrap_err().to_string();
            assert!(said.ends_with(": Invalid NumPy header"), "{said}");
        }
    }
}

#[test]
fn a_graph_of_the_gpu_is_searched_on_the_cpu() {
    let Some(folder) = fake(&[]) else { return };
    let (resources, (n, dim)) = (&mut resources(&folder), (400usize, 12));
    let mut noise = crate::testing::noise(3);
    let values: Vec<f32> = (0..n * dim).map(|_| noise()).collect();
    let made = held(&values, dim, Value::F32);
    let options = Options::Cagra { graph_degree: 16, intermediate_graph_degree: 32 };
    // SAFETY: the stand-in has no context and no stream.
    let index = unsafe { Index::build(resources, options, Metric::L2, made.rows.clone()) }.unwrap();
    let graph = index.graph().unwrap();
    assert_eq!((graph.n, graph.degree), (n as u64, 16));
    // SAFETY: the stand-in's device is the host, and the graph has this size.
    let links = unsafe { std::slice::from_raw_parts(graph.address as *const u32, n * 16) }.to_vec();
    // And back.
    // SAFETY: the stand-in has no context and no stream.
    let of_graph = |resources: &mut Resources, links: &[u32], degree| unsafe {
        Index::of_graph(resources, Metric::L2, made.rows.clone(), links, degree)
    };
    let again = of_graph(resources, &links, 16).unwrap();
    let asked = (10, &SearchParams::default(), Walk::Auto);
    let want = oracle(&made.matrix, Metric::L2, &values[..dim], Filter::ALL, 10);
    same(&search(&again, resources, &values[..dim], Value::F32, None, asked).unwrap(), &want, n as i64);
    let refused =
        |links: &[u32], degree, resources: &mut Resources| of_graph(resources, links, degree).unwrap_err().to_string();
    assert_eq!(refused(&links, 15, resources), "the graph's links is 6400, expected 6000 to 6000");
    let astray = [&links[1..], &[400]].concat();
    assert_eq!(refused(&astray, 16, resources), "the graph's farthest row is 400, expected 0 to 399");

    let exact = Exact::new(made.matrix.clone(), Metric::L2, Kernel::detect());
    let hnsw = Hnsw::from_graph(links.into(), 16, exact).unwrap();
    let (mut out, mut scratch) = (Vec::new(), SearchScratch::default());
    let params = SearchParams { ef_search: Some(200), ..Default::default() };
    hnsw.search(&values[..dim], 10, Filter::ALL, &params, &mut scratch, &mut out);
    assert_eq!(out[0].row, 0);
    let found = out.iter().filter(|found| want[0].iter().any(|want| want.0 == i64::from(found.row))).count();
    assert!(found >= 9, "{found} of 10");

    // SAFETY: the stand-in has no context and no stream.
    let flat = unsafe { Index::build(resources, Options::BruteForce, Metric::L2, made.rows) }.unwrap();
    assert_eq!(flat.graph().unwrap_err(), Error::Unsupported("graph but that of cagra"));
}

#[test]
fn what_is_out_of_range_is_refused_by_name() {
    let Some(folder) = fake(&[]) else { return };
    let (resources, dim) = (&mut resources(&folder), 8usize);
    let values = vec![0.5; 100 * dim];
    let rows = held(&values, dim, Value::F32).rows;
    let refused = |resources: &mut Resources, options| {
        // SAFETY: the stand-in has no context and no stream.
        unsafe { Index::build(resources, options, Metric::L2, rows.clone()) }.unwrap_err().to_string()
    };
    let pq = |n_lists, kmeans_n_iters, pq_dim, pq_bits| Options::IvfPq { n_lists, kmeans_n_iters, pq_dim, pq_bits };
    let cagra = |graph_degree, intermediate_graph_degree| Options::Cagra { graph_degree, intermediate_graph_degree };
    let flat = Options::IvfFlat { n_lists: 101, kmeans_n_iters: 1 };
    assert_eq!(refused(resources, flat), "n_lists is 101, expected 1 to 100");
    assert_eq!(refused(resources, pq(10, 0, 8, 8)), "kmeans_n_iters is 0, expected 1 to 100");
    assert_eq!(refused(resources, pq(10, 1, 8, 3)), "pq_bits is 3, expected 4 to 8");
    assert_eq!(refused(resources, pq(10, 1, 7, 4)), "pq_dim * pq_bits modulo 8 is 4, expected 0 to 0");
    assert_eq!(refused(resources, cagra(3, 3)), "graph_degree is 3, expected 4 to 512");
    assert_eq!(refused(resources, cagra(32, 31)), "intermediate_graph_degree is 31, expected 32 to 1024");

    // SAFETY: the stand-in has no context and no stream.
    let mut index = unsafe { Index::build(resources, cagra(8, 8), Metric::L2, rows.clone()) }.unwrap();
    let mut asked = |k, ef_search, walk| {
        let params = SearchParams { ef_search, ..Default::default() };
        search(&index, resources, &values[..dim], Value::F32, None, (k, &params, walk))
            .map(|_| ())
            .map_err(|e| e.to_string())
    };
    assert_eq!(asked(0, None, Walk::Auto), Err("k is 0, expected 1 to 100".into()));
    assert_eq!(asked(101, None, Walk::Auto), Err("k is 101, expected 1 to 100".into()));
    let said = "itopk_size is 1056, expected 1 to 1024";
    assert_eq!(asked(10, Some(1025), Walk::OneBlock), Err(said.into()));
    let walk = Walk::Persistent { lifetime: 1.0, device_usage: 0.5 };
    assert_eq!(asked(10, Some(1025), walk), Err(said.into()));
    assert_eq!(asked(10, None, walk), Ok(()));
    let walk = Walk::Persistent { lifetime: 1.0, device_usage: 1.5 };
    assert_eq!(asked(10, None, walk), Err("device_usage, percent is 150, expected 1 to 100".into()));
    assert_eq!(asked(10, Some(1025), Walk::SeveralBlocks), Ok(()));

    // SAFETY: nothing is read before it is refused.
    let extended = unsafe { index.extend(resources, rows.clone(), 1) }.unwrap_err().to_string();
    assert_eq!(extended, "n_rows is 100, expected 101 to 4294967294");
    let wider = held(&values, 16, Value::F32).rows;
    // SAFETY: as above.
    let extended = unsafe { index.extend(resources, wider, 1) }.unwrap_err().to_string();
    assert_eq!(extended, "dim is 16, expected 8 to 8");

    // What the library itself refuses comes with its own text, without the trace behind it.
    let params = SearchParams::default();
    let search = Search { queries: 0, n_queries: 1, k: 1, params: &params, walk: Walk::Auto, filter: None };
    // SAFETY: the stand-in looks at addresses before it uses them.
    let said = unsafe { index.search(resources, &search, Neighbors { rows: 0, distances: 0 }) }.unwrap_err();
    assert_eq!(said.to_string(), "cuvsCagraSearch: type mismatch between index and queries");
    assert!(!said.is_out_of_memory());
    let lacking = Error::Call { call: "f", said: "std::bad_alloc: out_of_memory: CUDA error".into() };
    assert!(lacking.is_out_of_memory());
}

#[test]
fn options_of_the_cpu_become_cuvs_ones() {
    let of = |text: &str| Options::of(&serde_json::from_str::<IndexOptions>(text).unwrap(), 1_000_000, 96);
    assert_eq!(of(r#"{"kind":"brute_force"}"#), Ok(Options::BruteForce));
    let flat = |n_lists, kmeans_n_iters| Ok(Options::IvfFlat { n_lists, kmeans_n_iters });
    assert_eq!(of(r#"{"kind":"ivf_flat"}"#), flat(2000, 10));
    assert_eq!(of(r#"{"kind":"ivf_flat","n_lists":77,"kmeans_n_iters":4}"#), flat(77, 4));
    assert_eq!(of(r#"{"kind":"ivf_flat","storage":"bf16"}"#), Err(Error::Unsupported("lists of bf16 values")));
    let pq = |pq_dim| Ok(Options::IvfPq { n_lists: 2000, kmeans_n_iters: 10, pq_dim, pq_bits: 8 });
    assert_eq!(of(r#"{"kind":"ivf_pq"}"#), pq(48));
    assert_eq!(of(r#"{"kind":"ivf_pq","pq_dim":24}"#), pq(24));
    assert_eq!(of(r#"{"kind":"ivf_rabitq"}"#), pq(16));
    let cagra =
        |graph_degree, intermediate_graph_degree| Ok(Options::Cagra { graph_degree, intermediate_graph_degree });
    assert_eq!(of(r#"{"kind":"hnsw"}"#), cagra(32, 200));
    assert_eq!(of(r#"{"kind":"hnsw","graph_degree":64,"ef_construction":4000}"#), cagra(64, 1024));
}

#[test]
fn efforts_follow_from_k() {
    let params = SearchParams::default();
    let ef = |ef| SearchParams { ef_search: Some(ef), ..Default::default() };
    let sizes = [(10, None, 64), (100, None, 224), (500, None, 1024), (500, Some(500), 512), (500, Some(40), 512)];
    for (k, asked, want) in sizes {
        assert_eq!(itopk_size(k, &asked.map_or(params, ef)), want, "{k} {asked:?}");
    }
    assert_eq!(fetch(500, 1.0, &params, false), Some(500));
    assert_eq!(fetch(500, 1.0, &params, true), Some(1000));
    assert_eq!(fetch(900, 1.0, &params, true), Some(1024));
    let half = fetch(100, 0.5, &params, false).unwrap();
    assert!((240..300).contains(&half), "{half}");
    assert_eq!(fetch(500, 0.5, &params, false), None);
    assert_eq!(fetch(10, 0.0, &params, false), None);
    // Enough but for one in thousands: rows that are admitted at random.
    let mut noise = crate::testing::noise(9);
    for (k, share) in [(10, 0.1), (100, 0.3), (300, 0.6)] {
        let fetched = fetch(k, share, &params, false).unwrap();
        let mut few = 0;
        for _ in 0..2000 {
            let left = (0..fetched).filter(|_| f64::from(noise() + 0.5) < share).count();
            few += usize::from(left < k as usize);
        }
        assert!(few <= 2, "{k} {share}: {few} of 2000");
    }
}

#[test]
fn scores_are_higher_for_what_is_nearer() {
    assert_eq!(METRICS.map(|metric| Scale::of(metric).score(0.25)), [0.25, 0.75, -0.25]);
}

/// A type as C spells it.
fn c_type(rust: &str) -> String {
    let rust = rust.replace(' ', "");
    if let Some(to) = rust.strip_prefix("*mut") {
        return format!("{}*", c_type(to));
    }
    if let Some(to) = rust.strip_prefix("*const") {
        return format!("const {}*", c_type(to));
    }
    match rust.as_str() {
        "()" => "void",
        "c_void" => "void",
        "c_char" => "char",
        "c_int" => "int",
        "u16" => "uint16_t",
        "u32" => "uint32_t",
        "i64" => "int64_t",
        "usize" => "size_t",
        "f32" => "float",
        name => name,
    }
    .to_owned()
}

#[test]
fn types_equal_the_headers() {
    let Some(site) = real() else { return };
    let folder = tempfile::tempdir().unwrap();
    let mut text = String::new();
    for header in [
        "core/c_api",
        "core/dataset",
        "neighbors/brute_force",
        "neighbors/ivf_flat",
        "neighbors/ivf_pq",
        "neighbors/cagra",
    ] {
        writeln!(text, "#include <cuvs/{header}.h>").unwrap();
    }
    text.push_str("#include <stddef.h>\n#include <cuvs/version_config.h>\n");
    writeln!(
        text,
        "_Static_assert(CUVS_VERSION_MAJOR == {} && CUVS_VERSION_MINOR == {}, \"version\");",
        VERSION.0, VERSION.1
    )
    .unwrap();
    for (name, value) in CONSTANTS {
        writeln!(text, "_Static_assert({name} == {value}, \"{name}\");").unwrap();
    }
    for Layout { name, size, fields } in LAYOUTS {
        writeln!(text, "_Static_assert(sizeof({name}) == {size}, \"{name}\");").unwrap();
        for (field, offset, size) in *fields {
            writeln!(text, "_Static_assert(offsetof({name}, {field}) == {offset}, \"{name}.{field}\");").unwrap();
            writeln!(text, "_Static_assert(sizeof((({name}*)0)->{field}) == {size}, \"{name}.{field}\");").unwrap();
        }
    }
    // A declaration that differs from one before it is an error in C.
    for (name, types, returned) in PROTOTYPES {
        let types: Vec<String> = types.iter().map(|rust| c_type(rust)).collect();
        let types = if types.is_empty() { "void".into() } else { types.join(", ") };
        writeln!(text, "{} {name}({types});", c_type(returned)).unwrap();
    }
    // The headers want two of others: of CUDA's two types, and DLPack's, which no package has; this is its ABI of version 1.
    std::fs::create_dir(folder.path().join("dlpack")).unwrap();
    let own = [
        (
            "cuda_runtime.h",
            "#pragma once\n#include <stddef.h>\n#include <library_types.h>\ntypedef struct CUstream_st* cudaStream_t;\n",
        ),
        (
            "dlpack/dlpack.h",
            "#pragma once\n#include <stdint.h>\n\
             typedef enum { kDLCPU = 1, kDLCUDA = 2, kDLCUDAHost = 3, kDLCUDAManaged = 13 } DLDeviceType;\n\
             typedef enum { kDLInt = 0U, kDLUInt = 1U, kDLFloat = 2U } DLDataTypeCode;\n\
             typedef struct { DLDeviceType device_type; int32_t device_id; } DLDevice;\n\
             typedef struct { uint8_t code; uint8_t bits; uint16_t lanes; } DLDataType;\n\
             typedef struct { void* data; DLDevice device; int32_t ndim; DLDataType dtype; int64_t* shape; int64_t* strides;\n\
             uint64_t byte_offset; } DLTensor;\n\
             typedef struct DLManagedTensor { DLTensor dl_tensor; void* manager_ctx;\n\
             void (*deleter)(struct DLManagedTensor*); } DLManagedTensor;\n",
        ),
    ];
    for (name, text) in own {
        std::fs::write(folder.path().join(name), text).unwrap();
    }
    let compile = |text: &str| {
        let source = folder.path().join("layouts.c");
        std::fs::write(&source, text).unwrap();
        let ran = Command::new(std::env::var("CC").unwrap_or_else(|_| "cc".into()))
            .args(["-std=c11", "-fsyntax-only", "-I"])
            .arg(folder.path())
            .arg("-I")
            .arg(site.join("libcuvs/include"))
            .arg("-I")
            .arg(site.join("nvidia/cu13/include"))
            .arg(&source)
            .output()
            .unwrap();
        (ran.status.success(), String::from_utf8_lossy(&ran.stderr).into_owned())
    };
    let (fits, said) = compile(&text);
    assert!(fits, "{said}");
    assert!(PROTOTYPES.len() > 50 && LAYOUTS.len() > 15, "{} {}", PROTOTYPES.len(), LAYOUTS.len());
    // And it would notice: a type, an order, a size, a number.
    for (from, to) in [
        ("cuvsStreamSet(cuvsResources_t, cudaStream_t)", "cuvsStreamSet(cudaStream_t, cuvsResources_t)"),
        ("offsetof(struct cuvsIvfPqIndexParams, pq_dim) == ", "offsetof(struct cuvsIvfPqIndexParams, pq_bits) == "),
        (
            "_Static_assert(sizeof(struct cuvsCagraSearchParams) == ",
            "_Static_assert(8 + sizeof(struct cuvsCagraSearchParams) == ",
        ),
        ("InnerProduct == 6", "InnerProduct == 7"),
    ] {
        assert!(text.contains(from), "{from}");
        assert!(!compile(&text.replace(from, to)).0, "{from} => {to} is not noticed");
    }
}

#[test]
fn the_real_library_without_a_gpu() {
    let Some(site) = real() else { return };
    let cuvs = Cuvs::load(Some(&site)).unwrap();
    assert_eq!((cuvs.version.0, cuvs.version.1), VERSION);
    // Defaults, which prove that fields lie where we think.
    let mut flat = owned!(cuvs, cuvsIvfFlatIndexParamsCreate, cuvsIvfFlatIndexParamsDestroy).unwrap();
    let p = *flat.fields();
    assert_eq!((p.metric, p.n_lists, p.kmeans_n_iters, p.add_data_on_build), (L2Expanded, 1024, 20, true));
    assert_eq!((p.kmeans_trainset_fraction, p.adaptive_centers, p.conservative_memory_allocation), (0.5, false, false));
    let mut pq = owned!(cuvs, cuvsIvfPqIndexParamsCreate, cuvsIvfPqIndexParamsDestroy).unwrap();
    let p = *pq.fields();
    assert_eq!((p.n_lists, p.pq_bits, p.pq_dim, p.max_train_points_per_pq_code, p.codes_layout), (1024, 8, 0, 256, 1));
    let mut cagra = owned!(cuvs, cuvsCagraIndexParamsCreate, cuvsCagraIndexParamsDestroy).unwrap();
    let p = *cagra.fields();
    assert_eq!((p.metric, p.intermediate_graph_degree, p.graph_degree, p.build_algo), (L2Expanded, 128, 64, IVF_PQ));
    drop((flat, pq, cagra));

    // SAFETY: the null stream is every context's default one.
    let mut resources = unsafe { Resources::new(cuvs, NO_STREAM, 0) }.unwrap();
    let p = *resources.cagra.fields();
    println!("{p:?}");
    assert_eq!((p.itopk_size, p.search_width, p.hashmap_mode, p.hashmap_max_fill_rate), (64, 1, AUTO_HASH, 0.5));
    assert_eq!((p.num_random_samplings, p.rand_xor_mask, p.persistent), (1, 0x128394, false));
    assert_eq!((resources.ivf_flat.fields().n_probes, resources.ivf_pq.fields().n_probes), (20, 20));
    assert_eq!(resources.ivf_pq.fields().preferred_shmem_carveout, 1.0);
    drop(resources);

    if cudarc_sees_a_gpu() {
        skipped("there is a GPU, and what cuVS says without one is not shown");
        return;
    }
    // Without a GPU every call that wants one says so, and nothing ends the process.
    // SAFETY: as above.
    let resources = &mut unsafe { Resources::new(cuvs, NO_STREAM, 0) }.unwrap();
    let values = vec![0.5f32; 64 * 8];
    let rows = held(&values, 8, Value::F32).rows;
    for options in [
        Options::BruteForce,
        Options::IvfFlat { n_lists: 4, kmeans_n_iters: 1 },
        Options::IvfPq { n_lists: 4, kmeans_n_iters: 1, pq_dim: 8, pq_bits: 8 },
        Options::Cagra { graph_degree: 8, intermediate_graph_degree: 16 },
    ] {
        // SAFETY: the values lie in the host's memory; without a GPU nothing reads them.
        let built = unsafe { Index::build(resources, options, Metric::L2, rows.clone()) };
        let said = built.map(|_| ()).unwrap_err();
        println!("{options:?}: {said}");
        assert!(said.to_string().starts_with("cuvs") && said.to_string().lines().count() == 1, "{said}");
        assert!(said.to_string().contains("cudaErrorInsufficientDriver") && !said.is_out_of_memory(), "{said}");
    }
    let folder = tempfile::tempdir().unwrap();
    for (name, bytes) in [("none", None), ("empty", Some(&b""[..])), ("garbage", Some(&[0xa5; 4096][..]))] {
        let path = folder.path().join(name);
        if let Some(bytes) = bytes {
            std::fs::write(&path, bytes).unwrap();
        }
        for kind in [Kind::IvfFlat, Kind::IvfPq, Kind::Cagra] {
            // SAFETY: as above.
            let loaded = unsafe { Index::load(resources, kind, Metric::L2, rows.clone(), &path) };
            let said = loaded.map(|_| ()).unwrap_err().to_string();
            println!("{name}, {}: {said}", kind.name());
            assert!(said.starts_with("cuvs") || said.starts_with("cuVS has no files "), "{said}");
        }
    }
    let said = resources.synchronize().unwrap_err().to_string();
    println!("synchronize: {said}");
    assert!(said.starts_with("cuvsStreamSync: ") && said.contains("cuda"), "{said}");
}

fn cudarc_sees_a_gpu() -> bool {
    super::super::probe::probe(None).is_ok()
}
