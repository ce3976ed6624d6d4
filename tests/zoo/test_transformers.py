"""Models of transformers in situations of their own: generation, checkpoints, routers, compilers.

They are here, among the last tests that run, because importing transformers takes long and makes
every full garbage collection of the process slow.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import torchdrop

transformers = pytest.importorskip("transformers")

from test_training_loops import assert_gradients_agree, gradients  # noqa: E402
from zoo_transformers import FAMILIES  # noqa: E402

NOTHING_IS_DROPPED = r"nothing is dropped in such calls.*torchdrop\.paused\(model\)"


# --- generate() while the model is in training mode --------------------------------------------


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


def generated(model: Any, ids: Tensor, **options: Any) -> list[list[int]]:
    with torch.no_grad():
        out = model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False, **options)
    found: list[list[int]] = out.tolist()
    return found


@pytest.mark.filterwarnings("ignore::UserWarning:transformers", "ignore:.*fast path is not")
@pytest.mark.parametrize(("make", "example"), [(llama, True), (gpt2, False), (mamba, False)])
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


# --- checkpoints, routers, compilers --------------------------------------------------------------


@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_transformers_checkpoints(mode: str, reentrant: bool) -> None:
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=16,
        patch_size=8,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = transformers.ViTModel(config, add_pooling_layer=False).double().train()
    plan = torchdrop.add_stochastic_depth(model, 0.5, schedule="uniform", mode=mode)
    x = torch.randn(5, 3, 16, 16, dtype=torch.float64)
    found = []
    for enabled in (False, True):
        if enabled:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        for seed in range(4):
            torch.manual_seed(seed)
            model.zero_grad()
            model(x).last_hidden_state.square().sum().backward()
            found.append(gradients(model))
        plan.observed()
    for mine, theirs in zip(found[:4], found[4:], strict=True):
        assert_gradients_agree(mine, theirs)
    # rows counted once, not again in the recompute
    assert plan._sites[0].branches[0].counts.last is not None
    model(x)
    assert plan._sites[0].branches[0].counts.rows_seen == 5


def _mixtral(compute: str) -> tuple[Any, torchdrop.Plan, Tensor]:
    config = transformers.MixtralConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=4, use_cache=False,
        output_router_logits=True,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config).train()
    ids = torch.randint(50, (6, 7))
    plan = torchdrop.add_stochastic_depth(
        model, 0.5, schedule="uniform", compute=compute, example_inputs={"input_ids": ids}
    )
    return model, plan, ids


def test_what_hooks_record_of_a_router_is_that_of_the_kept_rows() -> None:
    model, plan, ids = _mixtral("auto")
    out = model(input_ids=ids, labels=ids)
    kept = [len(rows) for name, rows in plan.last_kept().items() if name.endswith("mlp")]
    assert [len(logits) for logits in out.router_logits] == [7 * rows for rows in kept] == [21, 21]
    assert out.loss.isfinite()
    assert out.aux_loss > 0.0
    out.loss.backward()
    # A loss that wants them for all rows, as this one with a mask does, needs the mask.
    with pytest.raises(RuntimeError, match="must match"):
        model(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids))
    model, _, ids = _mixtral("mask")
    out = model(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids))
    assert [len(logits) for logits in out.router_logits] == [42, 42]


def test_an_error_says_that_a_model_has_to_run_once_before_it_is_compiled() -> None:
    model, inputs = FAMILIES["albert"].build(4)  # whose forward asks for the dtype of its mask
    # the proof would call the model like this
    torchdrop.add_stochastic_depth(model.train(), 0.3, example_inputs=inputs, verify=False)
    graph = torch.compile(model, fullgraph=True, backend="eager")
    with pytest.raises(RuntimeError, match="call the model once like this before compiling it"):
        graph(**inputs)
    model(**inputs)
    torch.manual_seed(0)
    expected = model(**inputs).last_hidden_state
    torch.manual_seed(0)
    torch.testing.assert_close(graph(**inputs).last_hidden_state, expected)
