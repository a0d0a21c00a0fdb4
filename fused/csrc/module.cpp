// The operators of the namespace "fused" and an empty Python module, like cc_attention/csrc/ops.cpp. norm_ops.cpp and
// loss_ops.cpp add the operators.
#if __has_include(<Python.h>)
#include <Python.h>

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
#endif
