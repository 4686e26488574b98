// Inputs become integers: a = q - z, in a form that the products of a processor class hold.
//
// As int8 a fits up to 7 bits. At 8 bits it does not. Of one or few tokens it is then multiplied in parts, two or three values whose sum it is.
// Of several tokens q - 128 is multiplied, and what is missing, 128 - z, comes from further rows of the same product: two halves of it for z
// per input (128 itself does not fit), a row of ones for z per token. As int16 a always fits.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "cpu_weight.h"

namespace {

enum Granularity { kChannel = 0, kToken = 1, kDynamicToken = 2, kNone = 3, kDynamicGroup = 4 };

struct Input {
    const float* scale;         // [K] for "channel", [positions] for "token"
    const int32_t* zero_point;  // likewise
    int64_t positions;
    int bits, granularity;
    bool bytes;  // int8, or int16

    float top() const { return float((1 << bits) - 1); }
    // Whether q - z does not fit.
    bool large() const { return bytes && bits == 8; }
    // Grids of a token.
    int64_t grids(const Weight& w) const { return granularity == kDynamicGroup ? w.groups : 1; }
    // Further rows of the product that put back what q - 128 lacks.
    int64_t corrections() const { return !large() ? 0 : granularity == kChannel ? 2 : 1; }
    // Parts of q - z that fit: 255 takes three. `zero` is the smallest of all grids.
    int parts(const Weight& w, float zero) const {
        if (!large()) return 1;
        if (granularity == kChannel) zero = float(*std::min_element(zero_point, zero_point + w.k));
        return zero > 0 ? 2 : 3;
    }
};

// What is stored of q - z: `parts` values `apart`, or one of q - 128.
struct Form {
    bool offset;
    int parts;
    int64_t apart;
};

// Integers of `count` values; returns their sum. `zeros` null: one scale and the zero point `zero` for all.
template <class A>
int32_t quantize_values(const float* x, int64_t count, const float* scales, const int32_t* zeros, float zero, float top, const Form& form, A* values) {
#if QVLM_VECTOR
    Ints total = no_ints();
    for (int64_t i = 0; i < count; i += kLanes) {
        const int64_t exist = count - i;
        const Floats z = zeros ? as_floats(load(zeros + i, exist)) : splat(zero), scale = zeros ? load(scales + i, exist) : splat(*scales);
        Floats q = nearest(load(x + i, exist) / scale);
        q = smaller(larger(q, no_floats() - z), splat(top) - z);
        if (form.offset) q = q + (z - splat(128.0f));
        const Ints integers = first(as_ints(q), exist);
        total += integers;
        if (form.parts == 1) {
            store(values + i, integers, exist);
        } else {
            const Ints half = integers >> 1, rest = integers - half, most = rest > 127 ? splat(int32_t(127)) : rest;
            store(values + i, half, exist);
            store(values + form.apart + i, most, exist);
            if (form.parts == 3) store(values + 2 * form.apart + i, rest - most, exist);
        }
    }
    return sum(total);
#else
    int32_t sum = 0;
    for (int64_t i = 0; i < count; ++i) {
        const float z = zeros ? float(zeros[i]) : zero;
        const float q = std::nearbyint(x[i] / (zeros ? scales[i] : *scales));
        values[i] = A(std::min(std::max(q, -z), top - z));
        sum += values[i];
    }
    return sum;
#endif
}

// Scale and zero point over the range of `count` values.
inline void value_range(const float* x, int64_t count, float top, float& scale, float& zero) {
    float low = 0, high = 0;
#if QVLM_VECTOR
    Floats lowest = no_floats(), highest = no_floats();
    for (int64_t k = 0; k < count; k += kLanes) {
        const Floats values = load(x + k, count - k);
        lowest = smaller(values, lowest), highest = larger(values, highest);  // of NaN and another the second
    }
    low = -largest(no_floats() - lowest), high = largest(highest);
#else
    for (int64_t k = 0; k < count; ++k) low = std::min(low, x[k]), high = std::max(high, x[k]);
#endif
    const float step = (high - low) / top;
    scale = step > 0 ? step : 1.0f;
    zero = std::min(std::max(std::nearbyint(-low / scale), 0.0f), top);
}

// Scales and zero points of a token, where they are its own: one each, or one a group.
inline void token_range(const Weight& w, const Input& input, const float* x, int64_t position, float* scale, float* zero) {
    *scale = 1, *zero = 0;
    if (input.granularity == kDynamicToken)
        value_range(x, w.k, input.top(), *scale, *zero);
    else if (input.granularity == kDynamicGroup)
        for (int64_t g = 0; g < w.groups; ++g) value_range(x + g * w.length, w.count(g), input.top(), scale[g], zero[g]);
    else if (input.granularity == kToken)
        *scale = input.scale[position], *zero = float(input.zero_point[position]);
}

// Whether a token is finite: an integer cannot say that it was NaN.
inline bool finite(const float* x, int64_t count) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t k = 0; k < count; ++k) sum += x[k] * 0.0f;
    return sum == 0;
}

// Puts `count` integers, whole blocks, in the order in which the weights come out of their bytes.
inline void into_slices(int8_t* values, int64_t count, int64_t block) {
    alignas(64) int8_t even[64], odd[64];
    for (int8_t* at = values; at < values + count; at += block) {
        for (int64_t i = 0; i < block / 2; ++i) even[i] = at[2 * i], odd[i] = at[2 * i + 1];
        std::memcpy(at, even, block / 2), std::memcpy(at + block / 2, odd, block / 2);
    }
}

// One token: integers [KP], their sums per group. `block`: of values in slices, 0 for natural order.
template <class A>
void quantize_token(const Weight& w, const Input& input, const Form& form, int64_t block, const float* x, const float* scale, const float* zero, A* a,
                    int32_t* sums) {
    const int64_t padded = w.padded(), next = input.grids(w) > 1;
    const bool own = input.granularity != kChannel;
    for (int64_t g = 0; g < w.groups; ++g) {
        const int64_t count = w.count(g), begin = g * w.length, at = g * padded;
        const float* scales = own ? scale + g * next : input.scale + begin;
        const int32_t* zeros = own ? nullptr : input.zero_point + begin;
        sums[g] = quantize_values(x + begin, count, scales, zeros, zero[g * next], input.top(), form, a + at);
        for (int part = 0; part < form.parts; ++part) std::fill(a + part * form.apart + at + count, a + part * form.apart + at + padded, A(0));
    }
    if constexpr (sizeof(A) == 1)
        for (int part = 0; block && part < form.parts; ++part) into_slices(a + part * form.apart, w.groups * padded, block);
}

// Rows that put 128 - z back: two halves of it per input ("channel"), or ones.
inline void correction_rows(const Weight& w, const Input& input, int64_t block, int8_t* a, int32_t* sums) {
    const int64_t padded = w.padded(), stride = w.stride(), rows = input.corrections();
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t g = 0; g < w.groups; ++g) {
            int8_t* values = a + r * stride + g * padded;
            int32_t sum = 0;
            const int64_t count = w.count(g);
            if (input.granularity == kChannel) {
                const int32_t* zero = input.zero_point + g * w.length;
                for (int64_t i = 0; i < count; ++i) {
                    const int32_t half = (128 - zero[i] + int32_t(r)) >> 1;  // rounded down, rounded up
                    values[i] = int8_t(half), sum += half;
                }
            } else {
                std::memset(values, 1, count);
                sum = int32_t(count);
            }
            std::memset(values + count, 0, padded - count);
            if (block) into_slices(values, padded, block);
            sums[r * w.groups + g] = sum;
        }
}

}  // namespace
