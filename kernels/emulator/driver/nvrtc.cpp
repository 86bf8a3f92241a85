// A libnvrtc.so for tests, which compiles nothing: what it makes is an image that the emulated driver takes.

#include <cstddef>
#include <cstring>

namespace {
constexpr char IMAGE[] = "EMULATED CUBIN 1";
int program;
}

#define API extern "C" __attribute__((visibility("default")))

API int nvrtcVersion(int* major, int* minor) {
    *major = 13, *minor = 0;
    return 0;
}
API int nvrtcCreateProgram(int** out, const char*, const char*, int, const char* const*, const char* const*) {
    *out = &program;
    return 0;
}
API int nvrtcCompileProgram(int*, int, const char* const*) { return 0; }
API int nvrtcGetProgramLogSize(int*, size_t* size) {
    *size = 1;
    return 0;
}
API int nvrtcGetProgramLog(int*, char* log) {
    *log = 0;
    return 0;
}
API int nvrtcGetCUBINSize(int*, size_t* size) {
    *size = sizeof IMAGE;
    return 0;
}
API int nvrtcGetCUBIN(int*, char* image) {
    memcpy(image, IMAGE, sizeof IMAGE);
    return 0;
}
API int nvrtcDestroyProgram(int** out) {
    *out = nullptr;
    return 0;
}
API const char* nvrtcGetErrorString(int) { return "an emulated error"; }
