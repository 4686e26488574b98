// Floating-point inputs (A16): packed weights become float32 in registers, products are added as float32.
//
// A weight ws (w - zp) is exact: 8 bits of the scale times 9 of the difference. So the only roundings are those of the sums, which PyTorch's own
// float32 product has too.
//
// Up to kFew tokens: a pass over the weights, which come out of their bytes a register of floats at a time (`Spread`). Inputs lie in that order.
//
// More: 64 inputs x 64 columns of weights at a time become float32 in the L1 cache and meet 6 tokens x kPart columns of sums in registers.
//
// Legend: as in cpu_weight.h.

#include "cpu_portable.h"
#include "cpu_unpack.h"

namespace {

// Value k of token i of x [m, K] as float, with the stored scale (or null) divided out.
template <class T>
struct FloatInput {
    const T* x;
    const float* scale;  // [K]
    int64_t k;

    float at(int64_t i, int64_t j) const { return scale ? widen(x[i * k + j]) / scale[j] : widen(x[i * k + j]); }
};

#if QVLM_VECTOR

constexpr int64_t kBlockM = 6;   // tokens that share the loads of a weight
constexpr int64_t kBlockK = 64;  // inputs of a block of weights as float32, which takes 16 KiB

// How few tokens' weights become floats: from registers of `values` x kLanes of them.
enum Way {
    kEight,   // 4 bits in blocks
    kFour,    // narrow values: with AVX-512 up to 4 bits, with AVX2 up to 7
    kWidest,  // the others
};
inline Way way_of(const Weight& w) {
    if (w.bits == 4 && w.padded() % kBlock == 0) return kEight;
    return w.bits <= (kLanes == 16 ? 4 : 7) ? kFour : kWidest;
}
template <Way WAY>
constexpr int kValues = WAY == kEight ? 8 : 4;

#if QVLM_VECTOR == 64

// 16 lanes hold neighbouring values of a row each. A rotation brings one of them to the lowest bits, where it picks one of the row's 2^bits
// weights of this group from a table (vpermps, up to 4 bits), or to the upper bits of a mantissa, where 2^15 + w needs one bitwise instruction
// and its weight one fused multiplication and subtraction.

// How a lane gets the bytes of its values, and the rotations to the left that bring each of them to bit 0 (up to 4 bits) or 8.
struct Turn {
    alignas(64) uint8_t index[64];
    alignas(64) uint32_t left[4][16];
    constexpr explicit Turn(int bits = 0) : index(), left() {
        for (int lane = 0; lane < 16; ++lane) {
            const int bit = lane * 4 * bits;
            for (int i = 0; i < 4; ++i) index[4 * lane + i] = uint8_t(bit / 8 + i);
            for (int i = 0; i < 4; ++i) left[i][lane] = uint32_t(64 + (bits <= 4 ? 0 : 8) - bit % 8 - i * bits) % 32;
        }
    }
};
constexpr Turn kTurn[] = {Turn(), Turn(), Turn(2), Turn(3), Turn(4), Turn(5), Turn(6), Turn(7), Turn(8)};

template <Way WAY>
struct Spread {
    const Turn& turn;
    const __m512i mask;

    explicit Spread(int bits) : turn(kTurn[bits]), mask(_mm512_set1_epi32(((1 << bits) - 1) << 8)) {}
    QVLM_INLINE Bytes read(const uint8_t* source) const {
        return WAY == kEight ? load_bytes(source) : _mm512_permutexvar_epi8(load_bytes(turn.index), load_bytes(source));
    }
    // Value J of each lane.
    template <int J>
    QVLM_INLINE Bytes value(Bytes lanes) const {
        if constexpr (WAY == kEight) return J ? _mm512_rol_epi32(lanes, 32 - 4 * J) : lanes;
        return _mm512_rolv_epi32(lanes, load_bytes(turn.left[J % 4]));
    }
    static int64_t order(int64_t j, int64_t lane) { return lane * kValues<WAY> + j; }
};

// The weights of one row in one group, by value.
template <Way WAY>
struct Levels {
    Floats low, high;  // a table; widest ws and ws (2^15 + zp), which takes 24 bits

