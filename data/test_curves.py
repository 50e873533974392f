"""Oracles for data/curves.py and data/lotka_volterra.py."""

import math
import random
import subprocess
import sys
import zipfile
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent

import tinyinr
from data import curves, lotka_volterra


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("kernel, formula", [
    ("rbf", lambda d: math.exp(-(d / 0.4) ** 2 / 2)),
    ("matern52", lambda d: (1 + 5**0.5 * d / 0.4 + 5 * (d / 0.4) ** 2 / 3)
     * math.exp(-(5**0.5) * d / 0.4)),
    ("periodic", lambda d: math.exp(-2 * (math.sin(math.pi * d / 0.3) / 0.4) ** 2))])
def test_covariance_equals_its_formula(kernel, formula):
    points = [-1.0, 0.2, 1.7]
    x = torch.tensor(points, dtype=torch.float64).view(1, 3, 1)
    k = curves.covariance(kernel, x, x, *torch.tensor([0.4, 0.9, 0.3], dtype=torch.float64))
    want = [[0.81 * formula(abs(a - b)) for b in points] for a in points]
    torch.testing.assert_close(k[0], torch.tensor(want, dtype=torch.float64))


@pytest.mark.parametrize("kernel, n, m, x0, y1", [  # first and last number of the first set
    ("rbf", 27, 5, 1.913002, -0.835873), ("matern52", 14, 18, 0.764012, -0.070508),
    ("periodic", 4, 17, -0.923828, -0.59552)])
def test_gp_test_sets_stay_the_same_draws(kernel, n, m, x0, y1):
    x, y, hyper, context = next(curves.gp_test_sets(kernel, 1))
    assert (context, x.shape, y.shape, x.dtype) == (n, *2 * ((16, n + m, 1),), torch.float64)
    assert (x[0, 0].item(), y[-1, -1].item()) == pytest.approx((x0, y1), abs=2e-6)
    sizes = [(n, x.shape[1]) for x, _, _, n in curves.gp_test_sets(kernel, 60, seed=5)]
    assert all(3 <= n <= 46 and n + 3 <= total < 50 for n, total in sizes)
    assert sizes != [(n, x.shape[1]) for x, _, _, n in curves.gp_test_sets(kernel, 60)]


