"""Tests of what a program meets that uses tinyinr.py as a library, and of what a user types."""

import math
import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn as nn

import tinyinr
from data.testing import close, photos, rand, refused
from test_tinyinr import CELLS, configs, picture_rays, poses, run, signals, tiny, train_args


def test_predictions_of_several_samples_are_those_of_decode():
    """Samples first, whatever the pieces; a ray that meets nothing is white in each of them."""
    pixels = {"coords": tinyinr.pixel_grid(100, 100)[None]}
    rays = picture_rays(poses(), torch.full((2,), 8.0), 24)  # of a wide picture
    for task, query in (("image", pixels), ("nvs", rays)):
        model, (context, _) = tiny(task, "vnp"), signals(task, 1)
        code, hits = model.encode(context), model.signal.hits(query)
        assert hits is None or not hits.all()
        z, _ = model.latents(code, query, rand(2, 3, 1, 1, 5, seed=4))
        got = tinyinr.predict(model, code, query, z, chunk=64).mean
        assert len(got) == 3 and (got[0] != got[1]).any()
        close(got, model.decode(code, query, z=z).mean, 1e-5)


@pytest.mark.parametrize("task, name", CELLS)
def test_no_signals_give_no_predictions(task, name):
    model = tiny(task, name)
    context, query = ({k: v[:0] for k, v in x.items()} for x in signals(task))
    assert tinyinr.predict(model, model.encode(context), query).mean.shape[0] == 0


@pytest.mark.parametrize("task, name", CELLS)
def test_a_query_is_of_each_signal_or_shared_by_all(task, name):
    model, (context, query) = tiny(task, name), signals(task)
    code, one, two = model.encode(context), *({k: v[:n] for k, v in query.items()} for n in (1, 2))
    repeated = {k: v.expand(3, *v.shape[1:]) for k, v in one.items()}
    close(model.decode(code, one).mean, model.decode(code, repeated).mean, 1e-6)
    refused("a query of 2 signals, but a code of 3; give 3 or 1", model.decode, code, two)


@pytest.mark.parametrize("task", ("image", "gp"))
def test_a_mask_is_of_any_type_and_whatever_is_not_0_is_seen(task):
    model = tiny(task, "vnp", **{"masked": True} if task == "image" else {})
    context, query = signals(task)
    shape = (3, 1, 16, 16) if task == "image" else (3, 9)
    mask = rand(*shape, seed=3) < 0.6
    want = model(context | {"mask": mask.float()}, query)
    for other in (mask, mask.byte() * 255, 0.5 * mask):
        assert torch.equal(model(context | {"mask": other}, query).mean, want.mean)


def test_pixels_to_train_on_are_bytes():
    cfg, recipe = configs("image", "transinr", n_queries=4)
    refused("torch.float32; those to train on are uint8",
            lambda: next(tinyinr.image_batches(cfg, recipe, rand(4, 3, 16, 16))))


def test_as_many_latents_are_needed_as_there_are_blocks():
    model = tiny("image", "vnp")
    context, query = signals("image")
    code, eps = model.encode(context), rand(3, 3, 1, 5)
    refused("eps is of 3 latents; give one for each of 2 blocks", model.latents, code, query, eps)
    for z in (eps, eps[:1]):
        refused(f"z is of {len(z)} latents; give one", model.decode, code, query, z=z)


def test_what_could_not_be_loaded_is_not_saved(tmp_path):
    refused("place, more: only plain types", tinyinr.save, tiny("gp", "vnp"), tmp_path / "a.pt",
            place=tmp_path, more=[1, "b", None])
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("name", ("transinr", "vnp"))
def test_a_target_under_a_mask_of_0_has_no_influence_on_the_loss(name):
    model = tiny("gp", name)
    context, query = signals("gp")
    mask, target = (rand(3, 7, 1, seed=3) < 0.6).float(), rand(3, 7, 1, seed=4)
    loss = lambda hidden: tinyinr.objective(
        model, (context, query | {"mask": mask}, torch.where(mask > 0, target, hidden)),
        rand(2, 3, 1, 5))
    assert torch.equal(torch.stack(loss(math.nan)), torch.stack(loss(3.0)))


def test_a_run_takes_a_short_batch_and_refuses_pieces_that_differ():
    cfg, recipe = configs("gp", "vnp", batch_size=4)
    context, query = signals("gp")
    batch = context, query, rand(3, 7, 1)
    before = torch.random.get_rng_state()
    runs = [tinyinr.Run(cfg, replace(recipe, grad_accum_steps=n)) for n in (1, 2)]
    assert torch.equal(torch.random.get_rng_state(), before)  # the caller's
    with torch.enable_grad():
        assert runs[0].update(batch, 0.5).isfinite().all()
        refused("a batch of 3 signals has no 2 equal pieces", runs[1].update, batch, 0.5)


def test_cameras_are_matrices_of_three_rows_or_four():
    pose, focal = poses(), torch.tensor([40.0, 30.0])
    four = torch.cat((pose, torch.tensor([[0.0, 0, 0, 1]])))
    assert all(map(torch.equal, tinyinr.camera_rays(pose, focal, 4, 6),
                   tinyinr.camera_rays(four, focal, 4, 6)))


@pytest.mark.parametrize("name", ("transinr", "vnp"))
def test_numbers_of_any_precision_are_read(name):
    """NumPy's doubles, and halves, by a model of curves in fp32; and a double one reads floats."""
    model = tiny("gp", name)
    context, query = signals("gp")
    want = model(context, query)
    for a, b in product((torch.float64, torch.float32, torch.float16), repeat=2):
        got = model({k: v.to(a) for k, v in context.items()}, {"x": query["x"].to(b)})
        half = torch.float16 in (a, b)
        close(got.mean.float(), want.mean, 0.1 if half else 1e-4)
    close(model.double()(context, query).mean.float(), want.mean, 1e-4)


