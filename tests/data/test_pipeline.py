"""The pipeline: pure random access, honest weights, padding that says so."""

import dataclasses
import itertools

import numpy as np
import pytest

from entrust_jax.data import augment, pipeline
from entrust_jax.data.body import coordinates
from entrust_jax.data.preprocess import Volume
from entrust_jax.errors import UserError


def volume(name, shape=(5, 20, 18), lesion=(), seed=0, label=True):
    """A body box from 3 to 17 in H and 2 to 16 in W, in all slices but the first; a spot in `lesion`."""
    rng = np.random.default_rng(seed)
    body = np.zeros(shape, bool)
    body[1:, 3:17, 2:16] = True
    mask = np.zeros(shape, np.int32)
    for d in lesion:
        mask[d, 5:8, 10:13] = 1
    return Volume(
        name=name,
        patient=name,
        number=100 + seed,
        image=(rng.normal(size=(2, *shape)) * body).astype(np.float32),
        present=np.array([True, seed % 2 == 0]),
        label=mask if label else None,
        body=body,
        coordinates=coordinates(body),
        spacing=(1.0, 1.0, 1.0),
        reference=None,
    )


@pytest.fixture
def volumes():
    return [volume("a", lesion=(1, 2), seed=0), volume("b", seed=1), volume("c", (9, 20, 18), (4,), seed=2)]


def make(volumes, **changes):
    return pipeline.training_dataset(volumes, **{"batch": 4, "patch": (20, 18), "seed": 0, **changes})


def test_shapes_and_types(volumes):
    batch = pipeline.batch_at(make(volumes, augment=True), 0)
    shapes = {name: (values.shape, values.dtype.name) for name, values in batch.items()}
    assert shapes == {
        "image": ((4, 2, 20, 18), "float32"),
        "present": ((4, 2), "bool"),
        "label": ((4, 20, 18), "int32"),
        "body": ((4, 20, 18), "bool"),
        "coordinates": ((4, 20, 18, 3), "float32"),
        "weight": ((4,), "float32"),
        "valid": ((4,), "bool"),
        "case": ((4,), "int32"),
        "slice": ((4,), "int32"),
    }
    assert batch["valid"].all()


def equal(a, b):
    return all(np.array_equal(a[name], b[name]) for name in a)


def test_batch_is_a_pure_function_of_seed_and_step(volumes):
    one, two = make(volumes, augment=True), make(volumes, augment=True)
    later = pipeline.batch_at(one, 1000)
    pipeline.batch_at(two, 3)
    assert equal(later, pipeline.batch_at(two, 1000))
    assert not equal(later, pipeline.batch_at(one, 1001))
    assert not equal(later, pipeline.batch_at(make(volumes, augment=True, seed=1), 1000))


@pytest.mark.parametrize("threads", [1, 3])
def test_iteration_from_a_step_is_random_access(volumes, threads):
    dataset = make(volumes, augment=True, patch=(12, 12))
    stream = pipeline.iterate(dataset, 7, threads=threads, buffer=3)
    for step, batch in zip(range(7, 15), stream, strict=False):
        assert equal(batch, pipeline.batch_at(dataset, step))


EVERY = augment.Settings(dict.fromkeys(augment.KINDS, 0.5), (None, ("scale", 2.5)), 0)


def test_with_every_kind_a_batch_is_a_pure_function_of_seed_and_step(volumes):
    dataset = make(volumes, augment=True, kinds=EVERY, patch=(12, 12))
    for step, batch in zip(range(7, 10), pipeline.iterate(dataset, 7, threads=3, buffer=3), strict=False):
        assert equal(batch, pipeline.batch_at(make(volumes, augment=True, kinds=EVERY, patch=(12, 12)), step))
        assert not batch["image"][:, :, ~batch["body"].any(0)].any()
        assert not batch["image"][~batch["present"]].any()
    assert not equal(batch, pipeline.batch_at(make(volumes, augment=True, kinds=EVERY, patch=(12, 12), seed=1), step))
    # An example is itself, whatever the others of its batch are.
    alone = pipeline.batch_at(make(volumes, augment=True, kinds=EVERY, patch=(12, 12), batch=1), 4 * step + 2)
    assert all(np.array_equal(alone[name][0], batch[name][2]) for name in batch)


