// Quantized inputs: their integers, and the products of integers. What is multiplied, and why it is exact, is told in cpu_kernels.cpp.
#pragma once

#include "cpu_weight.h"

namespace {

// Quantized inputs of some tokens, and the rows that put back what did not fit.
struct Rows {
    const int8_t* a;        // [M, KP]
    const int32_t* sums;    // [M, G], over each group of a
    const int32_t* shift;   // [M], factor of a single correction row; not read otherwise
    const int8_t* more;     // [corrections, KP], or the second halves of a
    const int32_t* more_sums;
    const float* scale;     // [M], of a token's outputs, or null for 1
    bool wide;              // whether a sum over a group can leave the 24 bits that float holds

    Rows from(const Weight& w, int64_t m) const {
        return {a + m * w.stride(), sums + m * w.groups, shift + m, more, more_sums, scale ? scale + m : nullptr, wide};
    }
};

#if QVLM_AVX512

// vpdpbusd as one instruction: GCC 12 spills the accumulators around the intrinsic.
inline void dot(__m512i& sum, __m512i weights, __m512i inputs) { __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(weights), "v"(inputs)); }

// Sums of one weight row with several tokens. Not an array: GCC 12 keeps one in memory as soon as a loop runs around it.
template <int ROWS>
struct Sums {
    __m512i head = _mm512_setzero_si512();
    Sums<ROWS - 1> tail;

    QVLM_INLINE void add(__m512i weights, const int8_t* a, int64_t stride) {
        dot(head, weights, _mm512_loadu_si512(a));
        tail.add(weights, a + stride, stride);
    }
    QVLM_INLINE __m512i all() const { return ROWS == 1 ? head : _mm512_add_epi32(head, tail.all()); }
};
template <>
struct Sums<0> {
    QVLM_INLINE void add(__m512i, const int8_t*, int64_t) {}
    QVLM_INLINE __m512i all() const { return _mm512_setzero_si512(); }
};

// Sums of a group with what the correction rows add. MORE as in gemv; `factor` is read for a single one.
template <int MORE>
QVLM_INLINE __m512i corrected(__m512i sum, __m512i more, const int32_t* factor) {
    if constexpr (MORE == 0) return sum;
    return _mm512_add_epi32(sum, MORE == 1 ? _mm512_mullo_epi32(more, _mm512_set1_epi32(*factor)) : more);
}

// Outputs of one weight row and several tokens, spread over 16 lanes until the row is done.
template <int ROWS, int MORE>
struct Totals {
    __m512 head = _mm512_setzero_ps();
    Totals<ROWS - 1, MORE> tail;

    // Subtracts zero points times sums of inputs of 16 groups; a lane is a group here.
    QVLM_INLINE void shift(const Parameters& of, const int32_t* sums, int64_t groups, __mmask16 exist, __m512i more, const int32_t* factor) {
        const __m512i inputs = corrected<MORE>(_mm512_maskz_loadu_epi32(exist, sums), more, factor);
        head = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(_mm512_mullo_epi32(of.zero, inputs)), of.scale, head);
        tail.shift(of, sums + groups, groups, exist, more, factor + 1);
    }
    // Adds a group. Its lanes as floats stand for the exact sum: 24 bits hold every one of them.
    QVLM_INLINE void add(const Sums<ROWS>& sums, __m512i more, const int32_t* factor, __m512 scale) {
        head = _mm512_fmadd_ps(_mm512_cvtepi32_ps(corrected<MORE>(sums.head, more, factor)), scale, head);
        tail.add(sums.tail, more, factor + 1, scale);
    }
    // Adds a group that needs more than 24 bits: one integer, rounded once. `inputs` are its sums of inputs, `more_inputs` of correction rows.
    QVLM_INLINE void add_wide(const Sums<ROWS>& sums, __m512i more, const int32_t* factor, float scale, int32_t zero, const int32_t* inputs,
                              int64_t groups, int32_t more_inputs) {
        const int32_t exact = _mm512_reduce_add_epi32(corrected<MORE>(sums.head, more, factor));
        const int32_t shift = zero * (*inputs + (MORE == 1 ? *factor : 1) * more_inputs);
        head = _mm512_add_ps(head, _mm512_zextps128_ps512(_mm_set_ss(float(exact - shift) * scale)));
        tail.add_wide(sums.tail, more, factor + 1, scale, zero, inputs + groups, groups, more_inputs);
    }
    QVLM_INLINE void store(float* out) const {
        *out = _mm512_reduce_add_ps(head);
        tail.store(out + kTileN);
    }
};
template <int MORE>
struct Totals<0, MORE> {
    QVLM_INLINE void shift(const Parameters&, const int32_t*, int64_t, __mmask16, __m512i, const int32_t*) {}
    QVLM_INLINE void add(const Sums<0>&, __m512i, const int32_t*, __m512) {}
    QVLM_INLINE void add_wide(const Sums<0>&, __m512i, const int32_t*, float, int32_t, const int32_t*, int64_t, int32_t) {}
    QVLM_INLINE void store(float*) const {}
};

