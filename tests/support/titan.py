"""A stand-in for torchtitan 0.3: what its trainer does with a loss, where the package itself is not installed."""

from __future__ import annotations

import importlib
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn


class BaseLoss(ABC):
    @dataclass(kw_only=True, slots=True)
    class Config:
        def build(self, **kwargs: Any) -> Any:
            return self._owner(config=replace(self), **kwargs)

    def __init_subclass__(cls) -> None:
        cls.Config._owner = cls

    @abstractmethod
    def __init__(self, config, *, compile_config=None): ...

    def _maybe_compile(self, compile_config) -> None:
        if compile_config is not None and compile_config.enable and "loss" in compile_config.components:
            self.fn = torch.compile(self.fn, backend=compile_config.backend)


class ChunkedLossWrapper(BaseLoss):
    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):
        num_chunks: int = 8

    def set_lm_head(self, lm_head) -> None: ...

    def __call__(self, pred, labels, global_valid_tokens=None, **loss_inputs): ...


def install_stub(
    monkeypatch: pytest.MonkeyPatch, backend: str = "spmd_types", tp: int = 1, types: bool = False
) -> None:
    """Has `import torchtitan` give a stand-in with what cce_ext.torchtitan imports."""
    loss = {"IGNORE_INDEX": -100, "BaseLoss": BaseLoss, "ChunkedLossWrapper": ChunkedLossWrapper}
    contents: dict[str, dict[str, Any]] = {
        "torchtitan": {"__version__": "0.3.0"},
        "torchtitan.components": {},
        "torchtitan.components.loss": loss,
        "torchtitan.distributed": {},
        "torchtitan.distributed.spmd_types": {"spmd_mesh_size": lambda axis: tp},
        "torchtitan.distributed.utils": {"get_spmd_backend": lambda: backend},
        "spmd_types": {"is_type_checking": lambda: types},
    }
    for name, attributes in contents.items():
        module = ModuleType(name)
        module.__path__ = []
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)


def fresh_import(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """cce_ext.torchtitan, imported anew with what sys.modules has."""
    import cce_ext

    monkeypatch.delitem(sys.modules, "cce_ext.torchtitan", raising=False)
    monkeypatch.setattr(cce_ext, "torchtitan", None, raising=False)
    module = importlib.import_module("cce_ext.torchtitan")
    monkeypatch.setitem(sys.modules, "cce_ext.torchtitan", module)  # and gone with the test
    return module


def forward_backward(model: nn.Module, loss_fn: Any, tokens: torch.Tensor, labels: torch.Tensor, valid: torch.Tensor):
    """Trainer._forward_backward_body of torchtitan 0.3: the loss of one micro-batch, and what the loss says besides."""
    predicted = model(tokens)
    loss, metrics = loss_fn(predicted, labels, valid, positions=torch.arange(tokens.shape[1]).expand_as(tokens))
    loss.backward()
    return loss.detach(), metrics


def compile_config(*components: str) -> SimpleNamespace:
    return SimpleNamespace(enable=True, components=list(components), backend="aot_eager")
