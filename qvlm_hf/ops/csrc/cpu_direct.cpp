// `linears`, `rms_norm` and `decode_attention` of the CPU kernels as functions of Python that go straight to them.
//
// They take what decoding does: contiguous tensors, float32, bfloat16 or float16, no gradient, nobody who follows single
// operators. For everything else they return None, and the caller goes the long way (`qvlm_hf::linears`, or PyTorch's operators), which
// takes all and has the words for what is wrong. The kernels come as addresses, after their check; before that every call gets None.
//
// Why not an operator: between two matrices that do not fit into the caches, all code has left them too, and an operator's way through
// PyTorch's dispatcher takes 0.1 ms, a tenth of a matrix of 11008 x 4096.

#include <Python.h>

#include <ATen/EmptyTensor.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/UnsafeFromTH.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/sum_cpu_dispatch.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <c10/util/ThreadLocalDebugInfo.h>

#include <cstring>
#include <exception>
#include <utility>
#include <vector>

#include "attention_call.h"
#include "cpu_call.h"

// As torch/csrc/autograd/python_variable.h has it, which takes six times as long to compile as all of this file.
PyObject* THPVariable_Wrap(const at::TensorBase&);

namespace {

using at::ScalarType;
using at::Tensor;

void (*kernels)(const void*) = nullptr;
void (*square)(const void*, float*, int64_t, int64_t) = nullptr;
void (*norm)(const void*, const void*, const float*, float, void*, int64_t, int64_t, int64_t) = nullptr;
void (*attend)(const qvlm::Attention*) = nullptr;
void (*on_trial)(const qvlm::Attention*) = nullptr;  // the same before its check
int64_t most_floats = 0;  // tokens of floating-point inputs, beyond which portable kernels are not the fastest way

PyObject* tensor_classes[2] = {};    // torch.Tensor and Parameter
const PyGetSetDef* cdata = nullptr;  // their attribute of that name: where the TensorImpl lies

// Thrown where a call is none that the kernels take.
struct Unusual : std::exception {};

void require(bool condition) {
    if (!condition) throw Unusual{};
}

// Keys of an ordinary tensor in the CPU's memory: anything else, from a batch of torch.func to a conjugate, brings a key of its own.
uint64_t ordinary_keys() {
    static const uint64_t keys = [] {
        const c10::InferenceMode off(false);  // whose tensors have fewer
        return at::detail::empty_cpu({1}, at::kFloat).key_set().raw_repr();
    }();
    return keys;
}

// Whether a gradient is recorded, or a mode, a tracer or a transformation follows single operators.
bool watched() {
    const auto included = c10::impl::tls_local_dispatch_key_set().included_.raw_repr();
    return at::GradMode::is_enabled() || c10::impl::TorchDispatchModeTLS::any_modes_set() || at::impl::torch_function_mode_enabled() ||
           (included & ~c10::default_included_set.raw_repr());
}

void* address(PyObject* object) {
    PyObject* number = cdata->get(object, cdata->closure);
    require(number);
    void* found = PyLong_AsVoidPtr(number);
    Py_DECREF(number);
    return found;
}

// An ordinary tensor, kept by Python's count of references: raising PyTorch's takes longer. By default undefined.
class Given : public Tensor {
    PyObject* object_ = nullptr;
    Given(PyObject* object, void* where) : Tensor(at::unsafeTensorFromTH(where, false)), object_(Py_NewRef(object)) {}
    static void* checked(PyObject* object) {
        const auto type = reinterpret_cast<PyObject*>(Py_TYPE(object));
        require(type == tensor_classes[0] || type == tensor_classes[1]);
        return address(object);
    }

public:
    Given() = default;
    explicit Given(PyObject* object) : Given(object, checked(object)) {
        require(!(key_set().raw_repr() & ~ordinary_keys()) && !_fw_grad(0).defined());
    }
    Given(Given&& other) noexcept : Tensor(std::move(other)), object_(std::exchange(other.object_, nullptr)) {}
    ~Given() {
        unsafeReleaseTensorImpl();
        Py_XDECREF(object_);
    }
};

Given maybe(PyObject* object) { return object == Py_None ? Given() : Given(object); }

// Held, because the list may change while other threads run.
std::vector<Given> listed(PyObject* object) {
    require(PyList_CheckExact(object));
    std::vector<Given> found;
    found.reserve(PyList_GET_SIZE(object));
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(object); ++i) found.emplace_back(PyList_GET_ITEM(object, i));
    return found;
}