def test_kinds_that_never_happen_change_no_bit(volumes):
    """Neither the draws of case, place, mirror and mild changes, nor what becomes of them."""
    patch, table = (12, 19), pipeline.make_table(volumes, (12, 19))
    never = augment.Settings(dict.fromkeys(augment.KINDS, 0.0), (None, None), 0)
    empty = [np.full(2, -2.0)] * 3
    for index in range(40):
        rng = np.random.default_rng([3, index])
        if index % 2:
            group = rng.integers(len(table.starts) - 1)
            row = int(table.foreground[rng.integers(table.starts[group], table.starts[group + 1])])
            pixel = rng.choice(pipeline.foreground_pixels(table, row), axis=0)
            first, last = pipeline.holders(pixel, table.low[row], table.high[row], patch)
        else:
            row = int(rng.integers(len(table.volume)))
            first, last = table.low[row], table.high[row]
        corner = rng.integers(first, last + 1)
        v, d = volumes[table.volume[row]], table.slice[row]
        before = augment.augment(
            {
                "image": pipeline.fit(v.image[:, d], corner, patch, 1, 0),
                "present": v.present,
                "label": pipeline.fit(v.label[d], corner, patch, 0, -1),
                "body": pipeline.fit(v.body[d], corner, patch, 0, False),
                "coordinates": pipeline.fit(v.coordinates[d], corner, patch, 0, 0),
            },
            rng,
        )
        for kinds in (None, never):
            now = pipeline.example(index, table=table, seed=3, share=0.5, augment=True, kinds=kinds, empty=empty)
            for name, values in before.items():
                assert values.dtype == now[name].dtype and np.array_equal(values, now[name]), (index, name)


def test_the_switch_turns_every_kind_off(volumes):
    assert equal(pipeline.batch_at(make(volumes, augment=False, kinds=EVERY), 3), pipeline.batch_at(make(volumes), 3))


def test_pixels_come_from_their_case_and_slice(volumes):
    by_number = {v.number: v for v in volumes}
    batch = pipeline.batch_at(make(volumes, batch=16), 2)
    for i in range(16):
        v, d = by_number[batch["case"][i]], batch["slice"][i]
        np.testing.assert_array_equal(batch["image"][i], v.image[:, d])
        np.testing.assert_array_equal(batch["label"][i], v.label[d])
        np.testing.assert_array_equal(batch["coordinates"][i], v.coordinates[d])
        np.testing.assert_array_equal(batch["present"][i], v.present)
        assert v.body[d].any()


def test_half_of_every_batch_is_foreground(volumes):
    share = []
    for step in range(40):
        batch = pipeline.batch_at(make(volumes, patch=(6, 6)), step)
        share.append(((batch["label"] > 0) & batch["body"]).any((1, 2)).mean())
    assert min(share) >= 0.5


def positions(table):
    """Every patch (row of the table, corner) there is."""
    for row in range(len(table.volume)):
        low, high = table.low[row], table.high[row]
        for corner in itertools.product(*(range(a, b + 1) for a, b in zip(low, high, strict=True))):
            yield row, np.array(corner)


@pytest.mark.parametrize("patch", [(20, 18), (16, 8), (6, 6), (2, 12, 12), (8, 20, 18)])
@pytest.mark.parametrize("share", [0.3, 0.5])
def test_weights_are_the_ratio_of_the_shares_exactly(volumes, patch, share):
    """By enumeration of what the samplers do: p / w is the sampling law q, it sums to 1 and E_q[w] = 1."""
    table = pipeline.make_table(volumes, patch)
    law = {}
    for row, corner in positions(table):
        n = np.prod(table.high[row] - table.low[row] + 1)
        law[row, *corner] = (1 - share) / len(table.volume) / n
    groups = [[r for r in table.foreground if table.volume[r] == v] for v in (0, 2)]
    for rows in groups:
        for row in rows:
            label = pipeline.rows_of(volumes[table.volume[row]].label, len(patch))[table.slice[row]]
            pixels = np.argwhere(label > 0)
            for pixel in pixels:
                held = [
                    key
                    for key in law
                    if key[0] == row and all(c <= u < c + s for c, u, s in zip(key[1:], pixel, patch, strict=True))
                ]
                for key in held:
                    law[key] += share / len(groups) / len(rows) / len(pixels) / len(held)
    np.testing.assert_allclose(sum(law.values()), 1)
    mean = 0.0
    for row, corner in positions(table):
        p = 1 / (len(table.volume) * np.prod(table.high[row] - table.low[row] + 1))
        w = pipeline.patch_weight(table, row, corner, share)
        np.testing.assert_allclose(w, p / law[row, *corner], rtol=1e-9)
        assert 0 < w <= 1 / (1 - share) + 1e-12
        mean += w * law[row, *corner]
    np.testing.assert_allclose(mean, 1)


