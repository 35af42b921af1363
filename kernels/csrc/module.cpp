// The Python module: its functions, and the choice of the instruction set.
#include <cstring>

#include "common/bindings.h"
#include "common/tensors.h"
#include "guided_sample/loops.h"

namespace {

// An instruction set that a user may choose. "avx512vnni" has its own loops for quant_linear only. "avx512bf16" uses
// those, and has its own loops for small_linear. Otherwise both run the loops of avx512.
struct InstructionSet {
  const char* name;
  const genarm::TileLoops* loops;
};

constexpr InstructionSet kInstructionSets[] = {
#ifdef GENARM_X86
    {"avx512bf16", &genarm::loops_avx512}, {"avx512vnni", &genarm::loops_avx512},
    {"avx512", &genarm::loops_avx512},     {"avx2", &genarm::loops_avx2},
#endif
    {"baseline", &genarm::loops_baseline}};

bool runs_here(const InstructionSet& set) {
#ifdef GENARM_X86
  __builtin_cpu_init();
  const bool pairs = !std::strcmp(set.name, "avx512bf16");  // slower than FMA on Intel: small_linear/dot_step.h
  if (pairs && !(__builtin_cpu_supports("avx512bf16") && __builtin_cpu_is("amd"))) return false;
  if ((pairs || !std::strcmp(set.name, "avx512vnni")) && !__builtin_cpu_supports("avx512vnni")) return false;
  if (set.loops == &genarm::loops_avx512) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
  }
  if (set.loops == &genarm::loops_avx2) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  }
#endif
  (void)set;
  return true;
}

const genarm::TileLoops* active = nullptr;
PyObject* number_of_threads = nullptr;  // torch.get_num_threads

void activate(const InstructionSet& set) {
  active = set.loops;
  genarm::use_ragged_loops(set.loops->name);
  genarm::use_norm_loops(set.loops->name);
  genarm::use_rotary_loops(set.loops->name);
  genarm::use_silu_loops(set.loops->name);
  genarm::use_linear_loops(set.name);
}

PyObject* instruction_sets(PyObject*, PyObject*) {
  PyObject* names = PyList_New(0);
  for (const InstructionSet& set : kInstructionSets) {
    if (!names || !runs_here(set)) continue;
    PyObject* name = PyUnicode_FromString(set.name);
    if (!name || PyList_Append(names, name) != 0) Py_CLEAR(names);
    Py_XDECREF(name);
  }
  return names;
}

PyObject* use(PyObject*, PyObject* argument) {
  for (const InstructionSet& set : kInstructionSets) {
    if (PyUnicode_CompareWithASCIIString(argument, set.name) == 0 && runs_here(set)) {
      activate(set);
      Py_RETURN_NONE;
    }
  }
  return PyErr_Format(PyExc_ValueError, "instruction set %R: expected one of instruction_sets()", argument);
}

PyObject* guided_sample(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return genarm::guided_sample_binding(*active, arguments, count);
}

}  // namespace

namespace genarm {

PyObject* use_threads(PyObject*, PyObject* get_num_threads) {
  Py_INCREF(get_num_threads);
  Py_XDECREF(number_of_threads);
  number_of_threads = get_num_threads;
  Py_RETURN_NONE;
}

int threads() {
  PyObject* found = number_of_threads ? PyObject_CallNoArgs(number_of_threads) : nullptr;
  const long count = found ? PyLong_AsLong(found) : 1;
  Py_XDECREF(found);
  PyErr_Clear();
  return count > 1 ? static_cast<int>(count) : 1;
}

}  // namespace genarm

namespace {

using Fast = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t);

PyMethodDef method(const char* name, Fast function, const char* doc) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL, doc};
}

PyMethodDef kMethods[] = {
    method("guided_sample", guided_sample, "By position → fields of GuidedSample, or None."),
    method("settle", genarm::settle_binding, "By position → fields of Settled, or None."),
    {"use_tensors", genarm::use_tensors, METH_O, "Give the class of tensors, before any other call."},
    {"use_threads", genarm::use_threads, METH_O, "Give the function that tells how many threads a call may use."},
    method("ragged_attention", genarm::ragged_attention_binding, "By position → the output, or None."),
    method("ragged_append", genarm::ragged_append_binding, "By position → True, or None."),
    method("rms_norm", genarm::rms_norm_binding, "By position → the output, or None."),
    method("add_rms_norm", genarm::add_rms_norm_binding, "By position → (sum, its norm), or None."),
    method("rotary", genarm::rotary_binding, "By position → (query, key), or None."),
    method("rotary_append", genarm::rotary_append_binding, "By position → the queries, or None."),
    method("silu_mul", genarm::silu_mul_binding, "By position → the output, or None."),
    method("exact_codes", genarm::exact_codes_binding, "By position → (codes, scales, minimums), False, or None."),
    method("quant_rows", genarm::quant_rows_binding, "By position → (rows of a packed weight,), or None."),
    {"linears", genarm::linears, METH_O, "Linears of one width: see ops/linear/cpu.py, the only caller."},
    {"decoder_layers", genarm::decoder_layers_binding, METH_O, "Layers of a decoder: see models/one_call.py."},
    {"instruction_sets", instruction_sets, METH_NOARGS, "Names of those that run here, fastest first."},
    {"use", use, METH_O, "Choose an instruction set by name."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef kModule = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, kMethods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() {
  for (const InstructionSet& set : kInstructionSets) {
    if (!active && runs_here(set)) activate(set);
  }
  return PyModule_Create(&kModule);
}