int64_t integer(PyObject* object) {
    require(PyLong_CheckExact(object));
    int overflow = 0;
    const int64_t value = PyLong_AsLongLongAndOverflow(object, &overflow);
    require(!overflow);
    return value;
}

// 0 ... 4, the numbers of cpu.py.
int64_t kind_of(PyObject* granularity) {
    require(PyUnicode_CheckExact(granularity));
    const char* names[] = {"channel", "token", "dynamic_token", "none", "dynamic_group"};
    for (int64_t i = 0; i < 5; ++i)
        if (!PyUnicode_CompareWithASCIIString(granularity, names[i])) return i;
    throw Unusual{};
}

bool is(const Tensor& t, ScalarType dtype, int64_t rows, int64_t columns) {
    return t.dim() == 2 && t.size(0) == rows && t.size(1) == columns && t.scalar_type() == dtype && t.is_contiguous();
}

bool is(const Tensor& t, ScalarType dtype, int64_t length) {
    return t.dim() == 1 && t.size(0) == length && t.scalar_type() == dtype && t.is_contiguous();
}

// A dtype as the kernels know it, -1 for others.
int64_t known(ScalarType dtype) {
    return dtype == ScalarType::Float ? 0 : dtype == ScalarType::BFloat16 ? 1 : dtype == ScalarType::Half ? 2 : -1;
}

bool plain(const Tensor& x) { return known(x.scalar_type()) >= 0 && x.dim() && x.numel() && x.is_contiguous(); }

// As in call.py and cpu.py: numbers that exist, groups that begin at a byte, and no sum of integers over one that leaves int32.
bool fits(int64_t k, int64_t weight_bits, int64_t activation_bits, int64_t length, bool integers) {
    if (weight_bits < 2 || weight_bits > 8 || length < 1 || length > k) return false;
    if (integers ? activation_bits < 3 || activation_bits > 8 : activation_bits != 16) return false;
    const int64_t largest = ((int64_t(1) << weight_bits) - 1) * ((int64_t(1) << activation_bits) - 1);
    return (length == k || length * weight_bits % 8 == 0) && (!integers || length * largest < int64_t(1) << 30);
}

// An uninitialised [..., columns].
Tensor output(const Tensor& x, int64_t columns, ScalarType dtype) {
    c10::DimVector sizes(x.sizes());
    sizes.back() = columns;
    return Tensor(at::detail::empty_cpu(sizes, dtype));
}

// While it lives, other threads run Python.
struct WithoutPython {
    PyThreadState* state = PyEval_SaveThread();
    ~WithoutPython() { PyEval_RestoreThread(state); }
};

// An event of the profiler, where one runs: by Python, because ATen/record_function.h would double what this file takes to compile.
struct Event {
    PyObject* event = nullptr;
    explicit Event(const char* name) {
        if (!c10::ThreadLocalDebugInfo::get(c10::DebugInfoKind::PROFILER_STATE)) return;
        if (PyObject* profiler = PyImport_ImportModule("torch._C._profiler")) {
            event = PyObject_CallMethod(profiler, "_RecordFunctionFast", "s", name);
            Py_DECREF(profiler);
        }
        ignore(event ? PyObject_CallMethod(event, "__enter__", nullptr) : nullptr);
    }
    ~Event() {
        if (!event) return;
        ignore(PyObject_CallMethod(event, "__exit__", "OOO", Py_None, Py_None, Py_None));
        Py_DECREF(event);
    }
    static void ignore(PyObject* result) {
        Py_XDECREF(result);
        PyErr_Clear();
    }
};

