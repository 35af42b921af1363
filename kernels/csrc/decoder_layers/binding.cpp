// Turns Python arguments into a call of decoder_layers. `decoder_layers_binding` checks the shapes of the layers once.
// `run` checks the tensors of each call.
#include <algorithm>
#include <cstring>
#include <new>

#include "common/tensors.h"
#include "decoder_layers.h"
#include "linear/linears.h"
#include "ragged_attention/arguments.h"
#include "rms_norm/rms_norm.h"
#include "rotary/rotary.h"

namespace genarm {
namespace {

// The parts of a layer's tuple, in their order. models/one_call.py makes the tuple.
enum Part {
  kQkv, kO, kGateUp, kDown,  // objects of type Linears
  kLanes,                    // for each of the seven linears, the index of its list of spans
  kNorm, kNormEps, kNormOffset, kNextNorm, kNextNormEps, kNextNormOffset,
  kQueryNorm, kKeyNorm, kHeadEps, kHeadWidth, kScale, kWindow,
  kParts
};

struct Layers {
  std::vector<DecoderLayer> layers;  // layers without the weights of their norms, which each call looks up
  int lists = 0;                     // least number of lists of spans that a call must give
  ElementType type = kBfloat16;      // type of all tensors: float32 if all linears are float32
};

struct LayersObject {
  PyObject head;
  PyObject* tuples;  // The tuples that describe the layers. The reference keeps their tensors alive.
  Layers* own;
};

void destroy(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  delete reinterpret_cast<LayersObject*>(self)->own;
  Py_XDECREF(reinterpret_cast<LayersObject*>(self)->tuples);
  reinterpret_cast<freefunc>(PyType_GetSlot(type, Py_tp_free))(self);
  Py_DECREF(type);
}

PyObject* part(PyObject* tuple, int index) { return PyTuple_GetItem(tuple, index); }

float number(PyObject* tuple, int index) { return static_cast<float>(PyFloat_AsDouble(part(tuple, index))); }

// Fills in the linears and the numbers of a layer. Returns whether their shapes fit. After a Python error
// it returns false, too.
bool fill(PyObject* tuple, DecoderLayer* layer, int* lists) {
  if (!PyTuple_Check(tuple) || PyTuple_Size(tuple) != kParts) {
    PyErr_Format(PyExc_TypeError, "layer %R: expected a tuple of %d parts", tuple, static_cast<int>(kParts));
    return false;
  }
  AdaptedLinear* const all[] = {&layer->qkv[0], &layer->qkv[1], &layer->qkv[2], &layer->o,
                                &layer->gate_up[0], &layer->gate_up[1], &layer->down};
  constexpr int kCounts[] = {3, 1, 2, 1};
  for (int i = 0, next = 0; i < 4; ++i) {
    const Linear* linears = linears_in(part(tuple, kQkv + i), kCounts[i]);
    if (!linears) return false;
    for (int j = 0; j < kCounts[i]; ++j, ++next) {
      const long lanes = PyLong_AsLong(part(part(tuple, kLanes), next));
      if (PyErr_Occurred() || lanes < 0) return false;
      *all[next] = {linears + j, static_cast<int>(lanes)};
      *lists = std::max(*lists, static_cast<int>(lanes) + 1);
    }
  }
  layer->norm = {nullptr, number(tuple, kNormEps), number(tuple, kNormOffset)};
  layer->next_norm = {nullptr, number(tuple, kNextNormEps), number(tuple, kNextNormOffset)};
  layer->head_eps = number(tuple, kHeadEps), layer->scale = number(tuple, kScale);
  layer->head_width = PyLong_AsLongLong(part(tuple, kHeadWidth));
  layer->window = part(tuple, kWindow) == Py_None ? INT64_MAX : PyLong_AsLongLong(part(tuple, kWindow));
  const int64_t width = layer->qkv[0].linear->in, head = layer->head_width, inner = layer->down.linear->in;
  return !PyErr_Occurred() && head >= 2 && head % 2 == 0 && layer->window >= 1 &&
         layer->qkv[0].linear->out >= head && layer->qkv[0].linear->out % head == 0 &&
         layer->qkv[1].linear->out >= head && layer->qkv[1].linear->out % head == 0 &&
         layer->gate_up[0].linear->in == width && layer->gate_up[0].linear->out == inner &&
         layer->gate_up[1].linear->out == inner && layer->o.linear->out == width && layer->down.linear->out == width;
}

bool is_float32(const DecoderLayer& layer) { return layer.qkv[0].linear->is_float32(); }

// Whether the inputs and outputs of all linears of a layer have one type.
bool of_one_type(const DecoderLayer& layer) {
  const auto same = [&](const AdaptedLinear& each) { return each.linear->is_float32() == is_float32(layer); };
  return std::all_of(layer.qkv, layer.qkv + 3, same) && same(layer.o) && same(layer.gate_up[0]) &&
         same(layer.gate_up[1]) && same(layer.down);
}

bool look_up_norms(PyObject* tuple, ElementType type, DecoderLayer* layer) {
  const int64_t width = layer->qkv[0].linear->in, head = layer->head_width;
  return norm_weight(part(tuple, kNorm), type, width, &layer->norm.weight) && layer->norm.weight &&
         norm_weight(part(tuple, kNextNorm), type, width, &layer->next_norm.weight) && layer->next_norm.weight &&
         norm_weight(part(tuple, kQueryNorm), type, head, &layer->query_norm) &&
         norm_weight(part(tuple, kKeyNorm), type, head, &layer->key_norm) &&
         !layer->query_norm == !layer->key_norm;
}

// Fills in the keys and values of a layer. Returns whether they fit the layer, and every slot and position is in range;
// false also with a Python error set.
bool cache_of(PyObject* const* keys_and_values, const DecoderLayer& layer, const DecoderCall& call, LayerCache* cache) {
  DLTensor keys, values;
  if (!ragged_cache(keys_and_values, &keys, &values)) return false;
  const int64_t heads = keys.shape[1], value_width = values.shape[3], of_queries = layer.qkv[0].linear->out;
  const ElementType type = call.bfloat16 ? kBfloat16 : kFloat32;
  if (!(type_of(keys) == type) || !(type_of(values) == type) || keys.shape[3] != layer.head_width ||
      layer.qkv[1].linear->out != heads * layer.head_width || layer.qkv[2].linear->out != heads * value_width ||
      of_queries / layer.head_width % heads != 0 || layer.o.linear->in != of_queries / layer.head_width * value_width) {
    return false;
  }
  *cache = {keys.at<char>(), values.at<char>(), {}, {}, heads, value_width};
  std::memcpy(cache->key_strides, keys.strides, sizeof cache->key_strides);
  std::memcpy(cache->value_strides, values.strides, sizeof cache->value_strides);
  return places_in_range(call.places, call.rows, call.block, keys);
}

// Whether every LoRA that a span names exists in the span's linear.
bool spans_fit(const DecoderLayer& layer, const DecoderCall& call) {
  for (const AdaptedLinear& each : {layer.qkv[0], layer.qkv[1], layer.qkv[2], layer.o, layer.gate_up[0],
                                    layer.gate_up[1], layer.down}) {
    for (const Span& span : call.spans[each.lanes]) {
      if (span.lora >= static_cast<int64_t>(each.linear->loras.size())) return false;
    }
  }
  return true;
}

bool fill_call(PyObject* const* in, const Layers& own, DecoderCall* call) {
  enum Argument { kHidden, kX, kCos, kSin, kSlots, kPositions, kSpans };
  DLTensor hidden, x, cos, sin;
  const DecoderLayer& first = own.layers[0];
  call->bfloat16 = own.type == kBfloat16;
  if (!borrow(in[kHidden], &hidden) || !(type_of(hidden) == own.type) || hidden.ndim != 3 || !contiguous(hidden) ||
      hidden.shape[2] != first.qkv[0].linear->in || !borrow(in[kX], &x) || !(type_of(x) == own.type) || x.ndim != 3 ||
      !contiguous(x) || std::memcmp(x.shape, hidden.shape, 3 * sizeof *x.shape) != 0) {
    return false;
  }
  call->hidden = hidden.at<const char>(), call->x = x.at<const char>();
  call->rows = hidden.shape[0], call->block = hidden.shape[1], call->width = hidden.shape[2];
  const int64_t angles[] = {call->rows, call->block, first.head_width};
  const void *cos_data = nullptr, *sin_data = nullptr;
  if (!borrow(in[kCos], &cos) || !rotary_angles(cos, own.type, angles, &cos_data, call->cos_strides) ||
      !borrow(in[kSin], &sin) || !rotary_angles(sin, own.type, angles, &sin_data, call->sin_strides) ||
      !ragged_places(in + kSlots, call->rows, call->block, &call->places)) {
    return false;
  }
  call->cos = static_cast<const char*>(cos_data), call->sin = static_cast<const char*>(sin_data);
  if (!PyTuple_Check(in[kSpans]) || PyTuple_Size(in[kSpans]) < own.lists) return false;
  call->spans.resize(PyTuple_Size(in[kSpans]));
  for (size_t i = 0; i < call->spans.size(); ++i) {
    PyObject* const list = PyTuple_GetItem(in[kSpans], static_cast<Py_ssize_t>(i));
    if (!spans_of(list, INT64_MAX, call->rows * call->block, &call->spans[i])) return false;
  }
  return true;
}

// Most tokens of a call that runs without a check for Ctrl-C. A call with more tokens, such as a prefill chunk, checks
// between layers: without a check, Ctrl-C would wait 1.8 s (512 tokens in 2 lanes of SmolLM2-135M, one thread of an AMD
// EPYC with AVX-512, 2026-11-29).
constexpr int64_t kDecoding = 64;

// Takes (hidden, x, cos, sin, slots, positions, lists of spans, (keys, values of each layer...)). Returns the output of
// the last norm, or None if the arguments do not fit.
PyObject* run(PyObject* self, PyObject* const* in, Py_ssize_t count) {
  constexpr int kCaches = 7;
  if (!takes(count, kCaches + 1)) return nullptr;
  PyObject* const tuples = reinterpret_cast<LayersObject*>(self)->tuples;
  Layers& own = *reinterpret_cast<LayersObject*>(self)->own;
  const size_t n = own.layers.size();
  PyObject* out = nullptr;
  try {
    DecoderCall call{};
    std::vector<LayerCache> caches(n);
    std::vector<DecoderLayer> layers = own.layers;
    bool runs = fill_call(in, own, &call) && PyTuple_Check(in[kCaches]) &&
                PyTuple_Size(in[kCaches]) == 2 * static_cast<Py_ssize_t>(n);
    for (size_t i = 0; runs && i < n; ++i) {
      PyObject* const pair[] = {PyTuple_GetItem(in[kCaches], 2 * i), PyTuple_GetItem(in[kCaches], 2 * i + 1)};
      runs = look_up_norms(PyTuple_GetItem(tuples, i), own.type, &layers[i]) && spans_fit(layers[i], call) &&
             cache_of(pair, layers[i], call, &caches[i]);
    }
    if (PyErr_Occurred()) return nullptr;
    if (!runs) Py_RETURN_NONE;
    int64_t shape[] = {call.rows, call.block, call.width};
    void* data = nullptr;
    if (!(out = new_tensor(own.type, 3, shape, &data))) return nullptr;
    call.out = static_cast<char*>(data), call.threads = threads();
    bool done = false;
    {
      WithoutGil without_gil;
      if (call.rows * call.block > kDecoding) call.interrupted = [&without_gil] { return without_gil.interrupted(); };
      done = decoder_layers(call, layers, caches);
    }
    if (!done) {
      Py_DECREF(out);
      return nullptr;
    }
  } catch (const std::bad_alloc&) {
    Py_XDECREF(out);
    return PyErr_NoMemory();
  }
  return out;
}

PyObject* layers_type() {
  static PyMethodDef methods[] = {
      {"run", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(run)), METH_FASTCALL,
       "By position → the output, or None."},
      {nullptr, nullptr, 0, nullptr}};
  static PyType_Slot slots[] = {
      {Py_tp_dealloc, reinterpret_cast<void*>(destroy)}, {Py_tp_methods, methods}, {0, nullptr}};
  static PyType_Spec spec{"genarm_fast.kernels._C.DecoderLayers", sizeof(LayersObject), 0,
                          Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, slots};
  static PyObject* type = nullptr;  // The GIL guards it. A guard of C++ could deadlock with the GIL.
  if (!type) type = PyType_FromSpec(&spec);
  return type;
}

}  // namespace

