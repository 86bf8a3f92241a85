// Stands in for cuVS in tests: the same functions over the host's memory, every search exact, every argument looked at. What it demands
// of an argument is what the real library demands; what it returns is ordered and scaled as the real library's.
// Macros: MAJOR, MINOR: its version. WITHOUT_CAGRA: a function is missing. WITHOUT_VERSION: it is not cuVS at all.
// EMULATED: over the memory of the emulated driver that the process has opened, on its streams, which must be set: a search happens when
// its turn comes. FAKE_CUVS=NAME@N=TEXT, or fake_script at run time, has the N-th and all further calls of a function fail with that text.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifndef MAJOR
#define MAJOR 26
#endif
#ifndef MINOR
#define MINOR 10
#endif

typedef struct { uint32_t type; int32_t id; } Device;
typedef struct { uint8_t code, bits; uint16_t lanes; } Type;
typedef struct { void* data; Device device; int32_t ndim; Type type; int64_t *shape, *strides; uint64_t byte_offset; } Tensor;
typedef struct Managed { Tensor t; void* context; void (*deleter)(struct Managed*); } Managed;
typedef struct { uintptr_t addr; uint32_t type; } Filter;
typedef struct { uint32_t metric; float arg; bool add; uint32_t n_lists, iters; double share; bool adaptive, tight; } FlatParams;
typedef struct {
    uint32_t metric; float arg; bool add; uint32_t n_lists, iters; double share;
    uint32_t pq_bits, pq_dim, codebook; bool rotate, tight; uint32_t points, layout;
} PqParams;
typedef struct { uint32_t n_probes; } FlatSearch;
typedef struct { uint32_t n_probes, lut, internal, coarse, batch; double carveout; } PqSearch;
typedef struct { uint32_t metric; size_t intermediate, degree; uint32_t algo; size_t iters; void* more; } CagraParams;
typedef struct { uint32_t chunk; } CagraExtend;
typedef struct {
    size_t max_queries, itopk, max_iterations; uint32_t algo; size_t team, width, min_iterations, block; uint32_t hash;
    size_t bitlen; float fill; uint32_t samplings; uint64_t mask; bool persistent; float lifetime, usage;
} CagraSearch;
typedef struct {
    int64_t n, dim, n_lists, degree; uint32_t metric; Type type; float* rows; uint32_t* graph;
    uintptr_t looks_at; size_t looks_at_bytes; int device; // at rows that it does not own
    int searches;                                          // under way
    uintptr_t shown;                                       // EMULATED: the graph in the device's memory
} Body;
typedef struct { Body* body; Type type; } Index;
typedef struct { Managed* data; } Dataset;

static _Thread_local char said[256];
static int fail(const char* text) { snprintf(said, sizeof said, "%s\nObtained 3 stack frames\n#1 nowhere", text); return 0; }
#ifdef EMULATED
static void* driver(const char* name) {
    void* library = dlopen("libcuda.so", RTLD_NOW | RTLD_NOLOAD);
    void* found = library ? dlsym(library, name) : NULL;
    if (!found) { fprintf(stderr, "fake cuVS: no emulated driver with %s\n", name); abort(); }
    return found;
}
#define DRIVER(name, type, ...) ((type)driver(name))(__VA_ARGS__)
static int holds(uintptr_t at, size_t bytes, int device) {
    return DRIVER("emu_cuda_holds", int (*)(uintptr_t, size_t, int), at, bytes, device);
}
static void report(const char* text) { DRIVER("emu_cuda_report", void (*)(const char*), text); }
static int query(void* stream) { return DRIVER("cuStreamQuery", int (*)(void*), stream); }
static int wait_for(void* stream) {
    return DRIVER("cuStreamSynchronize", int (*)(void*), stream) ? fail("cudaErrorLaunchFailure: of the stream") : 1;
}
static const char* script;
static char script_text[256];
static _Atomic int calls;
void fake_script(const char* text) { snprintf(script_text, sizeof script_text, "%s", text); script = script_text; calls = 0; }
static int faulty(const char* name) {
    if (!script) script = getenv("FAKE_CUVS") ? getenv("FAKE_CUVS") : "";
    const char *n = strchr(script, '@'), *text = strchr(script, '=');
    if (!n || !text || strlen(name) != (size_t)(n - script) || strncmp(name, script, strlen(name))) return 0;
    return ++calls >= atoi(n + 1) ? fail(text + 1) == 0 : 0;
}
#define FAULT() do { if (faulty(__func__)) return 0; } while (0)
#else
static int holds(uintptr_t at, size_t bytes, int device) { (void)at; (void)bytes; (void)device; return 1; }
static int wait_for(void* stream) { (void)stream; return 1; }
#define FAULT() do { } while (0)
#endif
#define DEMAND(what, text) do { if (!(what)) return fail(text); } while (0)
#define MAKE(name, type, ...) \
    int name##Create(type** made) { *made = malloc(sizeof(type)); **made = (type){__VA_ARGS__}; return 1; } \
    int name##Destroy(type* made) { DEMAND(made, "nothing to destroy"); free(made); return 1; }

