"""Linear layers, embeddings, patch projections and positions that are stored as entropy-coded integers, see ``codes``.

``weight``, of positions ``position_embeddings``, holds the steps of the rows, in floating point and trainable;
``codes`` the rest, as bytes. The shape of the former stops transformers without vitshrink from loading it.

The matrix is decoded when it is first used, unless it was ``decode_ahead``, and then kept in one of three ways, see
``hold``.
"""

from dataclasses import dataclass
from typing import Any, Literal, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitshrink.errors import CheckpointError
from vitshrink.models.codes import Codes, decode, decode_each, encode
from vitshrink.models.structures.quantized import dynamic_product
from vitshrink.models.structures.registry import read_entry, structure
from vitshrink.runtime.offloading import at_home

Memory = Literal["float", "integers", "stream"]
"""How a matrix is held: decoded (fastest), as integers (a quarter of float32), or as it is stored (least memory)."""

Module = TypeVar("Module", nn.Linear, nn.Embedding, nn.Conv2d)


@structure("coded")
@dataclass(frozen=True)
class CodedSpec:
    """``bytes``: the length of the stream."""

    bytes: int

    def to_dict(self) -> dict[str, Any]:
        return {"bytes": self.bytes}

    @classmethod
    def from_dict(cls, entry: Any) -> Self:
        """Raises CheckpointError when the entry is not one that this version writes."""
        return cls(**read_entry(entry, ("bytes",)))

    def fits(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear | nn.Embedding | nn.Conv2d) or has_positions(module)

    def build(self, module: nn.Module) -> "Coded":
        """An empty module in the place of a dense one, of its kind."""
        if has_positions(module):
            return CodedPositions(module, self)
        made: type[Coded] = next(cls for kind, cls in _KINDS.items() if isinstance(module, kind))
        return made(module, self)