// Several weight rows side by side. HALVES: every input is the sum of two, the second of them in place of the correction rows.
template <int BITS, int ROWS, int MORE, int LINES, bool HALVES>
struct Lines {
    Sums<ROWS> sums;
    Sums<MORE> more;
    Lines<BITS, ROWS, MORE, LINES - 1, HALVES> tail;

    // Adds 64 values of each row, `offset` bytes behind `bytes`; SLICED: a block of 128.
    template <bool INSIDE, bool SLICED>
    QVLM_INLINE void step(const uint8_t* const* bytes, int64_t offset, const uint8_t* end, const int8_t* a, const int8_t* corrections, int64_t stride) {
        if constexpr (SLICED) {
            __m512i block = load<64, INSIDE>(*bytes + offset, end);
            __asm__("" : "+v"(block));  // GCC reads memory for each use otherwise
            add(slice(block, 0), a, corrections, stride);
            add(slice(block, 1), a + kStep, corrections + kStep, stride);
        } else {
            add(unpack64<BITS, INSIDE>(*bytes + offset, end), a, corrections, stride);
        }
        tail.template step<INSIDE, SLICED>(bytes + 1, offset, end, a, corrections, stride);
    }

private:
    QVLM_INLINE void add(__m512i weights, const int8_t* a, const int8_t* corrections, int64_t stride) {
        sums.add(weights, a, stride);
        if constexpr (HALVES) sums.add(weights, corrections, stride);
        more.add(weights, corrections, stride);
    }
};
template <int BITS, int ROWS, int MORE, bool HALVES>
struct Lines<BITS, ROWS, MORE, 0, HALVES> {
    template <bool INSIDE, bool SLICED>
    QVLM_INLINE void step(const uint8_t* const*, int64_t, const uint8_t*, const int8_t*, const int8_t*, int64_t) {}
};

// The outputs of such rows.
template <int ROWS, int MORE, int LINES>
struct LineTotals {
    Totals<ROWS, MORE> totals;
    LineTotals<ROWS, MORE, LINES - 1> tail;

    // Scales of 16 groups from `g` on into `scale`, their zero points into the outputs.
    QVLM_INLINE void begin(const Weight& w, const Rows& x, bool wide, const int64_t* row, int64_t g, __mmask16 exist, __m512i more, float* scale) {
        const Parameters parameters = parameters16(w, *row, g, exist);
        ask_parameters(w, *row, g + 16);
        _mm512_store_ps(scale, parameters.scale);
        if (!wide) totals.shift(parameters, x.sums + g, w.groups, exist, more, x.shift);
        tail.begin(w, x, wide, row + 1, g, exist, more, scale + 16);
    }
    template <class L>
    QVLM_INLINE void add(const L& lines, const int32_t* factor, const float* scale) {
        totals.add(lines.sums, lines.more.all(), factor, _mm512_set1_ps(*scale));
        tail.add(lines.tail, factor, scale + 16);
    }
    template <class L>
    QVLM_INLINE void add_wide(const L& lines, const Weight& w, const Rows& x, const int64_t* row, int64_t g, const float* scale) {
        const int32_t more_inputs = (MORE > 0 ? x.more_sums[g] : 0) + (MORE > 1 ? x.more_sums[w.groups + g] : 0);
        totals.add_wide(lines.sums, lines.more.all(), x.shift, *scale, w.zero(*row, g), x.sums + g, w.groups, more_inputs);
        tail.add_wide(lines.tail, w, x, row + 1, g, scale + 16);
    }
    QVLM_INLINE void store(float* out, const int64_t* row) const {
        totals.store(out + *row);
        tail.store(out, row + 1);
    }
};
template <int ROWS, int MORE>
struct LineTotals<ROWS, MORE, 0> {
    QVLM_INLINE void begin(const Weight&, const Rows&, bool, const int64_t*, int64_t, __mmask16, __m512i, float*) {}
    template <class L>
    QVLM_INLINE void add(const L&, const int32_t*, const float*) {}
    template <class L>
    QVLM_INLINE void add_wide(const L&, const Weight&, const Rows&, const int64_t*, int64_t, const float*) {}
    QVLM_INLINE void store(float*, const int64_t*) const {}
};

