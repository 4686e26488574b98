// The dtypes of inputs and outputs, and float between them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

// The order of DTYPES in cpu.py.
enum class DType : int64_t { kFloat = 0, kBFloat16 = 1, kFloat16 = 2 };
struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

inline float as_float(uint32_t word) {
    float value;
    std::memcpy(&value, &word, 4);
    return value;
}
inline uint32_t as_word(float value) {
    uint32_t word;
    std::memcpy(&word, &value, 4);
    return word;
}

inline float widen(float value) { return value; }
inline float widen(BFloat16 value) { return as_float(uint32_t(value.bits) << 16); }
inline float widen(Float16 value) {
    const uint32_t magnitude = uint32_t(value.bits & 0x7fff) << 13, sign = uint32_t(value.bits & 0x8000) << 16;
    if (magnitude >= 0x7c00u << 13) return as_float(sign | 0x7f800000 | magnitude);  // infinity, NaN
    // 2^112 times the bits read as float32: exact for subnormal numbers too
    return as_float(sign | as_word(as_float(magnitude) * 0x1p112f));
}
inline void narrow(float value, float& out) { out = value; }
inline void narrow(float value, BFloat16& out) {
    const uint32_t word = as_word(value);
    out.bits = std::isnan(value) ? uint16_t(0x7fc0) : uint16_t((word + 0x7fff + ((word >> 16) & 1)) >> 16);
}
inline void narrow(float value, Float16& out) {
    const uint32_t word = as_word(value) & 0x7fffffff, sign = as_word(value) >> 16 & 0x8000;
    uint32_t bits;
    if (word >= 0x47800000)  // 65536 and more
        bits = std::isnan(value) ? 0x7e00 : 0x7c00;
    else if (word < 0x38800000)  // subnormal: 2^-24 is the last bit of what lies between 0.5 and 1
        bits = as_word(as_float(word) + 0.5f) - 0x3f000000;
    else
        bits = (word - 0x38000000 + 0xfff + (word >> 13 & 1)) >> 13;
    out.bits = uint16_t(sign | bits);
}

// Calls `function` with a value of the type that a dtype stands for.
template <class Function>
void typed(int64_t dtype, Function function) {
    switch (DType(dtype)) {
        case DType::kFloat: return function(0.0f);
        case DType::kBFloat16: return function(BFloat16{});
        case DType::kFloat16: return function(Float16{});
    }
}

// What a value becomes when it is stored.
template <class T>
inline float rounded(float value) {
    T held;
    narrow(value, held);
    return widen(held);
}

}  // namespace