PyObject* wrapped(const std::vector<Tensor>& tensors) {
    PyObject* list = PyList_New(Py_ssize_t(tensors.size()));
    for (size_t i = 0; list && i < tensors.size(); ++i) {
        PyObject* one = THPVariable_Wrap(tensors[i]);
        if (!one) Py_CLEAR(list);
        if (list) PyList_SET_ITEM(list, i, one);
    }
    return list;
}

PyObject* linears(PyObject* const* arguments) {
    const auto run = kernels;  // other threads may change it
    require(run);
    const Given x(arguments[0]);
    const std::vector<Given> weight = listed(arguments[1]), weight_scale = listed(arguments[2]), weight_zero_point = listed(arguments[3]);
    const Given input_scale = maybe(arguments[4]), input_zero_point = maybe(arguments[5]);
    const std::vector<Given> bias = listed(arguments[6]);
    const int64_t in_features = integer(arguments[7]), weight_bits = integer(arguments[8]), activation_bits = integer(arguments[9]);
    const int64_t group_length = integer(arguments[10]), kind = kind_of(arguments[11]), hadamard = integer(arguments[12]);

    const ScalarType dtype = x.scalar_type();
    const size_t count = weight.size();
    const bool token = kind == 1, floating = kind == 3;
    require(count && weight_scale.size() == count && (weight_zero_point.empty() || weight_zero_point.size() == count) &&
            (bias.empty() || bias.size() == count));
    require(!hadamard || (hadamard > 1 && hadamard <= 4096 && !(hadamard & (hadamard - 1)) && in_features % hadamard == 0));
    require(plain(x) && x.dim() >= (token ? 2 : 1) && x.size(-1) == in_features &&
            fits(in_features, weight_bits, activation_bits, group_length, !floating));
    require(!floating || x.numel() / in_features <= most_floats);
    const int64_t positions = token ? x.size(-2) : 0;
    const bool scaled = kind <= 1 || (floating && input_scale.defined()), shifted = kind <= 1;
    const int64_t length = token ? positions : in_features;
    require(!scaled || (input_scale.defined() && is(input_scale, ScalarType::Float, length)));
    require(!shifted || (input_zero_point.defined() && is(input_zero_point, ScalarType::Int, length)));
    const int64_t words = (in_features * weight_bits + 31) / 32, groups = (in_features + group_length - 1) / group_length;
    for (size_t i = 0; i < count; ++i) {
        const int64_t rows = weight[i].dim() ? weight[i].size(0) : 0;
        require(is(weight[i], ScalarType::Int, rows, words) && is(weight_scale[i], ScalarType::BFloat16, rows, groups));
        require(weight_zero_point.empty() || is(weight_zero_point[i], ScalarType::Byte, rows, groups));
        require(bias.empty() || is(bias[i], dtype, rows));
    }

    std::vector<Tensor> outputs;
    outputs.reserve(count);
    std::vector<char> memory(sizeof(qvlm::Call) + count * sizeof(qvlm::Layer));
    const qvlm::Call call{
        x.const_data_ptr(),
        scaled ? static_cast<const float*>(input_scale.const_data_ptr()) : nullptr,
        shifted ? static_cast<const int32_t*>(input_zero_point.const_data_ptr()) : nullptr,
        known(dtype), x.numel() / in_features, in_features, groups, group_length, words * 4, weight_bits, activation_bits,
        kind, positions, hadamard, int64_t(count)};
    std::memcpy(memory.data(), &call, sizeof call);
    for (size_t i = 0; i < count; ++i) {
        outputs.push_back(output(x, weight[i].size(0), dtype));
        const qvlm::Layer layer{
            bias.empty() ? nullptr : bias[i].const_data_ptr(), outputs[i].mutable_data_ptr(), static_cast<const uint8_t*>(weight[i].const_data_ptr()),
            static_cast<const uint16_t*>(weight_scale[i].const_data_ptr()),
            weight_zero_point.empty() ? nullptr : static_cast<const uint8_t*>(weight_zero_point[i].const_data_ptr()), weight[i].size(0)};
        std::memcpy(memory.data() + sizeof call + i * sizeof layer, &layer, sizeof layer);
    }
    {
        const Event event("qvlm_hf::linears");
        const WithoutPython others_run;
        run(memory.data());
    }
    return wrapped(outputs);
}

