// Floating-point inputs (A16): packed weights become float32 in registers, products are added as float32.
//
// A weight ws (w - zp) is exact: 8 bits of the scale times 9 of the difference. So the only roundings are those of the sums, which PyTorch's own
// float32 product has too.
//
// Up to kFew tokens: a pass over the weights. 16 lanes hold four neighbouring values of a row each; a rotation brings one of them to the
// lowest bits, where it picks one of the row's 2^bits weights of this group from a table (vpermps, up to 5 bits), or to the upper bits of a
// mantissa, where 2^15 + w needs one bitwise instruction and its weight one fused multiplication and subtraction. Inputs lie in that order.
//
// More: 64 inputs x 64 columns of weights at a time become float32 in the L1 cache and meet 6 tokens x 64 columns of sums in registers.
//
// Legend: as in cpu_weight.h.
#pragma once

#include "cpu_weight.h"

namespace {

constexpr int64_t kBlockM = 6;    // tokens that share the loads of a weight
constexpr int64_t kBlockK = 64;  // inputs of a block of weights as float32, which takes 16 KiB

// Value k of token i of x [m, K] as float, with the stored scale (or null) divided out.
template <class T>
struct FloatInput {
    const T* x;
    const float* scale;  // [K]
    int64_t k;

    float at(int64_t i, int64_t j) const { return scale ? widen(x[i * k + j]) / scale[j] : widen(x[i * k + j]); }
};

#if QVLM_AVX512

// How a lane gets the bytes of its VALUES values, and the rotations to the left that bring each of them to bit 0 (up to 5 bits) or 8.
template <int BITS, int VALUES>
struct Turn {
    alignas(64) uint8_t index[64];
    alignas(64) uint32_t left[VALUES][16];
    constexpr Turn() : index(), left() {
        for (int lane = 0; lane < 16; ++lane) {
            const int bit = lane * VALUES * BITS;
            for (int i = 0; i < 4; ++i) index[4 * lane + i] = uint8_t(bit / 8 + i);
            for (int i = 0; i < VALUES; ++i) left[i][lane] = uint32_t(64 + (BITS <= 5 ? 0 : 8) - bit % 8 - i * BITS) % 32;
        }
    }
};
template <int BITS, int VALUES>
constexpr Turn<BITS, VALUES> kTurn{};

// VALUES neighbouring values in each of 16 lanes.
template <int BITS, int VALUES, bool INSIDE>
QVLM_INLINE __m512i lanes_of(const uint8_t* source, const uint8_t* end) {
    const __m512i raw = load<2 * VALUES * BITS, INSIDE>(source, end);
    return BITS * VALUES == 32 ? raw : _mm512_permutexvar_epi8(_mm512_load_si512(kTurn<BITS, VALUES>.index), raw);
}

// Value J of each lane at the bits where `Levels` looks for it.
template <int BITS, int VALUES, int J>
QVLM_INLINE __m512i turned(__m512i lanes) {
    constexpr int left = int(kTurn<BITS, VALUES>.left[J][0]);
    if constexpr (BITS * VALUES % 8) return _mm512_rolv_epi32(lanes, _mm512_load_si512(kTurn<BITS, VALUES>.left[J]));
    return left ? _mm512_rol_epi32(lanes, left) : lanes;
}

// 2^15 + w as float, from lanes that hold w from bit 8 on.
template <int BITS>
QVLM_INLINE __m512 lifted(__m512i lanes) {
    constexpr int both_or = 0xea;  // (a & b) | c
    const __m512i mask = _mm512_set1_epi32(((1 << BITS) - 1) << 8), exponent = _mm512_set1_epi32(0x47000000);
    return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(lanes, mask, exponent, both_or));
}
constexpr float kLift = 32768;

// The weights of one row in one group, by value.
template <int BITS>
struct Levels {
    __m512 low, high;  // up to 5 bits the weights of 0 ... 15 and 16 ... 31; wider ws and ws (2^15 + zp), which takes 24 bits

    QVLM_INLINE void set(float scale, float zero) {
        if constexpr (BITS <= 5) {
            const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
            low = entries(_mm512_and_si512(first, _mm512_set1_epi32((1 << BITS) - 1)), scale, zero);  // what is above the value does not count
            if constexpr (BITS == 5) high = entries(_mm512_add_epi32(first, _mm512_set1_epi32(16)), scale, zero);
        } else {
            low = _mm512_set1_ps(scale), high = _mm512_set1_ps(scale * (kLift + zero));
        }
    }
    QVLM_INLINE __m512 of(__m512i lanes) const {
        if constexpr (BITS <= 4) return _mm512_permutexvar_ps(lanes, low);
        if constexpr (BITS == 5) return _mm512_permutex2var_ps(low, lanes, high);
        return _mm512_fmsub_ps(lifted<BITS>(lanes), low, high);
    }

private:
    static QVLM_INLINE __m512 entries(__m512i values, float scale, float zero) {
        return _mm512_mul_ps(_mm512_sub_ps(_mm512_cvtepi32_ps(values), _mm512_set1_ps(zero)), _mm512_set1_ps(scale));
    }
};

