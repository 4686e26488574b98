// `qvlm_hf::linears_cpu`, `rms_norm_cpu` and `rotary_cpu`: the usual call of the CPU kernels without any Python, through PyTorch's stable
// interface for libraries.
//
// Usual is what decoding does: contiguous tensors, float32, bfloat16 or float16, no transform. Everything else gets an empty list, and the
// caller goes the long way (`qvlm_hf::linears`, or PyTorch's operators), which takes all and has the words for what is wrong. The kernels
// come as pointers, after their check; before that every call gets an empty list.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "cpu_call.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void (*kernels)(const void*) = nullptr;
void (*square)(const void*, float*, int64_t, int64_t) = nullptr;
void (*norm)(const void*, const void*, const float*, float, void*, int64_t, int64_t, int64_t) = nullptr;
void (*turn)(const void*, const void*, const void*, void*, int64_t, int64_t, int64_t, int64_t, int64_t) = nullptr;

bool is(const Tensor& tensor, ScalarType dtype, int64_t rows, int64_t columns) {
    return tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns && tensor.scalar_type() == dtype && tensor.is_contiguous();
}

bool is(const Tensor& tensor, ScalarType dtype, int64_t length) {
    return tensor.dim() == 1 && tensor.size(0) == length && tensor.scalar_type() == dtype && tensor.is_contiguous();
}

// A dtype as the kernels know it, -1 for others.
int64_t known(ScalarType dtype) {
    return dtype == ScalarType::Float ? 0 : dtype == ScalarType::BFloat16 ? 1 : dtype == ScalarType::Half ? 2 : -1;
}

// As in schema.py and cpu.py: numbers that exist, groups that begin at a byte, and no sum of integers over one that leaves int32.
bool fits(int64_t k, int64_t weight_bits, int64_t activation_bits, int64_t length, bool integers) {
    if (weight_bits < 2 || weight_bits > 8 || length < 1 || length > k) return false;
    if (integers ? activation_bits < 3 || activation_bits > 8 : activation_bits != 16) return false;
    const int64_t largest = ((int64_t(1) << weight_bits) - 1) * ((int64_t(1) << activation_bits) - 1);
    return (length == k || length * weight_bits % 8 == 0) && (!integers || length * largest < int64_t(1) << 30);
}

// An uninitialised [..., columns] of the dtype of x, or of another. Asked for directly: through the dispatcher a call spends microseconds on its name.
Tensor output(const Tensor& x, int64_t columns, std::optional<int32_t> other = std::nullopt) {
    const auto like = x.sizes();
    std::vector<int64_t> sizes(like.begin(), like.end()), strides(like.size(), 1);
    sizes.back() = columns;
    for (size_t i = sizes.size() - 1; i > 0; --i) strides[i - 1] = strides[i] * std::max<int64_t>(sizes[i], 1);
    int32_t dtype = other.value_or(0);
    AtenTensorHandle handle;
    if (!other) STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(), dtype, aoti_torch_device_type_cpu(), -1, &handle));
    return Tensor(handle);
}

