// Packed weights of linear modules on x86-64 CPUs: how bytes on disk become numbers, where outputs go, and how threads share the columns.
//
// Unpacking. A row is a bit stream; eight values of b bits are b bytes. vpermb puts each run of b bytes into a 64-bit lane,
// vpmultishiftqb cuts it into eight bytes: three instructions for 64 values of any width from 2 to 8, in natural order.
// 64 bytes of 4-bit weights are two slices, the even and the odd values of a block of 128, which come out by one shift and two masks if the
// inputs lie in the same order: those of a module whose groups are whole blocks do (`sliced`).
//
// Legend: M tokens, N out_features, K in_features, G groups of L inputs (the last may be short), P inputs of a group padded to a multiple of
// 64 (padding is 0 in the inputs, so whatever weight it meets adds nothing), KP = G * P.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "cpu_number.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VNNI__) && defined(__AVX512VBMI__)
#define QVLM_AVX512 1
#include <immintrin.h>
#else
#define QVLM_AVX512 0
#endif

namespace {

constexpr int64_t kStep = 64;   // values unpacked at a time
constexpr int64_t kBlock = 128;  // 4-bit values of 64 bytes
constexpr int64_t kTileN = 64;  // output columns that a thread works on at a time
constexpr int64_t kFew = 8;     // tokens up to which a pass over the weights is best
constexpr int64_t kFewN = 32;   // output columns that a thread works on at a time then
constexpr int64_t kAhead = 1024;  // bytes that each stream of such a pass asks memory for in advance
constexpr int64_t kTileM = 192;  // tokens between two unpackings of the same weights: inputs and sums of a tile stay in the L2 cache

struct Weight {
    const uint8_t* bytes;       // [N, row_bytes]
    const BFloat16* scale;      // [N, G]
    const uint8_t* zero_point;  // [N, G] or null for 2^(bits - 1)
    int64_t n, k, groups, length, row_bytes;
    int bits;

    int64_t padded() const { return (std::min(length, k) + kStep - 1) / kStep * kStep; }
    // From one token's inputs to the next: KP and a cache line more, or the tokens of a power of two would share a cache set.
    int64_t stride() const { return groups * padded() + 64; }
    // Whether integer inputs lie in slices.
    bool sliced() const { return QVLM_AVX512 && bits == 4 && padded() % kBlock == 0; }
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
    void finish(const float* sums, const float* scale, int64_t begin, int64_t rows, int64_t first, int64_t columns) const {
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

#if QVLM_AVX512

// Sums live in registers only if every index into them is known when compiling.
#define QVLM_UNROLL _Pragma("GCC unroll 16")
#define QVLM_INLINE __attribute__((always_inline)) inline
#define QVLM_APART __attribute__((noinline))  // in a larger function GCC 12 keeps the sums in memory: three times slower

// How vpermb and vpmultishiftqb cut eight values of BITS bits out of each run of BITS bytes.
template <int BITS>
struct Cut {
    alignas(64) uint8_t index[64];
    alignas(64) uint8_t shift[64];
    constexpr Cut() : index(), shift() {
        for (int lane = 0; lane < 8; ++lane)
            for (int i = 0; i < 8; ++i) {
                index[8 * lane + i] = uint8_t(lane * BITS + (i < BITS ? i : 0));
                shift[8 * lane + i] = uint8_t(i * BITS);
            }
    }
};
template <int BITS>
constexpr Cut<BITS> kCut{};

// BYTES bytes and some more; nothing from `end` on is read. INSIDE: 64 bytes are known to lie before.
template <int BYTES, bool INSIDE = false>
QVLM_INLINE __m512i load(const uint8_t* source, const uint8_t* end) {
    if (INSIDE && BYTES <= 32)  // half the bytes cross half as many cache lines
        return _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)));
    if (INSIDE || __builtin_expect(source + 64 <= end, 1)) return _mm512_loadu_si512(source);
    return _mm512_maskz_loadu_epi8((1ull << std::max<int64_t>(end - source, 0)) - 1, source);
}

