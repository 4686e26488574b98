// One token's inputs as float32, after their transform: what quantizers and products read.
#pragma once

#include <cmath>

#include "cpu_call.h"
#include "cpu_number.h"
#include "cpu_vector.h"

namespace {

#if QVLM_VECTOR

// The first passes of the transform, inside of a register: a lane and the one `width` lanes away become their sum and difference.
template <int WIDTH>
QVLM_INLINE Floats butterfly(Floats values) {
    Ints lane, sign;
    for (int i = 0; i < kLanes; ++i) lane[i] = i ^ WIDTH, sign[i] = i & WIDTH ? INT32_MIN : 0;
    return permuted(values, lane) + (Floats)((Ints)values ^ sign);
}

#endif

// Adds and subtracts values `width` apart, in the order of hadamard.py: the same bits.
inline void hadamard_pass(float* x, int64_t block, int64_t width) {
    for (int64_t at = 0; at < block; at += 2 * width)
#pragma omp simd
        for (int64_t i = at; i < at + width; ++i) {
            const float first = x[i], second = x[i + width];
            x[i] = first + second, x[i + width] = first - second;
        }
}

// The normalised Hadamard transform of one block, a power of two.
inline void hadamard_block(float* x, int64_t block) {
    const float root = float(std::sqrt(double(block)));
    int64_t width = 1;
#if QVLM_VECTOR
    if (block >= kLanes) {
        for (int64_t i = 0; i < block; i += kLanes) {
            Floats values = butterfly<4>(butterfly<2>(butterfly<1>(load(x + i))));
            if constexpr (kLanes == 16) values = butterfly<8 % kLanes>(values);
            store(x + i, values);
        }
        width = kLanes;
    }
#endif
    for (; width < block; width *= 2) hadamard_pass(x, block, width);
#pragma omp simd
    for (int64_t i = 0; i < block; ++i) x[i] /= root;
}

// Token i of a call: k values, widened and transformed.
inline void read_token(const qvlm::Call& c, int64_t i, float* out) {
    typed(c.dtype, [&](auto zero) {
        const auto* x = static_cast<const decltype(zero)*>(c.x) + i * c.k;
#pragma omp simd
        for (int64_t k = 0; k < c.k; ++k) out[k] = widen(x[k]);
    });
    for (int64_t at = 0; c.hadamard && at < c.k; at += c.hadamard) hadamard_block(out + at, c.hadamard);
}

}  // namespace
