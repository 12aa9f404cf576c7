"""A chat template cannot leave its sandbox, run for ever, or take all memory."""

from __future__ import annotations

import mmap
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import jinja2
import pytest

from data import chat, limits
from data.chat import ChatTemplate
from data.embedded import build_tokenizer, generate_conversations
from data.errors import DataError
from data.limits import TEMPLATE_CHARACTERS, bounded


def _use(template: str) -> ChatTemplate:
    """The template of the embedded tokenizer with `template` in front."""
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template + str(tokenizer.chat_template)
    return ChatTemplate(tokenizer, train_on="all", expand_turns=False, control_tokens="exclude")


def test_S05_a_template_cannot_leave_its_sandbox(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    evil = f"{{{{ cycler.__init__.__globals__.os.system('touch {canary}') }}}}"
    with pytest.raises(DataError, match=r"fails on a plain conversation \(access to .* is unsafe"):
        _use(evil)
    with pytest.raises(DataError, match=r"fails on a plain conversation \(access to .* is unsafe"):
        _use("{{ messages.append(1) }}")
    assert not canary.exists()
    jinja2.Template(evil).render()  # outside of the sandbox the canary sings
    assert canary.exists()


_LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "line"),
    [
        (_LOOP, "computes for more than 0.2 s; give --model.chat_template native, chatml or "),
        ("{{ 'x' * 9999999999 }}", "needs more than 2 GiB of memory"),
        ("{{ '%9999999999d' % 1 }}", "needs more than 2 GiB of memory"),
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "fails on a plain conversation"),
        ("{# " + "x" * TEMPLATE_CHARACTERS + " #}", "has more than 1,048,576 characters"),
    ],
)
def test_S05_a_template_is_bounded_in_time_and_size(
    monkeypatch: pytest.MonkeyPatch, template: str, line: str
) -> None:
    monkeypatch.setattr(limits, "TEMPLATE_SECONDS", 0.2)
    before = signal.getsignal(signal.SIGVTALRM)
    with pytest.raises(DataError) as error:
        _use(template)
    assert line in str(error.value) and "\n" not in str(error.value)
    assert signal.getsignal(signal.SIGVTALRM) is before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)
    mmap.mmap(-1, 3 << 30).close()  # memory is free again


def test_S05_a_row_that_the_template_loops_over_stops_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "TEMPLATE_SECONDS", 0.2)
    template = _use("{% if messages[0].content == 'loop' %}" + _LOOP + "{% endif %}")
    rows = list(generate_conversations("train", count=3))
    assert all(isinstance(result, chat._Rendered) for result in template.render(rows, 0))
    turn = {"role": "assistant", "content": "x"}
    rows.append({"messages": [{"role": "user", "content": "loop"}, turn]})
    with pytest.raises(DataError, match="in one of the rows from 7 on, computes for more than"):
        template.render(rows, 7)


def test_a_row_has_the_time_of_a_row() -> None:
    def rows(restart: Callable[[], object], count: int = 4) -> Iterator[int]:
        for row in range(count):
            restart()
            begin = os.times().user  # what is bounded: not the time of system calls, as this one
            while os.times().user - begin < 0.12:
                sum(range(20_000))
            yield row

    with bounded("it", seconds=0.2) as restart:
        assert list(rows(restart)) == [0, 1, 2, 3]
    with (
        pytest.raises(DataError, match=r"^it computes for more than 0\.2 s"),
        bounded("it", seconds=0.2),
    ):
        list(rows(lambda: None, count=40))  # a busy machine counts its ticks late
