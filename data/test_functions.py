"""Tests of single functions against values by hand, in the order of tinyinr.py and of data/."""

import json
import math
from dataclasses import asdict, replace
from itertools import islice, pairwise, permutations, product, repeat
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn

import tinyinr
from data import curves, evaluation, images, rendering, scenes, tables
from data.testing import close, photos, rand, refused
from test_tinyinr import PARITY, balls, configs, picture_rays, poses, signals, tiny

# ------------------------------------------------------------------------- configs


@pytest.mark.parametrize("given, words", [
    (dict(image_size=64, patch=7, padding=0, grid=18, conv_nodes=8), "patches that cover the"),
    (dict(task="gp", grid=48, n_features=80, n_harmonics=40), "half of n_features=80; try 39"),
    (dict(task="gp", n_features=8), "n_features=8 is for curves with a grid")])
def test_what_only_some_models_have_is_refused_elsewhere(given, words):
    refused(words, tinyinr.ModelConfig, **given)


@pytest.mark.parametrize("task, model, top", [
    ("image", "transinr", 1024), ("nvs", "transinr", 256), ("gp", "vnp", 256)])
def test_a_small_paper_model_is_the_papers_and_a_task_has_a_model_by_default(task, model, top):
    cfg, recipe = tinyinr.make_config("paper-small", task)
    assert cfg.model == model == tinyinr.make_config("small", task)[0].model
    assert (cfg.grid, cfg.freq_top, cfg.n_features, recipe.zoom) == (0, top, 0, 1)


# ------------------------------------------------------------------------- parts of models


def test_halves_are_encoded_and_rendered_in_float32():
    x, freqs = rand(2, 5, 3).half(), tinyinr.frequencies(6, 256.0)
    assert torch.equal(tinyinr.positional_encoding(x, freqs),
                       tinyinr.positional_encoding(x.float(), freqs))
    rgb, sigma, z = rand(2, 3, 5, 3).half(), rand(2, 3, 5, seed=1).half(), rand(2, 3, 5).cumsum(-1)
    short = [v.half() for v in (rgb, sigma, z)]
    for got, want in zip(tinyinr.volume_render(*short),
                         tinyinr.volume_render(*(v.float() for v in short))):
        assert got.dtype == torch.float32 and torch.equal(got, want)


def test_cross_attention_starts_as_pytorchs_own():
    torch.manual_seed(0)
    ours, theirs = tinyinr.CrossBlock(64, 4, 8), nn.MultiheadAttention(64, 4)
    weights = torch.cat((ours.q.weight, ours.kv.weight))
    for of in (lambda v: v.abs().max(), torch.std):
        assert float(of(weights)) == pytest.approx(float(of(theirs.in_proj_weight)), rel=0.02)
    assert not any(layer.bias.any() for layer in (ours.q, ours.kv, ours.out))


def test_base_weights_start_as_those_of_linear_layers():
    for wb in tiny("image", "transinr", fresh=True).base.values():
        bound = (len(wb) - 1) ** -0.5
        assert 0.9 * bound < wb.abs().max() <= bound and wb[-1].any()


@pytest.mark.parametrize("task, grid, least", (
    ("image", 0, 0.05), ("image", 8, 0.002), ("gp", 0, 0.005), ("gp", 48, 0.005)))
def test_a_std_has_a_floor(task, grid, least):
    signal = tiny(task, "vnp", grid, **{"n_features": 0, "n_harmonics": 0} if grid else {}).signal
    raw = torch.full((1, 1, 2 * signal.value_dim), -99.0)
    close(signal.to_prediction(raw, None, None).std, torch.full((1, 1, signal.value_dim), least))


def test_a_prior_is_averaged_over_64_pixels_of_an_image_or_16_of_a_view():
    """The middle ones of equal blocks, of masked images those that are seen."""
    (image, _), mask = signals("image"), (rand(3, 1, 16, 16, seed=3) < 0.6).float()
    code = tiny("image", "vnp", masked=True).encode(image | {"mask": mask})
    grid = tinyinr.pixel_grid(16, 16).view(16, 16, 2)
    close(code["pool_coords"], grid[1::2, 1::2].reshape(1, 64, 2).expand(3, -1, -1))
    assert torch.equal(code["pool_weight"], mask[:, 0, 1::2, 1::2].flatten(1))
    context, _ = signals("nvs")
    code = tiny("nvs", "vnp").encode(context)
    rays = tinyinr.camera_rays(context["poses"], context["focals"], 16, 16)
    for key, want in zip(("rays_o", "rays_d"), rays):
        assert torch.equal(code[f"pool_{key}"], want[:, :, 2::4, 2::4].flatten(1, 3))
    context, mask = signals("gp")[0], (rand(3, 9, 2, seed=2) < 0.5).float()
    context |= {"y": rand(3, 9, 2, seed=1), "mask": mask}
    code = tiny("gp", "vnp", 0, n_values=2).encode(context)
    assert torch.equal(code["pool_weight"], mask.amax(-1))  # either value
    close(code["pool_x"], context["x"] * mask.amax(-1, keepdim=True))


def test_pixels_that_are_not_seen_have_no_weight_in_a_prior():
    model = tiny("image", "vnp", masked=True)
    for block in model.blocks:  # a prior that matters
        block.value[-1].weight.mul_(20)
    (image, query), mask = signals("image", 1), (rand(1, 1, 16, 16, seed=3) < 0.3).float()
    code = model.encode(image | {"mask": mask})
    seen, z = code["pool_weight"][0] > 0, model.latents(code, query)[0]
    part = {k: code[k][:, seen] for k in ("pool_coords", "pool_weight")}
    close(model.latents(code | part, query)[0], z)
    everywhere = {"pool_weight": torch.ones(1, 64)}
    assert (model.latents(code | everywhere, query)[0] - z).abs().max() > 1e-4