// 64 values as bytes, natural order; as `load`.
template <int BITS, bool INSIDE = false>
inline __m512i unpack64(const uint8_t* source, const uint8_t* end) {
    const __m512i raw = load<8 * BITS, INSIDE>(source, end);
    if constexpr (BITS == 8) return raw;
    const __m512i lanes = _mm512_permutexvar_epi8(_mm512_load_si512(kCut<BITS>.index), raw);
    const __m512i values = _mm512_multishift_epi64_epi8(_mm512_load_si512(kCut<BITS>.shift), lanes);
    return _mm512_and_si512(values, _mm512_set1_epi8(char((1 << BITS) - 1)));
}

// Slice 0 or 1 of 64 bytes of 4-bit values.
QVLM_INLINE __m512i slice(__m512i block, int index) {
    return _mm512_and_si512(index ? _mm512_srli_epi16(block, 4) : block, _mm512_set1_epi8(15));
}

// rows [16][16 dwords] -> columns [16 dwords][16 rows]
inline void transpose16(__m512i r[16]) {
    __m512i t[16];
    for (int i = 0; i < 8; ++i) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 4; ++i) {
        r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; ++i) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

// `count` values of a group from value `from` on, a multiple of 64, of `panels` x 16 columns: [count in steps of 64 / 4][panels][16 columns]
// [4 values]. Columns beyond N repeat the last. SLICED: whole blocks, each as its two slices.
template <int BITS, bool SLICED = false>
void unpack_panels(const Weight& w, int64_t first, int panels, int64_t g, int64_t from, int64_t count, uint8_t* tile) {
    const int64_t begin = w.start(g) + from * BITS / 8;
    const int64_t stop = SLICED ? (count + kBlock - 1) / kBlock * kBlock : count;
    QVLM_UNROLL
    for (int p = 0; p < panels; ++p)
        for (int64_t k = 0; k < stop; k += kStep) {
            __m512i block[16];
            for (int i = 0; i < 16; ++i) {
                const int64_t row = std::min(first + 16 * p + i, w.n - 1);
                const uint8_t *source = w.bytes + row * w.row_bytes + begin + k * BITS / 8, *end = w.bytes + (row + 1) * w.row_bytes;
                _mm_prefetch(reinterpret_cast<const char*>(source + 128), _MM_HINT_T1);  // no row is read long enough for the processor to foresee it
                if constexpr (SLICED)
                    block[i] = slice(load<64>(source - k % kBlock / 2, end), k % kBlock != 0);
                else
                    block[i] = unpack64<BITS>(source, end);
            }
            transpose16(block);
            for (int i = 0; i < 16; ++i) _mm512_store_si512(tile + ((k / 4 + i) * panels + p) * 64, block[i]);
        }
}

// The first `count` of 16 lanes.
QVLM_INLINE __mmask16 first_of(int64_t count) { return __mmask16(count >= 16 ? 0xffff : (1u << count) - 1); }

// Scales and zero points of 16 groups of a row from `g` on, of those that exist.
struct Parameters {
    __m512 scale;
    __m512i zero;
};
inline Parameters parameters16(const Weight& w, int64_t row, int64_t g, __mmask16 exist) {
    const __m512i scale = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(exist, w.scale + row * w.groups + g));
    const __m512i zero = w.zero_point ? _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(exist, w.zero_point + row * w.groups + g))
                                      : _mm512_set1_epi32(1 << (w.bits - 1));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(scale, 16)), zero};
}

// Asks memory for scales and zero points of a row from group `g` on, or, behind its last one, of the next row.
QVLM_INLINE void ask_parameters(const Weight& w, int64_t row, int64_t g) {
    _mm_prefetch(reinterpret_cast<const char*>(w.scale + row * w.groups + g), _MM_HINT_T0);
    if (w.zero_point) _mm_prefetch(reinterpret_cast<const char*>(w.zero_point + row * w.groups + g), _MM_HINT_T0);
}

