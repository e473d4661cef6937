// The C++ that runs without a GPU, as a Python module for pytest. Never part of the installed package.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>

#include "launch/heuristics.h"
#include "launch/params.h"
#include "tile/constants.h"
#include "tile/sampling.h"

namespace py = pybind11;

namespace {

py::dict plan_label_logits(cce::DType dtype, int64_t n, int64_t d, int64_t v, uintptr_t e_address,
                           int64_t e_row_stride, uintptr_t c_address, int64_t c_row_stride) {
  cce::LabelLogitsParams params{};
  params.dtype = dtype;
  params.n = n;
  params.d = d;
  params.v = v;
  params.e = reinterpret_cast<const void*>(e_address);
  params.c = reinterpret_cast<const void*>(c_address);
  params.e_row_stride = e_row_stride;
  params.c_row_stride = c_row_stride;
  const cce::LabelLogitsPlan plan = cce::plan_label_logits(params);
  py::dict result;
  result["vector_loads"] = plan.vector_loads;
  result["reason"] = plan.reason;
  result["blocks"] = plan.blocks;
  return result;
}

}  // namespace

PYBIND11_MODULE(cce_host_tests, m) {
  m.attr("kTileColumns") = cce::kTileColumns;
  m.attr("kLabelLogitsTokensPerBlock") = cce::kLabelLogitsTokensPerBlock;
  m.def("fmix32", py::vectorize(cce::fmix32), py::arg("x"));
  m.def("row_key", py::vectorize(cce::row_key), py::arg("seed"), py::arg("token"));
  m.def("visit_hash", py::vectorize(cce::visit_hash), py::arg("row_key"), py::arg("tile"));
  m.def("visit_probability", py::vectorize(cce::visit_probability), py::arg("log_mass"), py::arg("log_rate"));
  m.def("visited", py::vectorize(cce::visited), py::arg("hash"), py::arg("q"));

  py::enum_<cce::DType>(m, "DType")
      .value("float16", cce::DType::kFloat16)
      .value("bfloat16", cce::DType::kBFloat16)
      .value("float32", cce::DType::kFloat32)
      .value("float64", cce::DType::kFloat64);
  m.def("plan_label_logits", &plan_label_logits, py::kw_only(), py::arg("dtype"), py::arg("n"), py::arg("d"),
        py::arg("v"), py::arg("e_address"), py::arg("e_row_stride"), py::arg("c_address"),
        py::arg("c_row_stride"));
}
