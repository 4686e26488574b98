// What the CPU kernels are told: a Call with its `count` Layers behind it, eight bytes a field. cpu.py and cpu_direct.cpp write it.
#pragma once

#include <cstdint>

namespace qvlm {

// Layers of one width, group length and K that share an input x [m, k] and its ranges.
struct Call {
    const void* x;
    const float* input_scale;
    const int32_t* input_zero_point;
    int64_t dtype, m, k, groups, length, row_bytes, weight_bits, activation_bits, granularity, positions, hadamard, count;  // the numbers of cpu.py
};

// One of the layers: its output y [m, n] has the dtype of x, and so has its bias; bias and zero_point may be null.
struct Layer {
    const void* bias;
    void* y;
    const uint8_t* bytes;
    const uint16_t* scale;
    const uint8_t* zero_point;
    int64_t n;
};

// A weight [n, k] to round and pack; outputs as in docs/format.md, zero points of a symmetric scheme too.
struct Rounding {
    const void* weight;
    const float* clips;  // factors to try on the range of a group
    uint32_t* words;
    uint16_t* scale;
    uint8_t* zero_point;
    int64_t dtype, n, k, groups, length, row_words, bits, symmetric, clip_count;
};

// The outputs of a Call with its `count` Layers behind it: of quantized inputs, of floating-point ones.
void multiply_integers(const Call& call);
void multiply_floats(const Call& call);

}  // namespace qvlm