#ifndef WITHOUT_VERSION
int cuvsVersionGet(uint16_t* major, uint16_t* minor, uint16_t* patch) { *major = MAJOR; *minor = MINOR; *patch = 7; return 1; }
#endif
const char* cuvsGetLastErrorText() { return said[0] ? said : NULL; }
void cuvsSetLogLevel(uint32_t level) { if (level > 6) abort(); }
static void* stream_of(uintptr_t resources) { return *(void**)resources; }
// Whether calls can be made: with a stream of the context that is current.
static int ready(uintptr_t resources) {
    DEMAND(resources, "no resources");
#ifdef EMULATED
    DEMAND(stream_of(resources), "no stream is set");
    const int said = query(stream_of(resources));
    DEMAND(said == 0 || said == 600, "cudaErrorInvalidResourceHandle: the stream is none of the current context");
#endif
    return 1;
}
int cuvsResourcesCreate(uintptr_t* made) { FAULT(); *made = (uintptr_t)calloc(1, 8); return 1; }
int cuvsResourcesDestroy(uintptr_t made) { free((void*)made); return 1; }
int cuvsResourcesSetWorkspacePool(uintptr_t made, size_t bytes) { FAULT(); DEMAND(made && bytes, "no pool"); return 1; }
int cuvsStreamSet(uintptr_t made, void* stream) { *(void**)made = stream; return 1; }
int cuvsStreamSync(uintptr_t made) { return ready(made) && wait_for(stream_of(made)); }
int cuvsDeviceIdGet(uintptr_t made, int* id) { *id = 0; return 1; }
int cuvsRMMAsyncMemoryResourceEnable() { return 1; }

