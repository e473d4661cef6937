// The C++ that runs without a GPU, as a Python module for pytest. Never part of the installed package.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "launch/cublas.h"
#include "launch/heuristics.h"
#include "launch/params.h"
#include "tile/constants.h"
#include "tile/sampling.h"
#include "tile/tile_map.h"
#include "visit_execution.h"

namespace py = pybind11;

namespace {

py::tuple decode_tile(uint16_t code, float log2_reference) {
  const cce::TileShare share = cce::decode_tile(code, log2_reference);
  return py::make_tuple(share.log2_mass, share.log2_norm, share.none, share.above);
}

float visit_probability(uint16_t code, float log2_reference, float log2_rate, float even_share) {
  return cce::VisitRate{log2_rate, even_share}.probability(cce::decode_tile(code, log2_reference));
}

float tile_mass(uint16_t code, float log2_reference) {
  return cce::tile_mass(cce::decode_tile(code, log2_reference));
}

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

py::dict plan_pair_gradients(cce::DType dtype, int64_t n, int64_t k, int64_t d, int64_t v,
                             uintptr_t e_address, int64_t e_row_stride, int64_t c_row_stride,
                             uintptr_t grad_c_address) {
  cce::PairGradientsParams params{};
  params.in.dtype = dtype;
  params.in.n = n;
  params.in.d = d;
  params.in.v = v;
  params.in.e = reinterpret_cast<const void*>(e_address);
  params.in.e_row_stride = e_row_stride;
  params.in.c_row_stride = c_row_stride;
  params.k = k;
  params.grad_c = reinterpret_cast<void*>(grad_c_address);
  const cce::PairGradientsPlan plan = cce::plan_pair_gradients(params);
  py::dict result;
  result["vector_loads"] = plan.vector_loads;
  result["columns"] = plan.columns;
  result["segments"] = plan.segments;
  result["pairs"] = plan.pairs;
  return result;
}

py::dict plan_lce_forward(int64_t n, int64_t v, int multiprocessors, int shared_bytes, int major, int minor,
                          bool has_sm90, int64_t d, int64_t e_row_stride, int64_t c_row_stride,
                          bool all_count) {
  cce::LossInputs in{};
  in.n = n;
  in.d = d;
  in.v = v;
  in.e_row_stride = e_row_stride;
  in.c_row_stride = c_row_stride;
  in.ignore_index = all_count ? cce::kIgnoreNone : -100;
  const cce::LceForwardPlan plan =
      cce::plan_lce_forward(in, {multiprocessors, shared_bytes, major, minor, has_sm90});
  // Where all tokens count: as the device chooses (kernels/live_rows.cuh).
  cce::LogitsSchedule schedule = plan.logits.schedule(n, v);
  schedule.splits = plan.splits.best(n);
  py::list units;
  for (int i = 0; i < schedule.units(); ++i) {
    const cce::LogitsUnit unit = schedule.unit(i);
    units.append(py::make_tuple(unit.row_block, unit.first_column_block, unit.end_column_block, unit.split));
  }
  py::dict result;
  result["kernel"] = plan.logits.kernel == cce::LogitsKernel::kSm90 ? "sm90" : "sm80";
  result["cluster"] = plan.logits.cluster;
  result["kernel_reason"] = plan.logits.reason;
  result["row_blocks"] = schedule.row_blocks;
  result["column_blocks"] = schedule.column_blocks;
  result["splits"] = schedule.splits;
  result["partials"] = plan.partials;
  result["units"] = units;
  result["stages"] = plan.logits.stages;
  result["shared_bytes"] = plan.logits.shared_bytes;
  result["blocks"] = plan.blocks;
  return result;
}

py::dict plan_exact(int64_t n, int64_t d, int64_t v, bool need_e, bool need_c, int multiprocessors,
                    int shared_bytes, int major, int minor, bool has_sm90) {
  cce::LossInputs in{};
  in.n = n;
  in.d = in.e_row_stride = in.c_row_stride = d;
  in.v = v;
  const cce::ExactPlan plan =
      cce::plan_exact(in, need_e, need_c, {multiprocessors, shared_bytes, major, minor, has_sm90});
  const cce::LogitsSchedule schedule = plan.logits.schedule(n, plan.chunk_columns);
  py::dict result;
  result["kernel"] = plan.logits.kernel == cce::LogitsKernel::kSm90 ? "sm90" : "sm80";
  result["cluster"] = plan.logits.cluster;
  result["chunk_columns"] = plan.chunk_columns;
  result["chunks"] = plan.chunks;
  result["shared_bytes"] = plan.logits.shared_bytes;
  result["units"] = schedule.units();
  result["blocks"] = plan.logits.blocks(schedule);
  return result;
}

py::dict plan_visits(int64_t n, int64_t d, int64_t v, bool need_e, bool need_c, bool need_bias,
                     int multiprocessors, int shared_bytes, int major, int minor, bool has_sm90) {
  cce::LossInputs in{};
  in.n = n;
  in.d = in.e_row_stride = in.c_row_stride = d;
  in.v = v;
  const cce::VisitsPlan plan = cce::plan_visits(in, need_e, need_c, need_bias,
                                                {multiprocessors, shared_bytes, major, minor, has_sm90});
  const cce::VisitLayout& layout = plan.layout;
  py::dict result;
  result["kernel"] = plan.kernel == cce::VisitsKernel::kSm90 ? "sm90" : "sm80";
  result["reason"] = plan.reason;
  result["tiles"] = plan.tiles;
  result["columns"] = layout.columns;
  result["strips"] = layout.strips;
  result["words"] = plan.words;
  result["slices"] = layout.slices;
  result["centroids"] = layout.centroids;
  result["capacity"] = layout.capacity;
  result["buffer"] = layout.buffer;
  result["max_chunks"] = layout.max_chunks;
  result["max_items"] = layout.max_items;
  result["sums_begin"] = layout.sums_begin;
  result["residual_begin"] = layout.residual_begin;
  result["residual_stride"] = layout.residual_stride;
  result["first_borrowed"] = layout.first_borrowed;
  result["stages"] = plan.stages;
  result["shared_bytes"] = plan.shared_bytes;
  result["centroid_group"] = plan.centroid_group;
  return result;
}

// ---- The visits' plan and its execution; an item is a row of VISIT_ITEM_FIELDS numbers ----

using Numbers = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;
using Counts = py::array_t<uint32_t, py::array::c_style | py::array::forcecast>;
constexpr int kItemFields = 7;

// chunk_rows: the least of a chunk, so that small problems have many; -1: the kernel's.
cce::VisitLayout visit_layout(const std::array<int64_t, 3>& shape, const std::array<bool, 3>& needs,
                              bool sm90, int chunk_rows) {
  cce::VisitShape kernel = sm90 ? cce::VisitsSm90::kShape : cce::kVisitShape;
  if (chunk_rows >= 0) kernel.chunk_rows = chunk_rows;
  return cce::visit_layout(shape[0], shape[1], shape[2], needs[0], needs[1], needs[2], kernel);
}

// Rows of one of the ring's buffers.
uint32_t visit_buffer(const std::array<int64_t, 3>& shape, const std::array<bool, 3>& needs, bool sm90,
                      int chunk_rows) {
  return visit_layout(shape, needs, sm90, chunk_rows).buffer;
}

std::vector<uint32_t> vector_of(const Counts& counts) {
  return {counts.data(), counts.data() + counts.size()};
}

// The items and the number of items of each gate.
py::tuple plan_visit_items(const std::array<int64_t, 3>& shape, const std::array<bool, 3>& needs,
                           const Counts& counts, bool sm90, int chunk_rows, int threads) {
  const cce_tests::VisitPlan plan =
      cce_tests::make_visit_plan(visit_layout(shape, needs, sm90, chunk_rows), vector_of(counts), threads);
  Numbers items({static_cast<py::ssize_t>(plan.items.size()), static_cast<py::ssize_t>(kItemFields)});
  int64_t* to = items.mutable_data();
  for (const cce::VisitItem& item : plan.items) {
    for (const int64_t field :
         {int64_t{item.strip}, static_cast<int64_t>(item.work), int64_t{item.part}, int64_t{item.first_row},
          int64_t{item.gate}, int64_t{item.needs[0]}, int64_t{item.needs[1]}}) {
      *to++ = field;
    }
  }
  return py::make_tuple(items, Counts(static_cast<py::ssize_t>(plan.pending.size()), plan.pending.data()));
}

// Executes such items; empty, or what went wrong first.
std::string execute_visit_items(const std::array<int64_t, 3>& shape, const std::array<bool, 3>& needs,
                                const Counts& counts, bool sm90, int chunk_rows, const Numbers& items,
                                const Counts& pending, cce_tests::Adversary adversary, int blocks, int slots,
                                uint64_t seed) {
  cce_tests::VisitPlan plan{
      visit_layout(shape, needs, sm90, chunk_rows), vector_of(counts), {}, vector_of(pending)};
  for (py::ssize_t k = 0; k < items.shape(0); ++k) {
    const int64_t* from = items.data(k, 0);
    cce::VisitItem item;
    item.strip = static_cast<int>(from[0]);
    item.work = static_cast<cce::VisitWork>(from[1]);
    item.part = static_cast<uint32_t>(from[2]) & 0x1fffffffu;
    item.first_row = static_cast<uint32_t>(from[3]);
    item.gate = static_cast<int>(from[4]);
    item.needs[0] = static_cast<int>(from[5]);
    item.needs[1] = static_cast<int>(from[6]);
    plan.items.push_back(item);
  }
  return cce_tests::VisitExecution(plan).run(adversary, blocks, slots, seed);
}

// ---- cuBLAS, as its documentation has it: column-major, one call at a time ----

struct FakeBlas {
  int math_mode = 3, pointer_mode = 0;
  int gemm_math_mode = -1;  // of the last call
  int status = 0;           // what a call returns
};

float bf16(const void* data, int64_t index) {
  const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(data)[index]) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

int fake_gemm(FakeBlas* blas, int op_a, int op_b, int64_t m, int64_t n, int64_t k, const float* alpha,
              const void* a, int type_a, int64_t lda, const void* b, int type_b, int64_t ldb,
              const float* beta, void* c, int type_c, int64_t ldc, int compute, int algorithm) {
  blas->gemm_math_mode = blas->math_mode;
  const bool sized = lda >= (op_a ? k : m) && ldb >= (op_b ? n : k) && ldc >= m;
  if (!sized || type_a != 14 || type_b != 14 || compute != 68 || algorithm != -1) return 7;
  for (int64_t j = 0; j < n; ++j) {
    for (int64_t i = 0; i < m; ++i) {
      float sum = 0;
      for (int64_t l = 0; l < k; ++l) {
        sum += bf16(a, op_a ? l + i * lda : i + l * lda) * bf16(b, op_b ? j + l * ldb : l + j * ldb);
      }
      if (type_c == 0) {
        float& out = static_cast<float*>(c)[i + j * ldc];
        out = *alpha * sum + (*beta == 0 ? 0.0f : *beta * out);
      } else {
        const float scaled = *alpha * sum;
        uint32_t bits;
        std::memcpy(&bits, &scaled, sizeof(bits));
        static_cast<uint16_t*>(c)[i + j * ldc] = static_cast<uint16_t>(bits >> 16);
      }
    }
  }
  return blas->status;
}

int fake_get_math_mode(FakeBlas* blas, int* mode) { return *mode = blas->math_mode, 0; }
int fake_set_math_mode(FakeBlas* blas, int mode) { return blas->math_mode = mode, 0; }
int fake_set_pointer_mode(FakeBlas* blas, int mode) { return blas->pointer_mode = mode, 0; }
const char* fake_status_text(int status) { return status == 7 ? "refused" : "failed"; }

template <typename Function>
void* address(Function* function) {
  return reinterpret_cast<void*>(function);
}

void* fake_function(const char* name) {
  const std::string_view wanted = name;
  if (wanted == "cublasGemmEx_64") return address(fake_gemm);
  if (wanted == "cublasGetMathMode") return address(fake_get_math_mode);
  if (wanted == "cublasSetMathMode") return address(fake_set_math_mode);
  if (wanted == "cublasSetPointerMode_v2") return address(fake_set_pointer_mode);
  if (wanted == "cublasGetStatusString") return address(fake_status_text);
  return nullptr;
}

using Bits = py::array_t<uint16_t>;  // of bf16

cce::BlasMatrix blas_matrix(const Bits& x) { return {x.data(), x.strides(0) / 2}; }

// One product of the exact backward: out in bf16 from a transposed, or out in fp32.
py::dict blas_product(const Bits& a, const Bits& b, py::array out, std::optional<py::array_t<float>> factors,
                      bool transposed, bool add, int status) {
  FakeBlas blas;
  blas.status = status;
  py::dict result;
  {
    cce::Cublas cublas({&blas, fake_function}, cce::DType::kBFloat16);
    if (transposed) {
      cublas.multiply_transposed(blas_matrix(a), blas_matrix(b), a.shape(1), b.shape(1), a.shape(0),
                                 out.mutable_data(), factors ? factors->data() : nullptr);
    } else {
      cublas.multiply(blas_matrix(a), blas_matrix(b), a.shape(0), b.shape(1), a.shape(1),
                      static_cast<float*>(out.mutable_data()), add);
    }
    result["error"] =
        cublas.error() == nullptr ? py::object(py::none()) : py::object(py::str(cublas.error()));
  }
  result["gemm_math_mode"] = blas.gemm_math_mode;
  result["math_mode"] = blas.math_mode;
  result["pointer_mode"] = blas.pointer_mode;
  return result;
}

const char* error_without_cublas() {
  FakeBlas blas;
  const cce::Cublas cublas({&blas, [](const char*) -> void* { return nullptr; }}, cce::DType::kBFloat16);
  return cublas.error();
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
  m.attr("kMassSteps") = cce::kMassSteps;
  m.attr("kNormSteps") = cce::kNormSteps;
  m.attr("kMassCodes") = cce::kMassCodes;
  m.attr("kNormCodes") = cce::kNormCodes;
  m.def("encode_tile", py::vectorize(cce::encode_tile), py::arg("log2_mass"), py::arg("log2_norm"));
  m.def("decode_tile", &decode_tile, py::arg("code"), py::arg("log2_reference"));
  m.def("visit_probability", py::vectorize(&visit_probability), py::arg("code"), py::arg("log2_reference"),
        py::arg("log2_rate"), py::arg("even_share"));
  m.def("tile_mass", py::vectorize(&tile_mass), py::arg("code"), py::arg("log2_reference"));
  m.def("visit_step", py::vectorize(cce::visit_step), py::arg("q"));
  m.def("chain_wraps", py::vectorize(cce::chain_wraps), py::arg("sum"), py::arg("step"));

  py::enum_<cce::DType>(m, "DType")
      .value("float16", cce::DType::kFloat16)
      .value("bfloat16", cce::DType::kBFloat16)
      .value("float32", cce::DType::kFloat32)
      .value("float64", cce::DType::kFloat64);
  m.def("plan_pair_gradients", &plan_pair_gradients, py::kw_only(), py::arg("dtype"), py::arg("n"),
        py::arg("k"), py::arg("d"), py::arg("v"), py::arg("e_address"), py::arg("e_row_stride"),
        py::arg("c_row_stride"), py::arg("grad_c_address"));
  m.attr("kPairSegments") = cce::kPairSegments;
  m.def("plan_label_logits", &plan_label_logits, py::kw_only(), py::arg("dtype"), py::arg("n"), py::arg("d"),
        py::arg("v"), py::arg("e_address"), py::arg("e_row_stride"), py::arg("c_address"),
        py::arg("c_row_stride"));
  m.def("plan_lce_forward", &plan_lce_forward, py::arg("n"), py::arg("v"), py::arg("multiprocessors"),
        py::arg("shared_bytes"), py::arg("major") = 8, py::arg("minor") = 0, py::arg("has_sm90") = false,
        py::arg("d") = 64, py::arg("e_row_stride") = 64, py::arg("c_row_stride") = 64,
        py::arg("all_count") = false);
  m.def("plan_exact", &plan_exact, py::arg("n"), py::arg("d"), py::arg("v"), py::arg("need_e"),
        py::arg("need_c"), py::arg("multiprocessors"), py::arg("shared_bytes"), py::arg("major") = 8,
        py::arg("minor") = 0, py::arg("has_sm90") = false);
  m.def("blas_product", &blas_product, py::arg("a"), py::arg("b"), py::arg("out"), py::kw_only(),
        py::arg("factors") = py::none(), py::arg("transposed") = false, py::arg("add") = false,
        py::arg("status") = 0);
  m.def("error_without_cublas", &error_without_cublas);
  m.def("plan_visits", &plan_visits, py::arg("n"), py::arg("d"), py::arg("v"), py::arg("need_e"),
        py::arg("need_c"), py::arg("need_bias"), py::arg("multiprocessors"), py::arg("shared_bytes"),
        py::arg("major") = 8, py::arg("minor") = 0, py::arg("has_sm90") = false);
  py::enum_<cce_tests::Adversary>(m, "Adversary")
      .value("random", cce_tests::Adversary::kRandom)
      .value("oldest", cce_tests::Adversary::kOldest)
      .value("newest", cce_tests::Adversary::kNewest)
      .value("victim", cce_tests::Adversary::kVictim);
  m.attr("VISIT_ITEM_FIELDS") = py::make_tuple("strip", "work", "part", "first_row", "gate", "need", "need2");
  m.attr("VISIT_WORKS") = py::make_tuple("visits", "visits_of_c", "visits_of_e", "grad_c", "round");
  m.attr("kGateOfE") = cce::kGateOfE;
  m.attr("kGateOfRounding") = cce::kGateOfRounding;
  m.attr("kNoGate") = cce::kNoGate;
  m.def("visit_buffer", &visit_buffer, py::arg("shape"), py::arg("needs"), py::arg("sm90"),
        py::arg("chunk_rows"));
  m.def("plan_visit_items", &plan_visit_items, py::arg("shape"), py::arg("needs"), py::arg("counts"),
        py::arg("sm90"), py::arg("chunk_rows") = -1, py::arg("threads") = 1);
  m.def("execute_visit_items", &execute_visit_items, py::arg("shape"), py::arg("needs"), py::arg("counts"),
        py::arg("sm90"), py::arg("chunk_rows"), py::arg("items"), py::arg("pending"), py::arg("adversary"),
        py::arg("blocks"), py::arg("slots"), py::arg("seed"));
  m.def("swizzled_offset", &cce::swizzled_offset, py::arg("row"), py::arg("chunk"));
  m.def("mask_words", &cce::mask_words, py::arg("n"));
  m.def("slices_per_item", &cce::slices_per_item, py::arg("visits"), py::arg("slices"));
}
