//! The part of cuVS's C interface that is used here, by hand: few types, and no C compiler or header at build time. Names are the
//! library's own. `tests/cuvs.rs` holds every size, offset, constant and prototype against the headers that come with the library.
#![allow(unsafe_code, non_camel_case_types, non_snake_case)] // Functions found in a library; C's names.
#![allow(missing_docs)] // cuVS's headers are the documentation.

use std::ffi::{c_char, c_int, c_void};

use libloading::os::unix::Library;

// An enumeration that the library returns may hold any value, which a Rust `enum` must not: they are integers here.
pub type cuvsError_t = u32;
pub type cuvsLogLevel_t = u32;
pub type cuvsDistanceType = u32;
pub type cuvsDatasetMemType_t = u32;
pub type cudaDataType_t = u32;
pub type cuvsResources_t = usize;
pub type cudaStream_t = *mut c_void;

macro_rules! constants {
    ($($name:ident = $value:literal),* $(,)?) => {
        $(#[allow(non_upper_case_globals)] pub const $name: u32 = $value;)*
        /// For the comparison with the headers.
        pub const CONSTANTS: &[(&str, u32)] = &[$((stringify!($name), $value)),*];
    };
}

constants! {
    CUVS_SUCCESS = 1,
    CUVS_LOG_LEVEL_WARN = 3,
    CUVS_LOG_LEVEL_OFF = 6,
    L2Expanded = 0,
    CosineExpanded = 2,
    InnerProduct = 6,
    NO_FILTER = 0,
    BITSET = 1,
    AUTO_SELECT = 0,
    IVF_PQ = 1,
    SINGLE_CTA = 0,
    MULTI_CTA = 1,
    AUTO = 100,
    AUTO_HASH = 100,
    CUVS_DATASET_MEM_TYPE_DEVICE = 1,
    kDLCPU = 1,
    kDLCUDA = 2,
    kDLInt = 0,
    kDLUInt = 1,
    kDLFloat = 2,
}

/// How a structure lies in memory.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    /// As C names the type.
    pub name: &'static str,
    /// Bytes.
    pub size: usize,
    /// Name, offset and size of each field.
    pub fields: &'static [(&'static str, usize, usize)],
}

macro_rules! structures {
    ($($tag:literal $name:ident { $($field:ident $(as $c:literal)?: $type:ty),* $(,)? })*) => {
        $(#[repr(C)]
        #[derive(Clone, Copy, Debug)]
        pub struct $name { $(pub $field: $type),* })*
        /// For the comparison with the headers.
        pub const LAYOUTS: &[Layout] = &[$(Layout {
            name: concat!($tag, stringify!($name)),
            size: size_of::<$name>(),
            fields: &[$((c_name!($field $($c)?), std::mem::offset_of!($name, $field), size_of::<$type>())),*],
        }),*];
    };
}
macro_rules! c_name {
    ($field:ident) => {
        stringify!($field)
    };
    ($field:ident $c:literal) => {
        $c
    };
}

