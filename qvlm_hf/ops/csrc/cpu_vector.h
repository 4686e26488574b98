// The registers of a processor class, and what the kernels do with them. The class is chosen when compiling:
//
//   QVLM_VECTOR 64  AVX-512 with VNNI and VBMI: 16 lanes of 32 bits
//   QVLM_VECTOR 32  AVX2: 8 lanes; with VNNI of that width where the processor has it (AVX-VNNI, or AVX-512 without VBMI)
//   QVLM_VECTOR 0   anything older: no registers here, and the portable code of cpu_portable.h
//
// QVLM_YMM asks for the second class on a processor that has the first.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu_number.h"

#if !defined(QVLM_YMM) && defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VNNI__) && defined(__AVX512VBMI__)
#define QVLM_VECTOR 64
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define QVLM_VECTOR 32
#else
#define QVLM_VECTOR 0
#endif
// Whether products of bfloat16 are one instruction.
#if QVLM_VECTOR == 64 && defined(__AVX512BF16__)
#define QVLM_BFLOAT 1
#else
#define QVLM_BFLOAT 0
#endif

#if QVLM_VECTOR

#include <immintrin.h>

// Sums live in registers only if every index into them is known when compiling.
#define QVLM_UNROLL _Pragma("GCC unroll 16")
#define QVLM_INLINE __attribute__((always_inline)) inline
#define QVLM_APART __attribute__((noinline))  // in a larger function GCC 12 keeps the sums in memory: three times slower

#if QVLM_VECTOR == 64
#define QVLM_OF(name) _mm512_##name
#else
#define QVLM_OF(name) _mm256_##name
#endif

namespace {

constexpr int kLanes = QVLM_VECTOR / 4;
constexpr int kBytes = QVLM_VECTOR;
typedef int32_t Ints __attribute__((vector_size(QVLM_VECTOR), may_alias));
#if QVLM_VECTOR == 64
using Floats = __m512;
using Bytes = __m512i;
#else
using Floats = __m256;
using Bytes = __m256i;
#endif

// Whether four products of bytes are added in one instruction, without saturation.
#if QVLM_VECTOR == 64 || defined(__AVXVNNI__) || (defined(__AVX512VNNI__) && defined(__AVX512VL__))
constexpr bool kVnni = true;
#else
constexpr bool kVnni = false;
#endif

QVLM_INLINE Floats splat(float value) { return QVLM_OF(set1_ps)(value); }
QVLM_INLINE Ints splat(int32_t value) { return (Ints)QVLM_OF(set1_epi32)(value); }
QVLM_INLINE Floats no_floats() { return QVLM_OF(setzero_ps)(); }
QVLM_INLINE Ints no_ints() { return Ints{}; }
QVLM_INLINE Floats as_floats(Ints values) { return QVLM_OF(cvtepi32_ps)((Bytes)values); }
QVLM_INLINE Ints as_ints(Floats values) { return (Ints)QVLM_OF(cvtps_epi32)(values); }
QVLM_INLINE Floats fused(Floats a, Floats b, Floats c) { return QVLM_OF(fmadd_ps)(a, b, c); }         // a b + c
QVLM_INLINE Floats fused_minus(Floats a, Floats b, Floats c) { return QVLM_OF(fmsub_ps)(a, b, c); }   // a b - c
QVLM_INLINE Floats minus_fused(Floats a, Floats b, Floats c) { return QVLM_OF(fnmadd_ps)(a, b, c); }  // c - a b
QVLM_INLINE Floats smaller(Floats a, Floats b) { return QVLM_OF(min_ps)(a, b); }
QVLM_INLINE Floats larger(Floats a, Floats b) { return QVLM_OF(max_ps)(a, b); }

QVLM_INLINE Floats load(const float* from) { return QVLM_OF(loadu_ps)(from); }
QVLM_INLINE Ints load(const int32_t* from) {
    Ints values;
    std::memcpy(&values, from, sizeof values);
    return values;
}
QVLM_INLINE Bytes load_bytes(const void* from) {
    Bytes values;
    std::memcpy(&values, from, sizeof values);
    return values;
}
QVLM_INLINE void store(float* to, Floats values) { QVLM_OF(storeu_ps)(to, values); }
QVLM_INLINE void store(int32_t* to, Ints values) { std::memcpy(to, &values, sizeof values); }
QVLM_INLINE void store_bytes(void* to, Bytes values) { std::memcpy(to, &values, sizeof values); }

#if QVLM_VECTOR == 64

QVLM_INLINE Floats permuted(Floats values, Ints lanes) { return _mm512_permutexvar_ps((Bytes)lanes, values); }
QVLM_INLINE float sum(Floats values) { return _mm512_reduce_add_ps(values); }
QVLM_INLINE float largest(Floats values) { return _mm512_reduce_max_ps(values); }
QVLM_INLINE int32_t sum(Ints values) { return _mm512_reduce_add_epi32((__m512i)values); }
QVLM_INLINE Floats nearest(Floats values) { return _mm512_roundscale_ps(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

// The first `count` of 16 lanes; loads of so many give 0 behind them, and stores write no more.
QVLM_INLINE __mmask16 first_of(int64_t count) { return __mmask16(count >= 16 ? 0xffff : (1u << count) - 1); }
QVLM_INLINE Ints first(Ints values, int64_t count) { return (Ints)_mm512_maskz_mov_epi32(first_of(count), (__m512i)values); }
QVLM_INLINE Floats load(const float* from, int64_t count) { return _mm512_maskz_loadu_ps(first_of(count), from); }
QVLM_INLINE Floats load(const BFloat16* from, int64_t count) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_of(count), from)), 16));
}
QVLM_INLINE Floats load(const Float16* from, int64_t count) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_of(count), from)); }
QVLM_INLINE Ints load(const int32_t* from, int64_t count) { return (Ints)_mm512_maskz_loadu_epi32(first_of(count), from); }
QVLM_INLINE Ints load(const uint8_t* from, int64_t count) { return (Ints)_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(first_of(count), from)); }
QVLM_INLINE void store(int8_t* to, Ints values, int64_t count) { _mm512_mask_cvtepi32_storeu_epi8(to, first_of(count), (__m512i)values); }