std::vector<Tensor> linears(Tensor x, std::vector<Tensor> weight, std::vector<Tensor> weight_scale, std::vector<Tensor> weight_zero_point,
                            std::optional<Tensor> input_scale, std::optional<Tensor> input_zero_point, std::vector<Tensor> bias, int64_t in_features,
                            int64_t weight_bits, int64_t activation_bits, int64_t group_length, std::string granularity, int64_t hadamard) {
    const ScalarType dtype = x.scalar_type();
    const size_t count = weight.size();
    const std::array<std::string_view, 4> names{"channel", "token", "dynamic_token", "none"};
    const int64_t kind = std::find(names.begin(), names.end(), granularity) - names.begin();
    const bool token = kind == 1, floating = kind == 3;
    if (!kernels || !count || weight_scale.size() != count || (!weight_zero_point.empty() && weight_zero_point.size() != count) ||
        (!bias.empty() && bias.size() != count) || hadamard || kind == 4)
        return {};
    const int64_t number = known(dtype);
    if (number < 0 || x.dim() < (token ? 2 : 1) || x.size(x.dim() - 1) != in_features ||
        !x.numel() || !x.is_contiguous() || !fits(in_features, weight_bits, activation_bits, group_length, !floating))
        return {};
    const int64_t positions = token ? x.size(x.dim() - 2) : 0;
    const bool scaled = kind <= 1 || (floating && input_scale), shifted = kind <= 1;
    const int64_t length = token ? positions : in_features;
    if ((scaled && !(input_scale && is(*input_scale, ScalarType::Float, length))) ||
        (shifted && !(input_zero_point && is(*input_zero_point, ScalarType::Int, length))))
        return {};
    const int64_t words = (in_features * weight_bits + 31) / 32, groups = (in_features + group_length - 1) / group_length;
    for (size_t i = 0; i < count; ++i) {
        const int64_t rows = weight[i].dim() ? weight[i].size(0) : 0;
        if (!is(weight[i], ScalarType::Int, rows, words) || !is(weight_scale[i], ScalarType::BFloat16, rows, groups) ||
            (!weight_zero_point.empty() && !is(weight_zero_point[i], ScalarType::Byte, rows, groups)) || (!bias.empty() && !is(bias[i], dtype, rows)))
            return {};
    }

    std::vector<Tensor> outputs;
    std::vector<char> memory(sizeof(qvlm::Call) + count * sizeof(qvlm::Layer));
    const qvlm::Call call{
        x.data_ptr(),
        scaled ? static_cast<const float*>(input_scale->data_ptr()) : nullptr,
        shifted ? static_cast<const int32_t*>(input_zero_point->data_ptr()) : nullptr,
        number, x.numel() / in_features, in_features, groups, group_length, words * 4, weight_bits, activation_bits,
        kind, positions, int64_t(count)};
    std::memcpy(memory.data(), &call, sizeof call);
    for (size_t i = 0; i < count; ++i) {
        outputs.push_back(output(x, weight[i].size(0)));
        const qvlm::Layer layer{
            bias.empty() ? nullptr : bias[i].data_ptr(), outputs[i].data_ptr(), static_cast<const uint8_t*>(weight[i].data_ptr()),
            static_cast<const uint16_t*>(weight_scale[i].data_ptr()),
            weight_zero_point.empty() ? nullptr : static_cast<const uint8_t*>(weight_zero_point[i].data_ptr()), weight[i].size(0)};
        std::memcpy(memory.data() + sizeof call + i * sizeof layer, &layer, sizeof layer);
    }
    kernels(memory.data());
    return outputs;
}

bool plain(const Tensor& x) { return known(x.scalar_type()) >= 0 && x.numel() && x.is_contiguous(); }

// The squares are summed by PyTorch: a sum in another order would change the last bit of a norm, and with it now and then a level of an input.
std::vector<Tensor> rms_norm(Tensor x, Tensor weight, double epsilon) {
    if (!norm || !x.dim() || !plain(x) || !is(weight, x.scalar_type(), x.size(x.dim() - 1))) return {};
    const int64_t k = weight.size(0), rows = x.numel() / k, dtype = known(x.scalar_type()), last = -1;
    const Tensor squares = output(x, k, aoti_torch_dtype_float32());
    square(x.data_ptr(), static_cast<float*>(squares.data_ptr()), rows * k, dtype);
    const Tensor sums = torch::stable::sum(squares, torch::headeronly::IntHeaderOnlyArrayRef(&last, 1), true);
    const Tensor y = output(x, k);
    norm(x.data_ptr(), weight.data_ptr(), static_cast<const float*>(sums.data_ptr()), float(epsilon), y.data_ptr(), rows, k, dtype);
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
        turned.push_back(output(t, t.size(3)));
        turn(t.data_ptr(), cos.data_ptr(), sin.data_ptr(), turned.back().data_ptr(), t.size(0) * t.size(1), cos.size(0) * cos.size(1), t.size(2),
             t.size(3), known(dtype));
    }
    return turned;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qvlm_hf, CPU, library) {
    library.impl("linears_cpu", TORCH_BOX(&linears));
    library.impl("rms_norm_cpu", TORCH_BOX(&rms_norm));
    library.impl("rotary_cpu", TORCH_BOX(&rotary));
}

// The kernels' entries: `qvlm_linears`, `qvlm_square`, `qvlm_rms_norm`, `qvlm_rotary`.
extern "C" void qvlm_use(decltype(kernels) linears_entry, decltype(square) square_entry, decltype(norm) norm_entry, decltype(turn) rotary_entry) {
    kernels = linears_entry, square = square_entry, norm = norm_entry, turn = rotary_entry;
}
