// Where the CPU kernels are entered. Products are in cpu_integer.cpp and cpu_float.cpp, compiled beside this file.

#include "cpu_call.h"
#include "cpu_fused.h"
#include "cpu_vector.h"

extern "C" {

// What the code was compiled for: 64 AVX-512 with VNNI and VBMI, 32 AVX2, 33 that with VNNI, 0 portable.
int qvlm_variant() {
#if QVLM_VECTOR == 32
    return QVLM_VECTOR + kVnni;
#else
    return QVLM_VECTOR;
#endif
}

// `call` is a Call with its `count` Layers behind it.
void qvlm_linears(const void* call) {
    const qvlm::Call& c = *static_cast<const qvlm::Call*>(call);
    c.activation_bits == 16 ? qvlm::multiply_floats(c) : qvlm::multiply_integers(c);
}

// The squares of `count` values, in float32.
void qvlm_square(const void* x, float* y, int64_t count, int64_t dtype) {
    typed(dtype, [&](auto zero) { square(static_cast<const decltype(zero)*>(x), y, count); });
}

// RMSNorm of x [rows, k] from the sums of its squares; weight and y have its dtype.
void qvlm_rms_norm(const void* x, const void* weight, const float* sums, float epsilon, void* y, int64_t rows, int64_t k, int64_t dtype) {
    typed(dtype, [&](auto zero) {
        using T = decltype(zero);
        rms_norm(static_cast<const T*>(x), static_cast<const T*>(weight), sums, epsilon, static_cast<T*>(y), rows, k);
    });
}
}
