// Packed weights of linear modules on x86-64 CPUs: where their rows lie, where outputs go, and how threads share the columns.
//
// Legend: M tokens, N out_features, K in_features, G groups of L inputs (the last may be short), P inputs of a group padded to a multiple of
// 64 (padding is 0 in the inputs, so whatever weight it meets adds nothing), KP = G * P.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "cpu_call.h"
#include "cpu_number.h"
#include "cpu_vector.h"

namespace {

constexpr int64_t kStep = 64;    // values that groups are padded to
constexpr int64_t kTileN = 64;   // output columns that a thread works on at a time
constexpr int64_t kFew = 8;      // tokens up to which a pass over the weights is best
constexpr int64_t kFewN = QVLM_VECTOR == 64 ? 32 : 64;  // output columns that a thread works on at a time then
constexpr int64_t kTileM = 192;  // tokens between two unpackings of the same weights: inputs and sums of a tile stay in the L2 cache
constexpr int64_t kReach = 64;   // bytes that may be read from any byte of a row on

// One module's weight. The last rows are copied, so that reading kReach bytes never leaves what is ours.
struct Weight {
    const uint8_t* bytes;       // [N, row_bytes]
    const BFloat16* scale;      // [N, G]
    const uint8_t* zero_point;  // [N, G] or null for 2^(bits - 1)
    int64_t n, k, groups, length, row_bytes;
    int bits;
    int64_t safe;               // rows that need no copy
    std::vector<uint8_t> copy;  // of the others

    Weight(const qvlm::Call& c, const qvlm::Layer& l)
        : bytes(l.bytes), scale(reinterpret_cast<const BFloat16*>(l.scale)), zero_point(l.zero_point), n(l.n), k(c.k), groups(c.groups),
          length(c.length), row_bytes(c.row_bytes), bits(int(c.weight_bits)), safe(std::max<int64_t>(n - (kReach + row_bytes - 1) / row_bytes, 0)),
          copy((n - safe) * row_bytes + kReach) {
        std::memcpy(copy.data(), bytes + safe * row_bytes, (n - safe) * row_bytes);
    }

    int64_t padded() const { return (std::min(length, k) + kStep - 1) / kStep * kStep; }
    // From one token's inputs to the next: KP and a cache line more, or the tokens of a power of two would share a cache set.
    int64_t stride() const { return groups * padded() + 64; }
    const uint8_t* row(int64_t i) const { return i < safe ? bytes + i * row_bytes : copy.data() + (i - safe) * row_bytes; }
    int zero(int64_t row, int64_t g) const { return zero_point ? zero_point[row * groups + g] : 1 << (bits - 1); }
    float factor(int64_t row, int64_t g) const { return widen(scale[row * groups + g]); }
    // Values of a group that exist, and the first byte of it in a row.
    int64_t count(int64_t g) const { return std::min(length, k - g * length); }
    int64_t start(int64_t g) const { return g * length * bits / 8; }
};

// A linear module: its weight, bias (or null) and output [M, N], both of the input's dtype.
struct Module {
    Weight w;
    const void* bias;
    void* y;
    DType dtype;

    // Sums of `columns` outputs from `first` on, rows of kTileN floats, scaled and with the bias: the outputs of tokens begin ... begin + rows - 1.
    __attribute__((noinline)) void finish(const float* sums, const float* scale, int64_t begin, int64_t rows, int64_t first, int64_t columns) const {
        switch (dtype) {
            case DType::kFloat: return store<float>(sums, scale, begin, rows, first, columns);
            case DType::kBFloat16: return store<BFloat16>(sums, scale, begin, rows, first, columns);
            case DType::kFloat16: return store<Float16>(sums, scale, begin, rows, first, columns);
        }
    }

private:
    template <class T>
    void store(const float* sums, const float* scale, int64_t begin, int64_t rows, int64_t first, int64_t columns) const {
        const T* offset = bias ? static_cast<const T*>(bias) + first : nullptr;
        for (int64_t i = 0; i < rows; ++i) {
            T* out = static_cast<T*>(y) + (begin + i) * w.n + first;
            for (int64_t n = 0; n < columns; ++n) {
                const float value = scale ? sums[i * kTileN + n] * scale[i] : sums[i * kTileN + n];
                narrow(offset ? value + widen(offset[n]) : value, out[n]);
            }
        }
    }
};

inline std::vector<Module> modules_of(const qvlm::Call& c) {
    std::vector<Module> modules;
    modules.reserve(c.count);
    const qvlm::Layer* layers = reinterpret_cast<const qvlm::Layer*>(&c + 1);
    for (const qvlm::Layer* l = layers; l < layers + c.count; ++l) modules.push_back({Weight(c, *l), l->bias, l->y, DType(c.dtype)});
    return modules;
}

// A thread's buffer that grows and is kept: a layer asks for the same sizes again and again. One for every USE.
template <class T, int USE = 0>
T* scratch(int64_t count) {
    thread_local std::vector<T> memory;
    if (int64_t(memory.size()) < count + 64 / int64_t(sizeof(T))) memory.resize(count + 64 / sizeof(T));
    return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
}

// Calls task(module, first, last) for columns first ... last - 1 of every module, in one parallel region.
template <class Task>
void share_columns(const std::vector<Module>& modules, bool few, const Task& task) {
    const int64_t width = few ? kFewN : kTileN;
    int64_t tasks = 0;
    for (const Module& module : modules) tasks += (module.w.n + width - 1) / width;
    const auto at = [&](int64_t index) {
        const Module* module = modules.data();
        for (int64_t of = 0; index >= (of = (module->w.n + width - 1) / width); ++module) index -= of;
        task(*module, index * width, std::min(index * width + width, module->w.n));
    };
    if (few) {  // long runs of memory first, short ones to end together: no core is alone with its neighbours
#pragma omp parallel for schedule(guided)
        for (int64_t index = 0; index < tasks; ++index) at(index);
    } else {
#pragma omp parallel for schedule(dynamic)
        for (int64_t index = 0; index < tasks; ++index) at(index);
    }
}

}  // namespace