// vpdpbusd as one instruction: GCC 12 spills the accumulators around the intrinsic.
QVLM_INLINE void dot(Ints& sum, Bytes weights, Bytes inputs) { __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(weights), "v"(inputs)); }

// Likewise: adds both products of 16-bit integers in a lane.
QVLM_INLINE void dot16(Ints& sum, Bytes a, Bytes b) { __asm__("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b)); }

#if QVLM_BFLOAT
// The same of pairs of bfloat16.
QVLM_INLINE void dot_bfloats(Floats& sum, Ints a, Ints b) { __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b)); }
#endif

// rows [16][16 dwords] -> columns [16 dwords][16 rows]
inline void transpose(Bytes r[16]) {
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

#else

QVLM_INLINE Floats permuted(Floats values, Ints lanes) { return _mm256_permutevar8x32_ps(values, (Bytes)lanes); }
QVLM_INLINE float sum(Floats values) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(values), _mm256_extractf128_ps(values, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
QVLM_INLINE float largest(Floats values) {
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(values), _mm256_extractf128_ps(values, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}
QVLM_INLINE int32_t sum(Ints values) {
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128((__m256i)values), _mm256_extracti128_si256((__m256i)values, 1));
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}
QVLM_INLINE Floats nearest(Floats values) { return _mm256_round_ps(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

// The first `count` of 8 lanes; loads of so many give 0 behind them, and stores write no more.
QVLM_INLINE Ints first(Ints values, int64_t count) { return values & (Ints{0, 1, 2, 3, 4, 5, 6, 7} < splat(int32_t(std::min<int64_t>(count, 8)))); }
template <class T>
struct Eight {
    T value[8] = {};
    QVLM_INLINE Eight(const T* from, int64_t count) { std::memcpy(value, from, size_t(std::min<int64_t>(count, 8)) * sizeof(T)); }
};
QVLM_INLINE Floats load_all(const float* from) { return load(from); }
QVLM_INLINE Floats load_all(const BFloat16* from) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))), 16));
}
QVLM_INLINE Floats load_all(const Float16* from) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))); }
QVLM_INLINE Ints load_all(const int32_t* from) { return load(from); }
QVLM_INLINE Ints load_all(const uint8_t* from) { return (Ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))); }
template <class T>
QVLM_INLINE auto load(const T* from, int64_t count) {
    return __builtin_expect(count >= 8, 1) ? load_all(from) : load_all(Eight<T>(from, count).value);
}
QVLM_INLINE void store(int8_t* to, Ints values, int64_t count) {
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128((__m256i)values), _mm256_extracti128_si256((__m256i)values, 1));
    const int64_t bytes = _mm_cvtsi128_si64(_mm_packs_epi16(words, words));
    std::memcpy(to, &bytes, size_t(std::min<int64_t>(count, 8)));
}
QVLM_INLINE void store(int16_t* to, Ints values, int64_t count) {
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128((__m256i)values), _mm256_extracti128_si256((__m256i)values, 1));
    std::memcpy(to, &words, size_t(std::min<int64_t>(count, 8)) * 2);
}

// Adds products of unsigned and signed bytes, four to a lane. Without VNNI two of them are added in 16 bits first, which holds weights of up
// to 7 bits; those of 8 are multiplied as 16-bit integers (`dot16`).
#if defined(__AVXVNNI__)
QVLM_INLINE void dot(Ints& sum, Bytes weights, Bytes inputs) { __asm__("{vex} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(weights), "x"(inputs)); }
#elif defined(__AVX512VNNI__) && defined(__AVX512VL__)
QVLM_INLINE void dot(Ints& sum, Bytes weights, Bytes inputs) { __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(weights), "v"(inputs)); }
#else
QVLM_INLINE void dot(Ints& sum, Bytes weights, Bytes inputs) {
    sum += (Ints)_mm256_madd_epi16(_mm256_maddubs_epi16(weights, inputs), _mm256_set1_epi16(1));
}
#endif
QVLM_INLINE void dot16(Ints& sum, Bytes weights, Bytes inputs) { sum += (Ints)_mm256_madd_epi16(weights, inputs); }

// rows [8][8 dwords] -> columns [8 dwords][8 rows]
inline void transpose(Bytes r[8]) {
    __m256i t[8];
    for (int i = 0; i < 4; ++i) {
        t[2 * i] = _mm256_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm256_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 2; ++i) {
        r[4 * i] = _mm256_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm256_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm256_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm256_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm256_permute2x128_si256(r[i], r[i + 4], 0x20);
        t[i + 4] = _mm256_permute2x128_si256(r[i], r[i + 4], 0x31);
    }
    for (int i = 0; i < 8; ++i) r[i] = t[i];
}

#endif

}  // namespace

#endif  // QVLM_VECTOR