// Values J and on of the lanes of LINES rows with ROWS tokens, whose inputs are `stride` apart.
template <int BITS, int VALUES, int ROWS, int LINES, int J = 0>
QVLM_INLINE void add_products(const __m512i* lanes, const Levels<BITS>* levels, const float* a, int64_t stride, __m512 (*sum)[ROWS]) {
    __m512 inputs[ROWS];
    QVLM_UNROLL
    for (int m = 0; m < ROWS; ++m) inputs[m] = _mm512_load_ps(a + m * stride + 16 * J);
    QVLM_UNROLL
    for (int i = 0; i < LINES; ++i) {
        const __m512 weights = levels[i].of(turned<BITS, VALUES, J>(lanes[i]));
        QVLM_UNROLL
        for (int m = 0; m < ROWS; ++m) sum[i][m] = _mm512_fmadd_ps(weights, inputs[m], sum[i][m]);
    }
    if constexpr (J + 1 < VALUES) add_products<BITS, VALUES, ROWS, LINES, J + 1>(lanes, levels, a, stride, sum);
}

// Few tokens: a [ROWS, KP] in the order of lanes. out [ROWS, kTileN]. INSIDE: 64 bytes after the last of these rows may be read.
template <int BITS, int VALUES, int ROWS, int LINES, bool INSIDE>
QVLM_APART void gemv_float(const Weight& w, const float* a, float* out, int64_t first, int64_t last) {
    const int64_t padded = w.padded(), stride = w.stride(), group_bytes = w.length * BITS / 8;
    const uint8_t* end = w.bytes + w.n * w.row_bytes;
    alignas(64) float scale[LINES * 16], zero[LINES * 16];
    for (Streams<LINES> rows(w, first, last); rows.next();) {
        __m512 sum[LINES][ROWS];
        QVLM_UNROLL
        for (int i = 0; i < LINES; ++i)
            QVLM_UNROLL
            for (int m = 0; m < ROWS; ++m) sum[i][m] = _mm512_setzero_ps();
        for (int64_t g = 0; g < w.groups; ++g) {
            if (g % 16 == 0)
                for (int i = 0; i < LINES; ++i) {
                    const Parameters of = parameters16(w, rows.row[i], g, first_of(w.groups - g));
                    _mm512_store_ps(scale + 16 * i, of.scale), _mm512_store_ps(zero + 16 * i, _mm512_cvtepi32_ps(of.zero));
                }
            const int64_t start = g * group_bytes, count = w.count(g);
            rows.ask(start, start + count * BITS / 8);
            Levels<BITS> levels[LINES];
            QVLM_UNROLL
            for (int i = 0; i < LINES; ++i) levels[i].set(scale[16 * i + g % 16], zero[16 * i + g % 16]);
            for (int64_t k = 0; k < count; k += 16 * VALUES) {
                __m512i lanes[LINES];
                QVLM_UNROLL
                for (int i = 0; i < LINES; ++i) lanes[i] = lanes_of<BITS, VALUES, INSIDE>(rows.bytes[i] + start + k * BITS / 8, end);
                add_products<BITS, VALUES, ROWS, LINES>(lanes, levels, a + g * padded + k, stride, sum);
            }
        }
        QVLM_UNROLL
        for (int i = 0; i < LINES; ++i)
            QVLM_UNROLL
            for (int m = 0; m < ROWS; ++m) out[m * kTileN + rows.row[i] - first] = _mm512_reduce_add_ps(sum[i][m]);
    }
}

// Neighbouring values in a lane of few tokens' weights: eight of 4 bits fill it, if a group is full of such registers.
inline int64_t lane_values(const Weight& w) { return w.bits == 4 && w.padded() % 128 == 0 ? 8 : 4; }

// One token in the order of lanes: the first value of all 16 lanes, then the second.
template <class T>
void spread_token(const Weight& w, const FloatInput<T>& input, int64_t token, float* a) {
    const int64_t padded = w.padded(), values = lane_values(w);
    std::fill(a, a + w.stride(), 0.0f);
    for (int64_t g = 0; g < w.groups; ++g, a += padded)
        for (int64_t begin = 0; begin < w.count(g); begin += 16 * values)
            for (int64_t j = 0; j < values; ++j)
                for (int64_t lane = 0, k = begin + j; k < std::min(w.count(g), begin + 16 * values); ++lane, k += values)
                    a[begin + 16 * j + lane] = input.at(token, g * w.length + k);
}

