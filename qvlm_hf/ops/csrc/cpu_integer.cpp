// Quantized inputs: products of integers, straight from the packed bytes on disk. Nothing is repacked, memory holds one copy.
//
//   y[m, n] = bias[n] + r[m] * sum_g ws[n, g] * r[m, g] * sum_{k in g} a[m, k] (w[n, k] - zp[n, g])
//
// with one of the two r at most.
//
// The weights stay unsigned (w, 0 ... 2^bits - 1) and are the unsigned operand of a product of bytes; inputs are the signed one (cpu_quantize.h).
// Sums are int32, exactly; the only rounding is that of float(sum) * ws and its accumulation over groups, as in reference.py. Up to 8 tokens
// the sum of a group is as many exact parts as a register has lanes and a zero point's share, which meet ws and are added in float one by one:
// the last bits of float32 may differ.
//
// Without VNNI two products of bytes are added in 16 bits, with saturation. Weights of up to 7 bits stay below it. Narrow ones leave room for
// several such sums, which are widened together.
//
// Legend: as in cpu_weight.h.

#include "cpu_portable.h"
#include "cpu_quantize.h"
#include "cpu_token.h"
#include "cpu_unpack.h"

namespace {

// Quantized inputs of some tokens, and the rows that put back what did not fit.
template <class A>
struct Rows {
    const A* a;             // [M, KP]; of tokens in parts [parts, M, KP]
    int64_t apart;          // from a part to the next
    const int32_t* sums;    // [M, G], over each group; `paired`: see `pair`
    const int32_t* shift;   // [M, grids], factor of a single correction row
    const A* more;          // [corrections, KP]
    const int32_t* more_sums;
    int64_t corrections;
    const float* scale;     // [M], of a token's outputs, or null for 1
    const float* group_scale;  // [M, G], of a group's sums, or null for 1
    int64_t grids;          // of a token: 1 or G
    bool wide;              // whether a sum over a group can leave the 24 bits that float holds
    bool paired;            // whether sums and shifts of short groups lie together, 16 bits each
    int64_t room;           // sums of two products of bytes that 16 bits hold

    Rows from(const Weight& w, int64_t m) const {
        Rows rest = *this;
        rest.a += m * w.stride(), rest.sums += m * w.groups, rest.shift += m * grids;
        if (scale) rest.scale += m;
        if (group_scale) rest.group_scale += m * w.groups;
        return rest;
    }
};

// Two integers of 16 bits, for one instruction that adds both products of a lane.
inline int32_t pair(int32_t low, int32_t high) { return int32_t(uint32_t(uint16_t(low)) | uint32_t(high) << 16); }
constexpr int64_t kPaired = 128;  // values of a group up to which what is paired fits: 255 * 128

#if QVLM_VECTOR

QVLM_INLINE void multiply(Ints& sum, Bytes weights, const int8_t* a) { dot(sum, weights, load_bytes(a)); }
#if QVLM_VECTOR == 32
QVLM_INLINE void multiply(Ints& sum, Bytes weights, const int16_t* a) { dot16(sum, weights, load_bytes(a)); }
#endif

// Sums of one weight row with several tokens. Not an array: GCC 12 keeps one in memory as soon as a loop runs around it.
template <int ROWS, int PARTS>
struct Sums {
    Ints head = no_ints();
    Sums<ROWS - 1, PARTS> tail;

    template <class A>
    QVLM_INLINE void add(Bytes weights, const A* a, int64_t stride, int64_t apart) {
        QVLM_UNROLL
        for (int part = 0; part < PARTS; ++part) multiply(head, weights, a + part * apart);
        tail.add(weights, a + stride, stride, apart);
    }
};
template <int PARTS>
struct Sums<0, PARTS> {
    template <class A>
    QVLM_INLINE void add(Bytes, const A*, int64_t, int64_t) {}
};

// Outputs of one weight row and several tokens, spread over the lanes until the row is done.
template <int ROWS>
struct Totals {
    Floats head = no_floats();
    Totals<ROWS - 1> tail;

