from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from serval.compress.block import Block, find_block
from serval.compress.expert_views import put_experts_together
from serval.compress.registry import RECIPES
from serval.compress.scheme import WeightScheme
from serval.compress.statistics import MAX_ROWS, InputStatistics
from serval.errors import ConfigError
from serval.models import checkpoint
from serval.models.batch import PackedBatch
from serval.models.decoder import Decoder
from tests.compress.toy import decoder, mla_decoder, moe_decoder

ALL = frozenset({"range", "hessian", "rows"})
MAKERS = [decoder, moe_decoder, mla_decoder]


def last_block(model: Decoder) -> tuple[Block, Callable[[], torch.Tensor], torch.Tensor]:
    """The block, a function that runs it on a fixed input, and that input."""
    index = len(model.layers) - 1
    block = find_block(
        model.layers[index], index, lambda path: checkpoint.module_name(model.config, path)
    )
    x = torch.randn(24, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    batch = PackedBatch.from_lengths([16, 8])

    @torch.no_grad()
    def run() -> torch.Tensor:
        branch, residual = block.module(x, None, batch, model.rotary(x.device))
        return branch + residual

    return block, run, x


def test_statistics_are_those_of_all_rows():
    x = torch.randn(1500, 7)
    seen = InputStatistics(7, ALL)
    for part in x.split([1, 600, 399, 0, 500]):
        seen.update(part)
    assert seen.count == 1500
    assert torch.equal(seen.abs_max, x.abs().amax(0))
    torch.testing.assert_close(seen.abs_mean, x.abs().mean(0))
    torch.testing.assert_close(seen.hessian, x.T @ x, rtol=1e-5, atol=1e-3)
    assert seen.rows is not None
    assert torch.equal(seen.rows, x[::4])
    assert MAX_ROWS / 2 <= len(seen.rows) <= MAX_ROWS


def test_rescaled_statistics_are_those_of_rescaled_rows():
    x, scale = torch.randn(40, 7), torch.rand(7) + 0.5
    seen, again = InputStatistics(7, ALL), InputStatistics(7, ALL)
    seen.update(x)
    seen.rescale(scale)
    again.update(x / scale)
    for name in ("abs_max", "abs_mean", "hessian", "rows", "low", "high"):
        torch.testing.assert_close(getattr(seen, name), getattr(again, name))


@pytest.mark.parametrize("make", MAKERS)
def test_a_block_lists_every_linear_and_sees_its_inputs(make):
    model = make()
    stored = set(model.layers[1].state_dict())
    block, run, _ = last_block(model)
    exact = run()
    with block.observe(ALL):
        assert torch.equal(run(), exact)
    read = [matrix for part in block.inputs for matrix in part.matrices]
    assert len({matrix.name for matrix in read}) == len(read)
    unread = {matrix.path for matrix in block.matrices} - {matrix.path for matrix in read}
    assert unread <= {"self_attn.kv_b_proj"}
    assert all(matrix.statistics is not None for matrix in read)
    routed = sum(p.statistics.count for p in block.inputs if "experts.0" in p.matrices[0].path)
    assert routed < 24 * len(list(block.inputs))
    put_experts_together(block.module)
    assert set(model.layers[1].state_dict()) == stored


@pytest.mark.parametrize("make", MAKERS)
def test_folds_change_nothing_and_statistics_follow(make):
    block, run, _ = last_block(make())
    with block.observe(ALL):
        exact = run()
    for site in block.sites:
        if site.place.foldable:
            site.fold(torch.rand(site.place.width) + 0.5)
        else:
            with pytest.raises(ConfigError, match="cannot be scaled"):
                site.fold(torch.ones(site.place.width))
    torch.testing.assert_close(run(), exact, rtol=1e-5, atol=1e-5)
    followed = [site.abs_max.clone() for site in block.sites]
    with block.observe(ALL):
        run()
    for site, expected in zip(block.sites, followed, strict=True):
        torch.testing.assert_close(site.abs_max, expected, rtol=1e-4, atol=1e-5)


def test_fold_refuses_scales_that_would_lose_the_function():
    block, _, _ = last_block(decoder())
    with pytest.raises(ConfigError, match="64 positive numbers, got 63"):
        block.sites[0].fold(torch.cat([torch.ones(63), torch.zeros(1)]))


def test_rounding_in_a_block_reaches_the_stack_of_experts():
    model = moe_decoder()
    block, run, _ = last_block(model)
    exact, stack = run(), model.layers[1].mlp.experts.stack[0]
    before = stack.down_proj.detach().clone()
    recipe = RECIPES["rtn"].load()()
    for matrix in block.matrices:
        matrix.scheme = WeightScheme(bits=8, group_size=4)
        matrix.linear.weight.data.copy_(recipe.quantize(matrix).dequantize())
    assert not torch.equal(stack.down_proj, before)
    torch.testing.assert_close(stack.down_proj, before, rtol=0, atol=0.01)
    got = run()
    assert (got - exact).norm() < 0.02 * exact.norm()