template <int BITS, int VALUES>
void columns_few(const Weight& w, const float* a, float* out, int64_t m, int64_t first, int64_t last) {
    constexpr int lines = BITS <= 4 ? 8 : 4;  // as many sums as 32 registers hold beside the levels of as many rows
    const auto pass = [&](auto gemv, int64_t i, int64_t from, int64_t to) {
        if (from < to) gemv(w, a + i * w.stride(), out + i * kTileN + from - first, from, to);
    };
    // rows so near the end of the weight that a whole register does not fit behind them
    const int64_t safe = std::clamp(w.n - (64 + w.row_bytes - 1) / w.row_bytes, first, last);
    int64_t i = 0;
    for (; i + 4 <= m; i += 4) pass(gemv_float<BITS, VALUES, 4, 4, true>, i, first, safe);
    for (; i + 2 <= m; i += 2) pass(gemv_float<BITS, VALUES, 2, 4, true>, i, first, safe);
    for (; i < m; ++i) pass(gemv_float<BITS, VALUES, 1, lines, true>, i, first, safe);
    for (i = 0; i < m; ++i) pass(gemv_float<BITS, VALUES, 1, 1, false>, i, safe, last);
}

template <int BITS>
void columns_few(const Weight& w, const float* a, float* out, int64_t m, int64_t first, int64_t last) {
    if constexpr (BITS == 4)
        if (lane_values(w) == 8) return columns_few<BITS, 8>(w, a, out, m, first, last);
    columns_few<BITS, 4>(w, a, out, m, first, last);
}

// A block of weights as float32: [count][kTileN] from the bytes of unpack_panels.
template <int BITS>
void lift_panels(const uint8_t* tile, int64_t count, const float* scale, const float* zero, float* block) {
    constexpr int panels = kTileN / 16;
    for (int p = 0; p < panels; ++p) {
        const __m512 factor = _mm512_load_ps(scale + 16 * p);
        const __m512 shift = _mm512_mul_ps(factor, _mm512_add_ps(_mm512_load_ps(zero + 16 * p), _mm512_set1_ps(kLift)));
        for (int64_t k = 0; k < count; k += 4) {
            const __m512i four = _mm512_load_si512(tile + (k / 4 * panels + p) * 64);
            const __m512i turned[4] = {_mm512_slli_epi32(four, 8), four, _mm512_srli_epi32(four, 8), _mm512_srli_epi32(four, 16)};
            QVLM_UNROLL
            for (int j = 0; j < 4; ++j)
                _mm512_store_ps(block + (k + j) * kTileN + 16 * p, _mm512_fmsub_ps(lifted<BITS>(turned[j]), factor, shift));
        }
    }
}

// ROWS tokens x kTileN columns of a block. x [count, kBlockM], block [count, kTileN]; added to out [ROWS, kTileN], or the first to be there.
template <int ROWS>
QVLM_APART void block_product(const float* x, const float* block, int64_t count, bool begin, float* out) {
    constexpr int panels = kTileN / 16;
    __m512 sum[ROWS][panels];
    QVLM_UNROLL
    for (int m = 0; m < ROWS; ++m)
        QVLM_UNROLL
        for (int p = 0; p < panels; ++p) sum[m][p] = _mm512_setzero_ps();
    for (int64_t k = 0; k < count; ++k) {
        __m512 weights[panels];
        QVLM_UNROLL
        for (int p = 0; p < panels; ++p) weights[p] = _mm512_load_ps(block + k * kTileN + 16 * p);
        QVLM_UNROLL
        for (int m = 0; m < ROWS; ++m) {
            const __m512 input = _mm512_set1_ps(x[k * kBlockM + m]);
            QVLM_UNROLL
            for (int p = 0; p < panels; ++p) sum[m][p] = _mm512_fmadd_ps(input, weights[p], sum[m][p]);
        }
    }
    QVLM_UNROLL
    for (int m = 0; m < ROWS; ++m)
        QVLM_UNROLL
        for (int p = 0; p < panels; ++p) {
            float* y = out + m * kTileN + 16 * p;
            _mm512_store_ps(y, begin ? sum[m][p] : _mm512_add_ps(_mm512_load_ps(y), sum[m][p]));
        }
}