    // Subtracts zero points times sums of inputs of kLanes groups; a lane is a group here.
    QVLM_INLINE void shift(const Parameters& of, const int32_t* sums, int64_t groups, int64_t count) {
        head = minus_fused(as_floats(of.zero * load(sums, count)), of.scale, head);
        tail.shift(of, sums + groups, groups, count);
    }
    // The same with a scale for each group of a token.
    QVLM_INLINE void shift(const Parameters& of, const int32_t* sums, const float* own, int64_t groups, int64_t count) {
        head = minus_fused(as_floats(of.zero * load(sums, count)), of.scale * load(own, count), head);
        tail.shift(of, sums + groups, own + groups, groups, count);
    }
    // Adds a group. Its lanes as floats stand for the exact sum: 24 bits hold every one of them.
    template <int PARTS>
    QVLM_INLINE void add(const Sums<ROWS, PARTS>& sums, Floats scale) {
        head = fused(as_floats(sums.head), scale, head);
        tail.add(sums.tail, scale);
    }
    template <int PARTS>
    QVLM_INLINE void add(const Sums<ROWS, PARTS>& sums, Floats scale, const float* own, int64_t groups) {
        head = fused(as_floats(sums.head), scale * splat(*own), head);
        tail.add(sums.tail, scale, own + groups, groups);
    }
    // Adds a group that needs more than 24 bits: one integer, rounded once. `inputs` are its sums of inputs, `own` its scales or null.
    template <int PARTS>
    QVLM_INLINE void add_wide(const Sums<ROWS, PARTS>& sums, float scale, int32_t zero, const int32_t* inputs, const float* own, int64_t groups) {
        const float one[kLanes] = {float(sum(sums.head) - zero * *inputs) * scale * (own ? *own : 1.0f)};
        head = head + load(one);
        tail.add_wide(sums.tail, scale, zero, inputs + groups, own ? own + groups : nullptr, groups);
    }
    QVLM_INLINE void store(float* out) const {
        *out = sum(head);
        tail.store(out + kTileN);
    }
};
template <>
struct Totals<0> {
    QVLM_INLINE void shift(const Parameters&, const int32_t*, int64_t, int64_t) {}
    QVLM_INLINE void shift(const Parameters&, const int32_t*, const float*, int64_t, int64_t) {}
    template <int PARTS>
    QVLM_INLINE void add(const Sums<0, PARTS>&, Floats) {}
    template <int PARTS>
    QVLM_INLINE void add(const Sums<0, PARTS>&, Floats, const float*, int64_t) {}
    template <int PARTS>
    QVLM_INLINE void add_wide(const Sums<0, PARTS>&, float, int32_t, const int32_t*, const float*, int64_t) {}
    QVLM_INLINE void store(float*) const {}
};

// Several weight rows side by side.
template <Layout LAYOUT, int ROWS, int PARTS, int LINES>
struct Lines {
    Sums<ROWS, PARTS> sums;
    Lines<LAYOUT, ROWS, PARTS, LINES - 1> tail;

    // Adds a register of weights of each row, `offset` bytes behind `bytes`.
    QVLM_INLINE void step(const Unpack<LAYOUT>& unpack, const uint8_t* const* bytes, int64_t offset, const Integer<LAYOUT>* a, int64_t stride,
                          int64_t apart) {
        Bytes block = unpack(*bytes + offset);
        if constexpr (LAYOUT == kSliced) {
            __asm__("" : "+x"(block));  // GCC reads memory for each use otherwise
            sums.add(slice(block, 0), a, stride, apart);
            sums.add(slice(block, 1), a + kBytes, stride, apart);
        } else {
            sums.add(block, a, stride, apart);
        }
        tail.step(unpack, bytes + 1, offset, a, stride, apart);
    }
};
template <Layout LAYOUT, int ROWS, int PARTS>
struct Lines<LAYOUT, ROWS, PARTS, 0> {
    QVLM_INLINE void step(const Unpack<LAYOUT>&, const uint8_t* const*, int64_t, const Integer<LAYOUT>*, int64_t, int64_t) {}
};

// The outputs of such rows.
template <int ROWS, int LINES>
struct LineTotals {
    Totals<ROWS> totals;
    LineTotals<ROWS, LINES - 1> tail;

