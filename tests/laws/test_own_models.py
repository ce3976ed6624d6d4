"""Models nobody prepared: the transformer layers of torch.nn, and what users write themselves."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchdrop
from written_blocks import Stack, W, mlp
from zoo import BARELY, assert_same, fingerprint

# --- the transformer layers of torch.nn -------------------------------------------------------

B, T, S, D = 6, 5, 7, 8  # samples, steps of the target and of the memory, features
Weigh = Callable[[str, Tensor], Tensor]


def attend(
    attention: nn.MultiheadAttention, x: Tensor, memory: Tensor, mask: Any, pad: Any
) -> Tensor:
    out: Tensor = attention(x, memory, memory, attn_mask=mask, key_padding_mask=pad)[0]
    return out


def residual(layer: Any, norm: nn.Module, x: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
    """One residual of a layer of torch, norm first or last."""
    if layer.norm_first:
        return x + branch(norm(x))
    out: Tensor = norm(x + branch(x))
    return out


def feed_forward(layer: Any, name: str, weigh: Weigh) -> Callable[[Tensor], Tensor]:
    return lambda y: weigh(f"{name}:linear1", layer.linear2(layer.linear1(y).relu()))


def encoder_by_hand(layers: Any, prefix: str, x: Tensor, weigh: Weigh, mask: Any, pad: Any) -> Any:
    for i, layer in enumerate(layers):
        name = f"{prefix}{i}"

        def attention(y: Tensor, layer: Any = layer, name: str = name) -> Tensor:
            return weigh(f"{name}:self_attn", attend(layer.self_attn, y, y, mask, pad))

        x = residual(layer, layer.norm1, x, attention)
        x = residual(layer, layer.norm2, x, feed_forward(layer, name, weigh))
    return x


def decoder_by_hand(
    layers: Any, prefix: str, x: Tensor, memory: Tensor, weigh: Weigh, masks: dict[str, Any]
) -> Any:
    for i, layer in enumerate(layers):
        name = f"{prefix}{i}"

        def own(y: Tensor, layer: Any = layer, name: str = name) -> Tensor:
            found = masks.get("tgt_mask"), masks.get("tgt_key_padding_mask")
            return weigh(f"{name}:self_attn", attend(layer.self_attn, y, y, *found))

        def cross(y: Tensor, layer: Any = layer, name: str = name) -> Tensor:
            found = masks.get("memory_mask"), masks.get("memory_key_padding_mask")
            return weigh(f"{name}:multihead_attn", attend(layer.multihead_attn, y, memory, *found))

        x = residual(layer, layer.norm1, x, own)
        x = residual(layer, layer.norm2, x, cross)
        x = residual(layer, layer.norm3, x, feed_forward(layer, name, weigh))
    return x


class EncoderLayers(nn.Module):
    """Layers of torch in a ModuleList of one's own."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(D, 2, 16, 0.0, **options) for _ in range(2)
        )

    def forward(self, src: Tensor, mask: Any = None, src_key_padding_mask: Any = None) -> Tensor:
        for layer in self.layers:
            src = layer(src, mask, src_key_padding_mask)
        return src


class DecoderLayers(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(D, 2, 16, 0.0, **options) for _ in range(2)
        )

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Any = None,
        tgt_key_padding_mask: Any = None,
        memory_mask: Any = None,
        memory_key_padding_mask: Any = None,
    ) -> Tensor:
        pads = tgt_key_padding_mask, memory_key_padding_mask
        for layer in self.layers:
            tgt = layer(tgt, memory, tgt_mask, memory_mask, *pads)
        return tgt


def build(kind: str, **options: Any) -> tuple[nn.Module, Callable[..., Any]]:
    """A model, and the same written by hand with a weight for each branch."""
    model: nn.Module
    if kind == "nn.Transformer":
        model = nn.Transformer(D, 2, 2, 2, 16, 0.0, **options)

        def both(m: Any, weigh: Weigh, src: Tensor, tgt: Tensor, **masks: Any) -> Any:
            pad = masks.pop("src_key_padding_mask", None)
            memory = encoder_by_hand(m.encoder.layers, "encoder.layers.", src, weigh, None, pad)
            memory = m.encoder.norm(memory)
            y = decoder_by_hand(m.decoder.layers, "decoder.layers.", tgt, memory, weigh, masks)
            return m.decoder.norm(y)

        return model, both
    if "encoder" in kind:
        model = EncoderLayers(**options)
        if kind == "encoder":
            layer = nn.TransformerEncoderLayer(D, 2, 16, 0.0, **options)
            model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

        def encode(m: Any, weigh: Weigh, src: Tensor, **masks: Any) -> Any:
            mask, pad = masks.get("mask"), masks.get("src_key_padding_mask")
            return encoder_by_hand(m.layers, "layers.", src, weigh, mask, pad)

        return model, encode
    model = DecoderLayers(**options)
    if kind == "decoder":
        model = nn.TransformerDecoder(nn.TransformerDecoderLayer(D, 2, 16, 0.0, **options), 2)

    def decode(m: Any, weigh: Weigh, tgt: Tensor, memory: Tensor, **masks: Any) -> Any:
        return decoder_by_hand(m.layers, "layers.", tgt, memory, weigh, masks)

    return model, decode


