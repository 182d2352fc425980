"""PyTorch, compiled for one shape of inputs at a time."""

import shutil
from typing import Any

import torch
from torch import nn

from vitshrink.errors import DependencyError
from vitshrink.models.runtimes.registry import Program, Runtime, enter

COMPILERS = ("g++", "clang++", "c++", "cl")


class Compiled(nn.Module):
    """A model and its compiled code."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.code = [torch.compile(model, dynamic=False)]  # no module of this one
        self.runtime = RUNTIME.described

    def forward(self, **inputs: Any) -> Any:
        return self.code[0](**inputs)


class TorchCompile(Runtime):
    """Needs a C++ compiler."""

    def require(self, purpose: str) -> None:
        if not any(map(shutil.which, COMPILERS)):
            raise DependencyError(f"{purpose} needs a C++ compiler, and there is none: install g++ or clang.")


def _compiled(program: Program) -> nn.Module:
    torch._dynamo.config.recompile_limit = 1000  # models share their code: beyond the limit they would run eagerly
    return Compiled(program.model)


RUNTIME = enter(TorchCompile("torch-compile", _compiled, "torch", factors=True))
