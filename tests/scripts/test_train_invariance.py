"""The same losses however the work is spread: ranks, accumulation, wrapping, checkpointing, attention."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.job import EXACT, losses, train
from tests.support.tiny import write_chat, write_model

pytestmark = pytest.mark.distributed

_STEPS = 20


def wrap_mlps_and_layers(*, module: object, recurse: bool, nonwrapped_numel: int) -> bool:
    """A user's own policy, in the protocol of torch.distributed.fsdp.wrap."""
    return recurse or type(module).__name__ in ("Qwen3MLP", "Qwen3DecoderLayer")


class Case:
    """One model, one dataset and the losses of one process on them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = write_model(folder / "model")
        self.chat = write_chat(folder / "chat.jsonl", count=300)
        self.expected = self.run("reference", ["--micro_batch_size=4"], 1)

    def run(self, name: str, args: list[str], world_size: int) -> list[float]:
        output_dir = self.folder / name
        result = train(
            [
                f"--model.path={self.model}",
                f"--data.path={self.chat}",
                "--data.seq_len=128",
                "--global_batch_size=4",
                f"--steps={_STEPS}",
                "--schedule.warmup_steps=5",
                "--checkpoint.export=false",
                *EXACT,
                *args,
            ],
            world_size,
            cache_dir=self.folder / "cache",
            output_dir=output_dir,
            timeout=240,
        )
        assert result.returncode == 0, result.output
        return losses(output_dir)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("invariance"))


@pytest.mark.parametrize(
    ("world_size", "args"),
    [
        pytest.param(1, ["--micro_batch_size=1"], id="accumulated"),
        pytest.param(2, ["--micro_batch_size=2"], id="2-ranks"),
        pytest.param(2, ["--micro_batch_size=1"], id="2-ranks-accumulated"),
        pytest.param(4, ["--micro_batch_size=1", "--parallel.dp_replicate=2"], id="hsdp"),
        pytest.param(
            4,
            ["--micro_batch_size=1", "--parallel.tp=2"],
            id="tensor-parallel",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            2,
            [
                "--micro_batch_size=2",
                "--parallel.wrap_policy=size",
                "--parallel.min_wrap_params=1000",
            ],
            id="size-policy",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            2,
            [
                "--micro_batch_size=2",
                f"--parallel.wrap_policy=callable:{__name__}.{wrap_mlps_and_layers.__name__}",
            ],
            id="callable-policy",
        ),
        pytest.param(
            2,
            [
                "--micro_batch_size=1",
                "--parallel.activation_checkpointing=full",
                "--parallel.accumulation=sharded",
            ],
            id="activation-checkpointing",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            2,
            [
                "--micro_batch_size=2",
                "--parallel.wrap_policy=module:Qwen3MLP,Qwen3DecoderLayer",
                "--parallel.activation_checkpointing=selective",
                "--parallel.cpu_offload=true",
            ],
            id="module-policy-offloaded",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            4,
            [
                "--micro_batch_size=1",
                "--parallel.activation_checkpointing=op",
                "--parallel.reshard_after_forward=2",
            ],
            id="share-of-4-ranks",
            marks=pytest.mark.slow,
        ),
        pytest.param(2, ["--micro_batch_size=2", "--model.attention=sdpa"], id="sdpa"),
        pytest.param(
            2, ["--micro_batch_size=2", "--data.workers=1"], id="workers", marks=pytest.mark.slow
        ),
    ],
)
def test_losses_do_not_depend_on_how_the_work_is_spread(
    case: Case, request: pytest.FixtureRequest, world_size: int, args: list[str]
) -> None:
    found = case.run(request.node.callspec.id, args, world_size)

    assert len(found) == _STEPS
    assert found == pytest.approx(case.expected, rel=0, abs=1e-5)
    assert (
        found[-1] < found[0] - 0.5
    )  # it did learn: equal losses of a model that stands still say little


@pytest.mark.slow
@pytest.mark.parametrize(
    "args", [["--parallel.activation_checkpointing=full"], ["--parallel.tp=2"]]
)
def test_compiled_layers_give_the_same_losses(case: Case, args: list[str]) -> None:
    args = ["--micro_batch_size=2", "--parallel.compile=true", *args]
    found = case.run(f"compiled{args[-1].rpartition('=')[2]}", args, 2)

    assert found == pytest.approx(case.expected, rel=0, abs=1e-4)