class Coded(nn.Module):
    """What the three kinds have in common."""

    codes: Tensor
    bias: Tensor | None
    where = "a coded matrix"
    """Its name, where it was read from a checkpoint: for errors."""

    def __init__(self, like: nn.Module, spec: CodedSpec) -> None:
        """``like`` a dense module, of which everything but the matrix is kept; the matrix is left empty."""
        super().__init__()
        weight = dense_tensor(like)
        self.spec = spec
        self.dense_shape = tuple(weight.shape)
        self.memory: Memory = "float"
        self._ahead: Codes | None = None
        """What was decoded ahead, until it is used."""
        self._codes: Codes | None = None
        self._matrix: tuple[Tensor, Tensor] | None = None
        """The steps, of which a view may have others, and which training changes, and what they make."""
        empty = weight.new_empty(self.matrix_shape[0])
        self._put_steps(nn.Parameter(empty, requires_grad=weight.requires_grad))
        self.register_buffer("codes", torch.empty(spec.bytes, dtype=torch.uint8, device=weight.device))
        if isinstance(like, nn.Linear | nn.Conv2d):
            self.register_parameter("bias", like.get_parameter("bias") if like.bias is not None else None)

    def _put_steps(self, steps: nn.Parameter) -> None:
        self.weight = steps

    @classmethod
    @torch.no_grad()
    def from_codes(cls, like: nn.Module, rows: Tensor, codes: Codes) -> "Coded":
        """``like`` with these integers and steps in the place of its matrix."""
        stream = encode(codes)
        made = CodedSpec(len(stream)).build(like)
        made.weight.copy_(rows)
        made.codes.copy_(stream)
        return made

    @torch.no_grad()
    def take(self, rows: Tensor, stream: Tensor) -> None:
        """These steps of rows (rows,), and a stream of any length, in the place of its own."""
        self.spec = CodedSpec(len(stream))
        self.weight.copy_(rows)
        self.codes = stream.to(self.codes.device)
        self._forget()

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(rows, columns) of the stored matrix: of a convolution all inputs of an output in one row."""
        rows = self.dense_shape[0]
        return rows, torch.Size(self.dense_shape).numel() // rows

    def hold(self, memory: Memory) -> None:
        """How the matrix is held from now on."""
        self.memory = memory
        self._forget()

    def decoded(self) -> Codes:
        """The integers and the steps of columns. Raises CheckpointError for a damaged stream."""
        if self._ahead is not None:
            found, self._ahead = self._ahead, None
            return found
        try:
            return decode(self.codes, self.matrix_shape)
        except CheckpointError as error:
            raise CheckpointError(f"{self.where}: {error}") from error

    def dense_weight(self) -> Tensor:
        """The tensor that the dense module would have, in the type of the steps."""
        return self._scaled(self._codes or self.decoded())

    def dense(self) -> nn.Module:
        """The dense module that this one stands for, with tensors of its own."""
        raise NotImplementedError

    def matrix(self) -> Tensor:
        """``dense_weight``, decoded once where it is held so."""
        if self.memory != "float" or (self.weight.requires_grad and torch.is_grad_enabled()):
            return self._scaled(self._integers())
        # by value: optimizers that step many parameters in one go do not count as a change of each
        steps = at_home(self.weight)
        if self._matrix is None or not torch.equal(self._matrix[0], steps):
            self._matrix = steps.detach().clone(), at_home(self.dense_weight().detach())
        return self._matrix[1].to(self.weight.device)

    def _scaled(self, codes: Codes) -> Tensor:
        return codes.scaled(self.weight).view(self.dense_shape).to(self.weight.dtype)

    def _integers(self) -> Codes:
        """Decoded once, where integers are held, or steps are trained."""
        if self.memory == "stream":
            return self.decoded()
        if self._codes is None:
            self._codes = self.decoded()
        return self._codes

    def _forget(self) -> None:
        self._ahead = self._codes = self._matrix = None

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        ahead = self._ahead
        self._forget()  # of another device or type
        moved: Self = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._ahead = None if ahead is None else ahead.to(self.codes.device)
        return moved

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._forget()
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        shape = ", ".join(map(str, self.dense_shape))
        return f"{shape}, bits={8 * self.spec.bytes / torch.Size(self.dense_shape).numel():.2f}"


class CodedLinear(Coded):
    """y = W x + b."""

    def __init__(self, like: nn.Linear, spec: CodedSpec) -> None:
        super().__init__(like, spec)
        self.in_features, self.out_features = like.in_features, like.out_features

    @torch.no_grad()
    def dense(self) -> nn.Linear:
        made = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        return _filled(made, self)

    def forward(self, x: Tensor) -> Tensor:
        if self.memory != "integers" or self.training:
            return F.linear(x, self.matrix(), self.bias)
        codes = self._integers()
        scaled = (x * codes.columns).reshape(-1, self.in_features)
        if codes.integers.dtype == torch.int8:
            y = dynamic_product(scaled, codes.integers, self.weight, self.bias)
        else:
            y = F.linear(scaled, codes.integers.to(scaled.dtype)) * self.weight
            y = y if self.bias is None else y + self.bias
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)


class CodedEmbedding(Coded):
    """Rows by number."""

    def __init__(self, like: nn.Embedding, spec: CodedSpec) -> None:
        super().__init__(like, spec)
        self.num_embeddings, self.embedding_dim = like.num_embeddings, like.embedding_dim
        self.padding_idx = like.padding_idx

    @torch.no_grad()
    def dense(self) -> nn.Embedding:
        made = nn.Embedding(self.num_embeddings, self.embedding_dim, self.padding_idx, device="meta")
        return _filled(made, self)

    def forward(self, tokens: Tensor) -> Tensor:
        if self.memory != "integers":
            return F.embedding(tokens, self.matrix())
        codes = self._integers()
        rows = codes.integers[tokens].float() * codes.columns * self.weight[tokens].float()[..., None]
        return rows.to(self.weight.dtype)


class CodedConv2d(Coded):
    """A convolution of which a kernel is a row."""

    def __init__(self, like: nn.Conv2d, spec: CodedSpec) -> None:
        super().__init__(like, spec)
        self.kernel_size = like.kernel_size
        self.settings: Any = (like.stride, like.padding, like.dilation, like.groups)

    @torch.no_grad()
    def dense(self) -> nn.Conv2d:
        outputs, inputs, *size = self.dense_shape
        stride, padding, dilation, groups = self.settings
        made = nn.Conv2d(
            inputs * groups,
            outputs,
            (size[0], size[1]),
            stride,
            padding,
            dilation,
            groups,
            bias=self.bias is not None,
            device="meta",
        )
        return _filled(made, self)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.matrix(), self.bias, *self.settings)


class CodedPositions(Coded):
    """The embeddings of an image model, of whose tensors the positions are coded; everything else is as it was.

    ``position_embeddings`` holds the steps of positions.
    """

    def __init__(self, like: nn.Module, spec: CodedSpec) -> None:
        super().__init__(like, spec)
        self.dense_class = type(like)
        for name, kept in vars(like).items():
            vars(self).setdefault(name, kept)
        for name, parameter in like._parameters.items():
            if name != "position_embeddings":
                self.register_parameter(name, parameter)
        for name, child in like.named_children():
            self.add_module(name, child)

    def _put_steps(self, steps: nn.Parameter) -> None:
        self.position_embeddings = steps

    @property
    def weight(self) -> nn.Parameter:  # type: ignore[override]
        return self.position_embeddings

    @torch.no_grad()
    def dense(self) -> nn.Module:
        positions = nn.Parameter(self.dense_weight()[None], requires_grad=self.weight.requires_grad)
        made = self._with(positions)
        vars(made)["_modules"] = dict(self._modules)
        return made.train(self.training)

    def forward(self, *inputs: Any, **options: Any) -> Tensor:
        found: Tensor = self._with(self.matrix()[None]).forward(*inputs, **options)
        return found

    def _with(self, positions: Tensor) -> nn.Module:
        """The dense module with these positions, and otherwise the tensors and children of this one."""
        made = self.dense_class.__new__(self.dense_class)
        nn.Module.__init__(made)
        for name, kept in vars(self).items():
            if name not in _OF_CODED:
                vars(made).setdefault(name, kept)
        vars(made)["_modules"] = self._modules
        vars(made)["_parameters"] = self._parameters | {"position_embeddings": positions}
        return made


_OF_CODED = ("spec", "dense_shape", "dense_class", "memory", "where", "_ahead", "_codes", "_matrix")
"""What the dense module does not have."""


def has_positions(module: nn.Module) -> bool:
    """Whether it is the embeddings of an image model, which add a parameter of positions (1, tokens, width)."""
    positions = getattr(module, "position_embeddings", None)
    return hasattr(module, "patch_embeddings") and isinstance(positions, nn.Parameter) and positions.dim() == 3


def dense_tensor(module: nn.Module) -> Tensor:
    """What is coded of a dense module: its weight, or the positions (tokens, width)."""
    found = module.position_embeddings[0] if has_positions(module) else module.weight  # type: ignore[index]
    assert isinstance(found, Tensor)
    return found


def _filled(module: Module, coded: Coded) -> Module:
    """``module`` with what ``coded`` stands for, in its mode."""
    module.weight = nn.Parameter(coded.dense_weight(), requires_grad=coded.weight.requires_grad)
    if coded.bias is not None:
        module.bias = nn.Parameter(coded.bias.detach().clone(), requires_grad=coded.bias.requires_grad)
    return module.train(coded.training)


_KINDS: dict[type[nn.Module], type[Coded]] = {
    nn.Linear: CodedLinear,
    nn.Embedding: CodedEmbedding,
    nn.Conv2d: CodedConv2d,
}


def decode_ahead(model: nn.Module) -> None:
    """Decode all matrices of a model in one go, which takes a fraction of the time that it takes at their first use.

    What is damaged is left, and says so when it is used.
    """
    coded = [module for module in model.modules() if isinstance(module, Coded) and not module.codes.is_meta]
    found = decode_each([(module.codes, module.matrix_shape) for module in coded])
    for module, each in zip(coded, found, strict=True):
        module._ahead = each if isinstance(each, Codes) else None


@torch.no_grad()
def decode_all(model: nn.Module) -> nn.Module:
    """Put dense modules in the place of the coded ones, in place, and return the model."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Coded):
            model.set_submodule(name, module.dense(), strict=True)
    return model


def hold(model: nn.Module, memory: Memory) -> nn.Module:
    """Hold the coded matrices of a model in one way, and return the model.

    ``float``: decoded, fastest where floating point is. ``integers``: one byte a weight; linear layers multiply
    integers, with activations rounded token by token. ``stream``: as it is stored, decoded at every use.
    """
    for module in model.modules():
        if isinstance(module, Coded):
            module.hold(memory)
    return model
