// RMSNorm in one pass, rounded to T where Transformers rounds.
#pragma once

#include <cmath>
#include <cstdint>

#include "cpu_number.h"

namespace {

constexpr int64_t kWorthThreads = 1 << 15;  // values: waking threads takes about as long

// y = x^2 in float32.
template <class T>
void square(const T* x, float* y, int64_t count) {
#pragma omp parallel for simd schedule(static) if (parallel : count > kWorthThreads)
    for (int64_t i = 0; i < count; ++i) y[i] = widen(x[i]) * widen(x[i]);
}

// y = weight * (x / sqrt(mean(x^2) + epsilon)), rows of k values, whose squares have these sums.
template <class T>
void rms_norm(const T* x, const T* weight, const float* sums, float epsilon, T* y, int64_t rows, int64_t k) {
#pragma omp parallel for schedule(static) if (rows * k > kWorthThreads)
    for (int64_t row = 0; row < rows; ++row) {
        const T* in = x + row * k;
        T* out = y + row * k;
        const float factor = 1.0f / std::sqrt(sums[row] / float(k) + epsilon);
#pragma omp simd
        for (int64_t i = 0; i < k; ++i) narrow(widen(weight[i]) * rounded<T>(widen(in[i]) * factor), out[i]);
    }
}

}  // namespace