def test_a_posterior_is_averaged_over_the_places_of_known_targets():
    model, (context, query) = tiny("gp", "vnp", n_values=2), signals("gp")
    context, known = context | {"y": rand(3, 9, 2, seed=1)}, torch.tensor([0, 2, 3, 6])
    mask = torch.zeros(3, 7, 2)
    mask[:, known] = torch.tensor([[1.0, 0], [0, 1], [1, 1], [1, 0]])  # one value is enough
    code, target, eps = model.encode(context), rand(3, 7, 2, seed=4), rand(2, 3, 1, 5)
    got = model.latents(code, query | {"mask": mask}, eps, target)
    close(got, model.latents(code, {"x": query["x"][:, known]}, eps, target[:, known]))


def test_what_lies_behind_a_camera_is_not_in_its_view():
    pose = poses()
    points = pose[:, 3] + 0.5 * pose[:, 2] + 0.1 * (rand(1, 50, 3, seed=1) - 0.5)
    _, at = tinyinr.project(points, pose[None], torch.full((1, 2), 16.0), (16, 16))
    assert (at.abs().amax(-1) > 1).all()


def test_models_start_from_their_grid_and_a_constant():
    """Of scenes no maps of the views; of curves attention of what is like at every place."""
    context, _ = signals("nvs")
    for name in ("transinr", "vnp"):
        assert not tiny("nvs", name, fresh=True).encode(context)["views_map"].any()
    model, (context, _) = tiny("gp", "vnp", fresh=True), signals("gp")
    shift = model.encode(context)["tokens"] - model.tokenizer(*model.signal.inputs(context))
    close(shift, shift[:1, :1].expand_as(shift))
    assert 0.01 < model.tokenizer.pos.std() < 0.03


@pytest.mark.parametrize("task", ("image", "nvs"))
def test_patches_of_a_padded_image_lie_where_their_pixels_do(task):
    """Of 5 x 5 patches of 4 pixels, from 2 pixels outside on."""
    model = tiny(task, "transinr", 5 if task == "image" else 6, padding=2, conv_nodes=0)
    axis = model.axis if task == "image" else model.tokenizer.view_axis
    close(axis, torch.tensor([-1, -0.5, 0, 0.5, 1]))


def test_a_pixel_at_the_border_is_a_mean_within_the_image():
    signal, places = tiny("image", "transinr").signal, []
    decode = lambda query: tinyinr.Prediction(places.append(query["coords"]) or places[-1], None)
    corner = torch.tensor([[[-15 / 16, 15 / 16]]])
    near = [-1, -1 + 1 / 32, -1 + 3 / 32, -1 + 5 / 32]
    middle = sum(w * v for w, v in zip((1, 3, 3, 1), near)) / 8
    close(signal.observed(decode, {"coords": corner}), torch.tensor([[[middle, -middle]]]))
    assert places[0].abs().max() == 1


def test_a_scene_with_a_grid_ends_at_the_unit_sphere():
    """Its nodes hold something up to there; a point that jitter moves beyond is empty."""
    model = tiny("nvs", "transinr")
    ends = torch.tensor([[[0.0, -0.99, 0], [0, 0, 0.99], [0, -1.01, 0], [0, 0, 1.01]]])
    held = tinyinr.interpolate(torch.ones(1, 6**3, 1), ends, model.axis)
    assert held.flatten().tolist() == pytest.approx([1, 1, 0, 0])
    density = model.signal.radiance(torch.ones(1, 4, 4), ends)[1]
    assert (density[0, :2] > 10).all() and not density[0, 2:].any()


def test_a_regression_is_computed_in_float32_under_autocast():
    model, (context, query) = tiny("gp", "transinr"), signals("gp")
    grid = model.encode(context)["grid"], model.axis, model.freqs
    fit = lambda: model.regression.fit(*model.signal.inputs(context), *grid)
    add = lambda: model.regression.add(torch.zeros(3, 7, 1), *want, query["x"], *grid)
    want, points = fit(), (rand(3, 9, 3), poses(3), torch.full((3, 2), 20.0), (16, 16))
    mean, at = add(), tinyinr.project(*points)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, (*fit(), add(), *tinyinr.project(*points)),
                       (*want, mean, *at)))


# ------------------------------------------------------------------------- predictions, losses


@pytest.mark.parametrize("name, grid", product(("transinr", "vnp"), (0, 6)))
def test_rays_with_depths_and_jitter_of_their_own_are_predicted_in_pieces(name, grid):
    model = tiny("nvs", name, grid, latent_pool="query")
    query = picture_rays(poses(), torch.full((2,), 8.0), 36)  # more than a prior averages
    own = {"near": 2 + rand(1, 1296, 1), "far": 4 + rand(1, 1296, 1),
           "jitter": rand(1, 1296, 12, seed=1)}
    for more in (own, {k: v[:, :1] for k, v in own.items()}, {"near": 2.5, "far": torch.tensor(5)}):
        code = model.encode(signals("nvs", 1)[0])
        z = tinyinr.mean_latents(model, code, query | more)
        close(tinyinr.predict(model, code, query | more, z, chunk=64).mean,
              model.decode(code, query | more, z=z).mean)


def test_the_latents_of_a_signal_are_averaged_over_1024_of_its_targets_or_all():
    model = tiny("image", "vnp", latent_pool="query")
    for block in model.blocks:  # a prior that matters
        block.value[-1].weight.mul_(20)
    code = model.encode(signals("image", 1)[0])
    for side in (32, 40):
        query = {"coords": tinyinr.pixel_grid(side, side)[None]}
        some = tinyinr.subsample(query, 1024)
        assert some["coords"].shape == (1, 1024, 2)
        close(tinyinr.mean_latents(model, code, query), model.latents(code, some)[0], 1e-6)


def test_the_divergence_of_scenes_counts_once_a_signal_and_unknown_targets_not_at_all():
    model, (context, query) = tiny("nvs", "vnp"), signals("nvs")
    target, eps = rand(3, 7, 3, seed=4), rand(2, 3, 1, 5)
    loss, mse = tinyinr.objective(model, (context, query, target), eps, 0.3)
    kl = model.latents(model.encode(context), query, eps, target)[1]
    close(loss, mse + 0.3 * kl.mean())
    model, (context, query) = tiny("gp", "transinr"), signals("gp")
    query["mask"] = torch.zeros(3, 7, 1)
    assert tinyinr.objective(model, (context, query, rand(3, 7, 1))) == (0, 0)