// Any number of tokens of a tile of columns. x [blocks of kBlockM tokens][K][kBlockM], out [rows, kTileN].
template <int BITS>
void columns_many(const Weight& w, const float* x, float* out, int64_t rows, int64_t first) {
    alignas(64) uint8_t bytes[kBlockK * kTileN];
    alignas(64) float block[kBlockK * kTileN], scale[kTileN], zero[kTileN];
    for (int64_t g = 0; g < w.groups; ++g) {
        for (int64_t n = 0; n < kTileN; ++n) {
            const int64_t row = std::min(first + n, w.n - 1);
            scale[n] = w.factor(row, g), zero[n] = float(w.zero(row, g));
        }
        for (int64_t from = 0; from < w.count(g); from += kBlockK) {
            const int64_t count = std::min(kBlockK, w.count(g) - from), k = g * w.length + from;
            unpack_panels<BITS>(w, first, kTileN / 16, g, from, count, bytes);
            lift_panels<BITS>(bytes, count, scale, zero, block);
            for (int64_t i = 0; i < rows; i += kBlockM) {
                const float* inputs = x + i * w.k + k * kBlockM;
                switch (rows - i) {
                    case 1: block_product<1>(inputs, block, count, k == 0, out + i * kTileN); break;
                    case 2: block_product<2>(inputs, block, count, k == 0, out + i * kTileN); break;
                    case 3: block_product<3>(inputs, block, count, k == 0, out + i * kTileN); break;
                    case 4: block_product<4>(inputs, block, count, k == 0, out + i * kTileN); break;
                    case 5: block_product<5>(inputs, block, count, k == 0, out + i * kTileN); break;
                    default: block_product<6>(inputs, block, count, k == 0, out + i * kTileN);
                }
            }
        }
    }
}

// Tokens begin ... begin + rows - 1, at most kBlockM, side by side: [K, kBlockM].
template <class T>
void interleave_tokens(const Weight& w, const FloatInput<T>& input, int64_t begin, int64_t rows, float* a) {
    for (int64_t k = 0; k < w.k; ++k)
        for (int64_t i = 0; i < rows; ++i) a[k * kBlockM + i] = input.at(begin + i, k);
}

// The sums of columns first ... last - 1 for `rows` tokens, at most kTileM. out [rows, kTileN].
template <int BITS>
void columns_float(const Weight& w, const float* a, float* out, int64_t rows, int64_t first, int64_t last) {
    if (rows <= kFew)
        columns_few<BITS>(w, a, out, rows, first, last);
    else
        columns_many<BITS>(w, a, out, rows, first);
}

// Inputs of `rows` tokens from `begin` on, as the product reads them.
template <class T>
float* arranged(const Weight& w, const FloatInput<T>& input, int64_t begin, int64_t rows) {
    const bool few = rows <= kFew;
    const int64_t blocks = few ? rows : (rows + kBlockM - 1) / kBlockM, block = few ? w.stride() : w.k * kBlockM;
    float* a = scratch<float>(blocks * block);
#pragma omp parallel for schedule(static) if (rows > 4)
    for (int64_t i = 0; i < blocks; ++i)
        if (few)
            spread_token(w, input, begin + i, a + i * block);
        else
            interleave_tokens(w, input, begin + i * kBlockM, std::min(kBlockM, rows - i * kBlockM), a + i * block);
    return a;
}

#else  // portable

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

// The same. a [rows, K].
template <int BITS>
void columns_float(const Weight& w, const float* a, float* out, int64_t rows, int64_t first, int64_t last) {
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

// The inputs of `rows` tokens from `begin` on as float.
template <class T>
float* arranged(const Weight& w, const FloatInput<T>& input, int64_t begin, int64_t rows) {
    float* a = scratch<float>(rows * w.k);
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t k = 0; k < w.k; ++k) a[i * w.k + k] = input.at(begin + i, k);
    return a;
}

#endif

// The outputs of modules of one width, group length and K, from one input x [m, k]; scale [K] or null divides it.
template <class T>
void linears_float(const std::vector<Module>& modules, const float* scale, const T* x, int64_t m) {
    const Weight& w = modules.front().w;
    for (int64_t begin = 0; begin < m; begin += kTileM) {
        const int64_t rows = std::min(kTileM, m - begin);
        const float* a = arranged(w, FloatInput<T>{x, scale, w.k}, begin, rows);
        with_bits(w.bits, [&](auto bits) {
            share_columns(modules, rows <= kFew, [&](const Module& module, int64_t first, int64_t last) {
                alignas(64) float sums[kTileM * kTileN];
                columns_float<bits()>(module.w, a, sums, rows, first, last);
                module.finish(sums, nullptr, begin, rows, first, last - first);
            });
        });
    }
}

}  // namespace