// LINES rows of a range of columns side by side, step by step: they share the loads of the inputs, and memory delivers several streams
// faster than one (on an Ice Lake core 10 GB/s from one, 13 from four, 14 from eight), if they lie apart: with neighbouring rows two cores
// read 17 GB/s of W4, with runs of rows 20.
template <int LINES>
struct Streams {
    int64_t row[LINES];  // beyond the last the last again
    const uint8_t* bytes[LINES];

    QVLM_INLINE Streams(const Weight& w, int64_t first, int64_t last)
        : w_(w), first_(first), last_(last), run_((last - first + LINES - 1) / LINES), jump_((LINES - 1) * run_ * w.row_bytes) {}

    // Goes on to the next rows, if there are some.
    QVLM_INLINE bool next() {
        ++step_;
        QVLM_UNROLL
        for (int i = 0; i < LINES; ++i) row[i] = std::min(first_ + i * run_ + step_, last_ - 1), bytes[i] = w_.bytes + row[i] * w_.row_bytes;
        return step_ < run_;
    }
    // Asks memory for what comes kAhead after bytes start ... stop - 1 of these rows: the rest of the run, then the next range of columns.
    QVLM_INLINE void ask(int64_t start, int64_t stop) const {
        for (int64_t at = start + kAhead; at < stop + kAhead; at += 64) {
            const int64_t ahead = at < (run_ - step_) * w_.row_bytes ? at : at + jump_;
            QVLM_UNROLL
            for (int i = 0; i < LINES; ++i) _mm_prefetch(reinterpret_cast<const char*>(bytes[i] + ahead), _MM_HINT_T0);
        }
    }

private:
    const Weight& w_;
    const int64_t first_, last_, run_, jump_;
    int64_t step_ = -1;
};

#else  // portable: the compiler vectorises it for the machine it runs on

inline void unpack_row(const Weight& w, int64_t row, int64_t g, uint8_t* values) {
    const uint8_t* bytes = w.bytes + row * w.row_bytes + w.start(g);
    const int64_t available = w.row_bytes - w.start(g), count = w.count(g);
    for (int64_t i = 0; i < count; ++i) {
        const int64_t bit = i * w.bits, at = bit / 8;
        const uint32_t two = bytes[at] | (at + 1 < available ? uint32_t(bytes[at + 1]) << 8 : 0u);
        values[i] = uint8_t(two >> (bit % 8) & ((1u << w.bits) - 1));
    }
    std::memset(values + count, 0, w.padded() - count);
}

#endif

// A buffer that grows and is kept: a layer asks for the same sizes again and again.
template <class T>
T* scratch(int64_t count) {
    thread_local std::vector<T> memory;
    if (int64_t(memory.size()) < count + 64 / int64_t(sizeof(T))) memory.resize(count + 64 / sizeof(T));
    return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
}

#if QVLM_AVX512
inline __m512 load16(const float* x, __mmask16 exist) { return _mm512_maskz_loadu_ps(exist, x); }
inline __m512 load16(const BFloat16* x, __mmask16 exist) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(exist, x)), 16));
}
inline __m512 load16(const Float16* x, __mmask16 exist) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(exist, x)); }
#endif

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

// Calls run(std::integral_constant<int, bits>()).
template <class Run>
void with_bits(int bits, const Run& run) {
    switch (bits) {
        case 2: return run(std::integral_constant<int, 2>());
        case 3: return run(std::integral_constant<int, 3>());
        case 4: return run(std::integral_constant<int, 4>());
        case 5: return run(std::integral_constant<int, 5>());
        case 6: return run(std::integral_constant<int, 6>());
        case 7: return run(std::integral_constant<int, 7>());
        default: return run(std::integral_constant<int, 8>());
    }
}

}  // namespace
