"""data/bench.py: what it counts, prints, draws and where it ends."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product
import json

import pytest
from click.testing import CliRunner

import tinyinr
from data import bench

SIZES = dict(dim=24, depth=2, n_heads=2, head_dim=12, ff_dim=48, batch_size=2, n_queries=6)


@pytest.mark.parametrize("task, name", list(product(("image", "nvs", "gp"), bench.MODELS)))
def test_a_measured_step_counts_every_product_once_a_signal(task, name, monkeypatch):
    """Twice the signals are twice the FLOPs, and the share is FLOPs by time by peak."""
    monkeypatch.setattr(tinyinr, "median_seconds", lambda work, *_: (work(), 0.5)[1])
    cfg, recipe = tinyinr.make_config("small", task, name, **SIZES | {"muon_lr": 0.0})
    one, two, four = (bench.bench_cell(cfg, replace(recipe, batch_size=b), "cpu")
                      for b in (1, 2, 4))
    step = (four["gflop"] - two["gflop"]) / 2
    assert two["gflop"] - one["gflop"] == pytest.approx(step)
    assert two["gflop"] == pytest.approx(2 * one["gflop"], rel=0.1)  # what signals share
    assert two["share"] == pytest.approx(two["gflop"] * 1e9 / 0.5 / (2 * 2048**3 / 0.5))
    assert (two["step_ms"], two["encode_ms"], two["decode_per_s"]) == (500, 250, 24)
    assert two["signals_per_s"] == 4 and two["memory_mb"] > 50


def test_the_products_of_a_linear_layer_are_counted_as_by_hand(monkeypatch):
    """Three products a layer and step: forward, by the weights and by the inputs."""
    monkeypatch.setattr(tinyinr, "median_seconds", lambda *_: 1.0)
    small, wide = (tinyinr.make_config("paper-small", "image", "transinr", **SIZES | {
        "muon_lr": 0.0, "ff_dim": n}) for n in (48, 80))
    more = bench.bench_cell(*wide, "cpu")["gflop"] - bench.bench_cell(*small, "cpu")["gflop"]
    model, cfg = tinyinr.build(small[0]), small[0]
    seen = []
    block = next(m for m in model.modules() if isinstance(m, tinyinr.Block))
    block.register_forward_hook(lambda _, args, out: seen.append(args[0].shape[1]))
    model.encode({"image": bench.torch.rand(1, 3, cfg.image_size, cfg.image_size)})
    products = 3 * 2 * cfg.depth  # of both layers of the feed-forward part
    assert more * 1e9 == pytest.approx(2 * seen[0] * products * cfg.dim * 32 * 2)


def test_bench_prints_and_writes_a_row_for_every_cell(tmp_path, monkeypatch):
    row = dict.fromkeys(("step_ms", "signals_per_s", "gflop", "share", "memory_mb", "encode_ms",
                         "decode_per_s"), 0.5)
    cells = {("image", name): {"batch_size": 1} for name in bench.MODELS}
    monkeypatch.setattr(tinyinr, "PRESETS", {"small": cells})
    monkeypatch.setattr(bench, "ProcessPoolExecutor", lambda *_, initializer, **__:
                        ThreadPoolExecutor(1, initializer=initializer))
    monkeypatch.setattr(tinyinr, "median_seconds", lambda *_: 1e-3)
    monkeypatch.setattr(bench, "bench_cell", lambda cfg, recipe, _: row | {
        "cell": f"{cfg.model} {recipe.batch_size}"})
    out = CliRunner().invoke(bench.main, ["--batch-size", "3", "--json", str(tmp_path / "b.json")])
    assert out.exit_code == 0, out.output
    written = json.loads((tmp_path / "b.json").read_text())
    assert [r["cell"] for r in written["cells"]] == ["transinr 3", "vnp 3"]
    assert written["peaks"]["float32"] == 2 * 2048**3 / 1e-3
    assert "17.18 TFLOP/s in float32" in out.output and "vnp 3" in out.output


def test_cost_lines_end_where_memory_does_and_are_drawn(tmp_path, monkeypatch):
    law = lambda axis, model, n: (1e-4 * n, 1e3 * n**2)  # 16 times the memory a step
    monkeypatch.setattr(bench, "measure", law)
    with ThreadPoolExecutor(1) as pool:
        points = bench.line("views encoded", "vnp", pool)
    assert [n for n, *_ in points] == [4**i for i in range(7)]  # 4,096 takes 16.8 GB
    monkeypatch.setattr(bench, "README", tmp_path)
    table = {axis: {"vnp": points, "transinr": points} for axis in bench.AXES}
    tinyinr.write_json(tmp_path / "t.json", table)
    out = CliRunner().invoke(bench.main, ["inputs", "--json", str(tmp_path / "t.json")])
    assert out.exit_code == 0 and (tmp_path / "costs.png").stat().st_size > 1000