def test_an_error_of_0_has_a_finite_psnr():
    assert tinyinr.to_psnr(0.0) == pytest.approx(120)


def test_the_loss_of_an_image_with_a_std_by_hand():
    """A squared error in units of 0.05, and how far 1.96 std are off, weighted 19 to 1."""
    prediction = tinyinr.Prediction(torch.zeros(1, 1, 2), torch.full((1, 1, 2), 0.05))
    got = tiny("image", "vnp").signal.error(prediction, torch.tensor([[[0.2, -0.01]]]))
    close(got, torch.tensor([[[16 + 19 * 0.102, 0.04 + 0.088]]]))


# ------------------------------------------------------------------------- test-time optimization


@pytest.mark.parametrize("grid, rate, targets", ((0, 1e-4, 1024), (18, 2e-5, 256)))
def test_an_image_is_refined_at_its_rate_on_its_number_of_pixels(grid, rate, targets):
    """A copy, whose first step is Adam's; nothing is learned of what is not seen."""
    model = tiny("image", "transinr", grid, image_size=36, masked=True, conv_nodes=0, patch=6)
    context = {"image": rand(2, 3, 36, 36)}
    code = model.encode(context)
    before = {k: v.clone() for k, v in code.items()}
    one, given = (tinyinr.optimize(model, code, context, 1, *more) for more in ((), (
        rate, targets)))
    step = (one["wb1"] - code["wb1"]).abs().max()
    assert float(step) == pytest.approx(rate, rel=1e-2)
    for k, v in one.items():
        assert torch.equal(v, given[k]) and torch.equal(code[k], before[k]) and not v.requires_grad
    other = tinyinr.optimize(model, code, context, 1, rate, targets // 2)
    assert (other["wb1"] != one["wb1"]).any()
    unseen = context | {"mask": torch.zeros(2, 1, 36, 36)}
    refined = tinyinr.optimize(model, code, unseen, 2, lr=1e-2)
    assert all(torch.equal(v, before[k]) for k, v in refined.items())


def test_the_rate_of_a_scene_grows_up_to_eight_views():
    context = {"images": rand(1, 10, 3, 16, 16), "poses": poses(1, 10),
               "focals": torch.full((1, 10, 2), 40.0)}
    code = (model := tiny("nvs", "transinr")).encode(context)
    step = tinyinr.optimize(model, code, context, 1)["grid"] - code["grid"]
    assert float(step.abs().max()) == pytest.approx(8 * 1e-4, rel=1e-3)


# ------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("file, change, words", [
    ("transinr_image_1", lambda args: args["tokenizer"]["args"].update(input_size=[22, 24]),
     r"input_size=\[22, 24\] is not square"),
    ("transinr_image_1", lambda args: args["hyponet"].update(name="hypo_nerf"), "hypo_nerf"),
    ("transinr_nvs_1", lambda args: args["hyponet"]["args"].update(use_viewdirs=True),
     "use_viewdirs=True cannot be expressed")])
def test_official_models_that_are_none_of_ours_are_refused(file, change, words, tmp_path):
    ckpt = torch.load(PARITY / f"{file}.pth", weights_only=True)
    change(ckpt["model"]["args"])
    torch.save(ckpt, tmp_path / "c.pth")
    refused(words, tinyinr.load, tmp_path / "c.pth")


@pytest.mark.parametrize("file, want", [
    ("transinr_image_1", {}), ("vnp_1", dict(n_freqs=64)),
    ("transinr_nvs_1", dict(n_freqs=20, inr_depth=6, inr_width=256, freq_top=256.0))])
def test_what_an_official_config_leaves_out_is_the_official_default(file, want):
    ckpt = torch.load(PARITY / f"{file}.pth", weights_only=True)
    model, whole = ckpt["model"], tinyinr.load(PARITY / f"{file}.pth").cfg
    model["args"].pop("pe_dim", None)
    model["args"]["tokenizer"]["args"].pop("padding", None)
    model["args"].get("hyponet", {}).update(args={})
    got = tinyinr.official_config(model, {})
    if "image" in file:  # these sizes are those of the weights
        want = {k: getattr(whole, k) for k in ("n_freqs", "inr_depth", "inr_width")}
    want |= dict(padding=0, points_per_ray=128, n_views=1)
    assert {k: getattr(got, k) for k in want} == want
    run = {"train_points_per_ray": 7, "train_dataset": {"args": {"n_support": 3}}}
    got = tinyinr.official_config(model, run)
    assert (got.points_per_ray, got.n_views) == (7, 3)


def test_loading_draws_no_random_numbers_and_weights_are_floating_point(tmp_path):
    tinyinr.save(model := tiny("gp", "vnp"), file := tmp_path / "c.pt")
    before = torch.random.get_rng_state()
    assert not tinyinr.load(file).training and torch.equal(torch.random.get_rng_state(), before)
    key, weight = next((k, v) for k, v in model.state_dict().items() if v.dim() == 2)
    state = model.state_dict() | {key: weight.long()}
    torch.save({"config": asdict(model.cfg), "model": state}, file)
    refused(f"weight {key} is torch.int64", tinyinr.load, file)


# ------------------------------------------------------------------------- batches


def scene_set(*sizes, views=4, size=16):
    """Scenes of random pixels, so many in each class."""
    n = sum(sizes)
    return SimpleNamespace(
        images=(rand(n * views, 3, size, size) * 255).byte(), poses=poses(n * views),
        focals=torch.full((n * views, 2), 40.0), counts=torch.full((n,), views),
        labels=[str(i) for i, size in enumerate(sizes) for _ in range(size)])


@pytest.mark.parametrize("task, given", [
    ("image", dict(masked=True, min_seen=0.2)), ("nvs", dict(augment=True)), ("nvs", dict(
        shared_rays=True)), ("gp", {})])
