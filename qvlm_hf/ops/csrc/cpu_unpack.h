// From packed bytes to registers of integers.
//
// A row is a bit stream; eight values of b bits are b bytes, whatever b is from 2 to 8. With AVX-512 vpermb puts each run of b bytes into a
// 64-bit lane and vpmultishiftqb cuts it into eight bytes. With AVX2 a shuffle puts each value into 16 bits, whose product with a power of two
// has it on top. 4-bit weights are two slices, the even and the odd values of a block, which come out by one shift and two masks if the inputs
// lie in the same order: those of a module whose groups are whole blocks do.
#pragma once

#include <array>
#include <type_traits>

#include "cpu_weight.h"

#if QVLM_VECTOR

namespace {

constexpr int64_t kBlock = 2 * kBytes;         // 4-bit values that fill a register
constexpr int kPanels = kLanes == 16 ? 4 : 2;  // registers of columns whose sums with 6 tokens the processor holds
constexpr int64_t kPart = kPanels * kLanes;    // columns of them

// A pass over the weights for one token: rows read side by side, and bytes that each of them asks memory for in advance. As measured: eight
// on Ice Lake, two on Zen 4.
#if defined(__znver1__) || defined(__znver2__) || defined(__znver3__) || defined(__znver4__) || defined(__znver5__)
constexpr bool kZen = true;
#else
constexpr bool kZen = false;
#endif
constexpr int kLines = kLanes == 16 && !kZen ? 8 : 2;
constexpr int64_t kAhead = kLanes == 16 ? 1024 : 2048;
static_assert(kTileN % kPart == 0 && kReach >= kBytes);

// How weights come out of their bytes, and which inputs they meet.
enum Layout {
    kSliced,  // 4 bits in blocks
    kStream,  // up to 7 bits in natural order
    kWhole,   // 8 bits
    kWords,   // 8 bits, widened to 16 for 16-bit inputs: where products of bytes would saturate
};
template <Layout LAYOUT>
using Integer = std::conditional_t<LAYOUT == kWords, int16_t, int8_t>;

inline Layout layout_of(const Weight& w) {
    if (w.bits == 8) return kVnni ? kWhole : kWords;
    return w.bits == 4 && w.padded() % kBlock == 0 ? kSliced : kStream;
}

// Calls run(std::integral_constant<Layout, layout>()).
template <class Run>
void with_layout(Layout layout, const Run& run) {
    if (layout == kSliced) return run(std::integral_constant<Layout, kSliced>());
    if (layout == kStream) return run(std::integral_constant<Layout, kStream>());
    return run(std::integral_constant<Layout, kVnni ? kWhole : kWords>());
}

// A register of integers from the bytes that begin at `source`; kSliced: one of raw bytes, see `slice`.
template <Layout LAYOUT>
struct Unpack {
    static constexpr int64_t values = kBytes / sizeof(Integer<LAYOUT>) * (LAYOUT == kSliced ? 2 : 1);

    explicit Unpack(int) {}
    QVLM_INLINE Bytes operator()(const uint8_t* source) const {
#if QVLM_VECTOR == 32
        if constexpr (LAYOUT == kWords) return _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
#endif
        return load_bytes(source);
    }
};

#if QVLM_VECTOR == 64

// How vpermb and vpmultishiftqb cut eight values of `bits` bits out of each run of `bits` bytes.
struct Cut {
    alignas(64) uint8_t index[64];
    alignas(64) uint8_t shift[64];
    constexpr explicit Cut(int bits = 0) : index(), shift() {
        for (int lane = 0; lane < 8; ++lane)
            for (int i = 0; i < 8; ++i) {
                index[8 * lane + i] = uint8_t(lane * bits + (i < bits ? i : 0));
                shift[8 * lane + i] = uint8_t(i * bits);
            }
    }
};
constexpr Cut kCut[] = {Cut(), Cut(), Cut(2), Cut(3), Cut(4), Cut(5), Cut(6), Cut(7)};

template <>
struct Unpack<kStream> {
    static constexpr int64_t values = kBytes;
    const Bytes index, shift, mask;

    explicit Unpack(int bits) : index(load_bytes(kCut[bits].index)), shift(load_bytes(kCut[bits].shift)), mask(_mm512_set1_epi8(char((1 << bits) - 1))) {}
    QVLM_INLINE Bytes operator()(const uint8_t* source) const {
        const __m512i lanes = _mm512_permutexvar_epi8(index, load_bytes(source));
        return _mm512_and_si512(_mm512_multishift_epi64_epi8(shift, lanes), mask);
    }
};

// Slice 0 or 1 of a register of 4-bit values.
QVLM_INLINE Bytes slice(Bytes block, int index) { return _mm512_and_si512(index ? _mm512_srli_epi16(block, 4) : block, _mm512_set1_epi8(15)); }

#else

// How values 0 ... 7 and 8 ... 15 of 2 `bits` bytes come into 16 bits each, and the factors that put them on top.
struct Cut {
    alignas(32) uint8_t index[2][32];
    alignas(32) uint16_t factor[16];
    constexpr explicit Cut(int bits = 0) : index(), factor() {
        for (int i = 0; i < 16; ++i) {
            const int bit = i % 8 * bits;
            for (int half = 0; half < 2; ++half)
                for (int j = 0; j < 2; ++j) index[half][2 * i + j] = uint8_t(half * bits + bit / 8 + j);
            factor[i] = uint16_t(1 << (16 - bits - bit % 8));
        }
    }
};
constexpr Cut kCut[] = {Cut(), Cut(), Cut(2), Cut(3), Cut(4), Cut(5), Cut(6), Cut(7)};

template <>
struct Unpack<kStream> {
    static constexpr int64_t values = kBytes;
    const Bytes low, high, factor;
    const __m128i down;
    const int64_t half;

