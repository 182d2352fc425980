"""A linear layer as integers, rounded to the nearest."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vitshrink.compression.candidates import Candidate, Cost, Form, Offer, Site
from vitshrink.compression.findings import Findings
from vitshrink.compression.forms.registry import Material, form_maker
from vitshrink.compression.repairs.bias import SHIFTING, shifted_bias
from vitshrink.config.options import quantized_bits
from vitshrink.methods import Factorisation, LayerMethod
from vitshrink.models.checkpoint import HEADER_BYTES, replace_layers
from vitshrink.models.structures.quantized import Activations, QuantizedLinear, matrix_bytes
from vitshrink.models.targets import Target


@dataclass(frozen=True, slots=True)
class Integer:
    """Weights of ``bits`` bits, and how activations are treated."""

    bits: int
    activations: Activations

    @property
    def label(self) -> str:
        return f"int{self.bits}"

    @property
    def rank(self) -> None:
        return None


@form_maker("int8", "int4")
def make(name: str, material: Material, method: LayerMethod) -> "IntegerMaker":
    # activations stay in floating point: what their rounding loses was not priced
    return IntegerMaker(Integer(quantized_bits(name, "none")[0], "none"), material, method)


@dataclass(frozen=True, eq=False)
class IntegerMaker:
    """Offers one width, which loses what the method says that noise of the size of its rounding errors does."""

    form: Integer
    material: Material
    method: LayerMethod
    _rounded: dict[str, QuantizedLinear] = field(default_factory=dict)

    def offers(self, findings: Findings | None = None) -> Sequence[Offer]:
        return [
            self._offer(target, findings)
            for target in self.material.targets
            if findings is None or target.name in findings.layers
        ]

    @torch.no_grad()
    def build(self, model: PreTrainedModel, chosen: Mapping[str, Form], findings: Findings) -> None:
        replace_layers(model, {name: self._repaired(name, findings) for name in chosen})

    def _offer(self, target: Target, findings: Findings | None) -> Offer:
        kept = self.material.dense_cost(target.shape)
        nbytes = matrix_bytes(*target.shape, self.form.bits, self.material.itemsize) + HEADER_BYTES  # of the scales
        loss = 0.0 if findings is None else self._loss(target, findings)
        return Offer.of(
            Site(target.name, "matrix", target.shape),
            self.material.currency,
            Candidate(None, kept),
            [Candidate(self.form, Cost(kept.parameters, nbytes), loss)],
        )

    @torch.no_grad()
    def _loss(self, target: Target, findings: Findings) -> float:
        weight = self.material.layer(target.name).weight.double()
        error = self._layer(target.name).dense_weight().double() - weight
        centred = self.material.compensation in SHIFTING
        noise = self.method.noise(weight, findings.stats.get(target.name), centred=centred, **self.material.options)
        loss = noise * float(error.square().mean())
        found: Factorisation = findings.layers[target.name]
        return found.at_output(loss) if self.material.measures else loss

    def _layer(self, name: str) -> QuantizedLinear:
        if name not in self._rounded:
            layer = self.material.layer(name)
            self._rounded[name] = QuantizedLinear.from_layer(layer, self.form.bits, self.form.activations)
        return self._rounded[name]

    def _repaired(self, name: str, findings: Findings) -> QuantizedLinear:
        """The rounded layer, with a bias that makes its mean output exact, where the job moves biases."""
        dense = self.material.layer(name)
        layer = QuantizedLinear.from_layer(dense, self.form.bits, self.form.activations)
        if layer.bias is not None and self.material.compensation in SHIFTING:
            mean: Tensor = findings.stats[name].mean
            approximation = layer.dense_weight().double()
            layer.bias.copy_(shifted_bias(dense.bias.double(), dense.weight.double(), approximation, mean))
        return layer