// Few tokens: one pass over the weights, every value unpacked once for ROWS tokens and MORE correction rows. out [ROWS, kTileN] float.
template <int BITS, bool SLICED, int ROWS, int MORE, int LINES, bool HALVES = false>
QVLM_APART void gemv(const Weight& w, const Rows& x, float* out, int64_t first, int64_t last) {
    const int64_t padded = w.padded(), stride = w.stride(), groups = w.groups, group_bytes = w.length * BITS / 8;
    const uint8_t* end = w.bytes + w.n * w.row_bytes;  // what is read beyond a row meets inputs that are 0
    const bool wide = x.wide;
    constexpr int64_t width = SLICED ? kBlock : kStep;
    alignas(64) float scale[LINES * 16];
    for (Streams<LINES> rows(w, first, last); rows.next();) {
        LineTotals<ROWS, MORE, LINES> totals;
        for (int64_t begin = 0; begin < groups; begin += 16) {
            const int64_t stop = std::min(begin + 16, groups);
            const __mmask16 exist = first_of(groups - begin);
            __m512i more_inputs = _mm512_setzero_si512();
            QVLM_UNROLL
            for (int r = 0; r < MORE; ++r) more_inputs = _mm512_add_epi32(more_inputs, _mm512_maskz_loadu_epi32(exist, x.more_sums + r * groups + begin));
            totals.begin(w, x, wide, rows.row, begin, exist, more_inputs, scale);
            for (int64_t g = begin; g < stop; ++g) {
                const int64_t start = g * group_bytes, count = w.count(g), stop_bytes = start + count * BITS / 8;
                rows.ask(start, stop_bytes);
                Lines<BITS, ROWS, MORE, LINES, HALVES> lines;
                const int8_t *a = x.a + g * padded, *more = x.more + g * padded;
                if (__builtin_expect(rows.bytes[LINES - 1] + stop_bytes + 64 + kStep <= end, 1))
                    for (int64_t k = 0; k < count; k += width)
                        lines.template step<true, SLICED>(rows.bytes, start + k * BITS / 8, end, a + k, more + k, stride);
                else
                    for (int64_t k = 0; k < count; k += width)
                        lines.template step<false, SLICED>(rows.bytes, start + k * BITS / 8, end, a + k, more + k, stride);
                if (__builtin_expect(wide, 0))
                    totals.add_wide(lines, w, x, rows.row, g, scale + g - begin);
                else
                    totals.add(lines, x.shift, scale + g - begin);
            }
        }
        totals.store(out - first, rows.row);
    }
}

// One group's exact sums of ROWS tokens x PANELS * 16 columns.
template <int ROWS, int PANELS>
QVLM_INLINE void tile_sums(const int8_t* a, int64_t stride, const int32_t* sums, int64_t groups, const uint8_t* tile, int64_t padded,
                           const int32_t* zero, __m512i sum[ROWS][PANELS]) {
    QVLM_UNROLL
    for (int m = 0; m < ROWS; ++m)
        QVLM_UNROLL
        for (int p = 0; p < PANELS; ++p) sum[m][p] = _mm512_setzero_si512();
    for (int64_t k = 0; k < padded; k += 4) {
        __m512i weights[PANELS];
        QVLM_UNROLL
        for (int p = 0; p < PANELS; ++p) weights[p] = _mm512_load_si512(tile + (k / 4 * PANELS + p) * 64);
        QVLM_UNROLL
        for (int m = 0; m < ROWS; ++m) {
            int32_t four;
            std::memcpy(&four, a + m * stride + k, 4);
            const __m512i inputs = _mm512_set1_epi32(four);
            QVLM_UNROLL
            for (int p = 0; p < PANELS; ++p) dot(sum[m][p], weights[p], inputs);
        }
    }
    QVLM_UNROLL
    for (int p = 0; p < PANELS; ++p) {
        const __m512i z = _mm512_load_si512(zero + 16 * p);
        QVLM_UNROLL
        for (int m = 0; m < ROWS; ++m)
            sum[m][p] = _mm512_sub_epi32(sum[m][p], _mm512_mullo_epi32(z, _mm512_set1_epi32(sums[m * groups])));
    }
}