    explicit Unpack(int bits)
        : low(load_bytes(kCut[bits].index[0])), high(load_bytes(kCut[bits].index[1])), factor(load_bytes(kCut[bits].factor)),
          down(_mm_cvtsi32_si128(16 - bits)), half(2 * bits) {}
    QVLM_INLINE Bytes operator()(const uint8_t* source) const {
        const auto sixteen = [](const uint8_t* from) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)); };
        const __m256i bytes = _mm256_inserti128_si256(_mm256_castsi128_si256(sixteen(source)), sixteen(source + half), 1);
        return _mm256_packus_epi16(cut(bytes, low), cut(bytes, high));
    }

private:
    QVLM_INLINE __m256i cut(__m256i bytes, __m256i index) const {
        return _mm256_srl_epi16(_mm256_mullo_epi16(_mm256_shuffle_epi8(bytes, index), factor), down);
    }
};

QVLM_INLINE Bytes slice(Bytes block, int index) { return _mm256_and_si256(index ? _mm256_srli_epi16(block, 4) : block, _mm256_set1_epi8(15)); }

#endif

// Scales and zero points of `count` groups of a row from `g` on, at most kLanes.
struct Parameters {
    Floats scale;
    Ints zero;
};
QVLM_INLINE Parameters parameters(const Weight& w, int64_t row, int64_t g, int64_t count) {
    const Ints zero = w.zero_point ? load(w.zero_point + row * w.groups + g, count) : splat(int32_t(1) << (w.bits - 1));
    return {load(w.scale + row * w.groups + g, count), zero};
}

// A tile of kTileN columns from `first` on: where their rows begin, and scales and zero points of kLanes groups. Beyond N the last repeats.
struct Columns {
    const uint8_t* row[kTileN];
    alignas(64) float scale[kLanes][kTileN];
    alignas(64) int32_t zero[kLanes][kTileN];

    Columns(const Weight& w, int64_t first) {
        for (int64_t n = 0; n < kTileN; ++n) row[n] = w.row(std::min(first + n, w.n - 1));
    }
    QVLM_APART void load_parameters(const Weight& w, int64_t first, int64_t g) {
        for (int64_t panel = 0; panel < kTileN; panel += kLanes) {
            Bytes scales[kLanes], zeros[kLanes];
            for (int i = 0; i < kLanes; ++i) {
                const Parameters of = parameters(w, std::min(first + panel + i, w.n - 1), g, w.groups - g);
                scales[i] = (Bytes)of.scale, zeros[i] = (Bytes)of.zero;
            }
            transpose(scales), transpose(zeros);
            for (int i = 0; i < kLanes; ++i) store_bytes(scale[i] + panel, scales[i]), store_bytes(zero[i] + panel, zeros[i]);
        }
    }
};

// Columns of a group as the tile product reads them: `count` values of kTileN rows from byte `begin` on, where a multiple of 64 values begins.
// tile [kTileN / kPart][room in steps of 4 bytes][kPanels][kLanes columns][4 bytes].
template <Layout LAYOUT>
QVLM_APART void unpack_panels(const uint8_t* const* rows, int bits, int64_t begin, int64_t count, int64_t room, uint8_t* tile) {
    const Unpack<LAYOUT> unpack(bits);
    constexpr int64_t values = Unpack<LAYOUT>::values, words = sizeof(int32_t) / sizeof(Integer<LAYOUT>);  // of a register, and in 4 bytes
    for (int64_t k = 0; k < count; k += values)
        for (int64_t panel = 0; panel < kTileN / kLanes; ++panel) {
            Bytes block[kLanes];
            for (int i = 0; i < kLanes; ++i) {
                const uint8_t* source = rows[kLanes * panel + i] + begin + k * bits / 8;
                // no row is read long enough for the processor to foresee it
                _mm_prefetch(reinterpret_cast<const char*>(source + 128), _MM_HINT_T1);
                block[i] = unpack(source);
            }
            transpose(block);  // of slices both together
            uint8_t* to = tile + ((panel / kPanels * (room / words) + k / words) * kPanels + panel % kPanels) * kBytes;
            for (int i = 0; i < kLanes; ++i, to += kPanels * kBytes) {
                if constexpr (LAYOUT == kSliced) {
                    store_bytes(to, slice(block[i], 0));
                    store_bytes(to + kLanes * kPanels * kBytes, slice(block[i], 1));
                } else {
                    store_bytes(to, block[i]);
                }
            }
        }
}

// LINES rows of a range of columns side by side, step by step: they share the loads of the inputs, and memory delivers several streams
// faster than one (on an Ice Lake core 10 GB/s from one, 13 from four, 14 from eight), if they lie apart: with neighbouring rows two cores
// read 17 GB/s of W4, with runs of rows 20. A Zen 4 core reads two faster than eight, by half.
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
        for (int i = 0; i < LINES; ++i) row[i] = std::min(first_ + i * run_ + step_, last_ - 1), bytes[i] = w_.row(row[i]);
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

// Asks memory for scales and zero points of a row from group `g` on, or, behind its last one, of the next row.
QVLM_INLINE void ask_parameters(const Weight& w, int64_t row, int64_t g) {
    _mm_prefetch(reinterpret_cast<const char*>(w.scale + row * w.groups + g), _MM_HINT_T0);
    if (w.zero_point) _mm_prefetch(reinterpret_cast<const char*>(w.zero_point + row * w.groups + g), _MM_HINT_T0);
}

}  // namespace

#endif  // QVLM_VECTOR
