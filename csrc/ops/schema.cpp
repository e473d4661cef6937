#include <torch/csrc/stable/library.h>

#include "ops/namespace.h"

// Every operator's signature. The kernels that are not in csrc/ops are registered from Python
// (cce_ext/ops.py).
CCE_TORCH_LIBRARY(m) {
  m.def(
      "linear_cross_entropy(Tensor e, Tensor c, Tensor targets, Tensor? bias=None, SymInt? "
      "ignore_index=-100, "
      "float? softcap=None, str reduction=\"mean\", SymInt shift=0, float? filter_eps=-1.0, "
      "bool filter_e_grad=True, bool filter_c_grad=True, str impl=\"cce\", str? scan=None) -> Tensor");
  // temperatures: of the targets' shape, in temperature's place. outputs: names, with commas in between. What
  // they do not name is [0].
  m.def(
      "linear_logprobs(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias=None, *, "
      "float temperature=1.0, Tensor? temperatures=None, float? softcap=None, float logit_scale=1.0, "
      "SymInt? ignore_index=-100, SymInt shift=0, str outputs=\"entropy\", str impl=\"cce\", "
      "float? filter_eps=-1.0, bool batch_invariant=False) "
      "-> (Tensor logprobs, Tensor lse, Tensor entropy, Tensor is_top1, Tensor log_sum_sq_probs, "
      "Tensor mean_logits, Tensor max_logprob)");
  // ignore_index None: all tokens count, and no copy is made of the rows of e that do.
  // A token's logits are scale (fp32, fp64 for fp64 e; [N], positive) times softcap(e . c + bias). stats: a
  // sum of 1 entropy, 2 the logarithm of the sum of p^2, 4 the mean of the logits, 8 the largest logit and
  // argmax, the first column that has it. The output stats is [4, N], 0 in rows that are not asked for, or
  // [0, 0]; argmax [N] int64 or [0]. Of stats the entropy alone has a gradient.
  // scan "fp8": the logits are scanned in e4m3, the tile map is the scan's, and nll and lse are corrected by
  // what seed draws, unbiased. For CUDA's 16 bits on compute capability 9.0, with method "sampled", a seed,
  // need_map, no scale, no stats and no batch_invariant.
  // keep_logits, for few tokens of CUDA's 16 bits: in the tile map's place the logits, 16 bits each
  // [V / 256, N, 258], from which method "exact" takes its gradient without computing them again.
  m.def(
      "lce_forward(Tensor e, Tensor c, Tensor? bias, Tensor targets, Tensor? seed, *, "
      "SymInt? ignore_index=-100, float? softcap=None, str method=\"sampled\", float eps=0.00390625, "
      "bool filter_e=True, bool filter_c=True, bool need_map=True, Tensor? scale=None, SymInt stats=0, "
      "bool batch_invariant=False, str? scan=None, bool keep_logits=False) "
      "-> (Tensor nll, Tensor lse, Tensor tile_map, Tensor stats, Tensor argmax)");
  // count: what g_nll is divided by, a scalar of nll's dtype, as reduce_nll gives it.
  m.def(
      "lce_backward(Tensor? g_nll, Tensor? g_lse, Tensor? g_entropy, Tensor e, Tensor c, Tensor? bias, "
      "Tensor targets, Tensor nll, Tensor lse, Tensor tile_map, Tensor? entropy, Tensor? seed, *, "
      "SymInt? ignore_index=-100, float? softcap=None, str method=\"sampled\", float eps=0.00390625, "
      "bool filter_e=True, bool filter_c=True, bool need_e=True, bool need_c=True, bool need_bias=False, "
      "Tensor? scale=None, Tensor? count=None) "
      "-> (Tensor grad_e, Tensor grad_c, Tensor grad_bias)");
  m.def(
      "label_logits(Tensor e, Tensor c, Tensor? bias, Tensor targets, *, "
      "SymInt? ignore_index=-100, float? softcap=None, Tensor? scale=None) -> Tensor");
  // The sum of nll over the tokens that count, or with mean their mean, and how many they are, both scalars
  // of nll's dtype. nll is 0 where a token does not count.
  m.def(
      "reduce_nll(Tensor nll, Tensor targets, *, SymInt ignore_index=-100, bool mean=True) "
      "-> (Tensor loss, Tensor count)");
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
      "SymInt? ignore_index=-100, float? softcap=None, str method=\"sampled\", float eps=0.00390625, "
      "bool filter_e=True, bool filter_c=True, bool need_map=True, Tensor? scale=None, SymInt stats=0, "
      "bool batch_invariant=False, str? scan=None, bool keep_logits=False) "
      "-> (Tensor nll, Tensor lse, Tensor tile_map, Tensor stats, Tensor argmax)");
  m.def(
      "lce_backward_portable(Tensor? g_nll, Tensor? g_lse, Tensor? g_entropy, Tensor e, Tensor c, Tensor? "
      "bias, "
      "Tensor targets, Tensor nll, Tensor lse, Tensor tile_map, Tensor? entropy, Tensor? seed, *, "
      "SymInt? ignore_index=-100, float? softcap=None, str method=\"sampled\", float eps=0.00390625, "
      "bool filter_e=True, bool filter_c=True, bool need_e=True, bool need_c=True, bool need_bias=False, "
      "Tensor? scale=None, Tensor? count=None) "
      "-> (Tensor grad_e, Tensor grad_c, Tensor grad_bias)");
  // The divergence of the softmaxes of two heads, which may differ in D alone. mask: bool [N], the tokens
  // that count. The logits of each are its softcap's, over temperature. lse, teacher_lse and mean are for the
  // backward, and have no gradient.
  m.def(
      "kl_forward(Tensor e, Tensor c, Tensor? bias, Tensor teacher_e, Tensor teacher_c, Tensor? "
      "teacher_bias, "
      "Tensor? mask, *, str kind=\"forward\", float beta=0.5, float temperature=1.0, float? softcap=None, "
      "float? teacher_softcap=None) -> (Tensor kl, Tensor lse, Tensor teacher_lse, Tensor mean)");
  m.def(
      "kl_backward(Tensor g, Tensor e, Tensor c, Tensor? bias, Tensor teacher_e, Tensor teacher_c, "
      "Tensor? teacher_bias, Tensor? mask, Tensor lse, Tensor teacher_lse, Tensor mean, *, "
      "str kind=\"forward\", float beta=0.5, float temperature=1.0, float? softcap=None, "
      "float? teacher_softcap=None, bool need_e=True, bool need_c=True, bool need_bias=False) "
      "-> (Tensor grad_e, Tensor grad_c, Tensor grad_bias)");
  m.def("build_info() -> str");
  // In builds with CUDA only.
  m.def("device_info(int device) -> str");
}