// What a tile of columns has in one group.
struct Tile {
    alignas(64) float scale[kTileN];
    alignas(64) int32_t zero[kTileN];
    alignas(64) int32_t more[kTileN];  // sum of the correction rows
    const uint8_t* weights;            // see unpack_panels
};

// ROWS tokens of one group, added to out [ROWS, kTileN] in float, in the order of groups and without fused rounding: as in reference.py.
template <int ROWS, int MORE>
QVLM_APART void tile_product(const Weight& w, const Rows& x, int64_t g, const Tile& tile, float* out) {
    constexpr int panels = kTileN / 16;
    const int64_t padded = w.padded(), stride = w.stride();
    __m512i sum[ROWS][panels];
    tile_sums<ROWS, panels>(x.a + g * padded, stride, x.sums + g, w.groups, tile.weights, padded, tile.zero, sum);
    QVLM_UNROLL
    for (int p = 0; p < panels; ++p) {
        const __m512 scale = _mm512_load_ps(tile.scale + 16 * p);
        const __m512i more = _mm512_load_si512(tile.more + 16 * p);
        QVLM_UNROLL
        for (int m = 0; m < ROWS; ++m) {
            if constexpr (MORE == 1) sum[m][p] = _mm512_add_epi32(sum[m][p], _mm512_mullo_epi32(more, _mm512_set1_epi32(x.shift[m])));
            if constexpr (MORE == 2) sum[m][p] = _mm512_add_epi32(sum[m][p], more);
            float* y = out + m * kTileN + 16 * p;
            const __m512 part = _mm512_mul_ps(_mm512_cvtepi32_ps(sum[m][p]), scale);
            _mm512_store_ps(y, g == 0 ? part : _mm512_add_ps(_mm512_load_ps(y), part));
        }
    }
}

// Many tokens of a tile of columns, from `first` on. out [rows, kTileN] float, rows at most kTileM.
template <int BITS, bool SLICED, int MORE>
QVLM_APART void gemm(const Weight& w, const Rows& x, float* out, int64_t rows, int64_t first) {
    constexpr int panels = kTileN / 16;
    const int64_t padded = w.padded(), stride = w.stride();
    thread_local std::vector<uint8_t> memory;
    memory.resize(padded * kTileN + 64);
    uint8_t* weights = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
    Tile tile;
    tile.weights = weights;
    for (int64_t g = 0; g < w.groups; ++g) {
        unpack_panels<BITS, SLICED>(w, first, panels, g, 0, w.count(g), weights);
        for (int64_t n = 0; n < kTileN; ++n) {
            const int64_t row = std::min(first + n, w.n - 1);
            tile.scale[n] = w.factor(row, g), tile.zero[n] = w.zero(row, g);
        }
        if constexpr (MORE > 0) {
            __m512i sum[MORE][panels];
            tile_sums<MORE, panels>(x.more + g * padded, stride, x.more_sums + g, w.groups, weights, padded, tile.zero, sum);
            QVLM_UNROLL
            for (int p = 0; p < panels; ++p)
                _mm512_store_si512(tile.more + 16 * p, MORE == 1 ? sum[0][p] : _mm512_add_epi32(sum[0][p], sum[MORE - 1][p]));
        }
        int64_t i = 0;
        for (; i + 6 <= rows; i += 6) tile_product<6, MORE>(w, x.from(w, i), g, tile, out + i * kTileN);
        for (; i + 2 <= rows; i += 2) tile_product<2, MORE>(w, x.from(w, i), g, tile, out + i * kTileN);
        for (; i < rows; ++i) tile_product<1, MORE>(w, x.from(w, i), g, tile, out + i * kTileN);
    }
}

#else

