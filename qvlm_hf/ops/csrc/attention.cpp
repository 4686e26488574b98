// Attention of one query token per sequence over cached keys and values, float32 or bfloat16.
//
//   out[b, h] = sum_s p[s] value[b, h / group, s],   p = softmax over s of (scale * query[b, h] . key[b, h / group, s] + mask[b, h, s])
//
// Keys and values are read once and little is done with them: what counts is how fast memory delivers. A task is up to kChunk keys of one key
// head: their scores for all queries of the group, the softmax within the chunk, the weighted sum of their values. What it leaves of a query
// (that sum, the largest score, the sum of exponentials) is put together afterwards, so that few heads and long contexts use many threads.
// Chunks depend on sizes alone: a call gives the same bits with any number of threads. Scores, softmax and sums are float32; the output
// is rounded once. A chunk that the mask closes is not read.
//
// Written in vectors of the compiler, as wide as the processor's registers: one source for AVX-512, AVX2 and SSE2.
// Everything else (other dtypes, several query tokens, head sizes below 32 or above 256) is PyTorch's: cpu_direct.cpp looks at the tensors.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <utility>

#include "attention_call.h"

#define QVLM_INLINE __attribute__((always_inline)) inline
#define QVLM_FOR(i) [&](auto i) __attribute__((always_inline))  // body of each()

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr int kSums = kLanes;                      // vectors of sums that the registers hold beside their operands
constexpr int64_t kStep = 2 * kLanes;              // values of a head taken at a time, as two vectors
constexpr int64_t kLargest = qvlm::kLargestHead;
constexpr int64_t kChunk = 128;                    // keys of a task: their values stay in the L2 cache
constexpr int64_t kStreams = 4;                    // runs of neighbouring keys read side by side: memory delivers faster than from one
constexpr int64_t kQueries = 16;                   // queries of a group that a task works on at a time
constexpr int64_t kAlone = 1 << 16;                // bytes of keys and values below which starting threads costs more than it saves
constexpr float kInfinity = std::numeric_limits<float>::infinity();

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Integers __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
using Lanes = std::make_integer_sequence<int, kLanes>;
using Bfloat16 = uint16_t;

// f(0), ..., f(N - 1) with constants: arrays of vectors indexed by them live in registers.
template <class F, int... I>
QVLM_INLINE void each(F&& f, std::integer_sequence<int, I...>) {
    (f(std::integral_constant<int, I>()), ...);
}
template <int N, class F>
QVLM_INLINE void each(F&& f) {
    each(f, std::make_integer_sequence<int, N>());
}

QVLM_INLINE Floats splat(float value) { return Floats{} + value; }
QVLM_INLINE Floats larger(Floats a, Floats b) { return a > b ? a : b; }
QVLM_INLINE Floats load(const float* from) {
    Floats values;
    std::memcpy(&values, from, sizeof values);
    return values;
}
QVLM_INLINE void store(Floats values, float* to) { std::memcpy(to, &values, sizeof values); }

// kStep values as two vectors. Those of bfloat16 are the even and the odd ones: a shift and a mask, no shuffle.
struct Pair {
    Floats low, high;
};
QVLM_INLINE Pair load_step(const float* from) { return {load(from), load(from + kLanes)}; }
QVLM_INLINE Pair load_step(const Bfloat16* from) {
    Words words;
    std::memcpy(&words, from, sizeof words);
    return {(Floats)(words << 16), (Floats)(words & 0xffff0000u)};
}
QVLM_INLINE void store_step(Pair values, float* to) { store(values.low, to), store(values.high, to + kLanes); }
QVLM_INLINE Words rounded(Floats values) {  // bfloat16 in the upper half, to nearest even
    const Words words = (Words)values;
    return values == values ? words + 0x7fffu + ((words >> 16) & 1u) : Words{} + 0x7fc00000u;
}
QVLM_INLINE void store_step(Pair values, Bfloat16* to) {
    const Words words = (rounded(values.low) >> 16) | (rounded(values.high) & 0xffff0000u);
    std::memcpy(to, &words, sizeof words);
}
// Where the i-th value of a step lies in its two vectors.
QVLM_INLINE int64_t lane(const float*, int64_t i) { return i; }
QVLM_INLINE int64_t lane(const Bfloat16*, int64_t i) { return i % 2 * kLanes + i / 2; }

