"""Models that differ in one way each, and what runs the code that is proposed for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ckptmgr.diagnose.artifact import TensorFacts
from ckptmgr.diagnose.difference import Difference
from ckptmgr.diagnose.live_model import facts_of_module
from ckptmgr.diagnose.match import match


def facts(module: nn.Module) -> tuple[TensorFacts, ...]:
    return facts_of_module(module)


def compare(old: nn.Module, new: nn.Module, *, prefix: str = "") -> Difference:
    saved = [TensorFacts(prefix + it.name, it.dtype, it.shape, it.tied_to) for it in facts(old)]
    return match(saved, facts(new))


def load(old: nn.Module, new: nn.Module, *, prefix: str = "") -> Difference:
    """Run exactly the code that is proposed, on the real modules."""
    difference = compare(old, new, prefix=prefix)
    state = {prefix + name: tensor.clone() for name, tensor in old.state_dict().items()}
    scope: dict[str, Any] = {"state": state, "model": new}
    exec("\n".join(difference.code()), scope)
    return difference


def told(difference: Difference) -> list[tuple[str, str]]:
    return [(it.kind, it.certainty) for it in difference.proposals]


class Bert(nn.Module):
    """Named as BERT's encoder is."""

    def __init__(self, width: int = 8, nlayers: int = 3) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(self._layer(width) for _ in range(nlayers))})

    @staticmethod
    def _layer(width: int) -> nn.Module:
        attention = nn.ModuleDict(
            {
                "self": nn.ModuleDict({name: nn.Linear(width, width) for name in ("query", "key", "value")}),
                "output": nn.ModuleDict({"dense": nn.Linear(width, width), "LayerNorm": nn.LayerNorm(width)}),
            }
        )
        output = nn.ModuleDict({"dense": nn.Linear(4 * width, width), "LayerNorm": nn.LayerNorm(width)})
        intermediate = nn.ModuleDict({"dense": nn.Linear(width, 4 * width)})
        return nn.ModuleDict({"attention": attention, "intermediate": intermediate, "output": output})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.encoder["layer"]:
            own = layer["attention"]["self"]
            x = _block(
                x,
                tuple(own[name](x) for name in ("query", "key", "value")),
                layer["attention"]["output"]["dense"],
                layer["attention"]["output"]["LayerNorm"],
                layer["intermediate"]["dense"],
                layer["output"]["dense"],
                layer["output"]["LayerNorm"],
            )
        return x


class Short(nn.Module):
    """The same, as somebody writes it from memory; with one matrix for query, key and value or with three."""

    def __init__(self, width: int = 8, nlayers: int = 3, *, is_fused: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for _ in range(nlayers):
            qkv = {"qkv": nn.Linear(width, 3 * width)} if is_fused else {n: nn.Linear(width, width) for n in "qkv"}
            parts = {"attn": nn.ModuleDict({**qkv, "out": nn.Linear(width, width)}), "norm1": nn.LayerNorm(width)}
            more = {
                "fc1": nn.Linear(width, 4 * width),
                "fc2": nn.Linear(4 * width, width),
                "norm2": nn.LayerNorm(width),
            }
            self.layers.append(nn.ModuleDict({**parts, **more}))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            attn = layer["attn"]
            qkv = attn["qkv"](x).chunk(3, -1) if "qkv" in attn else tuple(attn[name](x) for name in "qkv")
            x = _block(x, qkv, attn["out"], layer["norm1"], layer["fc1"], layer["fc2"], layer["norm2"])
        return x


def _block(x: torch.Tensor, qkv: tuple[torch.Tensor, ...], out: Any, norm1: Any, fc1: Any, fc2: Any, norm2: Any) -> Any:
    x = norm1(x + out(nn.functional.scaled_dot_product_attention(*qkv)))
    return norm2(x + fc2(torch.relu(fc1(x))))


class Separate(nn.Module):
    """Attention with three matrices, in the names of MultiheadAttention's parts."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part(x).unflatten(-1, (2, -1)).transpose(1, 2) for part in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Nano(nn.Module):
    """GPT-2 with Linears where transformers has Conv1D, as nanoGPT has it."""

    def __init__(self, width: int = 8, nwords: int = 50) -> None:
        super().__init__()

        def block() -> nn.Module:
            attn = {"c_attn": nn.Linear(width, 3 * width), "c_proj": nn.Linear(width, width)}
            mlp = {"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)}
            norms = {"ln_1": nn.LayerNorm(width), "ln_2": nn.LayerNorm(width)}
            return nn.ModuleDict({**norms, "attn": nn.ModuleDict(attn), "mlp": nn.ModuleDict(mlp)})

        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(nwords, width),
                "wpe": nn.Embedding(16, width),
                "h": nn.ModuleList(block() for _ in range(2)),
                "ln_f": nn.LayerNorm(width),
            }
        )
        self.lm_head = nn.Linear(width, nwords, bias=False)
        self.lm_head.weight = self.transformer["wte"].weight

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        parts = self.transformer
        x = parts["wte"](words) + parts["wpe"](torch.arange(words.shape[1]))
        for block in parts["h"]:
            q, k, v = (
                it.unflatten(-1, (2, -1)).transpose(1, 2)
                for it in block["attn"]["c_attn"](block["ln_1"](x)).chunk(3, -1)
            )
            attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
            x = x + block["attn"]["c_proj"](attended)
            hidden = nn.functional.gelu(block["mlp"]["c_fc"](block["ln_2"](x)), approximate="tanh")
            x = x + block["mlp"]["c_proj"](hidden)
        return self.lm_head(parts["ln_f"](x))
