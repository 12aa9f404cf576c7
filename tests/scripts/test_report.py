"""report.html: of a real run, in a real browser, with nothing that a sample could do to its reader."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from data.ledger import Ledger
from scripts.page import head
from scripts.report import FILE, Record, main, read_record, report_page, write_report
from tests.support.command import ROOT, clean_environment, run_command
from tests.support.job import read_rows, train
from tests.support.tiny import write_chat

_EVIL = "<script>document.title = 'owned'</script><img src=x onerror=\"document.title='owned'\">"
_CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)


def _row(step: int, **values: Any) -> dict[str, Any]:
    return {
        "step": step, "epoch": 0.1, "loss": 6.0 / step, "grad_norm": 1.0, "learning_rate": 1e-3, "valid_tokens": 50,
        "tokens": 100, "padding_tokens": 28, "tokens_per_second": 5000.0, "tokens_per_second_per_gpu": 2500.0,
        "mfu_pct": 31.5, "step_seconds": 0.02, "data_wait_seconds": 0.001, "memory_peak_gib": 0.5, **values,
    }  # fmt: skip


def _record(**changes: Any) -> Record:
    samples = [
        {"step": step, "prompt": "2 + 2?", "expected": "4", "answer": answer}
        for step, answer in ((0, "fish"), (2, "5"), (4, "4"))
    ]
    values: dict[str, Any] = {
        "run": {
            "model": {"name": "org/model", "commit": "abc", "parameters": 1234567, "trained_parameters": 1234567},
            "data": {"sources": []},
            "world_size": 2,
            "device": "CPU",
            "steps": 4,
        },
        "rows": [
            {"step": 0, "eval_loss": 6.5},
            *(_row(step) for step in range(1, 5)),
            {"step": 4, "eval_loss": 1.75, "exact_match_pct": 50.0},
        ],
        "samples": samples,
    }  # fmt: skip
    return Record(**{**values, **changes})


def test_the_first_and_the_last_are_side_by_side() -> None:
    page = report_page(_record())
    assert "6.5 → 1.75" in page and "held-out loss" in page
    assert page.index("fish") < page.rindex(">4</pre>")
    assert "1 evaluations between" in page
    assert "step 4 of 4; 2 ranks on CPU; 400 tokens, 200 of them trained on" in page


def test_a_run_that_was_stopped_says_where() -> None:
    stopped = {"signal": "SIGTERM", "step": 6}
    page = report_page(_record(run={**_record().run, "steps": 9}, stopped=stopped))
    assert "step 6 of 9; stopped by SIGTERM, to be continued by the same command;" in page


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": []},
        {"rows": [{"step": 0, "eval_loss": 2.0}]},
        {"rows": [_row(1, loss=None, mfu_pct=None, grad_norm=None)], "samples": []},
        {"run": {}},
        {"goodput": {}, "config": ""},
    ],
)
def test_a_run_that_has_little_to_show_has_a_page(changes: dict[str, Any]) -> None:
    assert report_page(_record(**changes)).endswith("</html>\n")


def test_numbers_of_ones_own_have_charts() -> None:
    rows = [_row(1, z_penalty=0.5), _row(2, z_penalty=0.25), {"step": 2, "pass_at_1": 12.5}]
    page = report_page(_record(rows=rows))
    charts = re.findall(r"<figcaption>([^<]*)", page)
    assert "z_penalty" in charts and "pass_at_1" in charts


def test_planned_and_measured_are_told() -> None:
    plan = {"memory_allocated_gib": {"planned": 41.5, "measured": 40.25, "error_pct": 3.1}}
    page = report_page(_record(run={**_record().run, "plan": plan}))
    assert "41.5" in page and "40.25" in page and "3.1" in page


def test_S12_texts_of_data_and_model_stay_texts() -> None:
    """Everything that comes from outside, spelled as markup."""
    source = {"name": _EVIL, "ledger": _ledger({_EVIL: {"rows": 1, "first": [0]}})}
    page = report_page(
        _record(
            run={
                **_record().run,
                "model": {"name": _EVIL},
                "data": {"sources": [source]},
                "device": _EVIL,
                "versions": {_EVIL: _EVIL},
            },
            rows=[_row(1, **{_EVIL: 1.0}), {"step": 1, _EVIL: 2.0}],
            samples=[
                {"step": 1, "prompt": _EVIL, "expected": _EVIL, "answer": _EVIL + "\u202e\x00"}
            ],
            events=[{"step": 1, "line": _EVIL}],
            config=f"loss: {json.dumps(_EVIL)}\n",
            stopped={"signal": _EVIL, "step": 1},
        )
    )
    assert "<script" not in page and "<img" not in page
    assert "\u202e" not in page and "\x00" not in page
    assert page.count("&lt;script&gt;") > 12
    assert "default-src 'none'" in page


def _ledger(excluded: dict[str, Any]) -> dict[str, Any]:
    """Of a stream, whose rows are not packed beforehand."""
    return {
        **asdict(Ledger(rows_read=1, examples=1, tokens=1, supervised_tokens=1)),
        "excluded": excluded,
    }


def test_a_page_that_cannot_be_written_is_a_line(tmp_path: Path) -> None:
    assert "run.json" in (write_report(tmp_path) or "")
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "metrics.jsonl").write_text('{"loss": 1}\n')  # no step
    assert "was not written" in (write_report(tmp_path) or "")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.5, "to')  # killed in a row
    (tmp_path / FILE).mkdir()
    assert "was not written" in (write_report(tmp_path) or "")
    (tmp_path / FILE).rmdir()
    assert write_report(tmp_path) is None


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on chat data that one rank began and two ended; some of its held-out rows spell markup."""
    folder = tmp_path_factory.mktemp("report")
    chat = write_chat(folder / "data" / "train.jsonl", count=120)
    rows = [json.loads(line) for line in chat.read_text().splitlines()[:12]]
    for row in rows:
        row["messages"][-2]["content"] += " " + _EVIL
    (folder / "data" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = [
        f"--data.path={folder / 'data'}",
        "--evaluation.split=test",
        "--evaluation.every=2",
        "--evaluation.max_new_tokens=4",
        "--data.seq_len=128",
        "--global_batch_size=4",
        "--schedule.name=constant",
        "--log.every=1",
        "--checkpoint.export=false",
        "--log.tensorboard=false",
    ]
    for steps, world_size in ((4, 1), (6, 2)):
        result = train(
            [*args, f"--steps={steps}", "--allow_changed=[steps]"],
            world_size,
            cache_dir=folder / "cache",
            output_dir=folder / "out",
        )
        assert result.returncode == 0, result.output
        assert "warning" not in result.stderr
    return folder / "out"


@pytest.mark.distributed
def test_a_continued_run_is_whole(run_dir: Path) -> None:
    page = (run_dir / FILE).read_text()
    assert page == report_page(read_record(run_dir))
    samples = read_record(run_dir).samples
    assert [s["step"] for s in samples if s["prompt"] == samples[0]["prompt"]] == [0, 2, 4, 6]
    assert len({s["prompt"] for s in samples}) == 4
    losses = [row["eval_loss"] for row in read_rows(run_dir) if "eval_loss" in row]
    assert f"{losses[0]:.4g} → {losses[-1]:.4g}" in page
    assert "step 6 of 6; 2 ranks" in page
    assert "rows, used" in page and "Where the time went" in page


@pytest.mark.distributed
def test_the_command_writes_it_again(run_dir: Path, tmp_path: Path) -> None:
    before = (run_dir / FILE).read_text()
    (run_dir / FILE).unlink()
    script = str(ROOT / "scripts" / "report.py")
    env = clean_environment(tmp_path)
    result = run_command([sys.executable, script, str(run_dir)], timeout=60, env=env)
    assert (result.returncode, result.stdout.strip()) == (0, str(run_dir / FILE)), result.output
    assert (run_dir / FILE).read_text() == before
    assert main([str(tmp_path)]) == 2


@pytest.mark.distributed
def test_a_run_does_not_fail_with_its_report(tmp_path: Path, cache_dir: Path) -> None:
    (tmp_path / "out" / FILE).mkdir(parents=True)
    result = train(
        ["--steps=1", "--evaluation.max_rows=4", "--evaluation.generate_rows=0", "--checkpoint.export=false"],
        1,
        cache_dir=cache_dir,
        output_dir=tmp_path / "out",
    )  # fmt: skip
    assert result.returncode == 0, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("warning:") and "report.html was not written" in line


def _browse(args: list[str], place: Path) -> subprocess.CompletedProcess[str]:
    """Chromium's document once it is loaded, and on standard error its console."""
    assert _CHROMIUM is not None
    switches = (
        "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
        "disable-component-update disable-sync enable-logging=stderr virtual-time-budget=3000 dump-dom"
    )
    return subprocess.run(
        [_CHROMIUM, "--host-resolver-rules=MAP * ~NOTFOUND", *(f"--{name}" for name in switches.split()), f"--user-data-dir={place / 'profile'}", *args],
        env=clean_environment(place),
        capture_output=True,
        text=True,
        timeout=120,
    )  # fmt: skip


@pytest.mark.distributed
@pytest.mark.skipif(_CHROMIUM is None, reason="no Chromium: apt-get install chromium")
def test_a_browser_shows_it_without_a_script_or_a_request(run_dir: Path, tmp_path: Path) -> None:
    net_log = tmp_path / "net.json"
    with tempfile.TemporaryDirectory(
        prefix="chromium-", dir="/tmp"
    ) as place:  # a socket in it has a short path
        result = _browse([f"--log-net-log={net_log}", (run_dir / FILE).as_uri()], Path(place))
    page = result.stdout
    assert re.search(r"<title>the built-in Qwen3 on data</title>", page), result.stderr
    assert page.count("<polyline") >= 5 and page.count("<circle") >= 4
    assert not {"script", "img"} & set(re.findall(r"<(\w+)", page))
    assert "CONSOLE" not in result.stderr, result.stderr
    asked = re.findall(r'"url":\s*"([^"]*)"', net_log.read_text())
    assert not [
        url
        for url in asked
        if not re.match(r"chrome|https?://[\w.-]+\.(google|googleapis|gvt1)\.com/", url)
    ]


@pytest.mark.skipif(_CHROMIUM is None, reason="no Chromium: apt-get install chromium")
def test_the_policy_of_a_page_stops_what_escaping_would_have_missed(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(head("clean", style="") + _EVIL)
    with tempfile.TemporaryDirectory(prefix="chromium-", dir="/tmp") as place:
        result = _browse([(tmp_path / "page.html").as_uri()], Path(place))
    assert "<title>clean</title>" in result.stdout and "<img" in result.stdout, result.stderr
    assert result.stderr.count("CONSOLE") >= 2  # the script, and the picture that was not asked for