// e^x for x <= 0, to one unit in the last place; 0 below the smallest normal number. NaN stays.
QVLM_INLINE Floats exponential(Floats x) {
    const Floats shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const Floats bounded = x < -87.3f ? splat(-87.3f) : x;
    const Floats shifted = bounded * 1.44269504f + shift;
    const Floats n = shifted - shift;
    const Floats r = (bounded - n * 0.693145752f) - n * 1.42860677e-6f;  // n * ln 2 in two parts, the first exact
    Floats p = r * 0.00138131448f + 0.00836941879f;  // 1 + r + r^2 p: the least relative error for |r| <= ln 2 / 2
    p = p * r + 0.041668456f;
    p = p * r + 0.166665152f;
    p = p * r + 0.49999994f;
    p = p * r * r + r + 1.0f;
    const Integers power = ((Integers)shifted - 0x4b400000 + 127) << 23;
    return x < -87.3f ? Floats{} : p * (Floats)power;
}

// Lane i: that of a where i has no bit D, else that of b; and its partner, lane i ^ D of the same.
template <int D, int... I>
QVLM_INLINE Pair joined(Floats a, Floats b, std::integer_sequence<int, I...>) {
#ifdef __clang__
    return {__builtin_shufflevector(a, b, (I & D ? kLanes + I : I)...), __builtin_shufflevector(a, b, ((I & D ? kLanes + I : I) ^ D)...)};
#else
    return {__builtin_shuffle(a, b, Integers{(I & D ? kLanes + I : I)...}), __builtin_shuffle(a, b, Integers{((I & D ? kLanes + I : I) ^ D)...})};
#endif
}

template <int D = kLanes / 2>
QVLM_INLINE float sum_of(Floats values) {
    if constexpr (D > 0)
        return sum_of<D / 2>(values + joined<D>(values, values, Lanes()).high);
    else
        return values[0];
}
template <int D = kLanes / 2>
QVLM_INLINE float largest_of(Floats values) {
    if constexpr (D > 0)
        return largest_of<D / 2>(larger(values, joined<D>(values, values, Lanes()).high));
    else
        return values[0];
}

// Lane i is the sum over the lanes of sums[i].
template <int D = kLanes / 2>
QVLM_INLINE Floats totals(Floats (&sums)[kLanes]) {
    each<D>(QVLM_FOR(i) {
        const Pair halves = joined<D>(sums[i], sums[i + D], Lanes());
        sums[i] = halves.low + halves.high;
    });
    if constexpr (D > 1)
        return totals<D / 2>(sums);
    else
        return sums[0];
}

using qvlm::Mask;

// `count` neighbouring keys as kStreams runs: places 0, 1, ... are the first keys of all runs, then the second ones. The last places of
// a short chunk have no key of their own; they read the last one, and nothing comes of it.
struct Places {
    int64_t count, run, size;
    int64_t key[kChunk];

    explicit Places(int64_t count) : count(count), run((count + 15) / 16 * 16 / kStreams), size(run * kStreams) {  // size: a multiple of all kLanes
        for (int64_t i = 0; i < size; ++i) key[i] = std::min(place(i), count - 1);
    }
    int64_t place(int64_t i) const { return i % kStreams * run + i / kStreams; }
    bool exists(int64_t i) const { return place(i) < count; }
};

// The call, strides in elements; the last dimension of all three is contiguous.
template <class T>
struct Call {
    const T *query, *key, *value;
    T* out;  // [batch, heads, size]
    int64_t batch, heads, key_heads, keys, size;
    int64_t query_batch, query_head, key_batch, key_head, key_row, value_batch, value_head, value_row;
    Mask mask;
    float scale;

