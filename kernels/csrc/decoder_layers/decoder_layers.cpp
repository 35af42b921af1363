#include "decoder_layers.h"

#include <algorithm>

#include "linear/linears.h"
#include "linear/parts.h"
#include "rms_norm/rms_norm.h"
#include "rotary_append/rotary_append.h"
#include "silu_mul/silu_mul.h"

namespace genarm {
namespace {

// The buffers between the ops of a layer, and the calls of the ops. All layers use the same buffers, so that these stay
// in the CPU's cache.
class Layers {
 public:
  Layers(const DecoderCall& call, const std::vector<DecoderLayer>& layers)
      : call_(call), tokens_(call.rows * call.block), unit_(call.bfloat16 ? 2 : 4) {
    int64_t qkv = 0, query = 0, attended = 0, inner = 0;
    for (const DecoderLayer& layer : layers) {
      qkv = std::max(qkv, columns(layer));
      query = std::max(query, layer.qkv[0].linear->out);
      attended = std::max(attended, layer.o.linear->in);
      inner = std::max(inner, layer.down.linear->in);
    }
    qkv_ = buffer(qkv), query_ = buffer(query), attended_ = buffer(attended);
    gate_ = buffer(inner), up_ = buffer(inner);
    x_ = buffer(call.width), added_ = buffer(call.width);
    for (Aligned<char>& each : hidden_) each = buffer(call.width);
  }

  bool run(const std::vector<DecoderLayer>& layers, const std::vector<LayerCache>& caches) {
    const char *hidden = call_.hidden, *x = call_.x;
    for (size_t i = 0; i < layers.size(); ++i) {
      if (i && call_.interrupted && call_.interrupted()) return false;
      const DecoderLayer& layer = layers[i];
      attend(layer, caches[i], x);
      multiply({{layer.o, added_.get()}}, attended_.get());
      add_norm(hidden, layer.norm, hidden_[0].get(), x_.get());
      multiply({{layer.gate_up[0], gate_.get()}, {layer.gate_up[1], up_.get()}}, x_.get());
      run_silu(gate_.get(), up_.get(), tokens_ * layer.down.linear->in, call_.bfloat16, gate_.get());
      multiply({{layer.down, added_.get()}}, gate_.get());
      add_norm(hidden_[0].get(), layer.next_norm, hidden_[1].get(), i + 1 == layers.size() ? call_.out : x_.get());
      hidden = hidden_[1].get(), x = x_.get();
    }
    return true;
  }

 private:
  // A linear to multiply with the input, and the memory of its output.
  struct Target {
    const AdaptedLinear& adapted;
    char* y;
    int64_t stride = 0;  // elements between rows of y; 0: rows are contiguous
  };

  // Returns the sum of the outputs of query, key and value.
  static int64_t columns(const DecoderLayer& layer) {
    int64_t sum = 0;
    for (const AdaptedLinear& each : layer.qkv) sum += each.linear->out;
    return sum;
  }

  Aligned<char> buffer(int64_t width) const { return aligned<char>(tokens_ * width * unit_); }

  void multiply(std::initializer_list<Target> targets, const char* x) const {
    std::vector<Product> products;
    for (const Target& target : targets) {
      const Linear* linear = target.adapted.linear;
      products.push_back({linear, call_.spans[target.adapted.lanes], target.y, target.stride ? target.stride : linear->out});
    }
    genarm::multiply(&products, x, products[0].linear->in, tokens_, call_.threads);
  }

  void attend(const DecoderLayer& layer, const LayerCache& cache, const char* x) const {
    const int64_t all = columns(layer), of_queries = layer.qkv[0].linear->out, of_keys = layer.qkv[1].linear->out;
    char* const y = qkv_.get();
    char *const keys = y + of_queries * unit_, *const values = keys + of_keys * unit_;
    multiply({{layer.qkv[0], y, all}, {layer.qkv[1], keys, all}, {layer.qkv[2], values, all}}, x);

    RotaryAppend append{};
    append.y = y, append.cos = call_.cos, append.sin = call_.sin;
    append.query = query_.get(), append.keys = cache.keys, append.values = cache.values;
    append.y_strides[0] = call_.block * all, append.y_strides[1] = all;
    std::copy_n(call_.cos_strides, 2, append.cos_strides), std::copy_n(call_.sin_strides, 2, append.sin_strides);
    std::copy_n(cache.key_strides, 3, append.key_strides), std::copy_n(cache.value_strides, 3, append.value_strides);
    append.rows = call_.rows, append.block = call_.block, append.unit = unit_, append.bfloat16 = call_.bfloat16;
    append.width = layer.head_width, append.value_width = cache.value_width;
    append.query_heads = {0, of_queries / layer.head_width, layer.query_norm};
    append.key_heads = {of_queries, cache.heads, layer.key_norm};
    append.places = call_.places, append.eps = layer.head_eps;
    rotary_append(append);

    RaggedAttention attention{};
    attention.query = query_.get(), attention.keys = cache.keys, attention.values = cache.values;
    attention.out = attended_.get();
    attention.query_strides[0] = call_.block * of_queries, attention.query_strides[1] = layer.head_width;
    attention.query_strides[2] = of_queries;
    std::copy_n(cache.key_strides, 3, attention.key_strides), std::copy_n(cache.value_strides, 3, attention.value_strides);
    attention.rows = call_.rows, attention.heads = of_queries / layer.head_width, attention.block = call_.block;
    attention.width = layer.head_width, attention.kv_heads = cache.heads, attention.value_width = cache.value_width;
    attention.places = call_.places, attention.window = layer.window, attention.scale = layer.scale;
    attention.bfloat16 = call_.bfloat16;
    ragged_attention(attention, ragged_loops(), call_.threads);
  }

  // Writes hidden + added_, the output of the last product, to `total`, and the norm of this sum to `x`.
  void add_norm(const char* hidden, const Norm& norm, char* total, char* x) const {
    run_norm({hidden, norm.weight, added_.get(), total, x, tokens_, call_.width, norm.eps, norm.offset, call_.bfloat16});
  }

  const DecoderCall& call_;
  const int64_t tokens_, unit_;  // tokens: rows of every linear's input; unit: bytes of an element
  Aligned<char> qkv_, query_, attended_, gate_, up_, x_, added_, hidden_[2];
};

}  // namespace

bool decoder_layers(const DecoderCall& call, const std::vector<DecoderLayer>& layers,
                    const std::vector<LayerCache>& caches) {
  return Layers(call, layers).run(layers, caches);
}

}  // namespace genarm
