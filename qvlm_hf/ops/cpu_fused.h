// RMSNorm and rotary position embedding, each in one pass, rounded to T where Transformers rounds.
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

// Turns every head of d values of every token: value i and value i + d/2 by the token's angle i. `angles` tokens have angles of their own;
// of several sequences that share them each begins anew.
template <class T>
void rotary(const T* x, const T* cos, const T* sin, T* y, int64_t tokens, int64_t angles, int64_t heads, int64_t d) {
    const int64_t half = d / 2;
#pragma omp parallel for schedule(static) if (tokens * heads * d > kWorthThreads)
    for (int64_t token = 0; token < tokens; ++token) {
        const T *c = cos + token % angles * d, *s = sin + token % angles * d;
        for (int64_t head = token * heads; head < (token + 1) * heads; ++head) {
            const T* in = x + head * d;
            T* out = y + head * d;
#pragma omp simd
            for (int64_t i = 0; i < half; ++i) {
                const float a = widen(in[i]), b = widen(in[i + half]);
                narrow(rounded<T>(a * widen(c[i])) + rounded<T>(-b * widen(s[i])), out[i]);
                narrow(rounded<T>(b * widen(c[i + half])) + rounded<T>(a * widen(s[i + half])), out[i + half]);
            }
        }
    }
}

}  // namespace
