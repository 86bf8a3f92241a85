// Stands in for cuBLASLt on the emulated driver: products of f32 and bf16, all of whose operands lie in its memory, when the stream's turn
// comes. Compiled by the tests; a product that is not of the shape that gpu_check asks for is refused.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { OK = 0, INVALID_VALUE = 7, NOT_SUPPORTED = 15, R_32F = 0, R_16BF = 14, TRANSA = 3, MAX_WORKSPACE_BYTES = 1 };
typedef struct { int type; uint64_t rows, cols; int64_t ld; } Layout;
typedef struct { int compute, scale, transposed; } Desc;
typedef struct { uint64_t data[8]; size_t workspace; int state; float waves; int reserved[4]; } Found;

static void* driver(const char* name) {
    void* library = dlopen("libcuda.so", RTLD_NOW | RTLD_NOLOAD);
    void* found = library ? dlsym(library, name) : NULL;
    if (!found) { fprintf(stderr, "fake cuBLASLt: no emulated driver with %s\n", name); abort(); }
    return found;
}
static int holds(const void* at, size_t bytes) {
    return ((int (*)(uintptr_t, size_t, int))driver("emu_cuda_holds"))((uintptr_t)at, bytes, 0);
}

int cublasLtCreate(void** made) { *made = malloc(1); return OK; }
int cublasLtDestroy(void* made) { free(made); return OK; }
int cublasLtMatrixLayoutCreate(void** made, int type, uint64_t rows, uint64_t cols, int64_t ld) {
    if (ld < (int64_t)rows || (type != R_32F && type != R_16BF)) return INVALID_VALUE;
    Layout* layout = malloc(sizeof *layout);
    *layout = (Layout){type, rows, cols, ld};
    *made = layout;
    return OK;
}
int cublasLtMatrixLayoutDestroy(void* made) { free(made); return OK; }
int cublasLtMatmulDescCreate(void** made, int compute, int scale) {
    Desc* desc = malloc(sizeof *desc);
    *desc = (Desc){compute, scale, 0};
    *made = desc;
    return OK;
}
int cublasLtMatmulDescDestroy(void* made) { free(made); return OK; }
int cublasLtMatmulDescSetAttribute(Desc* desc, int which, const void* value, size_t size) {
    if (which != TRANSA || size != 4) return INVALID_VALUE;
    memcpy(&desc->transposed, value, 4);
    return OK;
}
int cublasLtMatmulPreferenceCreate(void** made) { *made = malloc(1); return OK; }
int cublasLtMatmulPreferenceDestroy(void* made) { free(made); return OK; }
int cublasLtMatmulPreferenceSetAttribute(void* preference, int which, const void* value, size_t size) {
    return which == MAX_WORKSPACE_BYTES && size == 8 && value && preference ? OK : INVALID_VALUE;
}
static int fits(const Desc* desc, const Layout* a, const Layout* b, const Layout* d) {
    return desc->transposed == 1 && a->type == b->type && d->type == R_32F && a->rows == b->rows && d->rows == a->cols
           && d->cols == b->cols;
}
int cublasLtMatmulAlgoGetHeuristic(void* handle, Desc* desc, Layout* a, Layout* b, Layout* c, Layout* d, void* preference, int wanted,
                                   Found* found, int* n) {
    *n = 0;
    if (!handle || !preference || wanted != 1 || c != d || !fits(desc, a, b, d)) return NOT_SUPPORTED;
    memset(found, 0, sizeof *found);
    found->data[0] = 1;
    *n = 1;
    return OK;
}

typedef struct { Layout a, b, d; const void *rows, *queries; float* out; } Task;
static float at(const void* values, int type, int64_t place) {
    if (type == R_32F) return ((const float*)values)[place];
    uint32_t bits = (uint32_t)((const uint16_t*)values)[place] << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
static void work(void* data) {
    Task* t = data;
    size_t value = t->a.type == R_32F ? 4 : 2;
    if (!holds(t->rows, t->a.cols * t->a.ld * value) || !holds(t->queries, t->b.cols * t->b.ld * value)
        || !holds(t->out, t->d.cols * t->d.ld * 4)) {
        ((void (*)(const char*))driver("emu_cuda_report"))("a product of cuBLASLt uses memory that is not there");
    } else {
        for (uint64_t q = 0; q < t->d.cols; q++)
            for (uint64_t row = 0; row < t->d.rows; row++) {
                float sum = 0;
                for (uint64_t i = 0; i < t->a.rows; i++)
                    sum += at(t->rows, t->a.type, row * t->a.ld + i) * at(t->queries, t->b.type, q * t->b.ld + i);
                t->out[q * t->d.ld + row] = sum;
            }
    }
    free(t);
}
int cublasLtMatmul(void* handle, Desc* desc, const float* alpha, const void* a, Layout* la, const void* b, Layout* lb, const float* beta,
                   const void* c, Layout* lc, void* d, Layout* ld, const void* algorithm, void* workspace, size_t bytes, void* stream) {
    if (!handle || *alpha != 1 || *beta != 0 || c != d || lc != ld || !algorithm || !fits(desc, la, lb, ld)) return INVALID_VALUE;
    if (!holds(workspace, bytes)) return INVALID_VALUE;
    Task* task = malloc(sizeof *task);
    *task = (Task){*la, *lb, *ld, a, b, d};
    return ((int (*)(void*, void (*)(void*), void*))driver("cuLaunchHostFunc"))(stream, work, task) ? INVALID_VALUE : OK;
}
