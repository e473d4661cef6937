// The C++ that runs without a GPU, as a Python module for pytest. Never part of the installed package.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>

#include "launch/heuristics.h"
#include "launch/params.h"
#include "tile/constants.h"
#include "tile/exp2.h"
#include "tile/sampling.h"

namespace py = pybind11;

namespace {

py::dict plan_label_logits(cce::DType dtype, int64_t n, int64_t d, int64_t v, uintptr_t e_address,
                           int64_t e_row_stride, uintptr_t c_address, int64_t c_row_stride) {
  cce::LossInputs params{};
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

py::dict plan_lce_forward(int64_t n, int64_t v, int multiprocessors, int shared_bytes, int major, int minor,
                          bool has_sm90, int64_t d, int64_t e_row_stride, int64_t c_row_stride) {
  cce::LossInputs in{};
  in.n = n;
  in.d = d;
  in.v = v;
  in.e_row_stride = e_row_stride;
  in.c_row_stride = c_row_stride;
  const cce::LceForwardPlan plan =
      cce::plan_lce_forward(in, {multiprocessors, shared_bytes, major, minor, has_sm90});
  py::list units;
  for (int i = 0; i < plan.schedule.units(); ++i) {
    const cce::ForwardUnit unit = plan.schedule.unit(i);
    units.append(py::make_tuple(unit.row_block, unit.first_column_block, unit.end_column_block, unit.split));
  }
  py::dict result;
  result["kernel"] = plan.kernel == cce::ForwardKernel::kSm90 ? "sm90" : "sm80";
  result["cluster"] = plan.cluster;
  result["kernel_reason"] = plan.kernel_reason;
  result["row_blocks"] = plan.schedule.row_blocks;
  result["column_blocks"] = plan.schedule.column_blocks;
  result["splits"] = plan.schedule.splits;
  result["units"] = units;
  result["stages"] = plan.stages;
  result["shared_bytes"] = plan.shared_bytes;
  result["blocks"] = plan.blocks;
  result["reason"] = plan.reason;
  return result;
}

py::dict plan_exact(int64_t n, int64_t d, int64_t v, bool need_e, bool need_c, int multiprocessors,
                    int shared_bytes) {
  const cce::ExactPlan plan = cce::plan_exact(n, d, v, need_e, need_c, {multiprocessors, shared_bytes});
  py::dict result;
  result["chunk_columns"] = plan.chunk_columns;
  result["chunks"] = plan.chunks;
  result["shared_bytes"] = plan.shared_bytes;
  return result;
}

py::dict plan_visits(int64_t n, int64_t d, int64_t v, bool need_e, bool need_c, bool need_bias, int row_bytes,
                     int multiprocessors, int shared_bytes) {
  const cce::VisitsPlan plan =
      cce::plan_visits(n, d, v, need_e, need_c, need_bias, row_bytes, {multiprocessors, shared_bytes});
  py::dict result;
  result["tiles"] = plan.tiles;
  result["words"] = plan.words;
  result["slices"] = plan.slices;
  result["capacity"] = plan.capacity;
  result["buffer"] = plan.buffer;
  result["chunks"] = plan.chunks;
  result["items"] = plan.items;
  result["sums_begin"] = plan.sums_begin;
  result["first_borrowed"] = plan.first_borrowed;
  result["shared_bytes"] = plan.shared_bytes;
  return result;
}

}  // namespace

PYBIND11_MODULE(cce_host_tests, m) {
  m.attr("kTileColumns") = cce::kTileColumns;
  m.attr("kChainTokens") = cce::kChainTokens;
  m.attr("kChainTiles") = cce::kChainTiles;
  m.attr("kLabelLogitsTokensPerBlock") = cce::kLabelLogitsTokensPerBlock;
  m.def("fmix32", py::vectorize(cce::fmix32), py::arg("x"));
  m.def("row_key", py::vectorize(cce::row_key), py::arg("seed"), py::arg("token"));
  m.def("visit_hash", py::vectorize(cce::visit_hash), py::arg("row_key"), py::arg("index"));
  m.def("chain_of_token", &cce::chain_of_token, py::arg("token_block"), py::arg("tile"));
  m.def("token_chain", &cce::token_chain, py::arg("row_key"), py::arg("tile"));
  m.def("tile_chain", &cce::tile_chain, py::arg("seed"), py::arg("tile"), py::arg("token_block"));
  m.def("visit_probability", py::vectorize(cce::visit_probability), py::arg("log_peak"), py::arg("log_rate"));
  m.def("visit_step", py::vectorize(cce::visit_step), py::arg("q"));
  m.def("chain_wraps", py::vectorize(cce::chain_wraps), py::arg("sum"), py::arg("step"));
  m.def("exp2_polynomial", py::vectorize(cce::exp2_polynomial), py::arg("x"));

  py::enum_<cce::DType>(m, "DType")
      .value("float16", cce::DType::kFloat16)
      .value("bfloat16", cce::DType::kBFloat16)
      .value("float32", cce::DType::kFloat32)
      .value("float64", cce::DType::kFloat64);
  m.def("plan_label_logits", &plan_label_logits, py::kw_only(), py::arg("dtype"), py::arg("n"), py::arg("d"),
        py::arg("v"), py::arg("e_address"), py::arg("e_row_stride"), py::arg("c_address"),
        py::arg("c_row_stride"));
  m.def("plan_lce_forward", &plan_lce_forward, py::arg("n"), py::arg("v"), py::arg("multiprocessors"),
        py::arg("shared_bytes"), py::arg("major") = 8, py::arg("minor") = 0, py::arg("has_sm90") = false,
        py::arg("d") = 64, py::arg("e_row_stride") = 64, py::arg("c_row_stride") = 64);
  m.def("plan_exact", &plan_exact, py::arg("n"), py::arg("d"), py::arg("v"), py::arg("need_e"),
        py::arg("need_c"), py::arg("multiprocessors"), py::arg("shared_bytes"));
  m.def("plan_visits", &plan_visits, py::arg("n"), py::arg("d"), py::arg("v"), py::arg("need_e"),
        py::arg("need_c"), py::arg("need_bias"), py::arg("row_bytes"), py::arg("multiprocessors"),
        py::arg("shared_bytes"));
  m.def("swizzled_offset", &cce::swizzled_offset, py::arg("row"), py::arg("chunk"));
  m.def("mask_words", &cce::mask_words, py::arg("n"));
  m.def("slices_per_item", &cce::slices_per_item, py::arg("visits"), py::arg("slices"));
}