def test_patches_of_volumes_are_cut_from_them_and_change_slice_by_slice(volumes):
    """The same keys with an axis more; mirrored left to right alone; every kind of change leaves air and label true."""
    by_number = {v.number: v for v in volumes}
    plain = pipeline.batch_at(make(volumes, patch=(3, 8, 8), batch=8), 1)
    assert plain["image"].shape == (8, 2, 3, 8, 8) and plain["coordinates"].shape == (8, 3, 8, 8, 3)
    table = pipeline.make_table(volumes, (3, 8, 8))
    assert len(table.volume) == 3 and len(table.foreground) == 2
    for i in range(8):
        v = by_number[plain["case"][i]]
        windows = np.lib.stride_tricks.sliding_window_view(v.image[0], (3, 8, 8)).reshape(-1, 3 * 8 * 8)
        assert (windows == plain["image"][i, 0].ravel()).all(axis=1).any()
    assert ((plain["label"] > 0) & plain["body"]).any((1, 2, 3)).mean() >= 0.5

    dataset = make(volumes, patch=(3, 8, 8), batch=8, augment=True, kinds=EVERY)
    for step in range(4):
        batch = pipeline.batch_at(dataset, step)
        assert np.isfinite(batch["image"]).all()
        assert not batch["image"][:, :, ~batch["body"].any(0)].any()
        assert batch["label"].shape == (8, 3, 8, 8)
        # A slice keeps its place along D, whatever happens in its plane.
        body = batch["body"]
        for d in range(3):
            inside = batch["coordinates"][:, d, ..., 0]
            assert all(np.ptp(one[here]) == 0 for one, here in zip(inside, body[:, d], strict=True) if here.any())
    large = pipeline.batch_at(make(volumes, patch=(12, 24, 18), batch=2, augment=True, kinds=EVERY), 0)
    assert (large["label"][:, -1] == -1).all() and not large["body"][:, -1].any()


def test_weighted_mean_over_batches_is_the_uniform_mean(volumes):
    """The weighted lesion share over drawn patches against the plain one, which is known exactly."""
    patch = (16, 8)
    table = pipeline.make_table(volumes, patch)
    truth = np.zeros(len(table.volume))
    count = np.zeros(len(table.volume))
    for row, (i, j) in positions(table):
        label = volumes[table.volume[row]].label[table.slice[row], i : i + 16, j : j + 8]
        truth[row] += (label > 0).mean()
        count[row] += 1
    truth = (truth / count).mean()
    batch = pipeline.batch_at(make(volumes, patch=patch, batch=4000), 0)
    value = (batch["label"] > 0).mean((1, 2))
    weighted = batch["weight"] * value
    error = weighted.std() / np.sqrt(len(weighted))
    assert abs(weighted.mean() - truth) < 4 * error and error < 0.05 * truth
    assert value.mean() > 1.5 * truth
    assert abs(batch["weight"].mean() - 1) < 4 * batch["weight"].std() / np.sqrt(4000)


def test_without_foreground_sampling_is_uniform():
    batch = pipeline.batch_at(make([volume("a"), volume("b", (9, 20, 18), seed=1)], batch=1200), 0)
    np.testing.assert_array_equal(batch["weight"], 1)
    # 4 slices with a body in a, 8 in b.
    assert abs((batch["case"] == 101).mean() - 2 / 3) < 0.06
    assert 0 not in batch["slice"]


def test_small_slices_are_padded_and_padding_says_so(volumes):
    batch = pipeline.batch_at(make(volumes, patch=(24, 19), batch=8, augment=True), 0)
    for i in range(8):
        assert batch["body"][i].sum() == 14 * 14
        for edge in (batch["label"][i, :2], batch["label"][i, -2:], batch["label"][i, :, -1:]):
            assert (edge == -1).all()
        assert (batch["label"][i, 2:22, :18] >= 0).all()
        assert not batch["image"][i][:, ~batch["body"][i]].any()


def test_patches_stay_with_the_body():
    body = np.zeros((30, 40), bool)
    body[5:12, 10:38] = True
    assert pipeline.corners(body, (10, 12)) == ([2, 10], [5, 26])
    assert pipeline.corners(body, (30, 40)) == ([0, 0], [0, 0])
    assert pipeline.corners(body, (64, 64)) == ([0, 0], [0, 0])


def test_errors_for_people(volumes):
    with pytest.raises(UserError, match="d: has no label"):
        make([*volumes, volume("d", label=False)])
    with pytest.raises(UserError, match="no training scan"):
        make([])
    with pytest.raises(UserError, match="foreground_share is 1"):
        make(volumes, foreground_share=1.0)