    int64_t group() const { return heads / key_heads; }
    int64_t chunks() const { return (keys + kChunk - 1) / kChunk; }
    int64_t steps() const { return (size + kStep - 1) / kStep; }
    int64_t padded() const { return steps() * kStep; }
    // First value of a step; the last step ends with the head and may overlap the one before.
    int64_t start(int64_t step) const { return std::min(step * kStep, size - kStep); }
    // What a chunk leaves of a query: the weighted sum [padded], the largest score, the sum of exponentials.
    int64_t partial() const { return (padded() + 2 + 15) / 16 * 16; }
};

// Asks for a step in advance, as far as the L2 cache.
template <class T>
QVLM_INLINE void ask(const T* from) {
    for (size_t i = 0; i < kStep * sizeof(T); i += 64) __builtin_prefetch(reinterpret_cast<const char*>(from) + i, 0, 2);
}

// Queries times scale as float32 [count, padded], in the order of load_step; zero where the last step repeats values.
template <class T>
void prepare(const Call<T>& c, const T* query, int64_t count, float* to) {
    for (int64_t i = 0; i < count; ++i, query += c.query_head, to += c.padded()) {
        for (int64_t s = 0; s < c.steps(); ++s) {
            const Pair values = load_step(query + c.start(s));
            store(values.low * c.scale, to + s * kStep), store(values.high * c.scale, to + s * kStep + kLanes);
        }
        const int64_t last = c.steps() - 1;
        for (int64_t repeated = 0; repeated < last * kStep - c.start(last); ++repeated) to[last * kStep + lane(query, repeated)] = 0;
    }
}

// scores [QUERIES, kChunk] of the keys of a chunk; asks for its values.
template <int QUERIES, class T>
void multiply_keys(const Call<T>& c, const float* query, const T* key, const T* value, const Places& places, float* scores) {
    constexpr int KEYS = kSums / QUERIES;
    const int64_t steps = c.steps(), padded = c.padded();
    for (int64_t j = 0; j < places.size; j += KEYS) {
        const T *from[KEYS], *later[KEYS];
        each<KEYS>(QVLM_FOR(k) { from[k] = key + places.key[j + k] * c.key_row, later[k] = value + places.key[j + k] * c.value_row; });
        Floats sums[kSums] = {};
        for (int64_t s = 0; s < steps; ++s) {
            const int64_t start = c.start(s);
            Pair keys[KEYS];
            each<KEYS>(QVLM_FOR(k) { ask(later[k] + start), keys[k] = load_step(from[k] + start); });
            each<QUERIES>(QVLM_FOR(q) {
                const Floats low = load(query + q * padded + s * kStep), high = load(query + q * padded + s * kStep + kLanes);
                each<KEYS>(QVLM_FOR(k) {
                    sums[q * KEYS + k] += keys[k].low * low;
                    sums[q * KEYS + k] += keys[k].high * high;
                });
            });
        }
        float all[kLanes];
        store(totals(sums), all);
        each<QUERIES>(QVLM_FOR(q) { std::memcpy(scores + q * kChunk + j, all + q * KEYS, KEYS * 4); });
    }
}

// Steps `step` ... `step + STEPS - 1` of the values of a chunk, weighted by [QUERIES, kChunk] and added up; asks for `next`.
template <int QUERIES, int STEPS, class T>
void multiply_values(const Call<T>& c, const float* weights, const T* value, const T* next, const Places& places, int64_t step, float* partial) {
    Floats low[QUERIES * STEPS] = {}, high[QUERIES * STEPS] = {};
    int64_t starts[STEPS];
    each<STEPS>(QVLM_FOR(s) { starts[s] = c.start(step + s); });
    for (int64_t j = 0; j < places.size; ++j) {
        const T *from = value + places.key[j] * c.value_row, *later = next + places.key[j] * c.key_row;
        each<STEPS>(QVLM_FOR(s) {
            ask(later + starts[s]);
            const Pair values = load_step(from + starts[s]);
            each<QUERIES>(QVLM_FOR(q) {
                low[q * STEPS + s] += values.low * weights[q * kChunk + j];
                high[q * STEPS + s] += values.high * weights[q * kChunk + j];
            });
        });
    }
    each<QUERIES>(QVLM_FOR(q) {
        each<STEPS>(QVLM_FOR(s) { store_step({low[q * STEPS + s], high[q * STEPS + s]}, partial + q * c.partial() + (step + s) * kStep); });
    });
}

