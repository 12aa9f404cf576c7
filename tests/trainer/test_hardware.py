"""Choices that follow from the hardware, as far as a machine without a GPU can show them."""

from __future__ import annotations

import pytest
import torch

from trainer.errors import TrainError
from trainer.hardware import (
    choose_device,
    choose_flash_attention,
    peak_flops,
    peak_memory_gib,
    use_flash_attention,
)

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@needs_no_gpu
def test_auto_is_the_cpu_where_there_is_no_gpu() -> None:
    assert choose_device("auto", local_world_size=2) == "cpu"


@needs_no_gpu
def test_asking_for_a_gpu_that_is_not_there_is_one_line() -> None:
    with pytest.raises(TrainError, match="no usable GPU here; use --device cpu"):
        choose_device("cuda", local_world_size=1)


def test_the_peak_of_a_cpu_is_measured() -> None:
    peak, origin = peak_flops(torch.device("cpu"), torch.float32)
    assert peak is not None
    assert 1e8 < peak < 1e14
    assert "measured" in origin


def test_peak_memory_of_the_process_is_in_gib() -> None:
    assert 0.05 < peak_memory_gib(torch.device("cpu")) < 64


@pytest.mark.parametrize(
    ("capability", "installed", "chosen"),
    [
        (9, ["FA3", "FA4"], "FA3"),
        (9, ["FA4"], "FA2"),
        (10, ["FA3", "FA4"], "FA4"),
        (8, ["FA3", "FA4"], "FA2"),
        (0, [], "FA2"),
    ],
)
def test_auto_is_the_flash_attention_of_the_gpu_if_it_is_installed(
    capability: int, installed: list[str], chosen: str
) -> None:
    assert choose_flash_attention("auto", capability, installed) == chosen


def test_flash_attention_that_cannot_be_had_is_one_line() -> None:
    with pytest.raises(TrainError, match="FA3 needs a Hopper or Blackwell GPU"):
        choose_flash_attention("FA3", 8, ["FA3"])
    with pytest.raises(TrainError, match=r"FA4 needs the module flash_attn\.cute\.interface"):
        choose_flash_attention("FA4", 9, ["FA3"])
    assert choose_flash_attention("FA2", 9, ["FA3"]) == "FA2"


@needs_no_gpu
def test_a_cpu_keeps_torchs_own_attention() -> None:
    use_flash_attention("auto", "cpu")
    assert torch.nn.attention.current_flash_attention_impl() is None
    with pytest.raises(TrainError, match="flash_attention auto"):
        use_flash_attention("FA3", "cpu")
