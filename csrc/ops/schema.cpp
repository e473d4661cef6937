#include <torch/csrc/stable/library.h>

#include "ops/namespace.h"

// Every operator's signature. The kernels that are not in csrc/ops are registered from Python
// (cce_ext/ops.py).
CCE_TORCH_LIBRARY(m) {
  m.def(
      "linear_cross_entropy(Tensor e, Tensor c, Tensor targets, Tensor? bias=None, SymInt ignore_index=-100, "
      "float? softcap=None, str reduction=\"mean\", SymInt shift=0, float? filter_eps=-1.0, "
      "bool filter_e_grad=True, bool filter_c_grad=True, str impl=\"cce\") -> Tensor");
  m.def(
      "lce_forward(Tensor e, Tensor c, Tensor? bias, Tensor targets, Tensor? seed, *, "
      "SymInt ignore_index=-100, float? softcap=None, str method=\"sampled\", float eps=0.00390625, "
      "bool filter_e=True, bool filter_c=True, bool need_map=True) "
      "-> (Tensor nll, Tensor lse, Tensor tile_map)");
  m.def(
      "lce_backward(Tensor? g_nll, Tensor? g_lse, Tensor e, Tensor c, Tensor? bias, Tensor targets, "
      "Tensor nll, Tensor lse, Tensor tile_map, Tensor? seed, *, "
      "SymInt ignore_index=-100, float? softcap=None, str method=\"sampled\", float eps=0.00390625, "
      "bool filter_e=True, bool filter_c=True, bool need_e=True, bool need_c=True, bool need_bias=False) "
      "-> (Tensor grad_e, Tensor grad_c, Tensor grad_bias)");
  m.def(
      "label_logits(Tensor e, Tensor c, Tensor? bias, Tensor targets, *, "
      "SymInt ignore_index=-100, float? softcap=None) -> Tensor");
  // What several labels a token need beside their log-sum-exp: logits [N, K] of pairs of a token and a label,
  // and what gradients of them add to gradients of e, c and bias. order: the pairs sorted by label.
  m.def(
      "pair_logits(Tensor e, Tensor c, Tensor? bias, Tensor targets, *, "
      "SymInt ignore_index=-100, float? softcap=None) -> Tensor");
  m.def(
      "add_pair_gradients(Tensor coefficients, Tensor labels, Tensor? order, Tensor e, Tensor c, "
      "Tensor(a!)? grad_e, Tensor(b!)? grad_c, Tensor(c!)? grad_bias) -> ()");
  // The portable kernels by themselves, for what the CUDA kernels leave to them: fp32 and fp64.
  m.def(
      "lce_forward_portable(Tensor e, Tensor c, Tensor? bias, Tensor targets, Tensor? seed, *, "
      "SymInt ignore_index=-100, float? softcap=None, str method=\"sampled\", float eps=0.00390625, "
      "bool filter_e=True, bool filter_c=True, bool need_map=True) "
      "-> (Tensor nll, Tensor lse, Tensor tile_map)");
  m.def(
      "lce_backward_portable(Tensor? g_nll, Tensor? g_lse, Tensor e, Tensor c, Tensor? bias, Tensor targets, "
      "Tensor nll, Tensor lse, Tensor tile_map, Tensor? seed, *, "
      "SymInt ignore_index=-100, float? softcap=None, str method=\"sampled\", float eps=0.00390625, "
      "bool filter_e=True, bool filter_c=True, bool need_e=True, bool need_c=True, bool need_bias=False) "
      "-> (Tensor grad_e, Tensor grad_c, Tensor grad_bias)");
  m.def("build_info() -> str");
  // In builds with CUDA only.
  m.def("device_info(int device) -> str");
}
