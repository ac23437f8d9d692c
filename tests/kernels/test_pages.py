"""Storage on huge pages: zero, aligned, apart from one another, whatever its size."""

from __future__ import annotations

import gc

import torch

from serval.kernels import pages


def test_tensors_of_any_size_are_zero_and_apart() -> None:
    sizes = [0, 3, pages.SMALLEST - 4, pages.SMALLEST, 70_001, pages.PAGE - 4, pages.PAGE + 12]
    sizes += [pages.CHUNK // 5] * 6  # more than one piece of memory
    kept = []
    for number, size in enumerate(sizes):
        tensor = pages.zeros(size, dtype=torch.uint8)
        assert tensor.shape == (size,)
        assert not tensor.any()
        if size >= pages.SMALLEST:
            assert tensor.data_ptr() % pages.LINE == 0
        kept.append(tensor.fill_(number + 1))
    del kept[3]  # its neighbours stay
    gc.collect()
    for number, tensor in zip([0, 1, 2, *range(4, len(sizes))], kept, strict=True):
        assert bool((tensor == number + 1).all())
    again = pages.zeros(300, 300, dtype=torch.float32)
    assert again.shape == (300, 300)
    assert not again.any()
