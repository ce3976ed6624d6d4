"""Process groups: nobody waits in vain, gradients are right, ranks decide alike or apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from torchdrop.error_pages import see

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch is built without torch.distributed"
)

Reports = list[dict[str, Any]]

# All have find_unused_parameters=False. The full matrix is benchmarks/soak/ranks.py.
TRAIN: dict[str, dict[str, Any]] = {
    "ddp row": {"mode": "row", "batch": [1, 8], "seeds": "alike"},
    "ddp row p=1": {"mode": "row", "p": 1.0, "batch": 2},
    "ddp batch": {"mode": "batch", "p": 0.5, "batch": [8, 1]},
    "ddp batch alone": {"mode": "batch", "p": 0.5, "batch": 3, "sync_ranks": False},
    "ddp uneven sizes": {"mode": "row", "batch": [3, 2, 1, 0]},
    "ddp static_graph": {"mode": "batch", "batch": 1, "static_graph": True},
    "ddp static_graph p=1": {"mode": "batch", "p": 1.0, "batch": 1, "static_graph": True},
    "ddp layer row": {"mode": "row", "batch": 1, "whole_blocks": True},
    "ddp layer batch": {"mode": "batch", "p": 0.5, "batch": 3, "whole_blocks": True},
    "ddp no_sync": {"mode": "row", "batch": 2, "accumulate": 3},
    "ddp checkpoint row": {"mode": "row", "batch": 3, "reentrant": False},
    "ddp checkpoint batch": {"mode": "batch", "p": 0.5, "batch": 3, "reentrant": False},
    "ddp reentrant row": {"mode": "row", "batch": 3, "reentrant": True},
    "ddp reentrant batch": {"mode": "batch", "p": 0.5, "batch": 3, "reentrant": True},
    "ddp zero": {"mode": "batch", "p": 0.5, "batch": 3, "zero": True},
    "ddp dense": {"mode": "batch", "p": 0.5, "batch": [8, 1], "attach": False},
    "fsdp row": {"mode": "row", "batch": 1},
    "fsdp batch": {"mode": "batch", "p": 0.5, "batch": 3},
    "fsdp row p=1": {"mode": "row", "p": 1.0, "batch": 2},
    "fsdp layer row": {"mode": "row", "batch": 1, "whole_blocks": True},
    "fsdp accumulation": {"mode": "row", "batch": 2, "accumulate": 3},
    "fsdp checkpoint batch": {"mode": "batch", "p": 0.5, "batch": 3, "reentrant": False},
    "fsdp reentrant row": {"mode": "row", "batch": 3, "reentrant": True},
    "fsdp dense": {"mode": "batch", "p": 0.5, "batch": 3, "attach": False},
}
TRAIN = {
    name: {"wrapper": name.split()[0], "p": 0.9, "steps": 8, **options}
    for name, options in TRAIN.items()
}
WAITS: dict[str, dict[str, Any]] = {
    f"{what} inside, {mode}{', layer' * layer}": {"what": what, "mode": mode, "layer": layer}
    for what in ("norm", "shard")
    for mode in ("row", "batch")
    for layer in (False, True)
}
OTHERS = (
    "uneven",
    "reseeded",
    "mixed",
    "resumed",
    "wrapped",
    "waiting_forwards",
    "split_over_modules",
    "layers_alike",
    "gathered",
    "without_zeros",
    "tensor_parallel",
)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    from ranks_worker import start

    cases: dict[str, Any] = {name: ["train", options] for name, options in TRAIN.items()}
    cases |= {name: ["waits_inside", options] for name, options in WAITS.items()}
    cases |= {name: [name, {}] for name in OTHERS}
    return start(2, cases, tmp_path_factory.mktemp("ranks"), timeout=300)


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    from ranks_worker import start

    names = ("ddp row", "ddp batch", "ddp uneven sizes", "fsdp row")
    cases = {name: ["train", TRAIN[name]] for name in names}
    return start(4, cases, tmp_path_factory.mktemp("four"), timeout=300)


def holds(reports: Reports, case: str) -> None:
    """Nobody hung, or was left without a gradient, and each gradient is that of one process."""
    for rank in reports:
        report = rank[case]
        assert report["identical"]
        assert report["finite"]
        assert report["missing"] == 0
        assert report["gradient_error"] < 1e-12


def alike(reports: Reports, case: str) -> bool:
    return all(rank[case]["decisions"] == reports[0][case]["decisions"] for rank in reports)


@pytest.mark.parametrize("case", [name for name in TRAIN if "dense" not in name])
def test_training_is_that_of_one_process_with_the_same_rows(ranks: Reports, case: str) -> None:
    holds(ranks, case)
    assert all(rank[case]["dropped"] > 0 for rank in ranks)
    kept = [rows for rank in ranks for step in rank[case]["decisions"] for rows, _ in step]
    assert 0 in kept


@pytest.mark.parametrize("case", ["ddp row", "ddp layer row", "fsdp row", "fsdp layer row"])
def test_one_rank_drops_everything_while_the_other_does_not(ranks: Reports, case: str) -> None:
    mine, theirs = (rank[case]["decisions"] for rank in ranks)
    kept = [
        (a[0] > 0, b[0] > 0)
        for x, y in zip(mine, theirs, strict=True)
        for a, b in zip(x, y, strict=True)
    ]
    assert {(True, False), (False, True)} & set(kept)
    assert ranks[0][case]["actions"] == ["layer" if "layer" in case else "skip"]


@pytest.mark.parametrize("case", ["ddp row", "ddp batch", "ddp uneven sizes", "fsdp row"])
def test_four_ranks(four_ranks: Reports, case: str) -> None:
    holds(four_ranks, case)
    # those that have the same sizes of batches decide alike in batch mode
    pairs = ((four_ranks[0], four_ranks[2]), (four_ranks[1], four_ranks[3]))
    for pair in pairs:
        assert alike(list(pair), case) == (case == "ddp batch")


def test_without_zeros_ddp_stops(ranks: Reports) -> None:
    """The twin: with dropped branches that leave None, the very case that has to work fails."""
    for rank in ranks:
        assert "Expected to have finished reduction" in rank["without_zeros"]["error"]


@pytest.mark.parametrize("case", ["ddp batch", "fsdp batch"])
def test_no_collective_a_block(ranks: Reports, case: str) -> None:
    """One broadcast of an object (its size, then itself) in the whole run, in batch mode."""
    dense = f"{case.split()[0]} dense"
    for rank in ranks:
        assert rank[case]["collectives"] - rank[dense]["collectives"] == 2
    row = "ddp row"  # row mode: none at all
    for rank in ranks:
        assert rank[row]["collectives"] == rank["ddp dense"]["collectives"]


def test_rows_differ_between_ranks_that_were_seeded_alike(ranks: Reports) -> None:
    assert not alike(ranks, "ddp row")
    mine, theirs = (rank["reseeded"]["row"][0] for rank in ranks)
    pairs = [(a, b) for x, y in zip(mine, theirs, strict=True) for a, b in zip(x, y, strict=True)]
    assert len(pairs) == 40
    assert sum(a == b for a, b in pairs) < 12  # three rows of six: a twentieth of them by chance


@pytest.mark.parametrize(
    "case", [n for n, o in TRAIN.items() if o["mode"] == "batch" and "dense" not in n]
)
def test_batch_mode_decides_alike_unless_told_not_to(ranks: Reports, case: str) -> None:
    """Ranks that were seeded apart. "alone" is the twin: there they part."""
    kept = [[[rows > 0 for rows, _ in step] for step in rank[case]["decisions"]] for rank in ranks]
    assert (kept[0] == kept[1]) == (case != "ddp batch alone")
    flat = [block for step in kept[0] for block in step]
    assert {True, False} == set(flat) or TRAIN[case]["p"] > 0.5


def test_a_seed_in_mid_run_fixes_what_follows(ranks: Reports) -> None:
    for mode in ("row", "batch"):
        for rank in ranks:
            first, other, again = rank["reseeded"][mode]
            assert first == again
            assert first != other
    assert ranks[0]["reseeded"]["batch"] == ranks[1]["reseeded"]["batch"]


def test_mixed_precision_with_one_sample_on_each_rank(ranks: Reports) -> None:
    """Nearly everything is dropped, on some ranks and not on others, before anything ran."""
    for case, mine in ranks[0]["mixed"].items():
        theirs = ranks[1]["mixed"][case]
        for report in (mine, theirs):
            assert report["identical"], case
            assert report["finite"], case
            assert report["moved"], case
            assert report["missing"] == 0, case
            assert report["dtypes"] == ["torch.bfloat16"], case
        assert (mine["kept"] == theirs["kept"]) == ("batch" in case), case


@pytest.mark.parametrize("mode", ["row", "batch"])
def test_a_run_saved_in_mid_epoch_goes_on_bit_for_bit(ranks: Reports, mode: str) -> None:
    """With weights_only. The twin: batch mode without the plan's state counts from 0 again."""
    for rank in ranks:
        assert rank["resumed"][f"{mode}, all"]["same"]
        assert rank["resumed"][f"{mode}, no plan"]["same"] == (mode == "row")
    kept = [rank["resumed"][f"{mode}, all"]["kept"] for rank in ranks]
    assert (kept[0] == kept[1]) == (mode == "batch")