static int is(const Managed* m, int ndim, int code, int bits) {
    const Tensor* t = &m->t;
    // Without gaps: strides may say so, or be left out.
    size_t size = 1;
    for (int i = t->ndim; i-- > 0;) {
        if (t->strides && t->strides[i] != size) return 0;
        size *= t->shape[i];
    }
    return t->device.type == 2 && t->ndim == ndim && t->type.code == code && t->type.bits == bits && t->type.lanes == 1
        && !t->byte_offset && t->data && holds((uintptr_t)t->data, size * bits / 8, t->device.id);
}
static float at(const Managed* m, int64_t i) {
    return m->t.type.bits == 16 ? (float)((const _Float16*)m->t.data)[i] : ((const float*)m->t.data)[i];
}
static float distance(const float* a, const float* b, int64_t dim, uint32_t metric) {
    double dot = 0, aa = 0, bb = 0, far = 0;
    for (int64_t i = 0; i < dim; i++) {
        dot += (double)a[i] * b[i]; aa += (double)a[i] * a[i]; bb += (double)b[i] * b[i];
        far += ((double)a[i] - b[i]) * ((double)a[i] - b[i]);
    }
    return metric == 6 ? dot : metric == 2 ? (aa > 0 && bb > 0 ? 1 - dot / sqrt(aa * bb) : 1) : far;
}
static int append(Body* body, const Managed* m) {
    int64_t n = m->t.shape[0], dim = m->t.shape[1];
    DEMAND(m->t.device.type == 2 && m->t.ndim == 2 && m->t.type.code == 2 && m->t.data, "dataset should be a matrix on the device");
    DEMAND(dim == body->dim && m->t.type.bits == body->type.bits, "vectors of another kind");
    DEMAND(holds((uintptr_t)m->t.data, n * dim * m->t.type.bits / 8, m->t.device.id), "cudaErrorIllegalAddress: vectors");
    body->rows = realloc(body->rows, (body->n + n) * dim * sizeof(float));
    for (int64_t i = 0; i < n * dim; i++) body->rows[body->n * dim + i] = at(m, i);
    body->n += n;
    return 1;
}
static int build(uintptr_t r, Index* index, const Managed* m, uint32_t metric, int64_t n_lists, int64_t degree) {
    DEMAND(!index->body, "built already");
    if (!ready(r) || !wait_for(stream_of(r))) return 0;
    DEMAND(metric == 0 || metric == 2 || metric == 6, "unknown metric");
    index->body = calloc(1, sizeof(Body));
    *index->body = (Body){.dim = m->t.shape[1], .n_lists = n_lists, .degree = degree, .metric = metric, .type = m->t.type};
    index->type = m->t.type;
    return append(index->body, m);
}
static int destroy(Index* index) {
    DEMAND(index, "nothing to destroy");
#ifdef EMULATED
    size_t left, all;
    int lost = DRIVER("cuMemGetInfo_v2", int (*)(size_t*, size_t*), &left, &all);
    if (index->body && !lost && __atomic_load_n(&index->body->searches, __ATOMIC_ACQUIRE)) {
        report("an index of cuVS is destroyed while a search is under way");
        return 1;
    }
#endif
#ifdef EMULATED
    if (index->body && index->body->shown) DRIVER("cuMemFree_v2", int (*)(uintptr_t), index->body->shown);
#endif
    if (index->body) { free(index->body->rows); free(index->body->graph); free(index->body); }
    free(index);
    return 1;
}
typedef struct { float key; int64_t row; } Found;
static int closer(const void* a, const void* b) {
    const Found *x = a, *y = b;
    return x->key < y->key ? -1 : x->key > y->key ? 1 : (x->row > y->row) - (x->row < y->row);
}
// For the tests: what was asked of the last search.
uint64_t fake_effort[4];
typedef struct { Body* body; Tensor queries, rows, distances; int64_t n, k; const uint32_t* bits; } Task;
static void work(void* data) {
    Task* task = data;
    Body* body = task->body;
    int64_t k = task->k, dim = body->dim;
    Found* found = malloc(body->n * sizeof(Found));
    float* query = malloc(dim * sizeof(float));
#ifdef EMULATED
    int device = task->queries.device.id;
    if (!holds((uintptr_t)task->queries.data, task->n * dim * body->type.bits / 8, device)
        || !holds((uintptr_t)task->rows.data, task->n * k * 8, device) || !holds((uintptr_t)task->distances.data, task->n * k * 4, device)
        || (task->bits && !holds((uintptr_t)task->bits, (body->n + 31) / 32 * 4, device))
        || (body->looks_at && !holds(body->looks_at, body->looks_at_bytes, body->device))) {
        report("a search of cuVS uses memory that was freed meanwhile");
        task->n = 0;
    }
#endif
    for (int64_t q = 0; q < task->n; q++) {
        int64_t count = 0;
        const Managed queries = {task->queries};
        for (int64_t i = 0; i < dim; i++) query[i] = at(&queries, q * dim + i);
        for (int64_t row = 0; row < body->n; row++) {
            if (task->bits && !(task->bits[row / 32] >> (row % 32) & 1)) continue;
            float far = distance(query, body->rows + row * dim, dim, body->metric);
            found[count++] = (Found){body->metric == 6 ? -far : far, row};
        }
        qsort(found, count, sizeof(Found), closer);
        for (int64_t i = 0; i < k; i++) {
            ((int64_t*)task->rows.data)[q * k + i] = i < count ? found[i].row : INT64_MAX;
            ((float*)task->distances.data)[q * k + i] = i >= count ? INFINITY : body->metric == 6 ? -found[i].key : found[i].key;
        }
    }
    free(query); free(found);
    __atomic_fetch_sub(&body->searches, 1, __ATOMIC_RELEASE);
    free(task);
}
// `stays`: the kernel does not wait for the stream.
static int search(uintptr_t r, Index* index, Managed* queries, Managed* rows, Managed* distances, Filter filter, int stays) {
    Body* body = index->body;
    if (!ready(r)) return 0;
    DEMAND(body, "not built");
    DEMAND(is(queries, 2, 2, body->type.bits), "type mismatch between index and queries");
    DEMAND(is(rows, 2, 0, 64), "neighbors should be of type int64_t");
    DEMAND(is(distances, 2, 2, 32), "distances should be of type float32");
    int64_t n = queries->t.shape[0], k = rows->t.shape[1];
    DEMAND(queries->t.shape[1] == body->dim && rows->t.shape[0] == n && distances->t.shape[0] == n && distances->t.shape[1] == k, "shapes");
    DEMAND(k <= body->n, "k must not be above the number of vectors");
    const uint32_t* bits = NULL;
    if (filter.type == 1) {
        Managed* m = (Managed*)filter.addr;
        DEMAND(is(m, 1, 1, 32) && m->t.shape[0] == (body->n + 31) / 32, "bitset of another size");
        bits = m->t.data;
    } else DEMAND(filter.type == 0 && !filter.addr, "Unsupported filter type");
    Task* task = malloc(sizeof(Task));
    *task = (Task){body, queries->t, rows->t, distances->t, n, k, bits};
    __atomic_fetch_add(&body->searches, 1, __ATOMIC_RELAXED);
#ifdef EMULATED
    if (!stays) {
        int refused = DRIVER("cuLaunchHostFunc", int (*)(void*, void (*)(void*), void*), stream_of(r), work, task);
        DEMAND(!refused, "cudaErrorLaunchFailure");
        return 1;
    }
    if (query(stream_of(r)) != 0) report("a kernel of cuVS that stays does not wait for the stream, which has work");
#endif
    work(task);
    return 1;
}
static int store(const char* name, Index* index, const char* kind) {
    FILE* file = fopen(name, "wb");
    DEMAND(file, "Cannot open file");
    fwrite(kind, 1, 4, file);
    fwrite(index->body, sizeof(Body), 1, file);
    fwrite(index->body->rows, sizeof(float), index->body->n * index->body->dim, file);
    if (index->body->graph) fwrite(index->body->graph, 4, index->body->n * index->body->degree, file);
    fclose(file);
    return 1;
}
static int restore(const char* name, Index* index, const char* kind) {
    FILE* file = fopen(name, "rb");
    char head[4] = "";
    DEMAND(file, "Cannot open file");
    Body* body = calloc(1, sizeof(Body));
    if (fread(head, 1, 4, file) != 4 || memcmp(head, kind, 4) || fread(body, sizeof(Body), 1, file) != 1) {
        fclose(file); free(body);
        return fail("Invalid NumPy header");
    }
    size_t n = body->n * body->dim, links = body->n * body->degree;
    body->rows = malloc(n * sizeof(float));
    int whole = fread(body->rows, sizeof(float), n, file) == n;
    if (body->graph) { body->graph = malloc(links * 4); whole &= fread(body->graph, 4, links, file) == links; }
    fclose(file);
    body->looks_at = 0, body->searches = 0, body->shown = 0;
    index->body = body;
    index->type = body->type;
    DEMAND(whole, "Invalid or truncated index");
    return 1;
}

