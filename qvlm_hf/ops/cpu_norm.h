// RMSNorm in one pass over a row, rounded to T (float, or bfloat16 as uint16_t) where Transformers' modules round.
#pragma once

#include <cmath>
#include <cstdint>

#include "cpu_number.h"

namespace qvlm {

// y = weight * (x / sqrt(mean(x^2) + epsilon)), rows of k values.
template <class T>
void rms_norm(const T* x, const T* weight, float epsilon, T* y, int64_t rows, int64_t k) {
    constexpr int64_t kWorthThreads = 1 << 15;  // values: waking threads takes about as long
#pragma omp parallel for schedule(static) if (rows * k > kWorthThreads)
    for (int64_t row = 0; row < rows; ++row) {
        const T* in = x + row * k;
        T* out = y + row * k;
        float squares = 0;
#pragma omp simd reduction(+ : squares)
        for (int64_t i = 0; i < k; ++i) squares += widen(in[i]) * widen(in[i]);
        const float factor = 1.0f / std::sqrt(squares / float(k) + epsilon);
#pragma omp simd
        for (int64_t i = 0; i < k; ++i) {
            T normed;
            narrow(widen(in[i]) * factor, normed);
            narrow(widen(weight[i]) * widen(normed), out[i]);
        }
    }
}

}  // namespace qvlm