template <int QUERIES, class T>
void multiply_values(const Call<T>& c, const float* weights, const T* value, const T* next, const Places& places, float* partial) {
    constexpr int STEPS = std::max(kSums / 2 / QUERIES, 1);
    int64_t step = 0;
    for (; step + STEPS <= c.steps(); step += STEPS) multiply_values<QUERIES, STEPS>(c, weights, value, next, places, step, partial);
    for (; step < c.steps(); ++step) multiply_values<QUERIES, 1>(c, weights, value, next, places, step, partial);
}

struct Allowed {
    uint8_t yes;
};
inline float term(Allowed allowed) { return allowed.yes ? 0.0f : -kInfinity; }
inline float term(float value) { return value; }
inline float term(Bfloat16 value) {
    const uint32_t word = uint32_t(value) << 16;
    float result;
    std::memcpy(&result, &word, 4);
    return result;
}

// What is added to the scores of a chunk whose mask begins at `first`: -infinity where there is no key. Returns whether any key counts.
template <class M>
bool terms(const M* mask, int64_t stride, const Places& places, float* to) {
    bool any = false;
    for (int64_t i = 0; i < places.size; ++i) {
        to[i] = places.exists(i) ? mask ? term(mask[places.key[i] * stride]) : 0.0f : -kInfinity;
        any |= to[i] != -kInfinity;
    }
    return any;
}
bool terms(const Mask& mask, int64_t first, const Places& places, float* to) {
    if (!mask.data) return terms<float>(nullptr, 0, places, to);
    if (mask.kind == Mask::kBool) return terms(static_cast<const Allowed*>(mask.data) + first, mask.key, places, to);
    if (mask.kind == Mask::kFloat) return terms(static_cast<const float*>(mask.data) + first, mask.key, places, to);
    return terms(static_cast<const Bfloat16*>(mask.data) + first, mask.key, places, to);
}

// Adds the terms to `count` scores, if there are any, and returns the largest.
float finish(float* scores, const float* terms, int64_t count) {
    if (terms)
        for (int64_t i = 0; i < count; ++i) scores[i] += terms[i];
    Floats most = splat(-kInfinity);
    for (int64_t i = 0; i < count; i += kLanes) most = larger(load(scores + i), most);
    return largest_of(most);
}

// Scores become exponentials, relative to the largest; returns their sum.
float exponentials(float* scores, float most, int64_t count) {
    const float base = most == -kInfinity ? 0.0f : most;
    Floats sum = {};
    for (int64_t i = 0; i < count; i += kLanes) {
        const Floats weights = exponential(load(scores + i) - base);
        store(weights, scores + i);
        sum += weights;
    }
    return sum_of(sum);
}

// f<QUERIES>(first) over `count` queries, as many at a time as leave registers for their operands.
template <class F>
QVLM_INLINE void tiled(int64_t count, F&& f) {
    int64_t first = 0;
    for (; first + 4 <= count; first += 4) f(std::integral_constant<int, 4>(), first);
    for (; first + 2 <= count; first += 2) f(std::integral_constant<int, 2>(), first);
    for (; first < count; ++first) f(std::integral_constant<int, 1>(), first);
}