int cuvsBruteForceIndexCreate(Index** made) { *made = calloc(1, sizeof(Index)); return 1; }
int cuvsBruteForceIndexDestroy(Index* index) { return destroy(index); }
int cuvsBruteForceBuild(uintptr_t r, Managed* m, uint32_t metric, float arg, Index* index) { return build(r, index, m, metric, 0, 0); }
int cuvsBruteForceSearch(uintptr_t r, Index* index, Managed* q, Managed* n, Managed* d, Filter f) { return search(r, index, q, n, d, f, 0); }

static int extend(Index* index, Managed* m, Managed* ids) {
    DEMAND(is(ids, 1, 0, 64) && ids->t.shape[0] == m->t.shape[0], "ids should be of type int64_t");
    for (int64_t i = 0; i < ids->t.shape[0]; i++) DEMAND(((int64_t*)ids->t.data)[i] == index->body->n + i, "ids out of order");
    return append(index->body, m);
}
static int lists(uint32_t n_lists, uint32_t iters, const Managed* m) {
    DEMAND(n_lists && n_lists <= m->t.shape[0] && iters, "n_lists must not be above the number of vectors");
    return 1;
}

MAKE(cuvsIvfFlatIndexParams, FlatParams, 0, 2, true, 1024, 20, 0.5, false, false)
MAKE(cuvsIvfFlatSearchParams, FlatSearch, 20)
int cuvsIvfFlatIndexCreate(Index** made) { *made = calloc(1, sizeof(Index)); return 1; }
int cuvsIvfFlatIndexDestroy(Index* index) { return destroy(index); }
int cuvsIvfFlatIndexGetNLists(Index* index, int64_t* n) { *n = index->body->n_lists; return 1; }
int cuvsIvfFlatIndexGetDim(Index* index, int64_t* n) { *n = index->body->dim; return 1; }
int cuvsIvfFlatBuild(uintptr_t r, FlatParams* p, Managed* m, Index* index) { FAULT();
    return p->add && lists(p->n_lists, p->iters, m) && build(r, index, m, p->metric, p->n_lists, 0);
}
int cuvsIvfFlatSearch(uintptr_t r, FlatSearch* p, Index* index, Managed* q, Managed* n, Managed* d, Filter f) { FAULT();
    DEMAND(p->n_probes && p->n_probes <= index->body->n_lists, "n_probes");
    fake_effort[0] = p->n_probes;
    return search(r, index, q, n, d, f, 0);
}
int cuvsIvfFlatExtend(uintptr_t r, Managed* m, Managed* ids, Index* index) { return extend(index, m, ids); }
int cuvsIvfFlatSerialize(uintptr_t r, const char* name, Index* index) { FAULT(); return store(name, index, "FLAT"); }
int cuvsIvfFlatDeserialize(uintptr_t r, const char* name, Index* index) { FAULT(); return restore(name, index, "FLAT"); }