def test_another_step_or_seed_draws_others(task, given):
    """Of equal pictures the pixels that are asked for and those that are seen; rays and jitter."""
    data = {"image": torch.zeros(9, 3, 16, 16, dtype=torch.uint8), "nvs": scene_set(1, views=30),
            "gp": curves.sampler("rbf")}[task]
    draw = lambda seed, step: next(tinyinr.BATCHES[task](*configs(
        task, "vnp", n_queries=6, batch_size=1, seed=seed, **given), data, start=step))
    parts = {"image": lambda c, q, y: (c["mask"], q["coords"]), "gp": lambda c, q, y: (y,),
             "nvs": lambda c, q, y: (c["poses"], q["rays_d"], q["jitter"])}[task]
    first, same, *others = (parts(*draw(*at)) for at in ((0, 3), (0, 3), (0, 4), (1, 3)))
    assert all(map(torch.equal, first, same))
    assert not any(torch.equal(*pair) for other in others for pair in zip(first, other))


def test_another_seed_orders_signals_and_numbers_of_views_otherwise():
    two = [tinyinr.TrainConfig(seed=seed) for seed in (0, 1)]
    for odds in (None, torch.ones(40)):
        a, b = (tinyinr.batch_indices(40, recipe, 2, odds) for recipe in two)
        assert a != b
    both = tinyinr.batch_indices(40, two[0], 2)[8:]  # 32 to 40, and the next epoch's first 8
    assert both != tinyinr.batch_indices(40, two[0], 0)[:8]
    numbers = []
    for seed in (0, 1):
        cfg, recipe = configs("nvs", "transinr", n_queries=4, more_views=2, seed=seed)
        batches = tinyinr.scene_batches(cfg, recipe, scene_set(3, views=6))
        numbers.append([context["images"].shape[1] for context, *_ in islice(batches, 200)])
    assert numbers[0] != numbers[1]
    for row in numbers:  # 2 of 5 steps have 1 or 2 more views than one
        assert abs(row.count(1) - 120) < 25 and min(row.count(2), row.count(3)) > 20


def test_without_a_number_of_queries_all_pixels_are_asked_for():
    cfg, recipe = configs("image", "transinr")
    _, query, _ = next(tinyinr.image_batches(cfg, recipe, torch.zeros(3, 3, 16, 16).byte()))
    assert len(query["coords"][0].unique(dim=0)) == 256


def test_without_flip_no_image_is_mirrored_and_with_it_half_of_them():
    pixels = torch.zeros(200, 3, 4, 4, dtype=torch.uint8)
    pixels[..., 0] = 255
    for flip in (False, True):
        cfg, recipe = configs("image", "transinr", batch_size=200, flip=flip, image_size=4)
        image = next(tinyinr.image_batches(cfg, recipe, pixels))[0]["image"]
        assert abs(float(image[..., 3].mean()) - 0.5 * flip) < 0.12 * flip + 1e-6


def test_classes_of_scenes_are_balanced_and_later_views_left_out():
    """One scene and 24 at a balance of 1: as often. Of each only the first three views."""
    data = scene_set(1, 24, views=5)
    cfg, recipe = configs("nvs", "transinr", n_queries=2, balance=1.0, train_views=3, n_views=1,
                          batch_size=1, target_views=2)
    eyes, drawn = data.poses[:, :, 3].view(25, 5, 3), []
    for context, query, _ in islice(tinyinr.scene_batches(cfg, recipe, data), 100):
        eye = context["poses"][0, 0, :, 3]
        scene, view = (eyes == eye).all(-1).nonzero()[0].tolist()
        drawn.append(scene)
        assert view < 3
        for o in query["rays_o"][0]:
            assert (eyes[scene, :3] == o).all(-1).any()
    assert abs(drawn.count(0) - 50) < 20


def test_half_the_odds_of_the_first_epochs_rays_are_on_the_object():
    """A tenth of the pixels, which differ from white in one channel; later all are as likely."""
    images = torch.full((1, 2, 3, 20, 20), 255, dtype=torch.uint8)
    images[0, :, 0, 0], images[0, :, 2, 1] = 0, 0
    many = [tinyinr.generator(i) for i in range(800)]
    for foreground, want in ((True, 0.5 + 0.5 * 0.1), (False, 0.1)):
        pick = torch.cat([tinyinr.pick_pixels(images, 1, [g], foreground) for g in many])
        assert float((pick % 400 < 40).float().mean()) == pytest.approx(want, abs=0.05)
    data = scene_set(2)
    data.images[:] = 255
    data.images[..., :1, :2] = 0  # 2 of 256 pixels
    cfg, recipe = configs("nvs", "transinr", n_queries=1, batch_size=2)
    hits = [float((y < 1).any(-1).float().sum()) for *_, y in islice(
        tinyinr.scene_batches(cfg, replace(recipe, repeats=40), data), 80)]
    assert sum(hits[:40]) > 20 and sum(hits[40:]) < 8


def test_half_of_the_scenes_are_mirrored_and_all_orders_of_colors_are_as_likely():
    images = torch.zeros(600, 1, 3, 1, 2)
    images[:] = torch.tensor([0.1, 0.2, 0.3])[:, None, None]
    images[..., 0] += 0.5
    after, _ = tinyinr.augment_scenes(images, poses(1).expand(600, 1, 3, 4), [
        tinyinr.generator(i) for i in range(600)])
    mirrored = after[:, 0, 0, 0, 0] < after[:, 0, 0, 0, 1]
    assert abs(float(mirrored.float().mean()) - 0.5) < 0.08
    orders = after[:, 0, :, 0].amin(-1).mul(10).round().long().tolist()
    counts = [orders.count([*order]) for order in permutations((1, 2, 3))]
    assert sum(counts) == 600 and min(counts) > 60


def test_curves_of_the_papers_protocol_have_one_context_size_a_batch():
    """3 to 46 points, and 3 or more targets, fewer than 50 in all."""
    cfg, recipe = configs("gp", "vnp", batch_size=4)
    sizes = [(context["x"].shape[1], query["x"].shape[1], float(context["mask"].min()))
             for context, query, _ in islice(tinyinr.curve_batches(
                 cfg, recipe, curves.sampler("rbf")), 250)]
    seen, asked, least = zip(*sizes)
    assert min(seen) == 3 and max(seen) == 46 and min(least) == 1
    assert min(asked) == 3 and max(map(sum, zip(seen, asked))) == 49