// columns first ... last - 1 of M tokens. out [M, kTileN] float.
void columns_portable(const Weight& w, const Rows& x, int more, float* out, int64_t m, int64_t first, int64_t last) {
    const int64_t padded = w.padded(), stride = w.stride();
    std::vector<uint8_t> values(padded);
    const auto sum = [&](const int8_t* a, int32_t inputs, int32_t zero) {
        int32_t total = 0;
        for (int64_t k = 0; k < padded; ++k) total += int32_t(values[k]) * int32_t(a[k]);
        return total - zero * inputs;
    };
    for (int64_t row = first; row < last; ++row)
        for (int64_t g = 0; g < w.groups; ++g) {
            unpack_row(w, row, g, values.data());
            const float scale = w.factor(row, g);
            const int32_t zero = w.zero(row, g);
            int32_t correction = 0;
            for (int r = 0; r < more; ++r) correction += sum(x.more + r * stride + g * padded, x.more_sums[r * w.groups + g], zero);
            for (int64_t i = 0; i < m; ++i) {
                const int32_t exact = sum(x.a + i * stride + g * padded, x.sums[i * w.groups + g], zero) + (more == 1 ? x.shift[i] : 1) * correction;
                float& y = out[i * kTileN + row - first];
                y = (g == 0 ? 0.0f : y) + float(exact) * scale;
            }
        }
}

#endif

// What a product is done with beside the inputs: correction rows, one or two, or second halves of a single token's inputs.
enum More { kNothing = 0, kHalves = 3 };

// Whether a pass over the weights is best for m tokens: correction rows cost a pass as much as tokens do.
inline bool few(int64_t m, int more) { return m <= (more == kNothing ? kFew : kFew / 2); }

// The sums of columns first ... last - 1 for M tokens, at most kTileM. out [M, kTileN] float.
template <int BITS, int MORE, bool SLICED = false>
void columns(const Weight& w, const Rows& x, float* out, int64_t m, int64_t first, int64_t last) {
#if QVLM_AVX512
    if constexpr (BITS == 4 && !SLICED)
        if (w.sliced()) return columns<BITS, MORE, true>(w, x, out, m, first, last);
    if constexpr (MORE == kHalves) {
        gemv<BITS, SLICED, 1, 0, 8, true>(w, x, out, first, last);
    } else if (few(m, MORE)) {
        // as many weight rows side by side as 32 registers hold
        int64_t i = 0;
        if constexpr (MORE == kNothing)
            for (; i + 8 <= m; i += 8) gemv<BITS, SLICED, 8, MORE, 1>(w, x.from(w, i), out + i * kTileN, first, last);
        for (; i + 4 <= m; i += 4) gemv<BITS, SLICED, 4, MORE, 2>(w, x.from(w, i), out + i * kTileN, first, last);
        for (; i + 2 <= m; i += 2) gemv<BITS, SLICED, 2, MORE, 4>(w, x.from(w, i), out + i * kTileN, first, last);
        for (; i < m; ++i) gemv<BITS, SLICED, 1, MORE, MORE == kNothing ? 8 : 4>(w, x.from(w, i), out + i * kTileN, first, last);
    } else {
        gemm<BITS, SLICED, MORE>(w, x, out, m, first);
    }
#else
    columns_portable(w, x, MORE, out, m, first, last);
#endif
}

// Tokens begin ... begin + m - 1 of several modules' outputs.
template <int BITS, int MORE>
void product(const std::vector<Module>& modules, const Rows& x, int64_t begin, int64_t m) {
    share_columns(modules, few(m, MORE), [&](const Module& module, int64_t first, int64_t last) {
        alignas(64) float sums[kTileM * kTileN];
        for (int64_t i = 0; i < m; i += kTileM) {
            const int64_t rows = std::min(kTileM, m - i);
            const Rows part = x.from(module.w, i);
            columns<BITS, MORE>(module.w, part, sums, rows, first, last);
            module.finish(sums, part.scale, begin + i, rows, first, last - first);
        }
    });
}

template <int BITS>
void product(const std::vector<Module>& modules, const Rows& x, int64_t more, int64_t begin, int64_t m) {
    switch (more) {
        case kNothing: return product<BITS, kNothing>(modules, x, begin, m);
        case 1: return product<BITS, 1>(modules, x, begin, m);
        case 2: return product<BITS, 2>(modules, x, begin, m);
        case kHalves: return product<BITS, kHalves>(modules, x, begin, m);
    }
}