MAKE(cuvsIvfPqIndexParams, PqParams, 0, 2, true, 1024, 20, 0.5, 8, 0, 0, false, false, 256, 1)
MAKE(cuvsIvfPqSearchParams, PqSearch, 20, 0, 0, 0, 4096, 1.0)
int cuvsIvfPqIndexCreate(Index** made) { *made = calloc(1, sizeof(Index)); return 1; }
int cuvsIvfPqIndexDestroy(Index* index) { return destroy(index); }
int cuvsIvfPqIndexGetNLists(Index* index, int64_t* n) { *n = index->body->n_lists; return 1; }
int cuvsIvfPqIndexGetDim(Index* index, int64_t* n) { *n = index->body->dim; return 1; }
int cuvsIvfPqIndexGetSize(Index* index, int64_t* n) { *n = index->body->n; return 1; }
int cuvsIvfPqBuild(uintptr_t r, PqParams* p, Managed* m, Index* index) { FAULT();
    DEMAND(p->pq_bits >= 4 && p->pq_bits <= 8 && p->pq_bits * p->pq_dim % 8 == 0, "pq_bits");
    return p->add && lists(p->n_lists, p->iters, m) && build(r, index, m, p->metric, p->n_lists, 0);
}
int cuvsIvfPqSearch(uintptr_t r, PqSearch* p, Index* index, Managed* q, Managed* n, Managed* d) { FAULT();
    DEMAND(p->n_probes && p->n_probes <= index->body->n_lists, "n_probes");
    fake_effort[0] = p->n_probes;
    return search(r, index, q, n, d, (Filter){0, 0}, 0);
}
int cuvsIvfPqExtend(uintptr_t r, Managed* m, Managed* ids, Index* index) { return extend(index, m, ids); }
int cuvsIvfPqSerialize(uintptr_t r, const char* name, Index* index) { FAULT(); return store(name, index, "PQ  "); }
int cuvsIvfPqDeserialize(uintptr_t r, const char* name, Index* index) { FAULT(); return restore(name, index, "PQ  "); }