// The squares are summed by PyTorch: a sum in another order would change the last bit of a norm, and with it now and then a level of an input.
PyObject* rms_norm(PyObject* const* arguments) {
    const auto squared = square;
    const auto run = norm;
    require(squared && run && PyFloat_CheckExact(arguments[2]));
    const Given x(arguments[0]), weight(arguments[1]);
    require(plain(x) && is(weight, x.scalar_type(), x.size(-1)));
    const int64_t k = weight.size(0), rows = x.numel() / k, dtype = known(x.scalar_type());
    const float epsilon = float(PyFloat_AS_DOUBLE(arguments[2]));
    Tensor y;
    {
        const Event event("qvlm_hf::rms_norm");
        const WithoutPython others_run;
        const Tensor squares = output(x, k, ScalarType::Float);
        squared(x.const_data_ptr(), squares.mutable_data_ptr<float>(), rows * k, dtype);
        const Tensor sums = at::cpu::sum(squares, {-1}, true);
        y = output(x, k, x.scalar_type());
        run(x.const_data_ptr(), weight.const_data_ptr(), sums.const_data_ptr<float>(), epsilon, y.mutable_data_ptr(), rows, k, dtype);
    }
    return THPVariable_Wrap(y);
}

bool is(const Tensor& t, int64_t batch, int64_t heads, int64_t rows, int64_t size) {
    return t.dim() == 4 && t.size(0) == batch && t.size(1) == heads && t.size(2) == rows && t.size(3) == size;
}

// A mask [batch or 1, heads or 1, 1, keys].
qvlm::Mask mask_of(const Tensor& t, int64_t batch, int64_t heads, int64_t keys) {
    if (!t.defined()) return {};
    const ScalarType dtype = t.scalar_type();
    require(dtype == ScalarType::Bool || dtype == ScalarType::Float || dtype == ScalarType::BFloat16);
    require(t.dim() == 4);
    const int64_t batches = t.size(0), rows = t.size(1);
    require((batches == 1 || batches == batch) && (rows == 1 || rows == heads) && t.size(2) == 1 && t.size(3) == keys);
    return {t.const_data_ptr(), dtype == ScalarType::Bool ? qvlm::Mask::kBool : dtype == ScalarType::Float ? qvlm::Mask::kFloat : qvlm::Mask::kBfloat16,
            batches == 1 ? 0 : t.stride(0), rows == 1 ? 0 : t.stride(1), t.stride(3)};
}

template <void (**entry)(const qvlm::Attention*)>
PyObject* decode_attention(PyObject* const* arguments) {
    const auto run = *entry;
    require(run && PyFloat_CheckExact(arguments[4]));
    const Given query(arguments[0]), key(arguments[1]), value(arguments[2]);
    const ScalarType dtype = query.scalar_type();
    require((dtype == ScalarType::Float || dtype == ScalarType::BFloat16) && key.scalar_type() == dtype && value.scalar_type() == dtype);
    require(query.dim() == 4 && key.dim() == 4);
    const int64_t batch = query.size(0), heads = query.size(1), size = query.size(3), key_heads = key.size(1), keys = key.size(2);
    require(batch && heads && key_heads && heads % key_heads == 0 && keys && size >= qvlm::kSmallestHead && size <= qvlm::kLargestHead);
    require(is(query, batch, heads, 1, size) && is(key, batch, key_heads, keys, size) && is(value, batch, key_heads, keys, size));
    require(query.stride(3) == 1 && key.stride(3) == 1 && value.stride(3) == 1);
    const Given closed = maybe(arguments[3]);
    const qvlm::Mask mask = mask_of(closed, batch, heads, keys);
    const Tensor out = Tensor(at::detail::empty_cpu({batch, 1, heads, size}, dtype));
    const qvlm::Attention call{
        query.const_data_ptr(), key.const_data_ptr(), value.const_data_ptr(), out.mutable_data_ptr(), dtype == ScalarType::BFloat16, batch, heads, key_heads, keys, size,
        query.stride(0), query.stride(1), key.stride(0), key.stride(1), key.stride(2), value.stride(0), value.stride(1), value.stride(2), mask,
        float(PyFloat_AS_DOUBLE(arguments[4]))};
    {
        const Event event("qvlm_hf::decode_attention");
        const WithoutPython others_run;
        run(&call);
    }
    return THPVariable_Wrap(out);
}