structures! {
    "" DLDevice { device_type: u32, device_id: i32 }
    "" DLDataType { code: u8, bits: u8, lanes: u16 }
    "" DLTensor {
        data: *mut c_void, device: DLDevice, ndim: i32, dtype: DLDataType, shape: *mut i64, strides: *mut i64, byte_offset: u64,
    }
    "" DLManagedTensor {
        dl_tensor: DLTensor, manager_ctx: *mut c_void, deleter: Option<unsafe extern "C" fn(*mut DLManagedTensor)>,
    }
    "" cuvsFilter { addr: usize, kind as "type": u32 }
    "" cuvsBruteForceIndex { addr: usize, dtype: DLDataType }
    "" cuvsIvfFlatIndex { addr: usize, dtype: DLDataType }
    "" cuvsIvfPqIndex { addr: usize, dtype: DLDataType }
    "" cuvsCagraIndex { addr: usize, dtype: DLDataType }
    "" cuvsDataset {
        addr: usize, destroy_addr: Option<unsafe extern "C" fn(*mut c_void)>, dtype: DLDataType, mem_type: u32, layout: u32,
        is_owning: bool,
    }
    "struct " cuvsIvfFlatIndexParams {
        metric: cuvsDistanceType, metric_arg: f32, add_data_on_build: bool, n_lists: u32, kmeans_n_iters: u32,
        kmeans_trainset_fraction: f64, adaptive_centers: bool, conservative_memory_allocation: bool,
    }
    "struct " cuvsIvfFlatSearchParams { n_probes: u32 }
    "struct " cuvsIvfPqIndexParams {
        metric: cuvsDistanceType, metric_arg: f32, add_data_on_build: bool, n_lists: u32, kmeans_n_iters: u32,
        kmeans_trainset_fraction: f64, pq_bits: u32, pq_dim: u32, codebook_kind: u32, force_random_rotation: bool,
        conservative_memory_allocation: bool, max_train_points_per_pq_code: u32, codes_layout: u32,
    }
    "struct " cuvsIvfPqSearchParams {
        n_probes: u32, lut_dtype: cudaDataType_t, internal_distance_dtype: cudaDataType_t, coarse_search_dtype: cudaDataType_t,
        max_internal_batch_size: u32, preferred_shmem_carveout: f64,
    }
    "struct " cuvsCagraIndexParams {
        metric: cuvsDistanceType, intermediate_graph_degree: usize, graph_degree: usize, build_algo: u32, nn_descent_niter: usize,
        graph_build_params: *mut c_void,
    }
    "struct " cuvsCagraExtendParams { max_chunk_size: u32 }
    "struct " cuvsCagraSearchParams {
        max_queries: usize, itopk_size: usize, max_iterations: usize, algo: u32, team_size: usize, search_width: usize,
        min_iterations: usize, thread_block_size: usize, hashmap_mode: u32, hashmap_min_bitlen: usize, hashmap_max_fill_rate: f32,
        num_random_samplings: u32, rand_xor_mask: u64, persistent: bool, persistent_lifetime: f32, persistent_device_usage: f32,
    }
}

pub type cuvsBruteForceIndex_t = *mut cuvsBruteForceIndex;
pub type cuvsIvfFlatIndex_t = *mut cuvsIvfFlatIndex;
pub type cuvsIvfFlatIndexParams_t = *mut cuvsIvfFlatIndexParams;
pub type cuvsIvfFlatSearchParams_t = *mut cuvsIvfFlatSearchParams;
pub type cuvsIvfPqIndex_t = *mut cuvsIvfPqIndex;
pub type cuvsIvfPqIndexParams_t = *mut cuvsIvfPqIndexParams;
pub type cuvsIvfPqSearchParams_t = *mut cuvsIvfPqSearchParams;
pub type cuvsCagraIndex_t = *mut cuvsCagraIndex;
pub type cuvsCagraIndexParams_t = *mut cuvsCagraIndexParams;
pub type cuvsCagraExtendParams_t = *mut cuvsCagraExtendParams;
pub type cuvsCagraSearchParams_t = *mut cuvsCagraSearchParams;
pub type cuvsDataset_t = *mut cuvsDataset;

macro_rules! functions {
    ($(fn $name:ident($($type:ty),* $(,)?) -> $return:ty;)*) => {
        /// The functions of an opened library.
        #[derive(Clone, Copy, Debug)]
        pub struct Api { $(pub $name: unsafe extern "C" fn($($type),*) -> $return),* }

        impl Api {
            /// Looks all of them up.
            ///
            /// # Errors
            /// The name of the first that is not there.
            ///
            /// # Safety
            /// The library has cuVS's C interface in the version that these types are of. The functions are called only while it is open.
            pub unsafe fn of(library: &Library) -> Result<Api, &'static str> {
                Ok(Api { $($name: {
                    // SAFETY: the caller vouches for the type, and the address is copied out of the borrowed symbol.
                    let found = unsafe { library.get(concat!(stringify!($name), "\0").as_bytes()) };
                    *found.map_err(|_| stringify!($name))?
                }),* })
            }
        }

        /// For the comparison with the headers: name, types of the parameters, type of what is returned.
        pub const PROTOTYPES: &[(&str, &[&str], &str)] =
            &[$((stringify!($name), &[$(stringify!($type)),*], stringify!($return))),*];
    };
}