// Takes a tuple of layers, each a tuple of `Part`s. Returns DecoderLayers, or None if the shapes do not fit together.
PyObject* decoder_layers_binding(PyObject*, PyObject* tuples) {
  const Py_ssize_t n = PyTuple_Size(tuples);
  if (n < 1) return PyErr_Occurred() ? nullptr : PyErr_Format(PyExc_TypeError, "expected one layer or more");
  PyObject* type = layers_type();
  PyObject* self = type ? PyType_GenericAlloc(reinterpret_cast<PyTypeObject*>(type), 0) : nullptr;
  if (!self) return nullptr;
  bool fits = true;
  try {
    Layers* own = reinterpret_cast<LayersObject*>(self)->own = new Layers;
    own->layers.resize(n);
    for (Py_ssize_t i = 0; fits && i < n; ++i) {
      DecoderLayer& layer = own->layers[i];
      fits = fill(PyTuple_GetItem(tuples, i), &layer, &own->lists) && of_one_type(layer) &&
             is_float32(layer) == is_float32(own->layers[0]) &&
             layer.qkv[0].linear->in == own->layers[0].qkv[0].linear->in &&
             layer.head_width == own->layers[0].head_width;
    }
    if (fits && is_float32(own->layers[0])) own->type = kFloat32;
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  }
  Py_INCREF(tuples);
  reinterpret_cast<LayersObject*>(self)->tuples = tuples;
  if (fits && !PyErr_Occurred()) return self;
  Py_DECREF(self);
  if (PyErr_Occurred()) return nullptr;
  Py_RETURN_NONE;
}

}  // namespace genarm