def padding(steps: int) -> Tensor:
    """True where a sample has ended: each after another number of steps."""
    ends = torch.arange(B) % (steps - 1) + 1
    return torch.arange(steps)[None] >= ends[:, None]


def minus_infinity(mask: Tensor) -> Tensor:
    """The same mask as numbers to be added: torch wants both masks of a call alike."""
    return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(mask, float("-inf"))


CAUSAL = torch.ones(T, T, dtype=torch.bool).triu(1)
ENCODER_MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "padding": {"src_key_padding_mask": padding(T)},
    "causal": {"mask": minus_infinity(CAUSAL)},
    "causal, padding": {"mask": CAUSAL, "src_key_padding_mask": padding(T)},
    "each its own": {"mask": torch.rand(B * 2, T, T, dtype=torch.float64)},
}
DECODER_MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "causal": {"tgt_mask": minus_infinity(CAUSAL)},
    "all": {
        "tgt_mask": CAUSAL,
        "tgt_key_padding_mask": padding(T),
        "memory_mask": torch.ones(T, S, dtype=torch.bool).triu(3),
        "memory_key_padding_mask": padding(S),
    },
}
BOTH_MASKS = {
    "none": {},
    "all": {
        "src_key_padding_mask": padding(S),
        "tgt_mask": CAUSAL,
        "tgt_key_padding_mask": padding(T),
        "memory_key_padding_mask": padding(S),
    },
}
LAYERS = [
    *(("encoder", masks) for masks in ENCODER_MASKS),
    *(("decoder", masks) for masks in DECODER_MASKS),
    *(("nn.Transformer", masks) for masks in BOTH_MASKS),
    *(("encoder layers alone", masks) for masks in ("none", "causal, padding")),
    *(("decoder layers alone", masks) for masks in ("none", "all")),
]


def call_of(kind: str, masks: str, batch_first: bool) -> dict[str, Any]:
    target = torch.randn(T, B, D, dtype=torch.float64, requires_grad=True)
    memory = torch.randn(S, B, D, dtype=torch.float64, requires_grad=True)
    if batch_first:
        target, memory = target.transpose(0, 1), memory.transpose(0, 1)
    if kind == "nn.Transformer":
        return {"src": memory, "tgt": target, **BOTH_MASKS[masks]}
    if "encoder" in kind:
        return {"src": target, **ENCODER_MASKS[masks]}
    return {"tgt": target, "memory": memory, **DECODER_MASKS[masks]}


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(("kind", "masks"), LAYERS)
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
def test_layers_of_torch(kind: str, masks: str, batch_first: bool, norm_first: bool) -> None:
    model, by_hand = build(kind, batch_first=batch_first, norm_first=norm_first)
    model.double()
    dense, before = copy.deepcopy(model), fingerprint(model)
    call = call_of(kind, masks, batch_first)
    plan = torchdrop.add_stochastic_depth(model, 0.5, schedule="uniform", example_inputs=call)
    assert len(plan.blocks) == (4 if kind == "nn.Transformer" else 2)
    assert {b.action for r in plan.blocks for b in r.branches} == {"skip"}
    title = " ".join(repr(plan).split())
    assert ("batch on dimension 1" in title) == (not batch_first)
    assert fingerprint(model) == before
    assert_same(model.eval()(**call), dense.eval()(**call))
    model.train(), dense.train()
    rates = {b.name: b.p for r in plan.blocks for b in r.branches}
    plan.set_p(dict.fromkeys(rates, BARELY))
    assert_same(model(**call), dense(**call))

    plan.set_p(rates)
    against_hand(model, dense, by_hand, plan, call, dim=0 if batch_first else 1)


def against_hand(
    model: nn.Module,
    dense: nn.Module,
    by_hand: Callable[..., Tensor],
    plan: torchdrop.Plan,
    call: dict[str, Any],
    dim: int = 0,
) -> None:
    """Rows dropped: the same as a weight on each row of each branch, in words of our own."""
    rates = {b.name: b.p for r in plan.blocks for b in r.branches}
    floats = [name for name, value in call.items() if value.requires_grad]
    for _ in range(2):
        model.zero_grad(), dense.zero_grad()
        mine = {k: v.detach().clone().requires_grad_(v.requires_grad) for k, v in call.items()}
        theirs = {k: v.detach().clone().requires_grad_(v.requires_grad) for k, v in call.items()}
        out = model(**mine)
        kept, used = plan.last_kept(), set()

        def weigh(
            name: str, y: Tensor, kept: dict[str, Tensor] = kept, used: set[str] = used
        ) -> Tensor:
            used.add(name)
            weight = torch.zeros(y.shape[dim], dtype=y.dtype)
            weight[kept[name]] = 1 / (1 - rates[name])
            return y * weight.view([-1 if d == dim else 1 for d in range(y.dim())])

        expected = by_hand(dense, weigh, **theirs)
        assert used == set(rates)
        assert 0 < sum(rows.numel() for rows in kept.values()) < out.shape[dim] * len(kept)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)
        direction = torch.randn_like(out)
        (out * direction).sum().backward(), (expected * direction).sum().backward()
        for (name, one), two in zip(model.named_parameters(), dense.parameters(), strict=True):
            torch.testing.assert_close(one.grad, two.grad, rtol=0, atol=1e-10, msg=name)
        for name in floats:
            torch.testing.assert_close(mine[name].grad, theirs[name].grad, rtol=0, atol=1e-10)


