// Floating-point inputs (A16): packed weights become floats in registers, products are added as float32.
//
// A weight ws (w - zp) is exact: 8 bits of the scale times 9 of the difference. So the only roundings are those of the sums, which PyTorch's own
// float32 product has too.
//
// Up to kFew tokens: a pass over the weights, which come out of their bytes a register of floats at a time (`Spread`). Inputs lie in that order.
//
// More: 64 or 128 inputs x 64 columns of w - zp at a time go to the L1 cache and meet 6 tokens x kPart columns of sums in registers, which ws
// multiplies at the end. They are float32; for bfloat16 inputs on a processor with products of those, bfloat16, which holds w - zp exactly.
//
// Legend: as in cpu_weight.h.

#include "cpu_portable.h"
#include "cpu_token.h"
#include "cpu_unpack.h"

namespace {

#if QVLM_VECTOR

constexpr int64_t kBlockWords = 64;  // inputs or pairs of them of a block of weights, which takes 16 KiB

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
template <Way WAY>
void spread_token(const Weight& w, const float* x, float* a) {
    constexpr int64_t values = kValues<WAY>;
    const int64_t padded = w.padded();
    for (int64_t g = 0; g < w.groups; ++g)
        for (int64_t k = 0; k < padded; k += values * kLanes)
            for (int64_t j = 0; j < values; ++j)
                for (int64_t lane = 0; lane < kLanes; ++lane) {
                    const int64_t at = k + Spread<WAY>::order(j, lane);
                    a[g * padded + k + j * kLanes + lane] = at < w.count(g) ? x[g * w.length + at] : 0.0f;
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

// What a lane multiplies at a time: a float, or two neighbours as bfloat16.
template <class Word>
constexpr int64_t kValuesOf = std::is_same_v<Word, float> ? 1 : 2;
template <class Word>
int64_t words_of(int64_t values) { return (values + kValuesOf<Word> - 1) / kValuesOf<Word>; }

// Words of a group, and from one token to the next: a cache line more, or the tokens of a power of two would share a cache set.
template <class Word>
int64_t group_words(const Weight& w) { return words_of<Word>(std::min(w.length, w.k)); }
template <class Word>
int64_t token_words(const Weight& w) { return w.groups * group_words<Word>(w) + 16; }

// A block of w - zp, [kTileN / kPart][words][kPart columns], from the bytes of unpack_panels.
template <class Word>
void lift_panels(const uint8_t* tile, int64_t count, const int32_t* zero, Word* block) {
    for (int64_t panel = 0; panel < kTileN / kLanes; ++panel) {
        const Ints shift = load(zero + kLanes * panel);
        const uint8_t* bytes = tile + (panel / kPanels * (kBlockWords * kValuesOf<Word> / 4) * kPanels + panel % kPanels) * kBytes;
        Word* to = block + panel / kPanels * kBlockWords * kPart + panel % kPanels * kLanes;
        for (int64_t k = 0; k < count; k += 4, bytes += kPanels * kBytes) {
            const Ints four = (Ints)load_bytes(bytes);
            Floats values[4];
            QVLM_UNROLL
            for (int j = 0; j < 4; ++j) values[j] = as_floats((four >> 8 * j & 255) - shift);
            QVLM_UNROLL
            for (int j = 0; j < 4; j += kValuesOf<Word>, to += kPart) {
                if constexpr (kValuesOf<Word> == 1)
                    store(to, values[j]);
                else
                    store(to, ((Ints)values[j] >> 16 & 0xffff) | ((Ints)values[j + 1] & ~0xffff));  // exact: w - zp has 8 bits
            }
        }
    }
}

QVLM_INLINE void multiply(Floats& sum, Floats weights, float input) { sum = fused(splat(input), weights, sum); }
#if QVLM_BFLOAT
QVLM_INLINE void multiply(Floats& sum, Ints weights, int32_t inputs) { dot_bfloats(sum, weights, splat(inputs)); }
#endif

// ROWS tokens x kPart columns of a block. x [ROWS, stride], block [count, kPart]; added to out [ROWS, kTileN], or the first to be there.
template <int ROWS, class Word>
QVLM_APART void block_product(const Word* x, int64_t stride, const Word* block, int64_t count, const float* scale, bool begin, float* out) {
    Floats sum[ROWS][kPanels];
    QVLM_UNROLL
    for (int m = 0; m < ROWS; ++m)
        QVLM_UNROLL
        for (int p = 0; p < kPanels; ++p) sum[m][p] = no_floats();
    for (int64_t k = 0; k < count; ++k) {
        decltype(load(block)) weights[kPanels];
        QVLM_UNROLL
        for (int p = 0; p < kPanels; ++p) weights[p] = load(block + k * kPart + kLanes * p);
        QVLM_UNROLL
        for (int m = 0; m < ROWS; ++m)
            QVLM_UNROLL
            for (int p = 0; p < kPanels; ++p) multiply(sum[m][p], weights[p], x[m * stride + k]);
    }
    QVLM_UNROLL
    for (int p = 0; p < kPanels; ++p) {
        const Floats factor = load(scale + kLanes * p);
        QVLM_UNROLL
        for (int m = 0; m < ROWS; ++m) {
            float* y = out + m * kTileN + kLanes * p;
            store(y, begin ? sum[m][p] * factor : fused(sum[m][p], factor, load(y)));
        }
    }
}

// Any number of tokens of a tile of columns. x [rows, token_words], out [rows, kTileN].
template <class Word>
void columns_many(const Weight& w, const Word* x, float* out, int64_t rows, int64_t first) {
    constexpr int64_t width = kBlockWords * kValuesOf<Word>;
    const int64_t stride = token_words<Word>(w);
    alignas(64) uint8_t bytes[width * kTileN];
    alignas(64) Word block[kBlockWords * kTileN];
    Columns columns(w, first);
    for (int64_t g = 0; g < w.groups; ++g) {
        if (g % kLanes == 0) columns.load_parameters(w, first, g);
        const float* scale = columns.scale[g % kLanes];
        for (int64_t from = 0; from < w.count(g); from += width) {
            const int64_t count = std::min(width, w.count(g) - from), at = g * group_words<Word>(w) + from / kValuesOf<Word>;
            const int64_t start = w.start(g) + from * w.bits / 8;
            if (w.bits == 8)
                unpack_panels<kWhole>(columns.row, w.bits, start, count, width, bytes);
            else
                unpack_panels<kStream>(columns.row, w.bits, start, count, width, bytes);
            lift_panels(bytes, count, columns.zero[g % kLanes], block);
            const auto product = [&](auto some, int64_t i) {
                for (int64_t part = 0; part < kTileN; part += kPart)
                    block_product<some()>(x + i * stride + at, stride, block + part * kBlockWords, words_of<Word>(count), scale + part, at == 0,
                                          out + i * kTileN + part);
            };
            int64_t i = 0;
            for (; i + 6 <= rows; i += 6) product(std::integral_constant<int, 6>(), i);
            for (; i + 2 <= rows; i += 2) product(std::integral_constant<int, 2>(), i);
            for (; i < rows; ++i) product(std::integral_constant<int, 1>(), i);
        }
    }
}

// One token in words, a group after the other.
template <class Word, class T>
void into_words(const Weight& w, const T* x, Word* a) {
    for (int64_t g = 0; g < w.groups; ++g, a += group_words<Word>(w)) {
        const int64_t count = w.count(g);
        a[words_of<Word>(count) - 1] = 0;
        std::memcpy(a, x + g * w.length, count * sizeof(T));
    }
}

#endif

// Inputs of tokens begin ... begin + rows - 1 as their product reads them: put(x, a + i * stride) for each of them.
template <class Put>
float* arranged(const qvlm::Call& c, int64_t begin, int64_t rows, int64_t stride, const Put& put) {
    float* a = scratch<float>(rows * stride);
#pragma omp parallel for schedule(static) if (rows > 4)
    for (int64_t i = 0; i < rows; ++i) {
        float* x = scratch<float, 1>(c.k);
        read_token(c, begin + i, x);
        for (int64_t k = 0; c.input_scale && k < c.k; ++k) x[k] /= c.input_scale[k];
        put(x, a + i * stride);
    }
    return a;
}

// The outputs of these tokens, whose sums compute(w, sums, first, last) makes, [rows, kTileN].
template <class Compute>
void fill(const std::vector<Module>& modules, bool few, int64_t begin, int64_t rows, const Compute& compute) {
    share_columns(modules, few, [&](const Module& module, int64_t first, int64_t last) {
        alignas(64) float sums[kTileM * kTileN];
        compute(module.w, sums, first, last);
        module.finish(sums, nullptr, begin, rows, first, last - first);
    });
}

#if QVLM_VECTOR

template <class Word>
void fill_many(const std::vector<Module>& modules, const Word* a, int64_t begin, int64_t rows) {
    fill(modules, false, begin, rows, [&](const Weight& w, float* sums, int64_t first, int64_t) { columns_many(w, a, sums, rows, first); });
}

void tokens(const qvlm::Call& c, const std::vector<Module>& modules, int64_t begin, int64_t rows) {
    const Weight& w = modules.front().w;
    const bool halves = QVLM_BFLOAT && DType(c.dtype) == DType::kBFloat16 && !c.input_scale && !c.hadamard;
    if (rows <= (halves ? kFew / 2 : kFew)) return with_way(way_of(w), [&](auto way) {
        const float* a = arranged(c, begin, rows, w.stride(), [&](const float* x, float* to) { spread_token<way()>(w, x, to); });
        fill(modules, true, begin, rows, [&](const Weight& of, float* sums, int64_t first, int64_t last) {
            columns_few<way()>(of, a, sums, rows, first, last);
        });
    });
#if QVLM_BFLOAT
    if (halves) {
        const int64_t stride = token_words<int32_t>(w);
        int32_t* a = scratch<int32_t>(rows * stride);
        for (int64_t i = 0; i < rows; ++i) into_words(w, static_cast<const BFloat16*>(c.x) + (begin + i) * c.k, a + i * stride);
        return fill_many(modules, a, begin, rows);
    }
#endif
    const int64_t stride = token_words<float>(w);
    fill_many(modules, arranged(c, begin, rows, stride, [&](const float* x, float* to) { into_words(w, x, to); }), begin, rows);
}

#else

void tokens(const qvlm::Call& c, const std::vector<Module>& modules, int64_t begin, int64_t rows) {
    const float* a = arranged(c, begin, rows, c.k, [&](const float* x, float* to) { std::copy_n(x, c.k, to); });
    fill(modules, rows <= kFew, begin, rows, [&](const Weight& w, float* sums, int64_t first, int64_t last) {
        columns_portable(w, a, sums, rows, first, last);
    });
}

#endif

}  // namespace

void qvlm::multiply_floats(const Call& c) {
    const std::vector<Module> modules = modules_of(c);
    for (int64_t begin = 0; begin < c.m; begin += kTileM) tokens(c, modules, begin, std::min(kTileM, c.m - begin));
}
