"""What a block says of its branches together."""

from __future__ import annotations

from torch import nn

from torchdrop.finding.residual import Branch, Residual


def branch(name: str, p: float, shortcut: str = "identity", action: str = "skip") -> Branch:
    return Branch(
        name=name, shortcut=shortcut, action=action, reason="", p=p, children=(), masks=()
    )


def test_of_different_branches_a_block_shows_the_largest_rate_and_every_action() -> None:
    attention, mlp = branch("a:attn", 0.1), branch("a:mlp", 0.3, "projection", "mask")
    block = Residual("a", nn.Identity(), [attention, mlp])
    assert (block.p, block.shortcut, block.action) == (0.3, "projection", "skip/mask")
    assert "2 branches" in repr(block)


def test_of_equal_branches_a_block_shows_one() -> None:
    block = Residual("a", nn.Identity(), [branch("a:attn", 0.2), branch("a:mlp", 0.2)])
    assert (block.p, block.shortcut, block.action) == (0.2, "identity", "skip")