// One chunk of one key head, for all queries of its group. `partial` [group, c.partial()].
template <class T>
void attend(const Call<T>& c, int64_t batch, int64_t key_head, int64_t chunk, float* partial) {
    alignas(64) float query[kQueries * kLargest], scores[kQueries * kChunk], added[kQueries * kChunk];
    const int64_t begin = chunk * kChunk, padded = c.padded(), row = c.partial();
    const Places places(std::min(kChunk, c.keys - begin));
    const T* key = c.key + batch * c.key_batch + key_head * c.key_head + begin * c.key_row;
    const T* value = c.value + batch * c.value_batch + key_head * c.value_head + begin * c.value_row;
    for (int64_t first = 0; first < c.group(); first += kQueries, partial += kQueries * row) {
        const int64_t queries = std::min(kQueries, c.group() - first), head = key_head * c.group() + first;
        const int64_t masks = c.mask.head ? queries : c.mask.data || places.size != places.count ? 1 : 0;  // rows of `added`
        bool any = !masks;
        for (int64_t i = 0; i < masks; ++i)
            any |= terms(c.mask, batch * c.mask.batch + (head + i) * c.mask.head + begin * c.mask.key, places, added + i * kChunk);
        if (!any) {
            for (int64_t i = 0; i < queries; ++i) partial[i * row + padded] = -kInfinity, partial[i * row + padded + 1] = 0;
            continue;
        }
        prepare(c, c.query + batch * c.query_batch + head * c.query_head, queries, query);
        tiled(queries, [&](auto tile, int64_t i) { multiply_keys<tile>(c, query + i * padded, key, value, places, scores + i * kChunk); });
        // two loops: the rows of each are independent, and the processor works on several at once
        for (int64_t i = 0; i < queries; ++i)
            partial[i * row + padded] = finish(scores + i * kChunk, masks ? added + (masks > 1 ? i : 0) * kChunk : nullptr, places.size);
        for (int64_t i = 0; i < queries; ++i)
            partial[i * row + padded + 1] = exponentials(scores + i * kChunk, partial[i * row + padded], places.size);
        const T* next = key + kChunk * c.key_row;
        tiled(queries, [&](auto tile, int64_t i) { multiply_values<tile>(c, scores + i * kChunk, value, next, places, partial + i * row); });
    }
}

// The output of one query from what its chunks left, `stride` apart. A row that the mask closes is zero, as PyTorch has it.
template <class T>
void combine(const Call<T>& c, const float* partial, int64_t stride, T* out) {
    const int64_t chunks = c.chunks(), padded = c.padded();
    float most = -kInfinity, sum = 0;
    for (int64_t i = 0; i < chunks; ++i) most = std::max(most, partial[i * stride + padded]);
    const float base = most == -kInfinity ? 0.0f : most;
    alignas(64) float total[kLargest + kStep] = {};
    for (int64_t i = 0; i < chunks; ++i, partial += stride) {
        const float weight = exponential(splat(partial[padded] - base))[0];
        sum += weight * partial[padded + 1];
        if (weight == 0) continue;  // not written, where the mask closes the chunk
        for (int64_t j = 0; j < padded; j += kLanes) store(load(total + j) + load(partial + j) * weight, total + j);
    }
    const float factor = sum == 0 ? 0.0f : 1 / sum;
    for (int64_t s = 0; s < c.steps(); ++s)
        store_step({load(total + s * kStep) * factor, load(total + s * kStep + kLanes) * factor}, out + c.start(s));
}

template <class T>
void run(const Call<T>& c) {
    const int64_t group = c.group(), chunks = c.chunks(), row = c.partial(), tasks = c.batch * c.key_heads * chunks;
    constexpr std::align_val_t line{64};
    float* partials = static_cast<float*>(::operator new(tasks * group * row * sizeof(float), line));
#pragma omp parallel if (c.batch * c.key_heads * c.keys * c.size * int64_t(2 * sizeof(T)) > kAlone)
    {
#pragma omp for schedule(static)
        for (int64_t task = 0; task < tasks; ++task)
            attend(c, task / chunks / c.key_heads, task / chunks % c.key_heads, task % chunks, partials + task * group * row);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < c.batch * c.heads; ++i)
            combine(c, partials + (i / group * chunks * group + i % group) * row, group * row, c.out + i * c.size);
    }
    ::operator delete(partials, line);
}

template <class T>
void attend(const qvlm::Attention& c) {
    run(Call<T>{static_cast<const T*>(c.query), static_cast<const T*>(c.key), static_cast<const T*>(c.value), static_cast<T*>(c.out),
                c.batch, c.heads, c.key_heads, c.keys, c.size, c.query_batch, c.query_head, c.key_batch, c.key_head, c.key_row,
                c.value_batch, c.value_head, c.value_row, c.mask, c.scale});
}

}  // namespace

extern "C" void qvlm_attend(const qvlm::Attention* call) { call->bfloat16 ? attend<Bfloat16>(*call) : attend<float>(*call); }