@pytest.mark.parametrize("kernel", curves.KERNELS)
def test_posterior_equals_conditioning_of_the_joint_normal(kernel):
    x, y, hyper = curves.draw_curves(kernel, 3, 12, seeded())
    k = curves.covariance(kernel, x, x, *hyper) + 0.02**2 * torch.eye(12, dtype=torch.float64)
    gain = k[:, 7:, :7] @ torch.linalg.inv(k[:, :7, :7])
    cov = k[:, 7:, 7:] - gain @ k[:, :7, 7:]
    seen = x[:, :7], y[:, :7]
    mean, std = curves.gp_posterior(kernel, *seen, x[:, 7:], hyper)
    torch.testing.assert_close(mean, gain @ y[:, :7], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(std[..., 0] ** 2, cov.diagonal(0, 1, 2), rtol=1e-5, atol=1e-8)


def test_fitted_gp_has_the_highest_evidence_of_a_grid():
    x, y, _ = curves.draw_curves("rbf", 2, 15, seeded(3))

    def evidence(length, scale, noise):
        k = curves.covariance("rbf", x, x, length, scale, None)
        k = k + noise**2 * torch.eye(15, dtype=torch.float64)
        normal = torch.distributions.MultivariateNormal(torch.zeros(15).double(), k)
        return normal.log_prob(y[..., 0])

    (length, scale, _), noise = curves.fit_gp(x, y, (0.02, 0.1))
    best = evidence(length, scale, noise) + 1e-4
    for a in torch.logspace(-1.2, 0.4, 14).double():
        for b in torch.logspace(-1.2, 0.4, 10).double():
            assert all((evidence(a, b, c) <= best).all() for c in (0.02, 0.1))


def test_sampler_draws_the_protocol_and_all_takes_every_kernel():
    x, y = curves.sampler("rbf")(4000, 5, seeded())
    assert x.abs().max() <= 2 and y.var().item() == pytest.approx(0.37, abs=0.02)  # E scale^2
    draw, batches = curves.sampler("all"), []
    for seed in range(9):
        pick = int(torch.randint(3, (), generator=(gen := seeded(seed))))
        want = curves.draw_curves(curves.KERNELS[pick], 2, 5, gen)
        assert all(map(torch.equal, draw(2, 5, seeded(seed)), want))
        batches.append(pick)
    assert set(batches) == {0, 1, 2}
    with pytest.raises(ValueError, match="'cubic' is unknown; use one of rbf, matern52"):
        curves.sampler("cubic")(2, 5, seeded())


LYNX = "year hare lynx\n1900  30 4\n1901  47.2 6.1\n1902 70.2 9.8\n"
TABLES = [  # text, columns, names, x, y
    ("# run 3\nx,y\n0,1\n1,2\n", None, ["x", "y"], [0, 1], [[1], [2]]),
    ("x;y\n0,5;1,5\n1,0;2,5\n", None, ["x", "y"], [0.5, 1], [[1.5], [2.5]]),
    ('"x","y"\n"0,5","1,5"\n"1","2"\n', None, ["x", "y"], [0.5, 1], [[1.5], [2]]),
    ("1700.5;  8.3; -1.0\n1701.5; 18.3; -1.0\n", None, ["column 1", "column 2"], [1700.5, 1701.5],
     [[8.3], [18.3]]),
    (" 1950   26.1\n 1951   25.8\n", None, ["x", "y"], [1950, 1951], [[26.1], [25.8]]),
    ("a title\n\n# t\ty\n0\t1\n1\t\u22122\n", None, ["t", "y"], [0, 1], [[1], [-2]]),
    (LYNX, None, ["year", "hare"], [1900, 1901, 1902], [[30], [47.2], [70.2]]),
    (LYNX, "year,lynx", ["year", "lynx"], [1900, 1901, 1902], [[4], [6.1], [9.8]]),
    (LYNX, "3,2", ["lynx", "hare"], [4, 6.1, 9.8], [[30], [47.2], [70.2]]),
    ("x,a,b\n0,1,\n1,NaN,NA\n2,-999,inf\n,3,3\n3,,4\n", "all", ["x", "a", "b"], [0, 2, 3],
     [[1, 0], [-999, 0], [0, 4]]),
    ("x,2019,2020\n1,2,3\n2,3,4\n", "x,2020", ["x", "2020"], [1, 2], [[3], [4]]),
    (" 1948 1949\n 1948 1 2 3\n 1949 2 3 4\n -99.9\n Nino 3.4 index\n", "1,3",
     ["column 1", "column 3"], [1948, 1949], [[2], [3]]),
    ("id,day,v\nA,2020-01-01,3\nA,2020-03-01,4\n", None, ["day", "v"], [0, 60], [[3], [4]]),
    ("day v\n2020-01-02 12:00  3\n2020-01-01 00:00:00  4\n", None, ["day", "v"], [1.5, 0],
     [[3], [4]]),
    ("2020-02,1\n2020-01,2\n2020-01-01T12:00+12:00,3\n", None, ["x", "y"], [31, 0, 0],
     [[1], [2], [3]])]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("text, columns, names, x, y", TABLES)
def test_tables_of_any_layout_are_read(tmp_path, encoding, text, columns, names, x, y):
    (tmp_path / "t.csv").write_bytes(text.replace("\n", "\r\n").encode(encoding))
    table = curves.read_table(tmp_path / "t.csv", columns)
    assert (table.x_name, *table.y_names) == tuple(names)
    assert (table.x[:, 0].tolist(), table.y.tolist()) == (x, y)
    assert table.origin == (datetime(2020, 1, 1) if "2020-0" in text else None)
    assert "2020-0" in text or columns == "all" or table.mask.all()


def test_notes_of_a_table_name_gaps_and_columns_that_are_left():
    table = curves.read_table("t", None, "Tag,°C,err\n1,2,3\n2,,3\n3,4,4\n".encode("latin-1"))
    assert table.y_names == ["°C"] and [note.split(" (")[0] for note in table.notes] == [
        "rows without x or y, left out: 1", "columns that are not read: err"]


@pytest.mark.parametrize("data, columns, error", [
    (b"", None, "no rows of two numbers"), (b"\x89PNG\r\n\0\1\2", None, "no rows of two numbers"),
    (b"1,5\n", None, "1 row of numbers; a series has two or more"),
    (b"x,y\n1,2\n2,abc\n", None, "x = 2.0 stands 'abc'"),
    (LYNX.encode(), "year,fox", "'year,fox' should be x,y .* 1 year, 2 hare, 3 lynx"),
    (LYNX.encode(), "year", "should be x,y"), (b"1," * 2**23 + b"1", None, "larger than 16 MB")])
def test_what_is_no_series_is_refused_in_words(data, columns, error):
    with pytest.raises(ValueError, match=f"^t.csv: .*{error}"):
        curves.read_table("t.csv", columns, data)


def test_damaged_tables_give_finite_numbers_or_a_value_error():
    dice = random.Random(0)
    for i in range(1000):
        data = bytearray(TABLES[i % len(TABLES)][0].encode(dice.choice(("utf-8", "utf-16"))))
        for _ in range(dice.choice((1, 2, 8))):
            at = dice.randrange(len(data))
            damage = dice.choice((dice.randbytes(3), b'"', b"nan", b"\n"))
            data[at : at + dice.randrange(3)] = damage
        try:
            table = curves.read_table("t", dice.choice((None, "all")), bytes(data))
        except ValueError:
            continue
        assert table.x.isfinite().all() and table.y.isfinite().all() and len(table.x) > 1


def test_standardised_units_go_back():
    x, y = 50 + 9 * torch.rand(2, 7, 1).double(), 3 + torch.rand(2, 7, 2).double()
    mask = torch.rand(2, 7, 2, generator=seeded()) < 0.7
    xs, ys, (x_mid, x_scale, y_mean, y_scale) = curves.standardise(x, y, mask)
    assert xs.amin().item() == pytest.approx(-2) and xs.amax().item() == pytest.approx(2)
    assert ys[0, mask[0, :, 1], 1].mean().item() == pytest.approx(0)
    assert ys[0, mask[0, :, 1], 1].std(correction=0).item() == pytest.approx(0.5)
    torch.testing.assert_close(xs * x_scale + x_mid, x)
    torch.testing.assert_close((ys * y_scale + y_mean)[mask], y[mask])
    assert curves.standardise(x, 0 * y + 1e9)[1].abs().max() == 0


def test_lotka_volterra_files_are_a_curve_set(tmp_path):
    script = ROOT / "data" / "lotka_volterra.py"
    subprocess.run([sys.executable, script, "simulate", tmp_path / "lv", "--count=20"], check=True)
    with zipfile.ZipFile(tmp_path / "lv.zip", "w") as archive:
        for file in (tmp_path / "lv").iterdir():
            archive.write(file, f"lv/{file.name}")
    table = curves.read_table(tmp_path / "lv" / "0000.csv", "year,hare,lynx")
    assert table.x[:, 0].tolist() == list(range(1845, 1936)) and table.y.min() >= 0
    parts = {split: curves.CurveSet(tmp_path / "lv", split) for split in ("train", "val", "test")}
    assert {split: len(part) for split, part in parts.items()} == {"train": 32, "val": 4, "test": 4}
    assert len(set().union(*(part.names for part in parts.values()))) == 20
    zipped = curves.CurveSet(tmp_path / "lv.zip", "all", columns="year,lynx", points=30)
    assert len(zipped) == 20 and sum(len(x) for x, _, _, _ in zipped.windows(repeats=1)) == 60


def test_curve_set_splits_a_wide_file_by_column_and_a_long_series_by_time(tmp_path):
    wide = "\n".join(",".join(str(i + 100 * j) for j in range(31)) for i in range(8))
    (tmp_path / "w.csv").write_text("x," + ",".join(f"c{j}" for j in range(30)) + "\n" + wide)
    names = [set(curves.CurveSet(tmp_path / "w.csv", s).names) for s in ("train", "val", "test")]
    assert [len(part) for part in names] == [24, 3, 3] and len(set.union(*names)) == 30
    (tmp_path / "l.csv").write_text("\n".join(f"{i},{i * i}" for i in reversed(range(200))))
    spans = [curves.CurveSet(tmp_path / "l.csv", s).x for s in ("train", "val", "test")]
    assert [(x.min().item(), x.max().item()) for x in spans] == [(0, 159), (160, 179), (180, 199)]
    short = curves.CurveSet(tmp_path / "l.csv", "test")
    assert short.points == 20 and next(short.windows())[3] == 10
    for error, call in (("'dev' is unknown", lambda: curves.CurveSet(tmp_path / "l.csv", "dev")),
                        ("no series in it", lambda: curves.CurveSet(ROOT / ".ci"))):
        with pytest.raises(ValueError, match=error):
            call()


def test_drawn_windows_are_neighbouring_points_of_one_curve_in_random_order():
    data = curves.CurveSet(ROOT / "data" / "elnino.csv", "train", points=12)
    x, y = data.draw(5, 12, seeded())
    windows = data.y.unfold(0, 12, 1)[:, 0]  # (starts, 12)
    windows = (windows - windows.mean(1, True)) / windows.std(1, correction=0, keepdim=True) / 2
    order = x.argsort(1)
    assert not torch.equal(order[0], order[1])
    for curve in y.gather(1, order)[..., 0]:
        assert (windows - curve).abs().amax(1).min() < 1e-9
    assert data.draw(3, 5, seeded())[0].shape == (3, 5, 1)  # some points of a window


def test_a_file_of_two_columns_is_one_curve_with_a_mask_in_its_gaps(tmp_path):
    x = torch.arange(40.0).double()
    y = torch.stack((x.sin(), 5 + x.cos()), -1)
    cell = lambda i, j: "" if (i + j) % 3 == 0 else f"{y[i, j]:.9f}"
    (tmp_path / "a.csv").write_text(
        "t,a,b\n" + "".join(f"{i},{cell(i, 0)},{cell(i, 1)}\n" for i in range(40)))
    data = curves.CurveSet(tmp_path, "all", n_values=2)
    xs, ys, mask = data.draw(30, 25, seeded())
    assert (len(data), xs.shape, ys.shape, mask.shape) == (1, (30, 25, 1), *2 * ((30, 25, 2),))
    t = ((xs[..., 0] + 2) * 39 / 4).round().long()  # the row that was drawn
    assert torch.equal(mask, (t.unsqueeze(-1) + torch.arange(2)) % 3 != 0)
    seen = (torch.arange(40)[:, None] + torch.arange(2)) % 3 != 0
    for j in range(2):
        mean, std = y[seen[:, j], j].mean(), y[seen[:, j], j].std(correction=0)
        want = ((y[t, j] - mean) / std / 2)[mask[..., j]]
        torch.testing.assert_close(ys[..., j][mask[..., j]], want, rtol=0, atol=1e-6)
    in_time = (t.diff(dim=1) > 0).all(1)
    assert 5 < in_time.sum() < 25  # about half come in the order of time
    window, n = next(data.windows())[:3], next(data.windows())[3]
    assert window[1].shape == window[2].shape == (1, 40, 2) and n == 20
    with pytest.raises(ValueError, match="a.csv: 2 columns .* no multiple of n_values=3"):
        curves.CurveSet(tmp_path, "all", n_values=3)


@pytest.mark.parametrize("n_values", [1, 2])
def test_a_short_curve_leaves_random_places_empty(tmp_path, n_values):
    for name, n in (("short", 9), ("long", 60)):
        (tmp_path / f"{name}.csv").write_text("".join(f"{i},{i % 7},{i % 5}\n" for i in range(n)))
    x, _, mask = curves.CurveSet(tmp_path, "all", n_values=n_values).draw(200, 30, seeded())
    counts = mask[..., 0].sum(1)
    assert set(counts.tolist()) == {9, 30}
    for points, there in zip(x[..., 0], mask[..., 0]):
        assert len(points[there].unique()) == there.sum()
    parts = mask[counts == 9][:, :15, 0].sum(1).double()
    assert parts.mean().item() == pytest.approx(4.5, abs=0.5) and parts.std() > 0.5


def test_tasks_hide_what_they_say_and_the_score_is_a_log_density_in_units_of_the_table():
    table = curves.read_table(ROOT / "data" / "hares.csv", "all")
    assert table.x[:, 0].tolist() == list(range(1845, 1936)) and table.mask.all()
    masks = {task: lotka_volterra.hidden(task, table.x, 300, seeded())
             for task in lotka_volterra.TASKS}
    counts = masks["interpolation"].sum(1)  # (300, 2)
    assert counts.min() == 1 and counts.max() == 20 and (counts[:, 0] != counts[:, 1]).any()
    for task in ("forecasting", "reconstruction"):
        starts = 91 - masks[task].sum(1).amax(1)
        assert 25 <= starts.min() < 30 and 70 < starts.max() <= 75
        assert (masks[task].diff(dim=1) == masks[task][:, 1:] & ~masks[task][:, :-1]).all()
    assert torch.equal(masks["forecasting"][..., 0], masks["forecasting"][..., 1])
    assert (masks["reconstruction"].any(1).sum(1) == 1).all()
    flat = SimpleNamespace(cfg=SimpleNamespace(model="transinr"), encode=lambda context: {},
                           decode=lambda code, query: tinyinr.Prediction(
                               z := query["x"].expand(-1, -1, 2) * 0, z + 0.5))
    scores = lotka_volterra.task_scores(flat, table, "forecasting", 16)
    want = []
    for hidden in lotka_volterra.hidden("forecasting", table.x, 16, seeded()):
        old, new = (table.y[rows].numpy() for rows in (~hidden[:, 0], hidden[:, 0]))
        m, s = old.mean(0), old.std(0)
        want.append((-((new - m) / s) ** 2 / 2 - np.log(s) - math.log(2 * math.pi) / 2).mean())
    assert scores["ll"] == pytest.approx(np.mean(want), abs=1e-4)
    assert scores["constant_ll"] == pytest.approx(scores["ll"], abs=1e-4)
