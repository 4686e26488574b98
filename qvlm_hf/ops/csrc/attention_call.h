// What attention.cpp is told; cpu_direct.cpp writes it.
#pragma once

#include <cstdint>

namespace qvlm {

constexpr int64_t kSmallestHead = 32, kLargestHead = 256;

struct Mask {
    const void* data;  // null for none
    enum { kBool, kFloat, kBfloat16 } kind;
    int64_t batch, head, key;  // strides
};

// Attention of one token: query [batch, heads, 1, size], key and value [batch, key_heads, keys, size], out [batch, heads, size] contiguous;
// float32 or bfloat16, the values of a head side by side, any other strides.
struct Attention {
    const void *query, *key, *value;
    void* out;
    bool bfloat16;
    int64_t batch, heads, key_heads, keys, size;
    int64_t query_batch, query_head, key_batch, key_head, key_row, value_batch, value_head, value_row;  // strides
    Mask mask;
    float scale;
};

}  // namespace qvlm
