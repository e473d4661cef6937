"""Cut cross-entropy: the loss layer of large-vocabulary language models, without the logits."""

from . import layers  # kernels looks for layers here
from .api import LinearCrossEntropy, LossStats, linear_cross_entropy
from .kl import linear_kl
from .logprobs import LogProbs, linear_logprobs
from .ops import HAS_CUDA
from .options import IMPLS, LinearCrossEntropyImpl
from .reduction import compute_z_loss
from .vocab_parallel import VocabParallelOptions

__version__ = "0.2.0"

__all__ = [
    "HAS_CUDA",
    "IMPLS",
    "LinearCrossEntropy",
    "LinearCrossEntropyImpl",
    "LogProbs",
    "LossStats",
    "VocabParallelOptions",
    "__version__",
    "compute_z_loss",
    "layers",
    "linear_cross_entropy",
    "linear_kl",
    "linear_logprobs",
]