def test_a_modality_is_missing_from_the_slices_in_which_it_shows_nothing(volumes):
    image = volumes[0].image.copy()
    image[1, 2] = np.where(volumes[0].body[2], -0.7, 0)
    ended = dataclasses.replace(volumes[0], image=image)
    batch = pipeline.evaluation_slices(ended, multiple=4)
    assert batch["present"][:, 1].tolist() == [True, True, False, True, True] and batch["present"][:, 0].all()
    table = pipeline.make_table([ended], (8, 8))
    rows = [pipeline.example(i, table=table, seed=0, share=0.0, augment=False) for i in range(20)]
    assert {bool(row["present"][1]) for row in rows if row["slice"] == 2} == {False}
    assert all(row["present"].all() for row in rows if row["slice"] != 2)
    # A patch of a volume has all of it.
    deep = pipeline.example(0, table=pipeline.make_table([ended], (4, 8, 8)), seed=0, share=0.0, augment=False)
    assert deep["present"].all()


def test_evaluation_slices_crop_and_chunks(volumes):
    v = volumes[0]
    batch = pipeline.evaluation_slices(v, multiple=8)
    assert batch["image"].shape == (5, 2, 24, 24) and batch["valid"].all()
    assert batch["case"].tolist() == [100] * 5 and batch["slice"].tolist() == [0, 1, 2, 3, 4]
    assert (batch["label"][:, 20:] == -1).all() and not batch["body"][:, :, 18:].any()
    np.testing.assert_array_equal(pipeline.crop(batch["label"], v), v.label)
    np.testing.assert_array_equal(pipeline.crop(batch["coordinates"], v), v.coordinates)
    np.testing.assert_array_equal(pipeline.crop(np.moveaxis(batch["image"], 1, -1), v), np.moveaxis(v.image, 0, -1))
    pieces = list(pipeline.chunks(batch, 2))
    assert [len(piece["valid"]) for piece in pieces] == [2, 2, 2]
    assert [piece["valid"].tolist() for piece in pieces] == [[True, True], [True, True], [True, False]]
    assert pieces[2]["weight"].tolist() == [1, 0] and (pieces[2]["label"][1] == -1).all()
    for name, values in batch.items():
        joined = np.concatenate([piece[name] for piece in pieces])
        assert joined.dtype == values.dtype
        np.testing.assert_array_equal(joined[:5], values)
    # One slice, more than a chunk: still exactly `size`.
    (piece,) = pipeline.chunks({name: values[:1] for name, values in batch.items()}, 4)
    assert piece["image"].shape == (4, 2, 24, 24) and piece["valid"].sum() == 1


def test_evaluation_without_label_and_with_an_even_size(volumes):
    batch = pipeline.evaluation_slices(volume("x", (3, 16, 24), label=False), multiple=8)
    assert batch["image"].shape == (3, 2, 16, 24) and (batch["label"] == -1).all()


def rated(name="a", seed=0):
    """Three raters: the lesion, nothing, another lesion in another slice."""
    plain = volume(name, lesion=(1, 2), seed=seed)
    other = np.zeros_like(plain.label)
    other[3, 8:11, 4:7] = 1
    return dataclasses.replace(plain, raters=np.stack([plain.label, np.zeros_like(other), other]))


def test_every_example_has_one_rater_drawn_evenly_and_reproducibly():
    one = rated()
    data = make([one, volume("b", seed=1)], batch=64, augment=False)
    first = pipeline.batch_at(data, 5)
    assert equal(first, pipeline.batch_at(make([one, volume("b", seed=1)], batch=64), 5))
    seen = np.zeros(3)
    for step in range(12):
        batch = pipeline.batch_at(data, step)
        for label, d in zip(*(batch[name][batch["case"] == one.number] for name in ("label", "slice")), strict=True):
            fits = [np.array_equal(label, own[d]) for own in one.raters]
            assert any(fits)  # whole: no mixture of raters
            if d in (1, 2, 3):  # where they differ
                seen += np.array(fits) / sum(fits)
    # In slices 1 and 2 the first rater differs from the others, who are equal there; in 3 the last does.
    assert seen.sum() > 300 and np.abs(seen / seen.sum() - 1 / 3).max() < 0.08


def test_what_any_rater_marks_is_foreground_whoever_is_drawn():
    one = rated()
    table = pipeline.make_table([one], (20, 18))
    assert table.slice[table.foreground].tolist() == [1, 2, 3]
    pixels = pipeline.foreground_pixels(table, int(table.foreground[2]))
    assert len(pixels) == 9 and pixels.min(0).tolist() == [8, 4]
    weights = np.concatenate([pipeline.batch_at(make([one], batch=32), step)["weight"] for step in range(25)])
    assert weights.mean() == pytest.approx(1, abs=0.06)  # E_q[w] = 1


def test_a_single_label_costs_no_draw(volumes):
    """One rater given as such is the same data set to the last bit as the plain label."""
    same = [dataclasses.replace(v, raters=v.label[None]) for v in volumes]
    one, other = (make(own, augment=True) for own in (volumes, same))
    for step in (0, 3):
        assert equal(pipeline.batch_at(one, step), pipeline.batch_at(other, step))