enum Granularity { kChannel = 0, kToken = 1, kDynamicToken = 2, kNone = 3 };

struct Input {
    const float* scale;         // [K] for "channel", [positions] for "token"
    const int32_t* zero_point;  // likewise
    int64_t positions;
    int bits, granularity;

    float top() const { return float((1 << bits) - 1); }
    // Subtracted from q on top of its zero point, so that the difference fits into int8.
    bool offset() const { return bits == 8; }
    // Further rows of the product that put it back.
    int64_t corrections() const { return !offset() ? 0 : granularity == kChannel ? 2 : 1; }
    // Whether a single token is multiplied as two halves of q - z instead: one sum per group, no row of ones. 255 has none that fit into int8.
    bool halves(const Weight& w, float zero) const {
        if (!QVLM_AVX512 || !offset()) return false;
        return granularity == kChannel ? std::all_of(zero_point, zero_point + w.k, [](int32_t z) { return z > 0; }) : zero > 0;
    }
};

// Integers q - z of `count` values as int8, or q - 128, or two halves of q - z, the second in `rest`; returns their sum. `zeros` null: one
// scale and the zero point `zero` for all.
template <class T>
int32_t quantize_values(const T* x, int64_t count, const float* scales, const int32_t* zeros, float zero, float top, bool offset,
                        int8_t* values, int8_t* rest) {
    int64_t i = 0;
    int32_t sum = 0;
#if QVLM_AVX512
    __m512i total = _mm512_setzero_si512();
    for (; i < count; i += 16) {
        const __mmask16 exist = count - i >= 16 ? 0xffff : __mmask16((1u << (count - i)) - 1);
        const __m512 z = zeros ? _mm512_cvtepi32_ps(_mm512_maskz_loadu_epi32(exist, zeros + i)) : _mm512_set1_ps(zero);
        const __m512 scale = zeros ? _mm512_mask_loadu_ps(_mm512_set1_ps(1.0f), exist, scales + i) : _mm512_set1_ps(*scales);
        const __m512 low = _mm512_sub_ps(_mm512_setzero_ps(), z), high = _mm512_sub_ps(_mm512_set1_ps(top), z);
        __m512 q = _mm512_roundscale_ps(_mm512_div_ps(load16(x + i, exist), scale), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        q = _mm512_min_ps(_mm512_max_ps(q, low), high);
        if (offset) q = _mm512_add_ps(q, _mm512_sub_ps(z, _mm512_set1_ps(128.0f)));
        const __m512i integers = _mm512_maskz_cvtps_epi32(exist, q);
        total = _mm512_add_epi32(total, integers);
        const __m512i kept = rest ? _mm512_srai_epi32(integers, 1) : integers;
        _mm512_mask_cvtepi32_storeu_epi8(values + i, exist, kept);
        if (rest) _mm512_mask_cvtepi32_storeu_epi8(rest + i, exist, _mm512_sub_epi32(integers, kept));
    }
    sum = _mm512_reduce_add_epi32(total);
#else
    for (; i < count; ++i) {
        const float z = zeros ? float(zeros[i]) : zero;
        float q = std::nearbyint(widen(x[i]) / (zeros ? scales[i] : *scales));
        q = std::min(std::max(q, -z), top - z) + (offset ? z - 128.0f : 0.0f);
        const int32_t integer = int32_t(q), kept = rest ? integer >> 1 : integer;
        values[i] = int8_t(kept), sum += integer;
        if (rest) rest[i] = int8_t(integer - kept);
    }
#endif
    return sum;
}

// Scale and zero point of a token, where they are its own.
template <class T>
void token_range(const Weight& w, const Input& input, const T* x, int64_t position, float& scale, float& zero) {
    scale = 1, zero = 0;
    if (input.granularity == kDynamicToken) {
        float low = 0, high = 0;
#pragma omp simd reduction(min : low) reduction(max : high)
        for (int64_t k = 0; k < w.k; ++k) low = std::min(low, widen(x[k])), high = std::max(high, widen(x[k]));
        const float step = (high - low) / input.top();
        scale = step > 0 ? step : 1.0f;
        zero = std::min(std::max(std::nearbyint(-low / scale), 0.0f), input.top());
    } else if (input.granularity == kToken) {
        scale = input.scale[position], zero = float(input.zero_point[position]);
    }
}

// Puts `count` integers, a multiple of 128, in the order in which the weights come out of their bytes.
inline void into_slices(int8_t* values, int64_t count) {
#if QVLM_AVX512
    alignas(64) uint8_t even[kStep];
    for (int i = 0; i < kStep; ++i) even[i] = uint8_t(2 * i);
    const __m512i index = _mm512_load_si512(even), next = _mm512_add_epi8(index, _mm512_set1_epi8(1));
    for (int8_t* block = values; block < values + count; block += kBlock) {
        const __m512i low = _mm512_loadu_si512(block), high = _mm512_loadu_si512(block + kStep);
        _mm512_storeu_si512(block, _mm512_permutex2var_epi8(low, index, high));
        _mm512_storeu_si512(block + kStep, _mm512_permutex2var_epi8(low, next, high));
    }
#endif
}

// One token: integers [KP], the second halves of them (null: none), their sums per group.
template <class T>
void quantize_token(const Weight& w, const Input& input, const T* x, float scale, float zero, int8_t* a, int8_t* rest, int32_t* sums) {
    const int64_t padded = w.padded();
    const bool own = input.granularity != kChannel, offset = input.offset() && !rest;
    for (int64_t g = 0; g < w.groups; ++g) {
        const int64_t count = w.count(g), begin = g * w.length, at = g * padded;
        const float* scales = own ? &scale : input.scale + begin;
        const int32_t* zeros = own ? nullptr : input.zero_point + begin;
        sums[g] = quantize_values(x + begin, count, scales, zeros, zero, input.top(), offset, a + at, rest ? rest + at : nullptr);
        std::memset(a + at + count, 0, padded - count);
        if (rest) std::memset(rest + at + count, 0, padded - count);
    }
    if (w.sliced()) {
        into_slices(a, w.groups * padded);
        if (rest) into_slices(rest, w.groups * padded);
    }
}

// Rows that put 128 - z back: two halves of it per input ("channel"), or ones.
void correction_rows(const Weight& w, const Input& input, int8_t* a, int32_t* sums) {
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
            if (w.sliced()) into_slices(values, padded);
            sums[r * w.groups + g] = sum;
        }
}