functions! {
    fn cuvsVersionGet(*mut u16, *mut u16, *mut u16) -> cuvsError_t;
    fn cuvsGetLastErrorText() -> *const c_char;
    fn cuvsSetLogLevel(cuvsLogLevel_t) -> ();

    fn cuvsResourcesCreate(*mut cuvsResources_t) -> cuvsError_t;
    fn cuvsResourcesDestroy(cuvsResources_t) -> cuvsError_t;
    fn cuvsResourcesSetWorkspacePool(cuvsResources_t, usize) -> cuvsError_t;
    fn cuvsStreamSet(cuvsResources_t, cudaStream_t) -> cuvsError_t;
    fn cuvsStreamSync(cuvsResources_t) -> cuvsError_t;
    fn cuvsDeviceIdGet(cuvsResources_t, *mut c_int) -> cuvsError_t;
    fn cuvsRMMAsyncMemoryResourceEnable() -> cuvsError_t;

    fn cuvsBruteForceIndexCreate(*mut cuvsBruteForceIndex_t) -> cuvsError_t;
    fn cuvsBruteForceIndexDestroy(cuvsBruteForceIndex_t) -> cuvsError_t;
    fn cuvsBruteForceBuild(cuvsResources_t, *mut DLManagedTensor, cuvsDistanceType, f32, cuvsBruteForceIndex_t) -> cuvsError_t;
    fn cuvsBruteForceSearch(
        cuvsResources_t, cuvsBruteForceIndex_t, *mut DLManagedTensor, *mut DLManagedTensor, *mut DLManagedTensor, cuvsFilter,
    ) -> cuvsError_t;

    fn cuvsIvfFlatIndexParamsCreate(*mut cuvsIvfFlatIndexParams_t) -> cuvsError_t;
    fn cuvsIvfFlatIndexParamsDestroy(cuvsIvfFlatIndexParams_t) -> cuvsError_t;
    fn cuvsIvfFlatSearchParamsCreate(*mut cuvsIvfFlatSearchParams_t) -> cuvsError_t;
    fn cuvsIvfFlatSearchParamsDestroy(cuvsIvfFlatSearchParams_t) -> cuvsError_t;
    fn cuvsIvfFlatIndexCreate(*mut cuvsIvfFlatIndex_t) -> cuvsError_t;
    fn cuvsIvfFlatIndexDestroy(cuvsIvfFlatIndex_t) -> cuvsError_t;
    fn cuvsIvfFlatIndexGetNLists(cuvsIvfFlatIndex_t, *mut i64) -> cuvsError_t;
    fn cuvsIvfFlatIndexGetDim(cuvsIvfFlatIndex_t, *mut i64) -> cuvsError_t;
    fn cuvsIvfFlatBuild(cuvsResources_t, cuvsIvfFlatIndexParams_t, *mut DLManagedTensor, cuvsIvfFlatIndex_t) -> cuvsError_t;
    fn cuvsIvfFlatSearch(
        cuvsResources_t, cuvsIvfFlatSearchParams_t, cuvsIvfFlatIndex_t, *mut DLManagedTensor, *mut DLManagedTensor,
        *mut DLManagedTensor, cuvsFilter,
    ) -> cuvsError_t;
    fn cuvsIvfFlatExtend(cuvsResources_t, *mut DLManagedTensor, *mut DLManagedTensor, cuvsIvfFlatIndex_t) -> cuvsError_t;
    fn cuvsIvfFlatSerialize(cuvsResources_t, *const c_char, cuvsIvfFlatIndex_t) -> cuvsError_t;
    fn cuvsIvfFlatDeserialize(cuvsResources_t, *const c_char, cuvsIvfFlatIndex_t) -> cuvsError_t;

    fn cuvsIvfPqIndexParamsCreate(*mut cuvsIvfPqIndexParams_t) -> cuvsError_t;
    fn cuvsIvfPqIndexParamsDestroy(cuvsIvfPqIndexParams_t) -> cuvsError_t;
    fn cuvsIvfPqSearchParamsCreate(*mut cuvsIvfPqSearchParams_t) -> cuvsError_t;
    fn cuvsIvfPqSearchParamsDestroy(cuvsIvfPqSearchParams_t) -> cuvsError_t;
    fn cuvsIvfPqIndexCreate(*mut cuvsIvfPqIndex_t) -> cuvsError_t;
    fn cuvsIvfPqIndexDestroy(cuvsIvfPqIndex_t) -> cuvsError_t;
    fn cuvsIvfPqIndexGetNLists(cuvsIvfPqIndex_t, *mut i64) -> cuvsError_t;
    fn cuvsIvfPqIndexGetDim(cuvsIvfPqIndex_t, *mut i64) -> cuvsError_t;
    fn cuvsIvfPqIndexGetSize(cuvsIvfPqIndex_t, *mut i64) -> cuvsError_t;
    fn cuvsIvfPqBuild(cuvsResources_t, cuvsIvfPqIndexParams_t, *mut DLManagedTensor, cuvsIvfPqIndex_t) -> cuvsError_t;
    fn cuvsIvfPqSearch(
        cuvsResources_t, cuvsIvfPqSearchParams_t, cuvsIvfPqIndex_t, *mut DLManagedTensor, *mut DLManagedTensor,
        *mut DLManagedTensor,
    ) -> cuvsError_t;
    fn cuvsIvfPqExtend(cuvsResources_t, *mut DLManagedTensor, *mut DLManagedTensor, cuvsIvfPqIndex_t) -> cuvsError_t;
    fn cuvsIvfPqSerialize(cuvsResources_t, *const c_char, cuvsIvfPqIndex_t) -> cuvsError_t;
    fn cuvsIvfPqDeserialize(cuvsResources_t, *const c_char, cuvsIvfPqIndex_t) -> cuvsError_t;

    fn cuvsCagraIndexParamsCreate(*mut cuvsCagraIndexParams_t) -> cuvsError_t;
    fn cuvsCagraIndexParamsDestroy(cuvsCagraIndexParams_t) -> cuvsError_t;
    fn cuvsCagraExtendParamsCreate(*mut cuvsCagraExtendParams_t) -> cuvsError_t;
    fn cuvsCagraExtendParamsDestroy(cuvsCagraExtendParams_t) -> cuvsError_t;
    fn cuvsCagraSearchParamsCreate(*mut cuvsCagraSearchParams_t) -> cuvsError_t;
    fn cuvsCagraSearchParamsDestroy(cuvsCagraSearchParams_t) -> cuvsError_t;
    fn cuvsCagraIndexCreate(*mut cuvsCagraIndex_t) -> cuvsError_t;
    fn cuvsCagraIndexDestroy(cuvsCagraIndex_t) -> cuvsError_t;
    fn cuvsCagraIndexGetDims(cuvsCagraIndex_t, *mut i64) -> cuvsError_t;
    fn cuvsCagraIndexGetSize(cuvsCagraIndex_t, *mut i64) -> cuvsError_t;
    fn cuvsCagraIndexGetGraph(cuvsCagraIndex_t, *mut DLManagedTensor) -> cuvsError_t;
    fn cuvsCagraUpdateDataset(cuvsResources_t, cuvsDataset_t, cuvsCagraIndex_t) -> cuvsError_t;
    fn cuvsCagraBuild(cuvsResources_t, cuvsCagraIndexParams_t, cuvsDataset_t, cuvsCagraIndex_t) -> cuvsError_t;
    fn cuvsCagraExtend(cuvsResources_t, cuvsCagraExtendParams_t, cuvsDataset_t, i64, cuvsCagraIndex_t) -> cuvsError_t;
    fn cuvsCagraSearch(
        cuvsResources_t, cuvsCagraSearchParams_t, cuvsCagraIndex_t, *mut DLManagedTensor, *mut DLManagedTensor,
        *mut DLManagedTensor, cuvsFilter,
    ) -> cuvsError_t;
    fn cuvsCagraIndexFromArgs(
        cuvsResources_t, cuvsDistanceType, *mut DLManagedTensor, *mut DLManagedTensor, cuvsCagraIndex_t,
    ) -> cuvsError_t;
    fn cuvsCagraSerializeGraph(cuvsResources_t, *const c_char, cuvsCagraIndex_t) -> cuvsError_t;
    fn cuvsCagraDeserializeGraph(cuvsResources_t, *const c_char, cuvsCagraIndex_t) -> cuvsError_t;

    fn cuvsDatasetMakePadded(cuvsResources_t, *mut DLManagedTensor, cuvsDatasetMemType_t, *mut cuvsDataset_t) -> cuvsError_t;
    fn cuvsDatasetMakePaddedView(cuvsResources_t, *mut DLManagedTensor, *mut cuvsDataset_t) -> cuvsError_t;
    fn cuvsDatasetDestroy(cuvsDataset_t) -> cuvsError_t;
}
