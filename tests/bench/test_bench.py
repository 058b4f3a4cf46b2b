"""`alfb bench`: sizes and refusals, what is measured and how, and a run on two ranks."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from alfb_dist.bench import contestants, document, memory, spawn, timing, worker
from alfb_dist.bench.contestants import OURS, THEIRS, Run, build, make_run, make_tokens, make_weights, products
from alfb_dist.bench.plot import bars
from alfb_dist.bench.sizes import FLOOR, Case, scaled
from alfb_dist.bench.tables import case_rows, scaling_rows
from alfb_dist.cli import bench as command
from alfb_dist.cli import main
from alfb_dist.moe.experts import expert_mlp, grouped

CPU = torch.device("cpu")
SMALL = Case(tokens=96, hidden=32, inter=16, experts=8, topk=2)
TEST_CONFIG = Path(__file__).parents[2] / "configs" / "test.toml"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--topk", "9", "--experts", "8"], "topk (9) must not be more than experts (8)"),
        (["--tokens", "0"], "tokens must be at least 1, got 0"),
        (["--ranks", "3"], "experts (32) must be divisible by ranks (3)"),
        (["--routing", "hot_rank", "--experts", "6"], "experts (6) must be at least 8"),
        (["--seconds", "0"], "--seconds must be more than 0"),
        (["--values", "4"], "--values needs --scaling"),
        (["--scaling", "topk", "--values", "4,x"], "--values must be comma-separated integers"),
        (["--scaling", "topk", "--values", "4,64"], "topk (64) must not be more than experts (32)"),
    ],
)
def test_impossible_sizes_are_refused(
    options: list[str], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("subprocess.run", lambda *_, **__: pytest.fail("a process was started"))
    assert main(["bench", *options]) == 78
    assert words in capsys.readouterr().err


def test_the_sizes_of_a_configuration_are_its_first_blocks() -> None:
    found = command._sizes_of(TEST_CONFIG)
    assert Case(**found) == Case(tokens=64, hidden=32, inter=16, experts=8, topk=2, ranks=2)


def test_scaling_leaves_out_what_does_not_fit() -> None:
    assert [c.topk for c in scaled(SMALL, "topk", None, 2)] == [1, 2, 4, 8]
    assert [c.ranks for c in scaled(SMALL, "ranks", None, 2)] == [1, 2]
    assert [c.experts for c in scaled(SMALL, "experts", [4, 6], 2)] == [4, 6]


@pytest.mark.parametrize(
    ("routing", "with_expert_0", "in_first_half"),
    # Of 16 experts, top 2, for half of the tokens. hot_expert: they choose expert 0 and one of the other 15.
    [
        ("balanced", 2 / 16, 1 / 2),
        ("hot_expert", (1 + 2 / 16) / 2, ((1 + 7 / 15) / 2 + 1 / 2) / 2),
        ("hot_rank", (2 / 8 + 2 / 16) / 2, (1 + 1 / 2) / 2),
    ],
)
def test_half_of_the_tokens_choose_the_hot_experts(routing: str, with_expert_0: float, in_first_half: float) -> None:
    case = Case(tokens=4000, hidden=64, experts=16, topk=2, routing=routing)
    weights = make_weights(case)
    ids = (make_tokens(case, weights, 0)[0] @ weights["gate"].T).topk(2).indices
    assert float((ids == 0).any(1).float().mean()) == pytest.approx(with_expert_0, abs=0.03)
    assert float((ids < 8).float().mean()) == pytest.approx(in_first_half, abs=0.03)
    assert not torch.equal(make_tokens(case, weights, 1), make_tokens(case, weights, 0))


def count_flops(run: Run) -> int:
    with FlopCounterMode(display=False) as counter:
        run.backward(run.forward())
    return counter.get_total_flops()


def test_bare_products_have_as_many_flops_as_the_block() -> None:
    weights = make_weights(SMALL)
    block = build("transformers eager", SMALL, weights, CPU)
    x = make_tokens(SMALL, weights, 0).requires_grad_()
    assert count_flops(products(SMALL, CPU)) == count_flops(make_run(block, x, torch.ones_like(x)))


def scripted(log: list[str], name: str) -> Run:
    return Run(lambda: log.append(name), lambda out: None)


def test_contestants_take_turns_and_each_is_first_in_some_rounds() -> None:
    log: list[str] = []
    times = timing.time_in_turn({n: scripted(log, n) for n in "ABC"}, 0.0, None, CPU)
    assert {name: len(seconds) for name, seconds in times.items()} == dict.fromkeys("ABC", timing.MIN_ROUNDS)
    assert log[:6] == list("ABCABC")
    assert "".join(log[6:15]) == "BCACABABC"


def test_ratios_are_taken_round_by_round() -> None:
    found = timing.summary([2.0, 9.0, 4.0], [1.0, 3.0, 4.0])
    assert found["ratio"] == {"median": 2.0, "min": 1.0, "max": 3.0}
    assert found["ms"]["median"] == 4000


class _Keeps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.attributes = [(torch.ones(50), 3)]
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * 2


def test_kept_bytes_count_saved_tensors_and_attributes_once_and_no_parameters() -> None:
    layer = nn.Linear(8, 4, bias=False)
    x = torch.randn(10, 8, requires_grad=True)

    def kept(forward: Callable[[], Tensor]) -> int:
        return memory.kept_bytes(Run(forward, lambda out: out.sum().backward()), layer.parameters())

    assert kept(lambda: layer(x)) == 10 * 8 * 4
    assert kept(lambda: layer(x) + layer(x.view(10, 8)[:])) == 10 * 8 * 4
    assert kept(lambda: layer(x).exp()) == 10 * 8 * 4 + 10 * 4 * 4
    assert kept(lambda: _Keeps.apply(x)) == 50 * 4


def test_peak_is_what_was_allocated_at_the_same_time() -> None:
    def forward() -> Tensor:
        a = torch.empty(100_000)
        b = torch.empty(50_000)
        del a
        return torch.empty(25_000) + b[0]

    assert memory.peak_bytes(Run(forward, lambda out: None)) == pytest.approx(600_000, abs=1000)


@pytest.mark.parametrize("path", ["expert_mlp", "grouped"])
def test_a_routed_row_keeps_the_first_product_and_little_else(path: str) -> None:
    """2F numbers per routed row and a small sort; the rows themselves belong to the caller."""
    rows, top_k, width, inner, num_experts = 200, 4, 64, 32, 8
    x = torch.randn(rows, width, requires_grad=True)
    weights = torch.rand(rows, top_k).requires_grad_()
    ids = torch.rand(rows, num_experts).argsort(1)[:, :top_k]
    gate_up = torch.randn(num_experts, 2 * inner, width, requires_grad=True)
    down = torch.randn(num_experts, width, inner, requires_grad=True)

    def forward() -> Tensor:
        if path == "grouped":
            return grouped.GroupedMLP.apply(x, weights, gate_up, down, ids)
        return expert_mlp(x, ids, weights, gate_up, down, nn.SiLU())

    run = Run(forward, lambda out: out.sum().backward())
    kept = memory.kept_bytes(run, (x, weights, gate_up, down))
    first_product = rows * top_k * 2 * inner * 4
    assert first_product <= kept <= first_product + 16 * rows * top_k + 1000


def test_the_block_keeps_less_than_half_of_what_transformers_keeps() -> None:
    case = Case(tokens=256)
    weights = make_weights(case)
    x = make_tokens(case, weights, 0).requires_grad_()
    kept = {}
    for name in (*THEIRS, OURS):
        block = build(name, case, weights, CPU)
        kept[name] = memory.kept_bytes(make_run(block, x, torch.ones_like(x)), block.parameters()) / case.rows
    assert kept[OURS] < 2000  # 2F numbers, K/4 of the token and of the shared expert's: 1845 bytes
    assert kept[OURS] < 0.5 * min(kept[name] for name in THEIRS)


def test_all_contestants_of_a_case_are_measured_and_agree() -> None:
    figures = worker.measure(SMALL, 0.0, CPU)
    assert set(figures["results"]) == {FLOOR, OURS, *THEIRS}
    for name, result in figures["results"].items():
        assert result["rounds"] == timing.MIN_ROUNDS
        assert name == FLOOR or 0 <= result["difference"] < 1e-5
    assert figures["results"][FLOOR]["ratio"] == {"median": 1.0, "min": 1.0, "max": 1.0}
    assert {row[0] for row in case_rows(figures)} == set(figures["results"])
    assert bars(figures).count("<rect") == 4
    head, rows = scaling_rows([figures, figures], "experts")
    assert head[0] == "experts" and [row[0] for row in rows] == ["8", "8"]


def test_a_very_slow_contestant_is_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    inner = timing.time_once
    monkeypatch.setattr(worker, "SLOW_SECONDS", 0.0)
    monkeypatch.setattr(worker, "time_once", lambda *run: inner(*run) * 0 + 7)
    figures = worker.measure(SMALL, 0.0, CPU, with_memory=False)
    assert {name: result["rounds"] for name, result in figures["results"].items()} == {
        FLOOR: timing.MIN_ROUNDS,
        OURS: 1,
        **dict.fromkeys(THEIRS, 1),
    }
    assert figures["results"][OURS]["ms"]["median"] == 7000
    assert scaling_rows([figures], "experts")[1][0][1].startswith("about 7000.00 (x")


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    inner = contestants.moe_layer

    def wrong(case: Any, weights: dict[str, Tensor], world: Any) -> Any:
        return inner(case, weights | {"down": weights["down"] * 1.001}, world)

    monkeypatch.setattr(contestants, "moe_layer", wrong)
    with pytest.raises(RuntimeError, match="alfb_dist differs from transformers' eager block"):
        worker.measure(SMALL, 0.0, CPU)


def test_a_scaling_on_two_ranks_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = "--tokens 64 --hidden 32 --inter 16 --topk 2 --ranks 2 --routing hot_rank".split()
    scaling = ["--scaling", "experts", "--values", "4,8", "--seconds", "0.01"]
    assert main(["bench", *sizes, *scaling, "--out", str(tmp_path / "out")]) == 0
    kept = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert [f["case"]["experts"] for f in kept["figures"]] == [4, 8]
    assert all(f["case"]["ranks"] == 2 and set(f["results"]) == {FLOOR, OURS, *THEIRS} for f in kept["figures"])
    table = (tmp_path / "out" / "bench.md").read_text()
    assert "| 4 |" in table and "| 8 |" in table and "torch 2." in table
    assert (tmp_path / "out" / "bench.html").read_text().count("<svg") == 2
    assert "experts" in capsys.readouterr().out


def test_failing_ranks_raise_an_error_with_their_output() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)the benchmark's ranks failed.*out of range"):
        spawn.measure([Case(tokens=8, hidden=8, inter=8, experts=2, topk=3)], 0.01, print)


def test_only_matching_tables_of_a_document_are_measured_again() -> None:
    text = "a\n<!-- alfb bench --topk 2 -->\nold\nold\n<!-- end -->\nb\n<!-- alfb bench --topk 3 -->\n<!-- end -->\n"
    updated = document.update_tables(text, "--topk 2", lambda arguments: f"new {arguments}")
    assert updated == (
        "a\n<!-- alfb bench --topk 2 -->\n`alfb bench --topk 2`\n\nnew --topk 2\n<!-- end -->\nb\n"
        "<!-- alfb bench --topk 3 -->\n<!-- end -->\n"
    )
    assert document.update_tables(text, "", str).count("`alfb bench --topk") == 2
    with pytest.raises(ValueError, match="no table's arguments contain '--topk 4'"):
        document.update_tables(text, "--topk 4", str)


def test_a_table_of_a_document_is_what_the_command_wrote(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **_: Any) -> Any:
        Path(command[-1], "bench.md").write_text(f"{command[2:-2]}\n\nmachine\n")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    table = document.measure_table("--topk 2 --seconds 1")
    assert table.startswith("['alfb_dist.cli', 'bench', '--topk', '2', '--seconds', '1']\n\nmachine. 20")
    monkeypatch.setattr(subprocess, "run", lambda c, **_: subprocess.CompletedProcess(c, 1, "", "why"))
    with pytest.raises(RuntimeError, match=r"(?s)alfb bench --topk 2 failed.*why"):
        document.measure_table("--topk 2")
