// `qvlm_hf::linears_cpu`, `rms_norm_cpu` and `rotary_cpu`: the usual call of the CPU kernels without any Python, through PyTorch's stable interface for
// libraries.
//
// Usual is what decoding does: contiguous tensors, float32 or bfloat16, quantized inputs, no transform. Everything else gets an empty list,
// and the caller goes the long way (`qvlm_hf::linears`, or PyTorch's operators), which takes all and has the words for what is wrong. The
// kernels come as pointers, after their check; before that every call gets an empty list.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "cpu_call.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void (*kernels)(const void*) = nullptr;
void (*norm)(const void*, const void*, float, void*, int64_t, int64_t, int64_t) = nullptr;
void (*turn)(const void*, const void*, const void*, void*, int64_t, int64_t, int64_t, int64_t, int64_t) = nullptr;

bool is(const Tensor& tensor, ScalarType dtype, int64_t rows, int64_t columns) {
    return tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns && tensor.scalar_type() == dtype && tensor.is_contiguous();
}

bool is(const Tensor& tensor, ScalarType dtype, int64_t length) {
    return tensor.dim() == 1 && tensor.size(0) == length && tensor.scalar_type() == dtype && tensor.is_contiguous();
}

// As in cpu.py: groups begin at a byte, and no sum over one leaves int32.
bool fits(int64_t k, int64_t weight_bits, int64_t activation_bits, int64_t length) {
    const int64_t largest = ((int64_t(1) << weight_bits) - 1) * ((int64_t(1) << activation_bits) - 1);
    return length > 0 && (length >= k || length * weight_bits % 8 == 0) && length * largest < int64_t(1) << 30;
}

std::vector<Tensor> linears(Tensor x, std::vector<Tensor> weight, std::vector<Tensor> weight_scale, std::vector<Tensor> weight_zero_point,
                            std::optional<Tensor> input_scale, std::optional<Tensor> input_zero_point, std::vector<Tensor> bias, int64_t in_features,
                            int64_t weight_bits, int64_t activation_bits, int64_t group_length, std::string granularity, int64_t hadamard) {
    const ScalarType dtype = x.scalar_type();
    const size_t count = weight.size();
    const bool channel = granularity == "channel", token = granularity == "token";
    if (!kernels || !count || weight_scale.size() != count || (!weight_zero_point.empty() && weight_zero_point.size() != count) ||
        (!bias.empty() && bias.size() != count) || hadamard || activation_bits > 8 || !(channel || token || granularity == "dynamic_token"))
        return {};
    if ((dtype != ScalarType::Float && dtype != ScalarType::BFloat16) || x.dim() < (token ? 2 : 1) || x.size(x.dim() - 1) != in_features ||
        !x.numel() || !x.is_contiguous() || !fits(in_features, weight_bits, activation_bits, group_length))
        return {};
    const int64_t positions = token ? x.size(x.dim() - 2) : 0;
    if (channel || token) {
        const int64_t length = channel ? in_features : positions;
        if (!input_scale || !input_zero_point || !is(*input_scale, ScalarType::Float, length) || !is(*input_zero_point, ScalarType::Int, length))
            return {};
    }
    const int64_t words = (in_features * weight_bits + 31) / 32, groups = (in_features + group_length - 1) / group_length;
    for (size_t i = 0; i < count; ++i) {
        const int64_t rows = weight[i].dim() ? weight[i].size(0) : 0;
        if (!is(weight[i], ScalarType::Int, rows, words) || !is(weight_scale[i], ScalarType::BFloat16, rows, groups) ||
            (!weight_zero_point.empty() && !is(weight_zero_point[i], ScalarType::Byte, rows, groups)) || (!bias.empty() && !is(bias[i], dtype, rows)))
            return {};
    }

    std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
    std::vector<Tensor> outputs;
    std::vector<char> memory(sizeof(qvlm::Call) + count * sizeof(qvlm::Layer));
    const bool ranges = channel || token;
    const qvlm::Call call{
        x.data_ptr(),
        ranges ? static_cast<const float*>(input_scale->data_ptr()) : nullptr,
        ranges ? static_cast<const int32_t*>(input_zero_point->data_ptr()) : nullptr,
        dtype == ScalarType::BFloat16, x.numel() / in_features, in_features, groups, group_length, words * 4, weight_bits, activation_bits,
        channel ? 0 : token ? 1 : 2, positions, int64_t(count)};
    std::memcpy(memory.data(), &call, sizeof call);
    for (size_t i = 0; i < count; ++i) {
        shape.back() = weight[i].size(0);
        outputs.push_back(torch::stable::new_empty(x, {shape.data(), shape.size()}));
        const qvlm::Layer layer{
            bias.empty() ? nullptr : bias[i].data_ptr(), outputs[i].data_ptr(), static_cast<const uint8_t*>(weight[i].data_ptr()),
            static_cast<const uint16_t*>(weight_scale[i].data_ptr()),
            weight_zero_point.empty() ? nullptr : static_cast<const uint8_t*>(weight_zero_point[i].data_ptr()), shape.back()};
        std::memcpy(memory.data() + sizeof call + i * sizeof layer, &layer, sizeof layer);
    }
    kernels(memory.data());
    return outputs;
}

bool plain(const Tensor& x) {
    return (x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::BFloat16) && x.numel() && x.is_contiguous();
}

std::vector<Tensor> rms_norm(Tensor x, Tensor weight, double epsilon) {
    if (!norm || !x.dim() || !plain(x) || !is(weight, x.scalar_type(), x.size(x.dim() - 1))) return {};
    const Tensor y = torch::stable::new_empty(x, x.sizes());
    const int64_t k = weight.size(0);
    norm(x.data_ptr(), weight.data_ptr(), float(epsilon), y.data_ptr(), x.numel() / k, k, x.scalar_type() == ScalarType::BFloat16);
    return {y};
}

std::vector<Tensor> rotary(std::vector<Tensor> x, Tensor cos, Tensor sin) {
    const ScalarType dtype = cos.scalar_type();
    const auto angles = [&](const Tensor& t) {
        return plain(t) && t.dim() == 3 && t.scalar_type() == dtype && t.size(0) == cos.size(0) && t.size(1) == cos.size(1) && t.size(2) == cos.size(2);
    };
    if (!turn || !angles(cos) || !angles(sin) || cos.size(2) % 2) return {};
    for (const Tensor& t : x)
        if (!plain(t) || t.dim() != 4 || t.scalar_type() != dtype || t.size(1) != cos.size(1) || t.size(3) != cos.size(2) ||
            (cos.size(0) != 1 && cos.size(0) != t.size(0)))
            return {};
    std::vector<Tensor> turned;
    for (const Tensor& t : x) {
        turned.push_back(torch::stable::new_empty(t, t.sizes()));
        turn(t.data_ptr(), cos.data_ptr(), sin.data_ptr(), turned.back().data_ptr(), t.size(0) * t.size(1), cos.size(0) * cos.size(1), t.size(2),
             t.size(3), dtype == ScalarType::BFloat16);
    }
    return turned;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qvlm_hf, CPU, library) {
    library.impl("linears_cpu", TORCH_BOX(&linears));
    library.impl("rms_norm_cpu", TORCH_BOX(&rms_norm));
    library.impl("rotary_cpu", TORCH_BOX(&rotary));
}

// The kernels' entries: `qvlm_linears`, `qvlm_rms_norm`, `qvlm_rotary`.
extern "C" void qvlm_use(decltype(kernels) linears_entry, decltype(norm) norm_entry, decltype(turn) rotary_entry) {
    kernels = linears_entry, norm = norm_entry, turn = rotary_entry;
}
