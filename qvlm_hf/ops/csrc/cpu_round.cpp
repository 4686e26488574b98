// Weights are rounded to nearest and packed: quantize_weight of format/grids.py and pack of format/packing.py in one pass.
//
// A row becomes float32 once and stays in the cache, while every factor on the range of each group is tried. The factor with the lowest sum of
// |error|^2.4 wins, the first of equal ones. The grid and its integers are those of the Python code, operation by operation.

#include <algorithm>
#include <vector>

#include "cpu_call.h"
#include "cpu_number.h"

namespace {

struct Grid {
    float scale, zero;
};

Grid grid_over(float low, float high, int64_t bits, bool symmetric) {
    const float top = float((1 << bits) - 1), half = float(1 << (bits - 1));
    const float wanted = symmetric ? std::max(-low / half, high / (half - 1)) : (high - low) / top;
    // below the smallest normal float a scale is 0 or imprecise, and such a group all but zero
    const float stored = rounded<BFloat16>(wanted), scale = stored >= 0x1p-126f ? stored : 1.0f;
    return {scale, symmetric ? half : std::min(std::max(std::nearbyint(-low / scale), 0.0f), top)};
}

// Value minus zero point of the level next to x: below 2^22, adding and subtracting 1.5 2^23 rounds to even.
inline float level(float x, const Grid& grid, float top) {
    const float low = -grid.zero, high = top - grid.zero, ratio = x / grid.scale;
    const float above = ratio < low ? low : ratio, inside = above > high ? high : above;
    return (inside + 0x1.8p23f) - 0x1.8p23f;
}

// |x|^2.4, by three steps of Newton's method from a guess of x^-0.4.
inline float penalty(float x) {
    const float squared = x * x, square = squared > 1e-30f ? squared : 1e-30f;
    float root = as_float(uint32_t(1278000000 - int32_t(float(int32_t(as_word(square))) * 0.2f)));  // square^-0.2
    for (int step = 0; step < 3; ++step) {
        const float second = root * root;
        root *= 1.2f - 0.2f * square * (second * second * root);
    }
    const float second = root * root;
    return square * square * (second * second);
}

// Errors of a group times `inverse`, which keeps them far from the ends of float32.
float error_of(const float* x, int64_t count, const Grid& grid, float top, float inverse) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < count; ++i) sum += penalty((level(x[i], grid, top) * grid.scale - x[i]) * inverse);
    return sum;
}

// One row as float32; returns whether it is finite.
template <class T>
bool widen_row(const T* from, int64_t k, float* x) {
    uint32_t largest = 0;
#pragma omp simd reduction(max : largest)
    for (int64_t i = 0; i < k; ++i) {
        x[i] = widen(from[i]);
        largest = std::max(largest, as_word(x[i]) & 0x7fffffff);
    }
    return largest < 0x7f800000;
}

// Integers of `bits` bits as a bit stream.
void pack_row(const uint8_t* values, int64_t k, int64_t bits, uint32_t* words) {
    uint64_t stream = 0;
    int64_t filled = 0;
    for (int64_t i = 0; i < k; ++i) {
        stream |= uint64_t(values[i]) << filled, filled += bits;
        if (filled >= 32) *words++ = uint32_t(stream), stream >>= 32, filled -= 32;
    }
    if (filled) *words = uint32_t(stream);
}

void round_row(const qvlm::Rounding& r, int64_t row, const float* x, uint8_t* values) {
    const float top = float((1 << r.bits) - 1);
    for (int64_t g = 0; g < r.groups; ++g) {
        const float* group = x + g * r.length;
        const int64_t count = std::min(r.length, r.k - g * r.length);
        float low = 0, high = 0;
#pragma omp simd reduction(min : low) reduction(max : high)
        for (int64_t i = 0; i < count; ++i) low = std::min(low, group[i]), high = std::max(high, group[i]);
        const float inverse = 1.0f / grid_over(low, high, r.bits, r.symmetric).scale;
        Grid best{1, 0};
        float least = INFINITY;
        for (int64_t i = 0; i < r.clip_count; ++i) {
            const Grid grid = grid_over(low * r.clips[i], high * r.clips[i], r.bits, r.symmetric);
            const float error = error_of(group, count, grid, top, inverse);
            if (error < least) least = error, best = grid;
        }
        uint8_t* out = values + g * r.length;
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) out[i] = uint8_t(int32_t(level(group[i], best, top) + best.zero));
        BFloat16 stored;
        narrow(best.scale, stored);
        r.scale[row * r.groups + g] = stored.bits;
        r.zero_point[row * r.groups + g] = uint8_t(best.zero);
    }
    pack_row(values, r.k, r.bits, r.words + row * r.row_words);
}

}  // namespace

// Rounds and packs a weight; returns whether all of it is finite, or nothing of use was written.
extern "C" int qvlm_round(const qvlm::Rounding* rounding) {
    const qvlm::Rounding& r = *rounding;
    int finite = 1;
    typed(r.dtype, [&](auto zero) {
        const auto* weight = static_cast<const decltype(zero)*>(r.weight);
#pragma omp parallel reduction(&& : finite)
        {
            std::vector<float> x(r.k);
            std::vector<uint8_t> values(r.k);
#pragma omp for schedule(dynamic, 8)
            for (int64_t row = 0; row < r.n; ++row) {
                finite = widen_row(weight + row * r.k, r.k, x.data()) && finite;
                if (finite) round_row(r, row, x.data(), values.data());
            }
        }
    });
    return finite;
}
