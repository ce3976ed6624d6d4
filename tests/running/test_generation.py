"""generate() while the model is in training mode, as in reinforcement learning."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import torchdrop

transformers = pytest.importorskip("transformers")

NOTHING_IS_DROPPED = r"nothing is dropped in such calls.*torchdrop\.paused\(model\)"


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, pad_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, dropout_rate=0.0,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def mamba() -> nn.Module:
    config = transformers.MambaConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, state_size=4, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, use_mambapy=False,
    )  # fmt: skip
    return transformers.MambaForCausalLM(config)


MODELS = [llama, gpt2, mamba]


def generated(model: Any, ids: Tensor, **options: Any) -> list[list[int]]:
    with torch.no_grad():
        out = model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False, **options)
    found: list[list[int]] = out.tolist()
    return found


@pytest.mark.filterwarnings("ignore::UserWarning:transformers", "ignore:.*fast path is not")
@pytest.mark.parametrize("example", [True, False])
@pytest.mark.parametrize("make", MODELS)
def test_the_tokens_are_those_of_the_model_without_stochastic_depth(
    make: Any, example: bool
) -> None:
    torch.manual_seed(0)
    model = make().train()
    ids = torch.randint(3, 32, (4, 5))
    wanted = generated(model, ids)
    given = {"input_ids": ids} if example else None
    torchdrop.add_stochastic_depth(model, 0.9, example_inputs=given)
    with pytest.warns(UserWarning, match=NOTHING_IS_DROPPED) as caught:
        assert generated(model, ids) == wanted
    assert len([w for w in caught if "nothing is dropped" in str(w.message)]) == 1
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="in training mode the model is called")
        assert generated(model, ids) == wanted


def test_an_encoder_has_no_cache_and_is_paused_by_hand() -> None:
    torch.manual_seed(0)
    model: Any = t5().train()
    ids = torch.randint(3, 32, (4, 5))
    wanted = generated(model, ids)
    torchdrop.add_stochastic_depth(model, 0.9)
    with torchdrop.paused(model.get_encoder()), pytest.warns(UserWarning, match="key/value cache"):
        assert generated(model, ids) == wanted


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_kinds_of_caches(kind: str) -> None:
    torch.manual_seed(0)
    model = llama().train()
    ids = torch.randint(3, 32, (4, 5))
    wanted = generated(model, ids, cache_implementation=kind)
    torchdrop.add_stochastic_depth(model, 0.9)
    with pytest.warns(UserWarning, match=NOTHING_IS_DROPPED):
        assert generated(model, ids, cache_implementation=kind) == wanted


def test_inside_paused_there_is_no_warning() -> None:
    torch.manual_seed(0)
    model = llama().train()
    ids = torch.randint(3, 32, (4, 5))
    wanted = generated(model, ids)
    torchdrop.add_stochastic_depth(model, 0.9)
    with torchdrop.paused(model):
        assert generated(model, ids) == wanted


# --- caches of one's own ----------------------------------------------------------------------


class Layer(nn.Module):
    """Keeps what it has seen in a list that its caller owns."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, kv_cache: Any = None) -> Tensor:
        seen = x
        if kv_cache is not None:
            kv_cache.append(x)
            seen = torch.stack(list(kv_cache)).mean(0)
        return x + self.fc2(torch.tanh(self.fc1(seen)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, x: Tensor, caches: Any = (None, None)) -> Tensor:
        for layer, cache in zip(self.layers, caches, strict=True):
            x = layer(x, kv_cache=cache)
        return x


def filled(x: Tensor) -> list[list[Tensor]]:
    return [[x], [x]]


def test_a_list_that_is_named_as_a_cache_is_left_alone() -> None:
    model, x = Net(), torch.randn(4, 4)
    dense = copy.deepcopy(model)
    torchdrop.add_stochastic_depth(model, 1.0, schedule="uniform")
    mine, theirs = filled(x), filled(x)
    with torch.no_grad(), pytest.warns(UserWarning, match=NOTHING_IS_DROPPED):
        out = model(x, mine)
    torch.testing.assert_close(out, dense(x, theirs))
    assert [len(cache) for cache in mine] == [2, 2]


@pytest.mark.parametrize("grad", [True, False])
def test_calls_without_a_cache_are_dropped_with_and_without_gradients(grad: bool) -> None:
    model, x = Net(), torch.randn(4, 4)
    torchdrop.add_stochastic_depth(model, 1.0, schedule="uniform")
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(model(x), x)


def test_a_reentrant_checkpoint_does_not_count_as_generation() -> None:
    """Its forward runs without gradients, on inputs that require them."""
    model, x = llama().train(), torch.randint(3, 32, (4, 5))
    plan = torchdrop.add_stochastic_depth(model, 0.5, schedule="uniform", verify=False)
    embedded = model.get_input_embeddings()(x)

    def run(inputs: Tensor) -> Tensor:
        out: Tensor = model(inputs_embeds=inputs, use_cache=True).logits
        return out

    with pytest.warns(UserWarning, match="creates a key/value cache"):
        checkpoint(run, embedded, use_reentrant=True).sum().backward()
    assert {len(rows) for rows in plan.last_kept().values()} == {2}
