// Quantized linear layers on x86-64 CPUs, straight from the packed bytes on disk: nothing is repacked, memory holds one copy.
//
//   y[m, n] = bias[n] + r[m] * sum_g ws[n, g] * sum_{k in g} a[m, k] (w[n, k] - zp[n, g])
//
// Integers (cpu_integer.h). The weights stay unsigned (w, 0 ... 2^bits - 1) and are the unsigned operand of vpdpbusd; inputs are the signed
// one. Up to 7 bits a = q - z fits into int8. At 8 bits it does not. A single token is then multiplied as two halves of q - z. Of several
// tokens q - 128 is multiplied, and what is missing, 128 - z, comes from further rows of the same product: two halves of it for z per input
// (128 itself does not fit), a row of ones for z per token. All of this is added as int32, exactly; the only rounding is that of float(sum) *
// ws and its accumulation over groups, as in reference.py. Up to 8 tokens the sum of a group is 16 exact parts and a zero point's share, which
// meet ws and are added in float one by one: the last bits of float32 may differ.
//
// Floating-point inputs are in cpu_float.h; packed weights, outputs and threads in cpu_weight.h, with the legend.

#include "cpu_call.h"
#include "cpu_float.h"
#include "cpu_fused.h"
#include "cpu_integer.h"

namespace {

template <class T>
void linears_of(const qvlm::Call& c) {
    const qvlm::Layer* layers = reinterpret_cast<const qvlm::Layer*>(&c + 1);
    std::vector<Module> modules;
    modules.reserve(c.count);
    for (const qvlm::Layer* l = layers; l < layers + c.count; ++l) {
        const auto* scale = reinterpret_cast<const BFloat16*>(l->scale);
        modules.push_back({{l->bytes, scale, l->zero_point, l->n, c.k, c.groups, c.length, c.row_bytes, int(c.weight_bits)}, l->bias, l->y, DType(c.dtype)});
    }
    const T* x = static_cast<const T*>(c.x);
    if (Granularity(c.granularity) == kNone)
        linears_float(modules, c.input_scale, x, c.m);
    else
        linears(modules, {c.input_scale, c.input_zero_point, c.positions, int(c.activation_bits), int(c.granularity)}, x, c.m);
}

// Calls `function` with a value of the type that a dtype stands for.
template <class Function>
void typed(int64_t dtype, Function function) {
    switch (DType(dtype)) {
        case DType::kFloat: return function(0.0f);
        case DType::kBFloat16: return function(BFloat16{});
        case DType::kFloat16: return function(Float16{});
    }
}

}  // namespace

extern "C" {

// What the code was compiled for: 1 AVX-512 with VNNI and VBMI, 0 portable.
int qvlm_variant() { return QVLM_AVX512; }

// `call` is a Call with its `count` Layers behind it.
void qvlm_linears(const void* call) {
    const qvlm::Call& c = *static_cast<const qvlm::Call*>(call);
    typed(c.dtype, [&](auto zero) { linears_of<decltype(zero)>(c); });
}

// The squares of `count` values, in float32.
void qvlm_square(const void* x, float* y, int64_t count, int64_t dtype) {
    typed(dtype, [&](auto zero) { square(static_cast<const decltype(zero)*>(x), y, count); });
}

// RMSNorm of x [rows, k] from the sums of its squares; weight and y have its dtype.
void qvlm_rms_norm(const void* x, const void* weight, const float* sums, float epsilon, void* y, int64_t rows, int64_t k, int64_t dtype) {
    typed(dtype, [&](auto zero) {
        using T = decltype(zero);
        rms_norm(static_cast<const T*>(x), static_cast<const T*>(weight), sums, epsilon, static_cast<T*>(y), rows, k);
    });
}
}