@pytest.mark.parametrize("task, name", CELLS)
def test_a_cast_and_back_leaves_constants_exact(task, name):
    model, exact = tiny(task, name), tiny(task, name)
    model.bfloat16().float().load_state_dict(exact.state_dict())
    context, query = signals(task)
    assert torch.equal(model(context, query).mean, exact(context, query).mean)


@pytest.mark.parametrize("task, name", CELLS)
def test_transforms_of_functions_differentiate_as_autograd_does(task, name):
    """With the gathering interpolation too, and through the encoder."""
    more = {"image": dict(grid=20), "nvs": dict(conv_nodes=16), "gp": {}}[task]
    model = tiny(task, name, **more).requires_grad_(False)
    context, query = signals(task, 1, 3)
    key = {"image": "coords", "nvs": "rays_d", "gp": "x"}[task]
    values = lambda at: model(context, query | {key: at}).mean[0, :, 0]
    with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH), torch.enable_grad():
        want = torch.autograd.functional.jacobian(values, query[key])
        close(torch.func.jacrev(values)(query[key]), want, 1e-4)
        close(torch.func.jacfwd(values)(query[key]), want, 1e-4)


def test_optimization_says_that_it_needs_gradients():
    model = tiny("image", "transinr")
    context, _ = signals("image")
    with torch.inference_mode():
        refused("inference_mode allows no gradients", tinyinr.optimize, model,
                model.encode(context), context, 1)


@pytest.mark.parametrize("grid", (0, 6))
def test_every_ray_has_a_near_and_far_of_its_own(grid):
    model = tiny("nvs", "transinr", grid=grid)
    context, query = signals("nvs", 2, 5)
    code, depths = model.encode(context), {"near": 2 + rand(2, 5, 1), "far": 4 + rand(2, 5, 1)}
    got = model.decode(code, query | depths).mean
    for i in range(5):
        one = {k: v[:, i : i + 1] for k, v in (query | depths).items()}
        one |= {k: one[k][:, 0, 0] for k in depths}  # (B,)
        close(model.decode(code, one).mean[:, 0], got[:, i], 1e-5)


def test_a_ray_that_touches_the_sphere_has_finite_gradients():
    model = tiny("nvs", "transinr")
    context, _ = signals("nvs", 1)
    ray = torch.tensor([[[1.0, -4.0, 0.0]]], requires_grad=True)
    with torch.enable_grad():
        query = {"rays_o": ray, "rays_d": torch.tensor([[[0.0, 1.0, 0.0]]])}
        model(context, query).mean.sum().backward()
    assert ray.grad.isfinite().all()


def test_a_field_that_neither_config_has_is_refused_by_its_name():
    refused("field='widht' is unknown; choose from task, model, grid", tinyinr.make_config,
            widht=3)


def test_a_scene_to_train_on_has_two_views():
    cfg, recipe = configs("nvs", "transinr", n_queries=4)
    one = type("Scenes", (), dict(images=torch.zeros(1, 3, 16, 16, dtype=torch.uint8),
                                  poses=poses(1), focals=torch.ones(1, 2),
                                  counts=torch.tensor([1]), labels=["all"]))
    refused("a scene of 1 views; training needs one to read",
            lambda: next(tinyinr.scene_batches(cfg, recipe, one)))


def test_a_run_starts_from_a_checkpoint_of_whose_model_it_is(tmp_path):
    """Without a rate of learning, the weights stay those of the checkpoint; so does its config."""
    start, data = tmp_path / "start.pt", photos(tmp_path / "photos")
    tinyinr.save(tiny("image", "transinr", inr_width=24), start)
    args = ("train", "--init", start, "--data", data, "--smoke", "--out", tmp_path / "out")
    run(*args, "--set", "lr=0", "--set", "muon_lr=0")
    want, got = tinyinr.load(start), tinyinr.load(tmp_path / "out/ckpt.pt")
    assert got.cfg == want.cfg
    for name, weight in want.state_dict().items():
        assert torch.equal(weight, got.state_dict()[name]), name
    assert "is a model with inr_width=24, not 32; leave this option out" in run(
        *args, "--set", "inr_width=32", code=2)
    assert "with task='image', not 'gp'" in run(*args, "--task", "gp", code=2)
    assert "--resume and --init exclude each other" in run(*args, "--resume", code=2)


def test_what_is_typed_is_meant(tmp_path, monkeypatch):
    """A field without a value; columns beyond a model's; a run whose data have moved; its score."""
    monkeypatch.chdir(tmp_path)
    assert "--set masked gives no value; write masked=VALUE" in run(
        "train", "--task", "image", "--set", "masked", code=2)
    tinyinr.save(tiny("gp", "vnp"), "gp.pt")
    Path("t.csv").write_text("t,a,b\n0,1,2\n1,3,5\n")
    assert "named, but not read by this model of 1: b" in run(
        "render", "gp.pt", "t.csv", "-o", "p.png", "--columns", "t,a,b")
    args = train_args("image", "transinr", Path("."), "--smoke", "--out", "out")
    monkeypatch.setattr("sys.argv", ["tinyinr.py"])
    hint = run(*args).strip().splitlines()[-1]
    assert hint.endswith("eval out/ckpt.pt --data photos")
    shutil.move("photos", "moved")
    again = ("train", "--resume", "--out", "out", "--steps", 4)
    assert "of a run on photos, which is not here; give --data" in run(*again, code=2)
    assert "photos is not here: going on with moved" in run(*again, "--data", "moved")
    photos(Path("photos"), 3)
    assert tinyinr.read_checkpoint("out/ckpt.pt")["data"] == "moved"