// A function of Python: `compute` if there are COUNT arguments of the usual kinds, else None. What else is thrown, such as a lack of memory,
// the long way will meet again.
template <PyObject* (*compute)(PyObject* const*), Py_ssize_t COUNT>
PyObject* called(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
    try {
        if (count == COUNT && !watched()) return compute(arguments);
    } catch (const std::exception&) {
        PyErr_Clear();
    }
    Py_RETURN_NONE;
}

// use(name, value): where a kernel begins, or 0 to take no more calls for it; "most_floats": tokens.
PyObject* use(PyObject*, PyObject* arguments) {
    const char* name = nullptr;
    long long value = 0;
    if (!PyArg_ParseTuple(arguments, "sL", &name, &value)) return nullptr;
    const std::pair<const char*, void*> entries[] = {
        {"linears", &kernels}, {"square", &square}, {"rms_norm", &norm}, {"most_floats", &most_floats},
        {"decode_attention", &attend}, {"trial_attention", &on_trial}};
    for (const auto& [known, entry] : entries)
        if (!std::strcmp(name, known)) {
            std::memcpy(entry, &value, sizeof value);
            Py_RETURN_NONE;
        }
    return PyErr_Format(PyExc_KeyError, "%s", name);
}

template <class Function>
PyMethodDef method(const char* name, Function function, int flags) {
    return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(function)), flags, nullptr};
}

PyMethodDef methods[] = {
    method("linears", called<linears, 13>, METH_FASTCALL), method("rms_norm", called<rms_norm, 3>, METH_FASTCALL),
    method("decode_attention", called<decode_attention<&attend>, 5>, METH_FASTCALL),
    method("trial_attention", called<decode_attention<&on_trial>, 5>, METH_FASTCALL), method("use", use, METH_VARARGS), {nullptr, nullptr, 0, nullptr}};
PyModuleDef definition{PyModuleDef_HEAD_INIT, "cpu_direct", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

// Finds what `Given` looks at, and tries it on a tensor whose address is known.
bool knows_tensors() {
    PyObject *torch = PyImport_ImportModule("torch"), *nn = PyImport_ImportModule("torch.nn");
    if (!torch || !nn) return false;
    tensor_classes[0] = PyObject_GetAttrString(torch, "Tensor");
    tensor_classes[1] = PyObject_GetAttrString(nn, "Parameter");
    PyObject* attribute = tensor_classes[0] ? PyObject_GetAttrString(tensor_classes[0], "_cdata") : nullptr;
    if (!attribute || !Py_IS_TYPE(attribute, &PyGetSetDescr_Type)) return false;
    cdata = reinterpret_cast<PyGetSetDescrObject*>(attribute)->d_getset;
    const Tensor one(at::detail::empty_cpu({1}, at::kFloat));
    PyObject* object = THPVariable_Wrap(one);
    return object && address(object) == one.unsafeGetTensorImpl();
}

}  // namespace

PyMODINIT_FUNC PyInit_cpu_direct() {
    try {
        if (knows_tensors()) return PyModule_Create(&definition);
    } catch (const std::exception&) {
    }
    return PyErr_Format(PyExc_ImportError, "torch.Tensor._cdata is no longer where a tensor lies");
}
