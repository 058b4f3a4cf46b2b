"""report.html: its content for whole, empty and damaged runs, and its size."""

from __future__ import annotations

import base64
import math
import re
import struct
import zlib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from support.report_runs import layer_names, make_run, training_record, write_loads, write_metrics

from alfb_dist.report import read_run, write_html
from alfb_dist.report.heatmap import binned_ratio, load_ratio, picture, shade
from alfb_dist.report.svg import Axis, downsample, nice_ticks, path


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "small", 3, 16, 60, evaluate_every=20)


@pytest.fixture(scope="module")
def small_page(small_run: Path) -> str:
    return write_html(small_run).read_text(encoding="utf-8")


def pixels(uri: str) -> list[bytes]:
    """Rows of palette indices of a PNG data URI, decoded without the code under test."""
    content = base64.b64decode(uri.removeprefix("data:image/png;base64,"))
    width, height = struct.unpack(">II", content[16:24])
    start = content.index(b"IDAT") + 4
    size = struct.unpack(">I", content[start - 8 : start - 4])[0]
    raw = zlib.decompress(content[start : start + size])
    assert len(raw) == height * (width + 1)
    return [raw[row * (width + 1) + 1 : (row + 1) * (width + 1)] for row in range(height)]


def test_page_shows_name_model_and_figures(small_page: str) -> None:
    for text in (
        "<h1>small</h1>",
        "deepseek_v3",
        "2.35M",
        "routed experts <b>16</b>",
        "unigram entropy",
        "MaxVio_global",
    ):
        assert text in small_page
    run_loss = re.search(r"training loss</span><b>([\d.]+)</b><small>first ([\d.]+)", small_page)
    assert run_loss is not None
    assert float(run_loss[1]) == pytest.approx(2.2 + 3.4 * math.exp(-60 / 40), abs=0.03)
    assert float(run_loss[2]) == pytest.approx(2.2 + 3.4 * math.exp(-1 / 40), abs=0.03)


def test_every_chart_has_title_axes_and_a_note_on_how_to_read_it(small_page: str) -> None:
    charts = re.findall(r"<figure.*?</figure>", small_page, flags=re.DOTALL)
    titles = [re.findall("<h3>(.*?)</h3>", chart)[0] for chart in charts]
    assert titles == [
        "Loss",
        "Gradient norm",
        "Learning rate",
        "MaxVio",
        "Load of every expert at step 60",
        "Expert load, layer by layer",
        "Routing bias, layer by layer",
        "Bias range",
        "Dead experts",
        "Rank skew",
        "Throughput",
    ]
    for chart in charts:
        assert len(re.findall(r"<figcaption>.*?<p>(.{20,}?)</p>", chart)) == 1
        assert chart.count('class="axis') >= 1


def test_drawings_are_well_formed_and_without_nan(small_page: str) -> None:
    drawings = re.findall(r"<svg.*?</svg>", small_page, flags=re.DOTALL)
    assert len(drawings) == 9 + 2 * 3 + 0
    for drawing in drawings:
        ElementTree.fromstring(drawing)
        assert "nan" not in re.sub(r'href="[^"]*"', "", drawing).lower()


def test_tags_are_balanced(small_page: str) -> None:
    open_tags: list[str] = []

    class Checker(HTMLParser):
        def handle_starttag(self, tag: str, attrs: object) -> None:
            if tag not in ("meta", "br", "img"):
                open_tags.append(tag)

        def handle_startendtag(self, tag: str, attrs: object) -> None:
            pass

        def handle_endtag(self, tag: str) -> None:
            assert open_tags.pop() == tag

    Checker().feed(small_page)
    assert not open_tags


def test_page_loads_nothing_from_elsewhere(small_page: str) -> None:
    assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", small_page)
    assert not re.findall(r"@import|url\(", small_page)
    addresses: list[str | None] = []

    class Addresses(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            assert tag not in ("link", "iframe", "object", "embed", "base")
            addresses.extend(value for name, value in attrs if name.removeprefix("xlink:") in ("src", "href", "srcset"))

    Addresses().feed(small_page)
    assert len(addresses) == 1 + 3  # the pictures: all layers at the last step, and each layer over time
    assert all(address is not None and address.startswith("data:image/png;base64,") for address in addresses)


def test_load_pictures_show_the_loads(tmp_path: Path) -> None:
    load_LE, bias_LE = np.array([[0, 10, 10, 20]]), np.zeros((1, 4), dtype=np.float32)
    write_loads(tmp_path, layer_names(1), [(step, load_LE, bias_LE) for step in (1, 2)])
    write_metrics(tmp_path, [training_record(step, load_LE, bias_LE) for step in (1, 2)])
    page = write_html(tmp_path).read_text()
    whole, over_time = re.findall(r'href="(data:[^"]*)"', page)
    # 32 is the mean, 0 a quarter of it or less, 64 four times it or more, 48 twice the mean.
    assert pixels(whole) == [bytes([0, 32, 32, 48])]
    assert pixels(over_time) == [bytes([0, 0]), bytes([32, 32]), bytes([32, 32]), bytes([48, 48])]


def test_shade_is_0_at_the_mean_and_symmetric_in_ratio() -> None:
    assert shade(np.array([1.0, 2.0, 0.5, 4.0, 0.0, 100.0])).tolist() == [0, 0.5, -0.5, 1, -1, 1]
    assert np.isnan(load_ratio(np.zeros((1, 3)))).all()
    assert pixels(picture(np.array([[np.nan, 0.0]]))) == [bytes([65, 32])]


def test_binning_counts_every_token() -> None:
    load_NLE = np.arange(2 * 7 * 3).reshape(7, 2, 3)
    ratio = binned_ratio(load_NLE, 3)
    assert ratio.shape == (3, 2, 3)
    assert ratio.mean(axis=-1) == pytest.approx(np.ones((3, 2)))
    assert ratio[0] == pytest.approx(load_ratio(load_NLE[:2].sum(axis=0)))


def test_bias_panels_reach_the_last_logged_step(small_run: Path, small_page: str) -> None:
    loads = read_run(small_run).loads
    assert loads is not None
    shown = re.findall(r"<title>expert (\d+), bias (\S+) at the end</title>", small_page)
    last_E = [(expert, float(value)) for layer in loads.bias_NLE[-1] for expert, value in enumerate(layer)]
    assert [int(expert) for expert, _ in shown] == [expert for expert, _ in last_E]
    assert [float(value) for _, value in shown] == pytest.approx([value for _, value in last_E], rel=1e-3)


def test_secrets_in_the_configuration_are_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_c4n4ry_value")
    (tmp_path / "config.json").write_text('{"data": {"source": ["https://user:hf_c4n4ry_value@host/x"]}}')
    page = write_html(tmp_path).read_text()
    assert "c4n4ry" not in page
    assert "[redacted]" in page


def test_directory_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="not a run directory"):
        write_html(tmp_path)
    assert not list(tmp_path.iterdir())


