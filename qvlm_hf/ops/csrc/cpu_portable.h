// What processors without AVX2 compute: plain loops, which the compiler vectorises as well as it can.
#pragma once

#include "cpu_weight.h"

#if !QVLM_VECTOR

namespace {

inline void unpack_row(const Weight& w, int64_t row, int64_t g, uint8_t* values) {
    const uint8_t* bytes = w.row(row) + w.start(g);
    const int64_t count = w.count(g);
    for (int64_t i = 0; i < count; ++i) {
        const int64_t bit = i * w.bits, at = bit / 8;
        values[i] = uint8_t((bytes[at] | uint32_t(bytes[at + 1]) << 8) >> (bit % 8) & ((1u << w.bits) - 1));
    }
    std::memset(values + count, 0, w.padded() - count);
}

// Columns first ... last - 1 of M tokens, whose integers have these sums and scales (or null for 1) per group. out [M, kTileN] float.
inline void columns_portable(const Weight& w, const int16_t* a, const int32_t* sums, const float* scales, float* out, int64_t m, int64_t first, int64_t last) {
    const int64_t padded = w.padded(), stride = w.stride();
    std::vector<uint8_t> values(padded);
    for (int64_t row = first; row < last; ++row)
        for (int64_t g = 0; g < w.groups; ++g) {
            unpack_row(w, row, g, values.data());
            for (int64_t i = 0; i < m; ++i) {
                const int16_t* inputs = a + i * stride + g * padded;
                int32_t total = -w.zero(row, g) * sums[i * w.groups + g];
                for (int64_t k = 0; k < padded; ++k) total += int32_t(values[k]) * int32_t(inputs[k]);
                float& y = out[i * kTileN + row - first];
                y = (g == 0 ? 0.0f : y) + float(total) * w.factor(row, g) * (scales ? scales[i * w.groups + g] : 1.0f);
            }
        }
}

// Products of `count` weights with TOKENS tokens, K apart, added to y, kTileN apart, or the first to be there. Several sums at a time, or each
// addition waits for the one before.
template <int TOKENS>
void add_dots(const float* weights, const float* x, int64_t k, int64_t count, bool begin, float* y) {
    float sum[TOKENS] = {};
#pragma omp simd reduction(+ : sum[:TOKENS])
    for (int64_t i = 0; i < count; ++i)
        for (int j = 0; j < TOKENS; ++j) sum[j] += weights[i] * x[j * k + i];
    for (int j = 0; j < TOKENS; ++j) y[j * kTileN] = (begin ? 0.0f : y[j * kTileN]) + sum[j];
}

// The same of floating-point inputs a [rows, K].
inline void columns_portable(const Weight& w, const float* a, float* out, int64_t rows, int64_t first, int64_t last) {
    std::vector<uint8_t> bytes(w.padded());
    std::vector<float> weights(w.padded());
    for (int64_t row = first; row < last; ++row)
        for (int64_t g = 0; g < w.groups; ++g) {
            const int64_t count = w.count(g);
            const float scale = w.factor(row, g), zero = float(w.zero(row, g));
            unpack_row(w, row, g, bytes.data());
            for (int64_t k = 0; k < count; ++k) weights[k] = (float(bytes[k]) - zero) * scale;
            const float* x = a + g * w.length;
            float* y = out + row - first;
            int64_t i = 0;
            for (; i + 4 <= rows; i += 4) add_dots<4>(weights.data(), x + i * w.k, w.k, count, g == 0, y + i * kTileN);
            for (; i < rows; ++i) add_dots<1>(weights.data(), x + i * w.k, w.k, count, g == 0, y + i * kTileN);
        }
}

}  // namespace

#endif