# --- on which dimension the batch is ------------------------------------------------------------


class SelfAttention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(W)
        self.attention = nn.MultiheadAttention(W, 2, **options)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.attention(y, y, y, need_weights=False)[0]


class Turned(SelfAttention):
    """(batch, time, features) outside; its attention takes (time, batch, features)."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x).transpose(0, 1)
        return x + self.attention(y, y, y, need_weights=False)[0].transpose(0, 1)


class Recurrent(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.lstm = nn.LSTM(W, W, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0].tanh() + x


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(W, W, 3, 1, 1), nn.BatchNorm2d(W)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).relu() + x


class Detector(nn.Module):
    """Images go through convolutions first, then as (places, batch, features) through attention."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(Convolutional(), Convolutional())
        self.tokens = nn.Sequential(SelfAttention(), SelfAttention())

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.tokens(self.trunk(x).flatten(2).permute(2, 0, 1))
        return y.mean(0)


def dims(plan: torchdrop.Plan) -> list[int]:
    return [branch.facts.dim for branch in plan._branches]


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: Stack(SelfAttention(), SelfAttention()), [1, 1]),
        (lambda: Stack(SelfAttention(batch_first=True), SelfAttention(batch_first=True)), [0, 0]),
        (lambda: Stack(Turned(), Turned()), [0, 0]),
        (lambda: Stack(Recurrent(), Recurrent()), [1, 1]),
        (lambda: Stack(Recurrent(batch_first=True), Recurrent(batch_first=True)), [0, 0]),
        (lambda: Stack(FeedForward(), FeedForward()), [0, 0]),
        (Detector, [0, 0, 1, 1]),
        # nothing is told of the inside of Turned: only what is given or measured counts
        (lambda: Stack(Turned(), Turned(), FeedForward(), FeedForward()), [0, 0, 0, 0]),
    ],
)
def test_the_layers_of_torch_tell_the_dimension_of_the_batch(
    make: Callable[[], nn.Module], expected: list[int]
) -> None:
    model = make()
    assert dims(torchdrop.add_stochastic_depth(model, 0.5)) == expected
    torchdrop.remove_stochastic_depth(model)
    # two batch sizes show the same
    x = torch.randn(2, W, 4, 4) if isinstance(model, Detector) else torch.randn(3, 4, W)
    assert dims(torchdrop.add_stochastic_depth(model, 0.5, example_inputs=x)) == expected
    torchdrop.remove_stochastic_depth(model)
    # and what is given wins
    assert set(dims(torchdrop.add_stochastic_depth(model, 0.5, batch_dim=1))) == {1}


def test_samples_are_dropped_not_steps() -> None:
    model, x = Stack(SelfAttention(), SelfAttention()), torch.randn(9, 4, W)
    plan = torchdrop.add_stochastic_depth(model, [1.0, 0.5])
    changed = (model(x) != x).any(-1)
    kept = torch.zeros(4, dtype=torch.bool)
    kept[plan.last_kept()["blocks.1"]] = True
    assert kept.sum() == 2
    assert torch.equal(changed, kept.expand(9, 4))


def test_what_the_layers_say_has_to_agree() -> None:
    mixed = Stack(*(SelfAttention(batch_first=first) for first in (True, False, True, False)))
    message = r"'blocks\.0\.attention' has batch_first=True and 'blocks\.1\.attention' has batch_"
    with pytest.raises(ValueError, match=message + r".*batch_dim=.*example_inputs"):
        torchdrop.add_stochastic_depth(mixed, 0.5)
    assert not torchdrop.has_stochastic_depth(mixed)
    assert dims(torchdrop.add_stochastic_depth(mixed, 0.5, batch_dim=0)) == [0] * 4
    silent = Stack(SelfAttention(), SelfAttention(), FeedForward(), FeedForward())
    message = r"'blocks\.0\.attention' has batch_first=False.*of 'blocks\.2' is not known"
    with pytest.raises(ValueError, match=message + ".*batch_dim=.*example_inputs"):
        torchdrop.add_stochastic_depth(silent, 0.5)
    x = torch.randn(3, 4, W)
    assert dims(torchdrop.add_stochastic_depth(silent, 0.5, example_inputs=x)) == [1] * 4