def test_run_without_loads_config_or_evaluation_is_drawn(tmp_path: Path) -> None:
    write_metrics(tmp_path, [{"step": 1, "loss": 3.0}])
    page = write_html(tmp_path).read_text()
    assert "<h3>Loss</h3>" in page
    assert "No value logged" in page


def test_run_with_truncated_files_is_drawn(small_run: Path, tmp_path: Path) -> None:
    for name in ("metrics.jsonl", "loads.bin", "config.json"):
        (tmp_path / name).write_bytes((small_run / name).read_bytes()[:-7])
    page = write_html(tmp_path).read_text()
    assert "Load of every expert at step 59" in page


def test_nan_is_a_gap_in_the_line(tmp_path: Path) -> None:
    losses = [3.0, 2.0, math.nan, 2.0, math.inf, 1.0]
    load_LE, bias_LE = np.ones((1, 4), dtype=np.int64), np.zeros((1, 4))
    write_metrics(tmp_path, [training_record(i + 1, load_LE, bias_LE, loss=loss) for i, loss in enumerate(losses)])
    assert np.isnan(read_run(tmp_path).column("loss")).tolist() == [False, False, True, False, True, False]
    drawing = re.findall(r"<svg.*?</svg>", write_html(tmp_path).read_text(), flags=re.DOTALL)[0]
    line = re.findall(r'class="line main" d="([^"]*)"', drawing)[0]
    assert (line.count("M"), line.count("L")) == (3, 1)


def test_names_with_markup_are_escaped(tmp_path: Path) -> None:
    names = ["<script>alert(1)</script>\"'&"]
    load_LE, bias_LE = np.ones((1, 4), dtype=np.int64), np.zeros((1, 4), dtype=np.float32)
    write_loads(tmp_path, names, [(1, load_LE, bias_LE)])
    write_metrics(tmp_path, [training_record(1, load_LE, bias_LE)])
    (tmp_path / "config.json").write_text('{"model": {"family": "<script>alert(2)</script>"}}')
    page = write_html(tmp_path).read_text()
    assert page.count("<script>") == 1
    for drawing in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL):
        ElementTree.fromstring(drawing)


def test_page_of_a_large_run_stays_under_3_megabytes(tmp_path: Path) -> None:
    num_layers, num_experts, steps = 58, 256, 1000
    rng = np.random.default_rng(0)

    def logged() -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        for step in range(1, steps + 1):
            if (
                step % 8 == 1
            ):  # noise that holds for 8 steps, so that the average of a column stays noise: hard to compress
                load_LE = (100 * np.exp(rng.normal(0, 1.2, (num_layers, num_experts)))).astype(np.int64) + 1
            yield step, load_LE, load_LE.astype(np.float32) / 1000

    write_loads(tmp_path, layer_names(num_layers), logged())
    write_metrics(tmp_path, (training_record(*record) for record in logged()))
    assert write_html(tmp_path).stat().st_size < 3_000_000


def test_axis_ticks_are_round_and_inside() -> None:
    assert nice_ticks(0, 1, 5) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert nice_ticks(3, 97, 5) == [20, 40, 60, 80]
    assert nice_ticks(2, 2) == [2]
    assert Axis(0, 3, 100, 0, symlog=True).ticks() == [0, 0.1, 0.2, 0.5, 1, 2]
    assert Axis(0, 1.2, 0, 1, whole=True).ticks() == [0, 1]


def test_symlog_axis_shows_zero_and_decades_in_order() -> None:
    positions = Axis(0, 100, 0, 1, symlog=True).position(np.array([0, 0.01, 0.1, 1, 10, 100]))
    assert positions[0] == 0
    assert positions[-1] == 1
    assert (np.diff(positions) > 0).all()
    assert np.diff(positions)[-1] == pytest.approx(np.diff(positions)[-2], rel=0.02)


def test_downsampling_keeps_spikes_and_gaps() -> None:
    x, y = np.arange(10_000.0), np.zeros(10_000)
    y[4321], y[7000:7500] = 99.0, np.nan
    thin_x, thin_y = downsample(x, y, 200)
    assert len(thin_x) <= 200
    assert np.nanmax(thin_y) == 99.0
    assert np.isnan(thin_y).any()
    assert path(thin_x, thin_y).count("M") == 2