def test_tables_of_two_values_give_windows_whose_targets_are_read_where_one_value_is_known():
    cfg, recipe = configs("gp", "vnp", n_values=2, batch_size=30, n_queries=24)
    draw = lambda batch, points, gen: (rand(batch, points, 1), rand(batch, points, 2))
    for context, query, target in islice(tinyinr.curve_batches(cfg, recipe, draw), 5):
        assert context["x"].shape[1] <= 96 and torch.equal(context["x"][:, -24:], query["x"])
        assert torch.equal(context["y"][:, -24:], target)
        assert float(query["n_known"]) == pytest.approx(float(query["mask"].sum() / 30))
        assert (context["mask"][:, -24:] + query["mask"] == 1).all()


# ------------------------------------------------------------------------- training


def test_bf16_is_used_where_it_is_asked_for_and_convolutions_keep_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {})
    got = [tinyinr.choose_device("cpu", precision).dtype for precision in ("auto", "fp32", "bf16")]
    assert got == [None, None, torch.bfloat16] and not torch.backends.cudnn.allow_tf32


def test_optimizers_have_the_rates_and_moments_of_the_recipe():
    cfg, recipe = configs("gp", "vnp", lr=3e-3, muon_lr=0.02, beta2=0.9, warmup=4,
                          lr_schedule="linear", batch_size=3)
    cpu = tinyinr.choose_device("cpu", "fp32")
    training = tinyinr.Run(cfg, recipe, cpu)
    (adam,), (muon,) = (o.param_groups for o in training.optimizers)
    assert (adam["betas"], adam["weight_decay"]) == ((0.9, 0.9), 0)
    assert training.optimizers[1].dtype == torch.float32
    training.step = 1
    with torch.enable_grad():
        training.update((*signals("gp"), rand(3, 7, 1)), 0.25)
    assert (adam["lr"], muon["lr"]) == pytest.approx((3e-3 * 0.5 * 0.75, 0.02 * 0.5 * 0.75))


def test_a_seed_gives_first_weights_and_the_noise_of_every_step(monkeypatch):
    """With the weight of the divergence, which grows from 0 over a twentieth of the run."""
    first, given = [], []
    for seed in (0, 1):
        cfg, recipe = configs("gp", "vnp", seed=seed, kl_weight=0.2, batch_size=3)
        training = tinyinr.Run(cfg, recipe)
        first.append(training.model.head[0].weight.detach().clone())
        monkeypatch.setattr(training, "loss", lambda batch, eps, weight: (
            given.append((eps, weight)), training.model.head[0].bias.sum() * torch.ones(2))[1])
        for progress in (0.0, 0.01, 0.5):
            with torch.enable_grad():
                training.update((*signals("gp"), rand(3, 7, 1)), progress)
    assert (first[0] != first[1]).any()
    noises, weights = zip(*given)
    assert weights == pytest.approx(2 * (0, 0.04, 0.2))
    noises = torch.stack(noises).flatten(1)  # 6 times 2 x 3 x 5 numbers
    assert torch.cdist(noises, noises).add(torch.eye(6)).min() > 0.5
    assert abs(float(noises.std()) - 1) < 0.2


def gradients(recipe, batch):
    """What a step's optimizer is given, as one row, and what the step returns."""
    training, rows = tinyinr.Run(configs("image", "transinr")[0], recipe), []
    step = training.optimizers[0].step
    training.optimizers[0].step = lambda: (rows.append(torch.cat([
        p.grad.flatten() for p in training.model.parameters()])), step())
    with torch.enable_grad():
        sums = [training.update(batch, 0.5) for _ in range(2)]
    return rows, sums[0]


def test_a_clipped_gradient_has_the_norm_of_the_bound_and_pieces_add_up_to_the_whole():
    recipe = configs("image", "transinr", batch_size=4, precision="fp32", lr=0.0)[1]
    batch = *signals("image", 4), rand(4, 7, 3, seed=2)
    (whole, again), sums = gradients(recipe, batch)
    close(again, whole, 1e-6)  # nothing is left of the step before
    (clipped, _), _ = gradients(replace(recipe, grad_clip=1e-3), batch)
    close(clipped, whole * (1e-3 / whole.norm()), 1e-6)
    assert float(clipped.norm()) == pytest.approx(1e-3, rel=1e-3)
    (parts, _), halves = gradients(replace(recipe, grad_accum_steps=2), batch)
    close(parts, whole, 1e-5)
    close(halves, sums, 1e-5)


def test_the_first_loss_that_is_not_finite_is_told_whatever_its_error(monkeypatch):
    training = tinyinr.Run(*configs("gp", "vnp", batch_size=3))
    for factor in (1, math.inf, math.nan):
        monkeypatch.setattr(training, "loss", lambda *_: torch.stack((
            factor * training.model.head[0].bias.square().sum(), torch.ones(()))))
        with torch.enable_grad():
            training.update((*signals("gp"), rand(3, 7, 1)), 0.5)
    with pytest.raises(tinyinr.RunFailed, match="the loss of step 1 is not"):
        training.check()


@pytest.mark.parametrize("minutes", (0.0, 2.0))
def test_a_run_remembers_the_time_it_took_where_that_is_its_length(minutes, tmp_path):
    cfg, recipe = configs("gp", "vnp", minutes=minutes)
    training = tinyinr.Run(cfg, recipe)
    training.elapsed = 7.0
    training.save(tmp_path / "c.pt")
    ckpt = tinyinr.read_checkpoint(tmp_path / "c.pt")
    assert tinyinr.Run(cfg, recipe, ckpt=ckpt).elapsed == 3.5 * minutes