    // Scales of `count` groups from `g` on into `scale`, their zero points into the outputs.
    template <class A>
    QVLM_INLINE void begin(const Weight& w, const Rows<A>& x, const int64_t* row, int64_t g, int64_t count, float* scale) {
        const Parameters of = parameters(w, *row, g, count);
        ask_parameters(w, *row, g + kLanes);
        ::store(scale, of.scale);
        if (!x.wide) {
            if (__builtin_expect(x.group_scale != nullptr, 0))
                totals.shift(of, x.sums + g, x.group_scale + g, w.groups, count);
            else
                totals.shift(of, x.sums + g, w.groups, count);
        }
        tail.begin(w, x, row + 1, g, count, scale + kLanes);
    }
    template <class L>
    QVLM_INLINE void add(const L& lines, const float* scale) {
        totals.add(lines.sums, splat(*scale));
        tail.add(lines.tail, scale + kLanes);
    }
    template <class L>
    QVLM_INLINE void add(const L& lines, const float* scale, const float* own, int64_t groups) {
        totals.add(lines.sums, splat(*scale), own, groups);
        tail.add(lines.tail, scale + kLanes, own, groups);
    }
    template <class L>
    QVLM_INLINE void add_wide(const L& lines, const Weight& w, const int32_t* sums, const float* own, const int64_t* row, int64_t g,
                              const float* scale) {
        totals.add_wide(lines.sums, *scale, w.zero(*row, g), sums + g, own ? own + g : nullptr, w.groups);
        tail.add_wide(lines.tail, w, sums, own, row + 1, g, scale + kLanes);
    }
    QVLM_INLINE void store(float* out, const int64_t* row) const {
        totals.store(out + *row);
        tail.store(out, row + 1);
    }
};
template <int ROWS>
struct LineTotals<ROWS, 0> {
    template <class A>
    QVLM_INLINE void begin(const Weight&, const Rows<A>&, const int64_t*, int64_t, int64_t, float*) {}
    template <class L>
    QVLM_INLINE void add(const L&, const float*) {}
    template <class L>
    QVLM_INLINE void add(const L&, const float*, const float*, int64_t) {}
    template <class L>
    QVLM_INLINE void add_wide(const L&, const Weight&, const int32_t*, const float*, const int64_t*, int64_t, const float*) {}
    QVLM_INLINE void store(float*, const int64_t*) const {}
};

// Few tokens: one pass over the weights, every value unpacked once for ROWS tokens. out [ROWS, kTileN] float.
template <Layout LAYOUT, int ROWS, int PARTS, int LINES>
QVLM_APART void gemv(const Weight& w, const Rows<Integer<LAYOUT>>& x, float* out, int64_t first, int64_t last) {
    constexpr int64_t width = Unpack<LAYOUT>::values;
    const Unpack<LAYOUT> unpack(w.bits);
    const int64_t padded = w.padded(), stride = w.stride(), groups = w.groups, apart = x.apart, bits = w.bits;
    const int64_t group_bytes = w.length * bits / 8, step_bytes = width * bits / 8;
    const bool wide = x.wide;
    alignas(64) float scale[LINES * kLanes];
    for (Streams<LINES> rows(w, first, last); rows.next();) {
        LineTotals<ROWS, LINES> totals;
        for (int64_t begin = 0; begin < groups; begin += kLanes) {
            const int64_t stop = std::min(begin + kLanes, groups);
            totals.begin(w, x, rows.row, begin, stop - begin, scale);
            for (int64_t g = begin; g < stop; ++g) {
                const int64_t start = g * group_bytes, count = w.count(g);
                rows.ask(start, start + count * bits / 8);
                Lines<LAYOUT, ROWS, PARTS, LINES> lines;
                const Integer<LAYOUT>* a = x.a + g * padded;
                for (int64_t k = 0, at = start; k < count; k += width, at += step_bytes) lines.step(unpack, rows.bytes, at, a + k, stride, apart);
                if (__builtin_expect(wide, 0))
                    totals.add_wide(lines, w, x.sums, x.group_scale, rows.row, g, scale + g - begin);
                else if (__builtin_expect(x.group_scale != nullptr, 0))
                    totals.add(lines, scale + g - begin, x.group_scale + g, groups);
                else
                    totals.add(lines, scale + g - begin);
            }
        }
        totals.store(out - first, rows.row);
    }
}

// Columns first ... last - 1 of M tokens in as many passes as it takes: as many weight rows side by side as the registers hold.
template <Layout LAYOUT>
void columns_few(const Weight& w, const Rows<Integer<LAYOUT>>& x, int parts, float* out, int64_t m, int64_t first, int64_t last) {
    const auto pass = [&](auto gemv, int64_t i) { gemv(w, x.from(w, i), out + i * kTileN, first, last); };
    constexpr int two = std::max(kLines / 2, 2);
    int64_t i = 0;
    if (parts == 1) {
        for (; i + 8 <= m; i += 8) pass(gemv<LAYOUT, 8, 1, 1>, i);
        for (; i + 4 <= m; i += 4) pass(gemv<LAYOUT, 4, 1, 2>, i);
        for (; i + 2 <= m; i += 2) pass(gemv<LAYOUT, 2, 1, two>, i);
        for (; i < m; ++i) pass(gemv<LAYOUT, 1, 1, kLines>, i);
    } else if constexpr (LAYOUT != kWords) {
        if (parts == 2) {
            for (; i + 4 <= m; i += 4) pass(gemv<LAYOUT, 4, 2, 2>, i);
            for (; i + 2 <= m; i += 2) pass(gemv<LAYOUT, 2, 2, kLanes / 4>, i);
            for (; i < m; ++i) pass(gemv<LAYOUT, 1, 2, kLines>, i);
        }
        for (; i < m; ++i) pass(gemv<LAYOUT, 1, 3, kLines>, i);
    }
}

// What a tile of columns has in one group.
struct Tile {
    const float* scale;                 // [kTileN]
    int32_t* zero;                      // [kTileN], zero points; paired: with the sums of a single correction row
    alignas(64) int32_t more[kTileN];   // sums of a single correction row, for every token times its shift
    alignas(64) int32_t begin[kTileN];  // sums of several correction rows, or 0
    const uint8_t* weights;             // see unpack_panels
    int64_t words;                      // of 4 bytes, of a padded group
};

// What ROWS tokens x kPart columns of a group begin with: minus zero points times sums of inputs, and the correction rows.
template <int ROWS, class A>
QVLM_INLINE void tile_begin(const Rows<A>& x, const Tile& tile, const int32_t* sums, int64_t groups, const int32_t* shift, int64_t part,
                            Ints sum[ROWS][kPanels]) {
    QVLM_UNROLL
    for (int p = 0; p < kPanels; ++p) {
        const int64_t at = part + kLanes * p;
        const Ints zero = load(tile.zero + at), begin = load(tile.begin + at);
        QVLM_UNROLL
        for (int m = 0; m < ROWS; ++m) {
            sum[m][p] = begin;
            if (__builtin_expect(x.paired, 1)) {
                dot16(sum[m][p], (Bytes)zero, (Bytes)splat(sums[m * groups]));
            } else {
                sum[m][p] -= zero * splat(sums[m * groups]);
                if (shift) sum[m][p] += load(tile.more + at) * splat(shift[m * x.grids]);
            }
        }
    }
}

// Adds one group's products of ROWS tokens x kPart columns. NARROW: in 16 bits for as long as `room` says.
template <bool NARROW, int ROWS, class A>
QVLM_INLINE void tile_sums(const A* a, int64_t stride, const uint8_t* tile, int64_t words, [[maybe_unused]] int64_t room,
                           Ints sum[ROWS][kPanels]) {
    const auto add = [&](int64_t begin, int64_t stop, Ints (*to)[kPanels]) __attribute__((always_inline)) {
        for (int64_t k = begin; k < stop; ++k) {
            Bytes weights[kPanels];
            QVLM_UNROLL
            for (int p = 0; p < kPanels; ++p) weights[p] = load_bytes(tile + (k * kPanels + p) * kBytes);
            QVLM_UNROLL
            for (int m = 0; m < ROWS; ++m) {
                int32_t word;
                std::memcpy(&word, a + m * stride + k * 4 / int64_t(sizeof(A)), 4);
                const Bytes inputs = (Bytes)splat(word);
                QVLM_UNROLL
                for (int p = 0; p < kPanels; ++p) {
#if QVLM_VECTOR == 32
                    if constexpr (NARROW)
                        to[m][p] = (Ints)_mm256_add_epi16((Bytes)to[m][p], _mm256_maddubs_epi16(weights[p], inputs));
                    else if constexpr (sizeof(A) == 2)
                        dot16(to[m][p], weights[p], inputs);
                    else
#endif
                        dot(to[m][p], weights[p], inputs);
                }
            }
        }
    };
    if constexpr (!NARROW) return add(0, words, sum);
#if QVLM_VECTOR == 32
    for (int64_t begin = 0; begin < words; begin += room) {
        Ints part[ROWS][kPanels];
        QVLM_UNROLL
        for (int m = 0; m < ROWS; ++m)
            QVLM_UNROLL
            for (int p = 0; p < kPanels; ++p) part[m][p] = no_ints();
        add(begin, std::min(begin + room, words), part);
        QVLM_UNROLL
        for (int m = 0; m < ROWS; ++m)
            QVLM_UNROLL
            for (int p = 0; p < kPanels; ++p) sum[m][p] += (Ints)_mm256_madd_epi16((Bytes)part[m][p], _mm256_set1_epi16(1));
    }
#endif
}

// ROWS tokens of one group, added to out [ROWS, kTileN] in float, in the order of groups and without fused rounding: as in reference.py.
template <bool NARROW, int ROWS, class A>
QVLM_APART void tile_product(const Weight& w, const Rows<A>& x, int64_t g, const Tile& tile, float* out) {
    const int32_t* shift = x.corrections == 1 ? x.shift + (x.grids > 1 ? g : 0) : nullptr;
    for (int64_t part = 0; part < kTileN; part += kPart) {
        Ints sum[ROWS][kPanels];
        tile_begin<ROWS>(x, tile, x.sums + g, w.groups, shift, part, sum);
        tile_sums<NARROW, ROWS>(x.a + g * w.padded(), w.stride(), tile.weights + part * tile.words * 4, tile.words, x.room, sum);
        QVLM_UNROLL
        for (int p = 0; p < kPanels; ++p) {
            const Floats scale = load(tile.scale + part + kLanes * p);
            QVLM_UNROLL
            for (int m = 0; m < ROWS; ++m) {
                float* y = out + m * kTileN + part + kLanes * p;
                Floats product = as_floats(sum[m][p]) * scale;
                if (x.group_scale) product = product * splat(x.group_scale[m * w.groups + g]);
                store(y, g == 0 ? product : load(y) + product);
            }
        }
    }
}

// The sums of the correction rows in a group: into `more` of a single one, which every token multiplies by its shift, or into `begin`.
template <bool NARROW, class A>
QVLM_APART void tile_corrections(const Weight& w, const Rows<A>& x, int64_t g, Tile& tile) {
    std::fill_n(tile.begin, kTileN, 0);
    int32_t* to = x.corrections == 1 ? tile.more : tile.begin;
    for (int64_t r = 0; r < x.corrections; ++r)
        for (int64_t part = 0; part < kTileN; part += kPart) {
            Ints sum[1][kPanels];
            tile_begin<1>(x, tile, x.more_sums + r * w.groups + g, 0, nullptr, part, sum);
            tile_sums<NARROW, 1>(x.more + r * w.stride() + g * w.padded(), 0, tile.weights + part * tile.words * 4, tile.words, x.room, sum);
            for (int p = 0; p < kPanels; ++p) store(to + part + kLanes * p, sum[0][p]);
        }
    if (x.paired && x.corrections == 1)
        for (int64_t n = 0; n < kTileN; ++n) tile.zero[n] = pair(tile.zero[n], tile.more[n]);
}

// Many tokens of a tile of columns, from `first` on. out [rows, kTileN] float, rows at most kTileM.
template <Layout LAYOUT, bool NARROW>
QVLM_APART void gemm(const Weight& w, const Rows<Integer<LAYOUT>>& x, float* out, int64_t rows, int64_t first) {
    using A = Integer<LAYOUT>;
    const int64_t padded = w.padded(), size = padded * int64_t(sizeof(A));
    uint8_t* weights = scratch<uint8_t>(size * kTileN);
    Columns columns(w, first);
    Tile tile;
    tile.weights = weights, tile.words = size / 4;
    for (int64_t g = 0; g < w.groups; ++g) {
        unpack_panels<LAYOUT>(columns.row, w.bits, w.start(g), w.count(g), padded, weights);
        if (g % kLanes == 0) columns.load_parameters(w, first, g);
        tile.scale = columns.scale[g % kLanes], tile.zero = columns.zero[g % kLanes];
        tile_corrections<NARROW>(w, x, g, tile);
        int64_t i = 0;
        for (; i + 6 <= rows; i += 6) tile_product<NARROW, 6>(w, x.from(w, i), g, tile, out + i * kTileN);
        for (; i + 2 <= rows; i += 2) tile_product<NARROW, 2>(w, x.from(w, i), g, tile, out + i * kTileN);
        for (; i < rows; ++i) tile_product<NARROW, 1>(w, x.from(w, i), g, tile, out + i * kTileN);
    }
}

constexpr int64_t kWorthWidening = 8;  // sums that 16 bits must hold, or widening them together costs more than one by one

template <Layout LAYOUT>
void columns_many(const Weight& w, const Rows<Integer<LAYOUT>>& x, float* out, int64_t m, int64_t first) {
    if constexpr (!kVnni && LAYOUT != kWords)
        if (x.room >= kWorthWidening) return gemm<LAYOUT, true>(w, x, out, m, first);
    gemm<LAYOUT, false>(w, x, out, m, first);
}

#endif

// Tokens up to which a pass over the weights is best, by the parts that each is multiplied in.
inline int64_t most_few(int parts) { return parts == 1 ? kFew : kFew / 2; }

// The outputs of a call's modules, which are of one width, group length and K.
template <class A>
void linears(const qvlm::Call& c, bool bytes) {
    constexpr int64_t kChunk = 768;  // tokens at once: bounds the memory for inputs
    const std::vector<Module> modules = modules_of(c);
    const Input input{c.input_scale, c.input_zero_point, c.positions, int(c.activation_bits), int(c.granularity), bytes};
    const Weight& w = modules.front().w;
    const int64_t stride = w.stride(), grids = input.grids(w);
#if QVLM_VECTOR
    const Layout layout = layout_of(w);
    const int64_t block = layout == kSliced ? kBlock : 0;
#else
    const int64_t block = 0;
#endif
    for (int64_t begin = 0; begin < c.m; begin += kChunk) {
        const int64_t rows = std::min(kChunk, c.m - begin);
        float* scale = scratch<float>((2 * grids + 1) * rows);
        float* zero = scale + grids * rows;
        float* sound = zero + grids * rows;  // whether a token is finite
        const auto read = [&](int64_t i, float* x) {
            read_token(c, begin + i, x);
            token_range(w, input, x, input.positions ? (begin + i) % input.positions : 0, scale + i * grids, zero + i * grids);
            sound[i] = finite(x, w.k);
        };
        const bool together = rows <= kFew;  // few tokens are looked at before any becomes integers
        float* few_inputs = together ? scratch<float, 1>(rows * w.k) : nullptr;
        for (int64_t i = 0; together && i < rows; ++i) read(i, few_inputs + i * w.k);
        int parts = together ? input.parts(w, *std::min_element(zero, zero + grids * rows)) : 1;
        const bool few = rows <= most_few(parts);
        if (!few) parts = 1;
        const Form form{input.large() && !few, parts, rows * stride};
        const int64_t extra = few ? 0 : input.corrections();
        const bool paired = !few && QVLM_VECTOR && w.length <= kPaired;
        A* a = scratch<A>((rows * parts + extra) * stride);
        A* more = a + rows * parts * stride;
        int32_t* sums = scratch<int32_t>((rows + extra) * w.groups + rows * grids);
        int32_t* more_sums = sums + rows * w.groups;
        int32_t* shift = more_sums + extra * w.groups;
#pragma omp parallel for schedule(static) if (rows > 4)
        for (int64_t i = 0; i < rows; ++i) {
            float* x = together ? few_inputs + i * w.k : scratch<float, 1>(w.k);
            if (!together) read(i, x);
            quantize_token(w, input, form, block, x, scale + i * grids, zero + i * grids, a + i * stride, sums + i * w.groups);
            for (int64_t g = i * grids; g < (i + 1) * grids; ++g) shift[g] = 128 - int32_t(zero[g]);
            for (int64_t g = 0; paired && g < w.groups; ++g) {
                int32_t& of = sums[i * w.groups + g];
                of = pair(-of, extra == 1 ? shift[grids > 1 ? i * grids + g : i] : 0);
            }
        }
        if constexpr (sizeof(A) == 1)
            if (extra) correction_rows(w, input, block, more, more_sums);
        for (int64_t i = 0; paired && i < extra * w.groups; ++i) more_sums[i] = pair(-more_sums[i], 0);
        const int64_t top = (1 << input.bits) - 1, largest = (1 << w.bits) - 1, room = 32767 / (2 * largest * std::min<int64_t>(top, 128));
        const bool wide = std::min(w.length, w.k) * largest * top >= 1ll << 24;
        const Rows<A> packed{a, form.apart, sums, shift, more, more_sums, extra, input.granularity == kChannel || grids > 1 ? nullptr : scale,
                             grids > 1 ? scale : nullptr, grids, wide, paired, room};
        share_columns(modules, few, [&](const Module& module, int64_t first, int64_t last) {
            alignas(64) float out[kTileM * kTileN];
            for (int64_t i = 0; i < rows; i += kTileM) {
                const int64_t some = std::min(kTileM, rows - i);
                const Rows<A> part = packed.from(module.w, i);
#if QVLM_VECTOR
                with_layout(layout, [&](auto of) {
                    if constexpr (std::is_same_v<Integer<of()>, A>) {
                        if (few)
                            columns_few<of()>(module.w, part, parts, out, some, first, last);
                        else
                            columns_many<of()>(module.w, part, out, some, first);
                    }
                });
#else
                columns_portable(module.w, part.a, part.sums, part.group_scale, out, some, first, last);
#endif
                for (int64_t r = 0; r < some; ++r)
                    if (!sound[i + r]) std::fill_n(out + r * kTileN, kTileN, NAN);
                module.finish(out, part.scale, begin + i, some, first, last - first);
            }
        });
    }
}

}  // namespace

void qvlm::multiply_integers(const Call& c) {
#if QVLM_VECTOR
    if (c.weight_bits < 8 || kVnni) return linears<int8_t>(c, true);
#endif
#if QVLM_VECTOR != 64
    linears<int16_t>(c, false);
#endif
}