// The outputs of modules of one width, group length and K, from one input x [m, k].
template <class T>
void linears(const std::vector<Module>& modules, const Input& input, const T* x, int64_t m) {
    constexpr int64_t kChunk = 768;  // tokens at once: bounds the memory for inputs
    const Weight& w = modules.front().w;
    const int64_t stride = w.stride();
    for (int64_t begin = 0; begin < m; begin += kChunk) {
        const int64_t rows = std::min(kChunk, m - begin);
        float* row_scale = scratch<float>(2 * rows);
        float* zero = row_scale + rows;
        const auto range = [&](int64_t i) {
            token_range(w, input, x + (begin + i) * w.k, input.positions ? (begin + i) % input.positions : 0, row_scale[i], zero[i]);
        };
        if (rows == 1) range(0);
        const bool halves = rows == 1 && input.halves(w, zero[0]);
        const int64_t extra = input.corrections(), further = halves ? 1 : extra;
        int8_t* a = scratch<int8_t>((rows + further) * stride);
        int8_t* more = a + rows * stride;
        int32_t* sums = scratch<int32_t>((rows + further) * w.groups + rows);
        int32_t* more_sums = sums + rows * w.groups;
        int32_t* shift = more_sums + further * w.groups;
#pragma omp parallel for schedule(static) if (rows > 4)
        for (int64_t i = 0; i < rows; ++i) {
            if (rows > 1) range(i);
            quantize_token(w, input, x + (begin + i) * w.k, row_scale[i], zero[i], a + i * stride, halves ? more : nullptr, sums + i * w.groups);
            shift[i] = 128 - int32_t(zero[i]);
        }
        if (!halves) correction_rows(w, input, more, more_sums);
        const bool wide = std::min(w.length, w.k) * ((1ll << w.bits) - 1) * ((1ll << input.bits) - 1) >= 1ll << 24;
        const Rows packed{a, sums, shift, more, more_sums, input.granularity == kChannel ? nullptr : row_scale, wide};
        with_bits(w.bits, [&](auto bits) { product<bits()>(modules, packed, halves ? kHalves : extra, begin, rows); });
    }
}

}  // namespace