def test_held_out_losses_are_means_with_the_whole_weight_of_the_divergence():
    cfg, recipe = configs("gp", "vnp", kl_weight=0.3, precision="fp32")
    training = tinyinr.Run(cfg, recipe)
    batches = [(*signals("gp"), rand(3, 7, 1, seed=i)) for i in range(3)]
    want = [tinyinr.objective(training.model, batch, None, 0.3) for batch in batches]
    got = training.validate(batches)
    assert got["val_loss"] == pytest.approx(float(sum(loss for loss, _ in want) / 3))
    assert got["val_psnr"] == pytest.approx(tinyinr.to_psnr(float(sum(e for _, e in want) / 3)))


def test_a_run_goes_on_from_its_time_logs_means_and_saves_every_minute(tmp_path, monkeypatch):
    """3 minutes, of which 10 seconds are over, in steps of 2 seconds by a clock of its own."""
    training, now, saves = tinyinr.Run(*configs("gp", "vnp", minutes=3.0)), [0.0], []
    monkeypatch.setattr(tinyinr, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def update(batch, progress):
        assert progress == pytest.approx((10 + now[0]) / 180)
        now[0] += 2.0
        training.step += 1
        return torch.tensor([training.step, 0.01])

    monkeypatch.setattr(training, "update", update)
    monkeypatch.setattr(training, "save", lambda path: saves.append(training.step))
    monkeypatch.setattr(training, "validate", lambda held_out: {"val_loss": 1.0, "val_psnr": 2.0})
    training.elapsed, batches = 10.0, lambda device, start: repeat(start)
    assert tinyinr.train(training, batches, tmp_path, 0, 3.0, [()]) == 0
    assert (training.step, training.elapsed, saves) == (85, 180.0, [31, 62, 85])
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    before = 0
    for row in rows:
        assert row["loss"] == (before + 1 + row["step"]) / 2  # of the steps since
        assert (row["psnr"], row["ms"]) == pytest.approx((20, 2000))
        assert row["elapsed"] == 10 + 2 * row["step"] and 0 < row["step"] - before <= 3
        assert row["eta"] == pytest.approx(180 - row["elapsed"])
        before = row["step"]
    validated = [row["step"] for row in rows if "val_loss" in row]
    assert validated == [math.ceil((18 * i - 10) / 2) for i in range(1, 11)]
    assert tinyinr.train(training, batches, tmp_path, 200, 0, stop=lambda: 15) == 15
    assert training.step == 85 and saves[-1] == 85 and len(saves) == 4


# ------------------------------------------------------------------------- scores and pictures


def test_a_mixture_has_the_moments_and_the_density_of_its_samples():
    mean, std, y = 3 * rand(5, 2, 4, 1), 0.1 + rand(5, 2, 4, 1, seed=1), rand(2, 4, 1, seed=2)
    got = evaluation.mixture(tinyinr.Prediction(mean, std))
    close(got.mean, mean.mean(0))
    close(got.std.square(), (mean.square() + std.square()).mean(0) - mean.mean(0).square())
    density = torch.distributions.Normal(mean, std).log_prob(y).exp().mean(0).log()
    close(evaluation.mixture_log_likelihood(tinyinr.Prediction(mean, std), y), density)


def test_gaps_of_a_table_count_neither_as_context_nor_as_targets():
    """A model whose std is a half and whose mean is that of what it reads; all by hand."""
    known = (rand(2, 8, 2, seed=3) < 0.6).float()
    known[:, [0, -1]] = 1
    x, y = rand(2, 8, 1).double(), rand(2, 8, 2, seed=1).double()
    encode = lambda c: ((c["y"] * c["mask"]).sum((1, 2)) / c["mask"].sum((1, 2))).view(2, 1, 1)
    decode = lambda code, query: tinyinr.Prediction(*(v.expand(2, query["x"].shape[1], 2)
                                                      for v in (code, torch.tensor(0.5))))
    model = SimpleNamespace(cfg=SimpleNamespace(model="transinr"), freqs=torch.zeros(1),
                            encode=encode, decode=decode)
    case = (x, y, known.bool(), None, 3, "series", torch.arange(2))
    row = evaluation.evaluate_curves(model, [case])["series"]
    ll = {"target_ll": [], "context_ll": []}
    for b in range(2):
        seen = known[b] > 0
        mean = float(y[b, :3][seen[:3]].mean())
        for name, part in ("target_ll", slice(3, 8)), ("context_ll", slice(0, 3)):
            values = y[b, part][seen[part]]
            ll[name].append(float(torch.distributions.Normal(mean, 0.5).log_prob(values).mean()))
    assert [row[k] for k in ll] == pytest.approx([sum(v) / 2 for v in ll.values()], abs=1e-5)
    joint = evaluation.evaluate_curves(model, [case], autoregressive=True)["series"]["joint_ll"]
    means = []
    order = torch.cat((torch.arange(3), 3 + torch.randperm(5, generator=tinyinr.generator(0, 7))))
    for b in range(2):
        values, seen, ll = y[b, order], known[b, order] > 0, []
        for j in range(3, 8):
            mean = float(values[:j][seen[:j]].mean())
            ll.append(torch.distributions.Normal(mean, 0.5).log_prob(values[j][seen[j]]))
        means.append(float(torch.cat(ll).mean()))
    assert joint == pytest.approx(sum(means) / 2, abs=1e-5)


def test_baselines_of_scenes_are_white_and_the_first_view():
    model, (context, query) = tiny("nvs", "transinr"), signals("nvs", 1, 256)
    target = rand(1, 1, 256, 3, seed=5) * 1.4 - 0.2
    case = evaluation.Case(context, query, target, "a", torch.tensor([0]))
    row = evaluation.evaluate(model, [case])["a"]
    mean = model(context, query).mean
    view = context["images"][0, 0].flatten(1).T
    for name, values in (("white", torch.ones(256, 3)), ("context_view", view),
                         ("psnr_unclamped", mean[0])):
        error = (values - target[0, 0]).square().mean()
        assert row[name] == pytest.approx(-10 * math.log10(error), abs=1e-4), name


def test_scores_of_an_image_are_of_its_unseen_pixels_also_where_values_leave_0_to_1():
    model, (image, _) = tiny("image", "vnp", masked=True), signals("image", 1)
    model.head[2].weight.mul_(30)
    context = image | {"mask": (rand(1, 1, 16, 16, seed=3) < 0.6).float()}
    truth, query = image["image"].flatten(2).mT, {"coords": tinyinr.pixel_grid(16, 16)[None]}
    case = evaluation.Case(context, query, truth.unsqueeze(1), "a", torch.tensor([0]))
    row, code = evaluation.evaluate(model, [case])["a"], model.encode(context)
    mean = evaluation.pixel_values(model, lambda query: model.decode(code, query), query)
    error, unseen = (mean - truth)[0], context["mask"].flatten() == 0
    inside = (error.abs() < 1.96 * model.decode(code, query).std[0]).float()
    want = -10 * math.log10(error[unseen].square().mean())
    assert row["psnr_unclamped"] == pytest.approx(want, abs=1e-3) and row["psnr"] > want + 0.1
    assert row["coverage"] == pytest.approx(float(inside[unseen].mean()), abs=1e-4)
    assert abs(row["coverage"] - float(inside.mean())) > 1e-3


def test_scores_that_are_not_finite_are_written_as_null(tmp_path):
    evaluation.write_json(tmp_path / "s.json", {"a": [math.nan, math.inf, 1.5], "n": 3})
    assert json.loads((tmp_path / "s.json").read_text()) == {"a": [None, None, 1.5], "n": 3}


def test_a_turntable_stands_around_the_scene_at_the_height_of_its_first_view():
    pose = tinyinr.look_at(torch.tensor([1.0, -3.0, 2.0]))
    scene = SimpleNamespace(poses=pose[None], focals=torch.tensor([[20.0, 26.0]]),
                            images=torch.zeros(1, 3, 16, 16))
    turned, focals = rendering.turntable(scene, 64, 8)
    close(turned[0], pose)
    angles = torch.atan2(turned[:, 1, 3], turned[:, 0, 3])
    close(torch.remainder(angles.diff(), 2 * math.pi), torch.full((7,), math.pi / 4), 1e-4)
    close(turned[:, 2, 3], torch.full((8,), 2.0))
    close(turned[:, :2, 3].norm(dim=1), torch.full((8,), 10**0.5))
    close(focals, torch.tensor([[80.0, 104.0]]).expand(8, 2))


def test_the_depth_of_a_view_is_1_at_near_and_0_at_far_and_where_nothing_is():
    model = tiny("nvs", "transinr", grid=0)  # from 2 to 6
    context, _ = signals("nvs", 1)
    query = picture_rays(poses(), torch.full((2,), 8.0), 4)
    for density, first, want in ((0.0, 0.0, 0.0), (1e4, 0.0, 1.0), (1e4, 4.0, 0.5)):
        def field(code, row, eps=None, z=None):
            points, depths = model.signal.points(row)
            raw = torch.zeros(1, points.shape[1], 4)
            raw[..., 3] = density * (depths >= first).flatten(1)
            return raw, points, depths
        fake = SimpleNamespace(cfg=model.cfg, signal=model.signal, raw_field=field)
        depth = rendering.view_and_depth(fake, model.encode(context), query, 4)[1]
        assert depth.shape == (1, 16, 1) and (depth - want).abs().max() < 0.1
        assert want == 0.5 or (depth - want).abs().max() < 1e-4


def test_a_panel_of_a_masked_image_shows_white_where_nothing_is_seen():
    model, (image, _) = tiny("image", "vnp", masked=True), signals("image", 1)
    mask = (rand(1, 1, 16, 16, seed=3) < 0.5).float()
    case = evaluation.Case(image | {"mask": mask}, {"coords": tinyinr.pixel_grid(16, 16)[None]},
                           image["image"].flatten(2).mT.unsqueeze(1), "a", torch.tensor([0]))
    seen, truth, _, std = rendering.prediction_panels(model, case)
    pixels = image["image"][0].movedim(0, -1)
    close(truth, pixels)
    close(seen, torch.where(mask[0, 0, ..., None] > 0, pixels, 1.0))
    assert std.max() == 1


def test_drawn_curves_lie_to_both_sides_of_the_mean():
    model, (context, _) = tiny("gp", "transinr"), signals("gp", 1)
    x, y = context["x"][0], context["y"][0]
    grid, band, drawn = rendering.curve_band(model, x, y, torch.ones(9, 1), 20)
    assert grid[[0, -1], 0].tolist() == [-2, 2] and drawn.shape == (6, 20, 1)
    close((drawn[:3] + drawn[3:]) / 2, band.mean.expand(3, -1, -1), 1e-4)
    model = tiny("gp", "vnp", 0)
    model.blocks[0].style[0].weight.mul_(20)
    grid, band, drawn = rendering.curve_band(model, x, y, torch.ones(9, 1), 20)
    draws = evaluation.sample_curves(model, context, grid[None], 32, tinyinr.generator(8))
    assert torch.equal(drawn, draws.mean[:6, 0]) and draws.mean.var(0).max() > 1e-6
    close(band.std.square(), (draws.std.square() + draws.mean.square()).mean(0)[0]
          - draws.mean.mean(0)[0].square())


def test_a_long_table_is_read_in_parts_that_join_and_dates_stay_dates(tmp_path):
    days = [f"2020-{month:02}-{day:02}" for month in range(1, 6) for day in range(1, 29)]
    model, rows = tiny("gp", "vnp"), [f"{day},{i % 7}" for i, day in enumerate(days)]
    (tmp_path / "t.csv").write_text("day,y\n" + "\n".join(rows[::-1]))
    table = tables.read_table(tmp_path / "t.csv")
    parts = rendering.table_parts(model, table)
    ends = [(float(b) * x[[0, -1], 0] + float(a)).tolist() for x, _, _, (a, b, *_) in parts]
    assert [len(x) for x, *_ in parts] == [36, 36, 36, 35]  # at most 46; neighbors share one
    assert all(a[1] == pytest.approx(b[0]) for a, b in pairwise(ends)) and abs(ends[0][0]) < 1e-9
    dates = rendering.tabulate_curve(model, table, 5)["day"]
    assert [*dates[[0, -1]]] == ["2020-01-01T00:00:00", "2020-05-28T00:00:00"]
    two = "x,a,b\n" + "".join(f"{i},{i % 3 and i},{i}\n" for i in range(9)).replace(",0,", ",,")
    table = tables.read_table("two", "all", two.encode())
    (x, _, mask, _), = rendering.table_parts(tiny("gp", "vnp", n_values=2), table)
    assert len(x) == 9 and mask.sum(0).tolist() == [6, 9]  # one value beside an x is enough


def test_an_attention_picture_holds_the_weights_of_attention(monkeypatch):
    """Read by values that are unit vectors."""
    model, sheet = tiny("image", "transinr", depth=1, conv_nodes=0), []
    context, _ = signals("image", 1)
    monkeypatch.setattr(rendering.pictures, "attention_sheet", lambda *args: sheet.append(args))
    rendering.attention_picture(model, context)
    (_, heat, base, weights), = sheet
    tokens = torch.cat((model.tokenizer(context["image"]), model.weight_tokens[None]), 1)
    block, n = model.transformer[0], tokens.shape[1]
    q, k, _ = block.qkv(block.norm1(tokens)).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
    maps = nn.functional.scaled_dot_product_attention(q, k, torch.eye(n).expand(1, 2, n, n))
    maps, at = maps[0].mean(0)[16:, :16], 0
    for (name, layer), g in zip(heat.items(), model.tokens_per_layer):
        close(layer, maps[at : at + g].mean(0))
        at += g
        close(weights[name], model.encode(context)[name][0, :-1])
    assert list(heat) == list(base) == list(model.shapes)


def test_a_set_is_opened_as_its_model_reads_it(tmp_path):
    """Windows of 48 points, or 96 of several values; a view to ask for; in the unit sphere."""
    (tmp_path / "t.csv").write_text("".join(f"{i},{i % 7},{i % 5}\n" for i in range(300)))
    for n_values, points in ((1, 48), (2, 96)):
        cfg = tinyinr.ModelConfig("gp", "vnp", n_values=n_values)
        assert evaluation.open_data(cfg, tmp_path / "t.csv", "all").points == points
    folder, read = balls(tmp_path / "set", "a"), {}
    for grid in (0, 6):
        cfg = configs("nvs", "transinr", grid=grid)[0]
        read[grid] = evaluation.open_data(cfg, folder, "all")
    assert read[6].poses[0, :, 3].norm() < 0.8 * read[0].poses[0, :, 3].norm()
    four = replace(cfg, n_views=4)
    refused("4 views; at least 5 are needed", evaluation.open_data, four, folder, "all")
    assert len(evaluation.open_data(four, folder, "all", targets=False)) == 1
    photos(tmp_path / "few", 3, 3), photos(tmp_path / "few", 1, 16)
    cfg = configs("image", "transinr")[0]  # of 4 x 4 patches
    assert len(evaluation.open_data(cfg, tmp_path / "few", "all")) == 1


def test_cases_hide_other_pixels_of_every_image_and_draw_other_views_of_every_object(tmp_path):
    photos(tmp_path / "p", 4, 32), photos(tmp_path / "p/small", 2, 24)
    model, data = tiny("image", "vnp", masked=True), images.ImageSet(tmp_path / "p", "all", 16, 2)
    cases = list(evaluation.image_cases(model, data))
    assert [len(case.numbers) for case in cases if case.large is not None] == [4]  # of 32 pixels
    assert len(cases) == 8 and {case.label[-8:] for case in cases[2:]} == {
        "10% seen", "30% seen", "50% seen"}
    for case in cases[2:]:
        share = case.context["mask"].mean((1, 2, 3))
        close(share, torch.full_like(share, int(case.label[-8:-6]) / 100), 0.1)
        assert (case.context["mask"][0] != case.context["mask"][1]).any()
    model = tiny("nvs", "transinr")
    data = scenes.SceneSet(balls(tmp_path / "s", "0123"), "train", 16)
    data.poses = data.poses[:4].repeat(len(data), 1, 1)
    seen = [case.context["poses"] for case in evaluation.scene_cases(model, data, pairs=9)]
    assert not any(torch.equal(seen[0], other) for other in seen[1:])


def test_scores_are_of_as_many_signals_and_steps_as_asked_for_and_of_a_splits_own_curves(
        monkeypatch, tmp_path):
    given = []
    for name in ("evaluate", "evaluate_curves"):
        monkeypatch.setattr(evaluation, name, lambda model, cases, more: given.append(
            (list(cases), more)))
    pixels = images.ImageSet(photos(tmp_path / "p", 5), "all", 16)
    evaluation.score(tiny("image", "transinr"), pixels, tto=3, count=2)
    views = scenes.SceneSet(balls(tmp_path / "s", "0123"), "train", 16)
    evaluation.score(tiny("nvs", "transinr"), views, tto=2, count=1)
    for split in ("test", "val", "train"):
        evaluation.score(tiny("gp", "vnp"), None, count=1, split=split, autoregressive=True)
    (two, tto), (one, more), *sets = given
    assert ([len(case.target) for case in two], tto, len(one), more) == ([2], 3, 1, 2)
    assert all(by_one for _, by_one in sets)
    assert len({float(cases[0][0][0, 0]) for cases, _ in sets}) == 3


def test_every_set_of_curves_has_latents_of_its_own_and_exact_posteriors_beside_it():
    model = tiny("gp", "vnp", 0)
    model.blocks[0].style[0].weight.mul_(20)
    x, y, hyper, n = next(curves.gp_test_sets("rbf", 1))
    case = (x, y, None, ("rbf", hyper), n)
    row = evaluation.evaluate_curves(model, [(*case, "a", None), (*case, "b", None)])
    assert row["a"]["target_ll"] != row["b"]["target_ll"]
    posterior = curves.averaged_gp(x[:, :n], y[:, :n], x[:, n:])  # of the noise that drew them
    want = torch.distributions.Normal(*posterior).log_prob(y[:, n:]).mean()
    assert row["a"]["averaged_gp"] == pytest.approx(float(want), abs=1e-4)