    QVLM_INLINE void set(float scale, float zero, int bits) {
        constexpr float kLift = 32768;
        if constexpr (WAY == kWidest) {
            low = splat(scale), high = splat(scale * (kLift + zero));
        } else {  // what is above the value does not count
            const Ints entries = Ints{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} & splat(int32_t((1 << bits) - 1));
            low = (as_floats(entries) - splat(zero)) * splat(scale);
        }
    }
    template <int J>
    QVLM_INLINE Floats of(const Spread<WAY>& spread, Bytes lanes) const {
        const Bytes value = spread.template value<J>(lanes);
        if constexpr (WAY != kWidest) return _mm512_permutexvar_ps(value, low);
        constexpr int both_or = 0xea;  // (a & b) | c
        const Bytes lifted = _mm512_ternarylogic_epi32(value, spread.mask, _mm512_set1_epi32(0x47000000), both_or);
        return fused_minus(_mm512_castsi512_ps(lifted), low, high);
    }
};

#else

// 32 integers of a row as bytes; a shuffle gives each of four neighbours in a half a lane of its own.
template <Way WAY>
struct Spread {
    static constexpr Layout layout = WAY == kEight ? kSliced : WAY == kFour ? kStream : kWhole;
    const Unpack<layout> unpack;

    explicit Spread(int bits) : unpack(bits) {}
    QVLM_INLINE Bytes read(const uint8_t* source) const { return unpack(source); }
    template <int J>
    QVLM_INLINE Ints value(Bytes bytes) const {
        if constexpr (WAY == kEight) bytes = slice(bytes, J / 4);
        constexpr int64_t at = J % 4 * 4, zeros = 0x80808000;
        constexpr int64_t low = zeros + at + ((zeros + at + 1) << 32), high = zeros + at + 2 + ((zeros + at + 3) << 32);
        return (Ints)_mm256_shuffle_epi8(bytes, _mm256_setr_epi64x(low, high, low, high));
    }
    static int64_t order(int64_t j, int64_t lane) {
        const int64_t byte = lane / 4 * 16 + j % 4 * 4 + lane % 4;
        return WAY == kEight ? 2 * byte + j / 4 : byte;
    }
};

// The weights of one row in one group: ws w - ws zp, whose products are exact.
template <Way WAY>
struct Levels {
    Floats scale, shift;

