// Window sizes as Python gives them.
#pragma once
#include <torch/csrc/utils/pybind.h>

#include <array>
#include <string>

namespace fastnorm {

// An int or a sequence of ints, as torch takes them.
struct PythonInts {
  std::array<int64_t, 3> v{};
  size_t size = 0;

  PythonInts(pybind11::handle h, const char* op, const char* name) {
    if (PyTuple_Check(h.ptr()) || PyList_Check(h.ptr())) {
      for (const auto item : h) {
        if (size == v.size()) break;  // more than two are refused by the operator
        v[size++] = number(item, op, name);
      }
    } else {
      v[size++] = number(h, op, name);
    }
  }
  static int64_t number(pybind11::handle h, const char* op, const char* name) {
    const pybind11::object index = PyBool_Check(h.ptr())
                                       ? pybind11::object()
                                       : pybind11::reinterpret_steal<pybind11::object>(PyNumber_Index(h.ptr()));
    if (!index) {
      PyErr_Clear();
      throw pybind11::type_error(std::string(op) + ": " + name + " must be an int or a tuple of two ints, got " +
                                 Py_TYPE(h.ptr())->tp_name);
    }
    return index.cast<int64_t>();
  }
  operator at::IntArrayRef() const { return at::IntArrayRef(v.data(), size); }
};

}  // namespace fastnorm