static int view(Managed* m, Dataset** made, int aligned) {
    DEMAND(!*made, "the handle must be null");
    DEMAND(m->t.device.type == 2 && m->t.ndim == 2 && m->t.data, "dataset should be a matrix on the device");
    DEMAND(!aligned || (uintptr_t)m->t.data % 16 == 0 && m->t.shape[1] * m->t.type.bits % 128 == 0, "not padded");
    *made = malloc(sizeof(Dataset));
    (*made)->data = malloc(sizeof(Managed));
    *(*made)->data = *m;
    (*made)->data->t.shape = malloc(16);
    memcpy((*made)->data->t.shape, m->t.shape, 16);
    return 1;
}
int cuvsDatasetMakePadded(uintptr_t r, Managed* m, uint32_t where, Dataset** made) { DEMAND(where == 1, "where"); return view(m, made, 0); }
int cuvsDatasetMakePaddedView(uintptr_t r, Managed* m, Dataset** made) { return view(m, made, 1); }
int cuvsDatasetDestroy(Dataset* set) { free(set->data->t.shape); free(set->data); free(set); return 1; }

static void look_at(Body* body, const Managed* m) {
    body->looks_at = (uintptr_t)m->t.data, body->looks_at_bytes = body->n * body->dim * m->t.type.bits / 8, body->device = m->t.device.id;
}
static void link_all(Body* body) { // the nearest others of each
    body->graph = realloc(body->graph, body->n * body->degree * 4);
    Found* found = malloc(body->n * sizeof(Found));
    for (int64_t row = 0; row < body->n; row++) {
        int64_t count = 0;
        for (int64_t other = 0; other < body->n; other++) {
            float far = distance(body->rows + row * body->dim, body->rows + other * body->dim, body->dim, body->metric);
            if (other != row) found[count++] = (Found){body->metric == 6 ? -far : far, other};
        }
        qsort(found, count, sizeof(Found), closer);
        for (int64_t i = 0; i < body->degree; i++) body->graph[row * body->degree + i] = found[i % count].row;
    }
    free(found);
}
MAKE(cuvsCagraIndexParams, CagraParams, 0, 128, 64, 0, 20, NULL)
MAKE(cuvsCagraExtendParams, CagraExtend, 0)
MAKE(cuvsCagraSearchParams, CagraSearch, 0, 64, 0, 0, 0, 1, 0, 0, 0, 0, 0.5, 1, 0x128394, false, 2, 1)
int cuvsCagraIndexCreate(Index** made) { *made = calloc(1, sizeof(Index)); return 1; }
int cuvsCagraIndexDestroy(Index* index) { return destroy(index); }
int cuvsCagraIndexGetDims(Index* index, int64_t* n) { *n = index->body->dim; return 1; }
int cuvsCagraIndexGetSize(Index* index, int64_t* n) { *n = index->body->n; return 1; }
static void forget(Managed* m) { free(m->t.shape); }
int cuvsCagraIndexGetGraph(Index* index, Managed* m) {
    int64_t* shape = malloc(16);
    shape[0] = index->body->n; shape[1] = index->body->degree;
    void* graph = index->body->graph;
#ifdef EMULATED // where others can copy it from
    size_t bytes = shape[0] * shape[1] * 4;
    if (!index->body->shown && DRIVER("cuMemAlloc_v2", int (*)(uintptr_t*, size_t), &index->body->shown, bytes)) {
        index->body->shown = 0;
        return fail("std::bad_alloc: out_of_memory");
    }
    graph = memcpy((void*)index->body->shown, graph, bytes);
#endif
    *m = (Managed){{graph, {2, 0}, 2, {1, 32, 1}, shape, NULL, 0}, NULL, forget};
    return 1;
}
int cuvsCagraUpdateDataset(uintptr_t r, Dataset* set, Index* index) {
    DEMAND(index->body && set->data->t.shape[0] == index->body->n, "dataset of another size");
    look_at(index->body, set->data);
    return 1;
}
int cuvsCagraBuild(uintptr_t r, CagraParams* p, Dataset* set, Index* index) { FAULT();
    DEMAND(p->degree && p->degree <= p->intermediate && p->algo == 0 && !p->more, "graph_degree");
    if (!build(r, index, set->data, p->metric, 0, p->degree)) return 0;
    look_at(index->body, set->data);
    link_all(index->body);
    return 1;
}
int cuvsCagraIndexFromArgs(uintptr_t r, uint32_t metric, Managed* graph, Managed* m, Index* index) {
    DEMAND(graph->t.device.type == 1 && graph->t.type.code == 1 && graph->t.type.bits == 32 && graph->t.shape[0] == m->t.shape[0], "graph");
    if (!build(r, index, m, metric, 0, graph->t.shape[1])) return 0;
    size_t bytes = graph->t.shape[0] * graph->t.shape[1] * 4;
    index->body->graph = malloc(bytes);
    memcpy(index->body->graph, graph->t.data, bytes);
    return 1;
}
int cuvsCagraExtend(uintptr_t r, CagraExtend* p, Dataset* set, int64_t first, Index* index) {
    DEMAND(first == index->body->n && set->data->t.shape[0] > first, "new_start_row");
    index->body->n = 0;
    if (!append(index->body, set->data)) return 0;
    link_all(index->body);
    return 1;
}
#ifndef WITHOUT_CAGRA
int cuvsCagraSearch(uintptr_t r, CagraSearch* p, Index* index, Managed* q, Managed* n, Managed* d, Filter f) { FAULT();
    DEMAND(p->itopk >= (size_t)n->t.shape[1], "topk must be smaller than itopk_size");
    DEMAND(p->itopk % 32 == 0 && (p->algo == 0 ? p->itopk <= 1024 : p->algo == 1 || p->algo == 100), "[CAGRA Error]");
    DEMAND(p->hash == 100 && (!p->persistent || p->algo == 0), "persistent");
    fake_effort[0] = p->itopk; fake_effort[1] = p->algo; fake_effort[2] = p->persistent;
    return search(r, index, q, n, d, f, p->persistent);
}
#endif
int cuvsCagraSerializeGraph(uintptr_t r, const char* name, Index* index) { FAULT(); return store(name, index, "GRPH"); }
int cuvsCagraDeserializeGraph(uintptr_t r, const char* name, Index* index) { FAULT(); return restore(name, index, "GRPH"); }