    QVLM_INLINE void set(float of, float zero, int) { scale = splat(of), shift = splat(of * zero); }
    template <int J>
    QVLM_INLINE Floats of(const Spread<WAY>& spread, Bytes bytes) const {
        return fused_minus(as_floats(spread.template value<J>(bytes)), scale, shift);
    }
};

#endif

// Values J and on of the lanes of LINES rows with ROWS tokens, whose inputs are `stride` apart.
template <Way WAY, int ROWS, int LINES, int J = 0>
QVLM_INLINE void add_products(const Spread<WAY>& spread, const Bytes* lanes, const Levels<WAY>* levels, const float* a, int64_t stride,
                              Floats (*sum)[ROWS]) {
    Floats inputs[ROWS];
    QVLM_UNROLL
    for (int m = 0; m < ROWS; ++m) inputs[m] = load(a + m * stride + kLanes * J);
    QVLM_UNROLL
    for (int i = 0; i < LINES; ++i) {
        const Floats weights = levels[i].template of<J>(spread, lanes[i]);
        QVLM_UNROLL
        for (int m = 0; m < ROWS; ++m) sum[i][m] = fused(weights, inputs[m], sum[i][m]);
    }
    if constexpr (J + 1 < kValues<WAY>) add_products<WAY, ROWS, LINES, J + 1>(spread, lanes, levels, a, stride, sum);
}

// Few tokens: a [ROWS, KP] in the order of lanes. out [ROWS, kTileN].
template <Way WAY, int ROWS, int LINES>
QVLM_APART void gemv(const Weight& w, const float* a, float* out, int64_t first, int64_t last) {
    const Spread<WAY> spread(w.bits);
    const int64_t padded = w.padded(), stride = w.stride(), bits = w.bits, group_bytes = w.length * bits / 8;
    constexpr int64_t width = kValues<WAY> * kLanes;
    alignas(64) float scale[LINES * kLanes], zero[LINES * kLanes];
    for (Streams<LINES> rows(w, first, last); rows.next();) {
        Floats sum[LINES][ROWS];
        QVLM_UNROLL
        for (int i = 0; i < LINES; ++i)
            QVLM_UNROLL
            for (int m = 0; m < ROWS; ++m) sum[i][m] = no_floats();
        for (int64_t g = 0; g < w.groups; ++g) {
            if (g % kLanes == 0)
                for (int i = 0; i < LINES; ++i) {
                    const Parameters of = parameters(w, rows.row[i], g, w.groups - g);
                    ask_parameters(w, rows.row[i], g + kLanes);
                    store(scale + kLanes * i, of.scale), store(zero + kLanes * i, as_floats(of.zero));
                }
            const int64_t start = g * group_bytes, count = w.count(g);
            rows.ask(start, start + count * bits / 8);
            Levels<WAY> levels[LINES];
            QVLM_UNROLL
            for (int i = 0; i < LINES; ++i) levels[i].set(scale[kLanes * i + g % kLanes], zero[kLanes * i + g % kLanes], w.bits);
            for (int64_t k = 0; k < count; k += width) {
                Bytes lanes[LINES];
                QVLM_UNROLL
                for (int i = 0; i < LINES; ++i) lanes[i] = spread.read(rows.bytes[i] + start + k * bits / 8);
                add_products<WAY, ROWS, LINES>(spread, lanes, levels, a + g * padded + k, stride, sum);
            }
        }
        QVLM_UNROLL
        for (int i = 0; i < LINES; ++i)
            QVLM_UNROLL
            for (int m = 0; m < ROWS; ++m) out[m * kTileN + rows.row[i] - first] = ::sum(sum[i][m]);
    }
}

// One token in the order of lanes: the first value of all lanes, then the second.
template <Way WAY, class T>
void spread_token(const Weight& w, const FloatInput<T>& input, int64_t token, float* a) {
    constexpr int64_t values = kValues<WAY>;
    const int64_t padded = w.padded();
    for (int64_t g = 0; g < w.groups; ++g)
        for (int64_t k = 0; k < padded; k += values * kLanes)
            for (int64_t j = 0; j < values; ++j)
                for (int64_t lane = 0; lane < kLanes; ++lane) {
                    const int64_t at = k + Spread<WAY>::order(j, lane);
                    a[g * padded + k + j * kLanes + lane] = at < w.count(g) ? input.at(token, g * w.length + at) : 0.0f;
                }
}

template <Way WAY>
void columns_few(const Weight& w, const float* a, float* out, int64_t m, int64_t first, int64_t last) {
    constexpr int lines = WAY != kWidest && kLanes == 16 ? 8 : 4;  // as many sums as the registers hold beside the levels of as many rows
    const auto pass = [&](auto gemv, int64_t i) { gemv(w, a + i * w.stride(), out + i * kTileN, first, last); };
    int64_t i = 0;
    for (; i + 4 <= m; i += 4) pass(gemv<WAY, 4, kLanes / 4>, i);
    for (; i + 2 <= m; i += 2) pass(gemv<WAY, 2, 4>, i);
    for (; i < m; ++i) pass(gemv<WAY, 1, lines>, i);
}

// Calls run(std::integral_constant<Way, way>()).
template <class Run>
void with_way(Way way, const Run& run) {
    switch (way) {
        case kEight: return run(std::integral_constant<Way, kEight>());
        case kFour: return run(std::integral_constant<Way, kFour>());
        case kWidest: return run(std::integral_constant<Way, kWidest>());
    }
}

// A block of weights as float32, [kTileN / kPart][kBlockK][kPart columns], from the bytes of unpack_panels.
inline void lift_panels(const uint8_t* tile, int64_t count, const float* scale, const float* zero, float* block) {
    for (int64_t panel = 0; panel < kTileN / kLanes; ++panel) {
        const Floats factor = load(scale + kLanes * panel), shift = factor * load(zero + kLanes * panel);
        const uint8_t* bytes = tile + (panel / kPanels * (kBlockK / 4) * kPanels + panel % kPanels) * kBytes;
        float* to = block + panel / kPanels * kBlockK * kPart + panel % kPanels * kLanes;
        for (int64_t k = 0; k < count; k += 4, bytes += kPanels * kBytes) {
            const Ints four = (Ints)load_bytes(bytes);
            QVLM_UNROLL
            for (int j = 0; j < 4; ++j) store(to + (k + j) * kPart, fused_minus(as_floats(four >> 8 * j & 255), factor, shift));
        }
    }
}

// ROWS tokens x kPart columns of a block. x [count, kBlockM], block [count, kPart]; added to out [ROWS, kTileN], or the first to be there.
template <int ROWS>
QVLM_APART void block_product(const float* x, const float* block, int64_t count, bool begin, float* out) {
    Floats sum[ROWS][kPanels];
    QVLM_UNROLL
    for (int m = 0; m < ROWS; ++m)
        QVLM_UNROLL
        for (int p = 0; p < kPanels; ++p) sum[m][p] = no_floats();
    for (int64_t k = 0; k < count; ++k) {
        Floats weights[kPanels];
        QVLM_UNROLL
        for (int p = 0; p < kPanels; ++p) weights[p] = load(block + k * kPart + kLanes * p);
        QVLM_UNROLL
        for (int m = 0; m < ROWS; ++m) {
            const Floats input = splat(x[k * kBlockM + m]);
            QVLM_UNROLL
            for (int p = 0; p < kPanels; ++p) sum[m][p] = fused(input, weights[p], sum[m][p]);
        }
    }
    QVLM_UNROLL
    for (int m = 0; m < ROWS; ++m)
        QVLM_UNROLL
        for (int p = 0; p < kPanels; ++p) {
            float* y = out + m * kTileN + kLanes * p;
            store(y, begin ? sum[m][p] : load(y) + sum[m][p]);
        }
}

// Any number of tokens of a tile of columns. x [blocks of kBlockM tokens][K][kBlockM], out [rows, kTileN].
inline void columns_many(const Weight& w, const float* x, float* out, int64_t rows, int64_t first) {
    alignas(64) uint8_t bytes[kBlockK * kTileN];
    alignas(64) float block[kBlockK * kTileN], scale[kTileN], zero[kTileN];
    for (int64_t g = 0; g < w.groups; ++g) {
        for (int64_t n = 0; n < kTileN; ++n) {
            const int64_t row = std::min(first + n, w.n - 1);
            scale[n] = w.factor(row, g), zero[n] = float(w.zero(row, g));
        }
        for (int64_t from = 0; from < w.count(g); from += kBlockK) {
            const int64_t count = std::min(kBlockK, w.count(g) - from), k = g * w.length + from;
            if (w.bits == 8)
                unpack_panels<kWhole>(w, first, g, from, count, kBlockK, bytes);
            else
                unpack_panels<kStream>(w, first, g, from, count, kBlockK, bytes);
            lift_panels(bytes, count, scale, zero, block);
            for (int64_t i = 0; i < rows; i += kBlockM)
                for (int64_t part = 0; part < kTileN; part += kPart) {
                    const float *inputs = x + i * w.k + k * kBlockM, *weights = block + part * kBlockK;
                    float* y = out + i * kTileN + part;
                    switch (rows - i) {
                        case 1: block_product<1>(inputs, weights, count, k == 0, y); break;
                        case 2: block_product<2>(inputs, weights, count, k == 0, y); break;
                        case 3: block_product<3>(inputs, weights, count, k == 0, y); break;
                        case 4: block_product<4>(inputs, weights, count, k == 0, y); break;
                        case 5: block_product<5>(inputs, weights, count, k == 0, y); break;
                        default: block_product<6>(inputs, weights, count, k == 0, y);
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

// Inputs of `rows` tokens from `begin` on, as the product reads them.
template <class T>
float* arranged(const Weight& w, const FloatInput<T>& input, int64_t begin, int64_t rows) {
    const bool few = rows <= kFew;
    const int64_t blocks = few ? rows : (rows + kBlockM - 1) / kBlockM, block = few ? w.stride() : w.k * kBlockM;
    float* a = scratch<float>(blocks * block);
#pragma omp parallel for schedule(static) if (rows > 4)
    for (int64_t i = 0; i < blocks; ++i)
        if (few)
            with_way(way_of(w), [&](auto way) { spread_token<way()>(w, input, begin + i, a + i * block); });
        else
            interleave_tokens(w, input, begin + i * kBlockM, std::min(kBlockM, rows - i * kBlockM), a + i * block);
    return a;
}

// The sums of columns first ... last - 1 for `rows` tokens, at most kTileM. out [rows, kTileN].
inline void columns(const Weight& w, const float* a, float* out, int64_t rows, int64_t first, int64_t last) {
    if (rows > kFew) return columns_many(w, a, out, rows, first);
    with_way(way_of(w), [&](auto way) { columns_few<way()>(w, a, out, rows, first, last); });
}

#else

// The inputs of `rows` tokens from `begin` on as float.
template <class T>
float* arranged(const Weight& w, const FloatInput<T>& input, int64_t begin, int64_t rows) {
    float* a = scratch<float>(rows * w.k);
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t k = 0; k < w.k; ++k) a[i * w.k + k] = input.at(begin + i, k);
    return a;
}

inline void columns(const Weight& w, const float* a, float* out, int64_t rows, int64_t first, int64_t last) {
    columns_portable(w, a, out, rows, first, last);
}

#endif

// The outputs of modules of one width, group length and K, from one input x [m, k]; scale [K] or null divides it.
template <class T>
void linears(const std::vector<Module>& modules, const float* scale, const T* x, int64_t m) {
    const Weight& w = modules.front().w;
    for (int64_t begin = 0; begin < m; begin += kTileM) {
        const int64_t rows = std::min(kTileM, m - begin);
        const float* a = arranged(w, FloatInput<T>{x, scale, w.k}, begin, rows);
        share_columns(modules, rows <= kFew, [&](const Module& module, int64_t first, int64_t last) {
            alignas(64) float sums[kTileM * kTileN];
            columns(module.w, a, sums, rows, first, last);
            module.finish(sums, nullptr, begin, rows, first, last - first);
        });
    }
}

}  // namespace

void qvlm::multiply_floats(const Call& c) {
    const std::vector<Module> modules = modules_of(c);
    typed(c.dtype, [&](auto zero) { linears(modules, c.input_scale, static_cast<const decltype(zero)*>(c.x), c.m); });
}