def test_wrapped_models_are_refused_with_the_order_to_use(ranks: Reports) -> None:
    ddp = "is wrapped in DistributedDataParallel; add stochastic depth to the model first and wrap"
    sharded = "is already sharded by fully_shard; add stochastic depth first and shard afterwards"
    page = see("already-attached")
    for rank in ranks:
        said = rank["wrapped"]
        assert said["ddp"].startswith(f"the model {ddp}")
        assert said["inside"].startswith(f"its part '0' {ddp}")
        assert said["fsdp"] == f"the model {sharded}{page}"
        assert said["one shard"] == f"its part 'blocks.1' {sharded}{page}"


def test_an_uneven_epoch_under_join(ranks: Reports) -> None:
    assert all(rank["uneven"]["identical"] for rank in ranks)
    for epoch in range(2):
        mine, theirs = (rank["uneven"]["epochs"][epoch] for rank in ranks)
        assert (len(mine), len(theirs)) == (6, 4)
        assert mine[:4] == theirs  # also in the second: a seed was set in between


def test_checkpoints_of_several_forwards_and_a_seed_in_every_step(ranks: Reports) -> None:
    assert all(rank["waiting_forwards"]["gradient_error"] < 1e-12 for rank in ranks)


@pytest.mark.parametrize("case", WAITS)
def test_a_branch_where_ranks_wait_for_each_other_is_masked(ranks: Reports, case: str) -> None:
    assert all(rank[case]["identical"] for rank in ranks)
    if not WAITS[case]["layer"]:
        mine, theirs = (rank[case]["decisions"] for rank in ranks)
        assert mine != theirs  # so a rank that skipped would have left the other one alone
        what = "SyncBatchNorm" if WAITS[case]["what"] == "norm" else "fully_shard"
        for action, reason in ranks[0][case]["actions"]:
            assert action == "mask"
            assert (
                reason
                == f"{what} in the branch: every rank has to run it, since other ranks wait for it"
            )


def test_a_residual_over_two_modules_is_sharded_whole_or_refused(ranks: Reports) -> None:
    for rank in ranks:
        assert rank["split_over_modules"]["whole"] == ["skip"] * 3
        assert "apply fully_shard to 0 as a whole" in rank["split_over_modules"]["inner"]


def test_layers_decide_alike_in_batch_mode_and_apart_in_row_mode(ranks: Reports) -> None:
    mine, theirs = (rank["layers_alike"] for rank in ranks)
    assert {name for name in mine if mine[name] == theirs[name]} == {"batch", "path"}
    assert len({str(run) for run in mine["batch"]}) == 2


def test_a_gathered_state_dict_fits_a_plain_model(ranks: Reports) -> None:
    assert ranks[0]["gathered"] == {"keys": True, "same": True, "differ_from_start": True}


def test_tensor_parallel_ranks_drop_alike_or_are_refused(ranks: Reports) -> None:
    for rank in ranks:
        report = rank["tensor_parallel"]
        assert "use mode='batch', and do not pass sync_ranks=False" in report["row"]
        assert report["batch"]["outs"][0] == report["batch"]["outs"][1]
        assert report["batch"]["kept"][0] == report["batch"]["kept"][1]
        assert report["batch"]["missing"] == []
