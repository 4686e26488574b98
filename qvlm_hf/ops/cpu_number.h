// bfloat16 <-> float, rounding to nearest even as PyTorch does.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace qvlm {

inline float widen(uint16_t bits) {
    uint32_t word = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &word, 4);
    return value;
}
inline float widen(float value) { return value; }
inline void narrow(float value, float& out) { out = value; }
inline void narrow(float value, uint16_t& out) {
    uint32_t word;
    std::memcpy(&word, &value, 4);
    out = std::isnan(value) ? uint16_t(0x7fc0) : uint16_t((word + 0x7fff + ((word >> 16) & 1)) >> 16);
}

}  // namespace qvlm
