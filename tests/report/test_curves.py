import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure

from entrust_jax.report import curves

BINS = np.array([[100.0, 10.0, 12.0], [0.0, 0.0, 0.0], [50.0, 40.0, 30.0]])


def test_reliability_draws_mean_confidence_against_accuracy():
    picture = curves.reliability_figure({"before": BINS, "after": BINS * 0}, "title", {"before": "ECE 0.0800"})
    before, after, counts = picture.axes[0], picture.axes[1], picture.axes[2]
    observed = next(line for line in before.lines if line.get_label() == "observed")
    np.testing.assert_allclose(observed.get_xydata(), [[0.1, 0.12], [0.8, 0.6]])  # the empty bin is left out
    assert "ECE 0.0800" in before.get_title() and after.get_title() == "after"
    assert [bar.get_height() for bar in counts.patches] == [100, 0, 50]


def test_risk_coverage_draws_every_method_and_its_best_order():
    line = (np.array([0.5, 1.0]), np.array([0.1, 0.3]))
    picture = curves.risk_coverage_figure({"a": line, "b": line}, "title", {"a": line})
    labels = [one.get_label() for one in picture.axes[0].lines]
    assert {"a", "b", "a: best order"} <= set(labels) and "b: best order" not in labels
    drawn = picture.axes[0].lines[labels.index("a")]
    np.testing.assert_allclose(drawn.get_xydata(), np.stack(line, -1))
    curves.risk_coverage_figure({}, "no case has a Dice", {})


def test_conflict_draws_both_curves_and_every_patient():
    profile = np.array([[0.1, 0.2, 0.1, 5.0], [0.3, np.nan, np.nan, 0.0], [0.5, 0.6, 0.4, 10.0]])
    null = np.random.default_rng(0).normal(size=50)
    picture = curves.conflict_figure(profile, np.array([0.1, 0.3]), null, "title", 0.1)
    left, right = picture.axes
    lines = {line.get_label(): line for line in left.lines}
    np.testing.assert_allclose(lines["conflict above 0.1"].get_ydata(), profile[:, 1])
    np.testing.assert_allclose(lines["conflict up to 0.1"].get_ydata(), profile[:, 2])
    dots = next(line for line in right.lines if len(line.get_ydata()) == 2 and line.get_marker() == "o")
    np.testing.assert_allclose(dots.get_ydata(), [0.1, 0.3])
    assert "2 patients" in right.get_xticklabels()[1].get_text()
    picture.canvas.draw()


def test_blobs_are_drawn_against_their_posterior():
    posterior = np.array([0.1, 0.1, 0.9, 0.9])
    kinds = {"agree": posterior > 0.5, "conflict": posterior < 0.5}
    picture = curves.blob_figure(posterior, {"p": np.array([0.0, 0.2, 0.8, 1.0]), "share": posterior}, kinds, "title")
    means = {line.get_label(): line.get_xydata() for line in picture.axes[0].lines}
    np.testing.assert_allclose(means["agree"], [[0.9, 0.9]])
    np.testing.assert_allclose(means["conflict"], [[0.1, 0.1]])
    assert [axis.get_title() for axis in picture.axes] == ["p", "share"]


def test_maps_are_drawn_in_rows_of_cases():
    columns = {"image": 50 * np.random.default_rng(0).random((2, 4, 4)), "share": np.full((2, 4, 4), 0.25)}
    picture = curves.map_figure(columns, 1, "title")
    assert len(picture.axes) == 4
    image, share = picture.axes[0].images[0], picture.axes[1].images[0]
    assert share.get_clim() == (0, 1) and image.get_clim()[1] > 10
    np.testing.assert_array_equal(share.get_array(), columns["share"][0])


def test_diversity_is_drawn_by_steps():
    picture = curves.steps_figure({"a": {1: 0.2, 4: 0.8}, "b": {1: 0.1, 4: 0.5}}, (0.75, 1.15))
    lines = {line.get_label(): line.get_xydata() for line in picture.axes[0].lines}
    np.testing.assert_allclose(lines["b"], [[1, 0.1], [4, 0.5]])


def test_save_writes_a_png_and_replaces_it_whole(tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(b"old")
    curves.save(curves.reliability_figure({"only": BINS}, "title", {}), path)
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_mode & 0o044
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_save_leaves_the_old_picture_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "picture.png"
    path.write_bytes(b"old")

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        curves.save(curves.reliability_figure({"only": BINS}, "title", {}), path)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_no_global_figures_are_left():
    curves.reliability_figure({"only": BINS}, "title", {})
    assert not matplotlib._pylab_helpers.Gcf.figs


def test_injection_draws_a_row_a_case_and_the_response_to_the_dose():
    plane = np.random.default_rng(0).random((12, 10))
    region = np.zeros((12, 10), bool)
    region[3:6, 4:7] = True
    case = {"kind": "erase", "modality": 1, "image": np.stack([plane, plane]), "region": region}
    case |= {"conflict": plane, "disagreement": plane / 2, "blame": np.where(region, 1, -1)}
    lines = {"B": np.array([[0.1, 0.2, 0.5, 0.3, 0.4], [0.1, 0.4, 0.7, 0.5, 0.6]])}  # A was missing everywhere
    bars = {
        "us: u": {"value": 0.8, "ci95": [0.7, 0.9]},
        "them: u": {"value": None},
        "them: v": {"value": 0.5, "ci95": None},
    }
    picture = curves.injection_figure([case, case], ("A", "B"), (0.0, 0.5, 1.0), lines, bars, 0.85, "us")
    assert len(picture.axes) == 2 * 5 + 2
    np.testing.assert_array_equal(picture.axes[1].images[0].get_array(), plane.T[::-1, ::-1])
    assert picture.axes[0].get_ylabel() == "erase\nin B"
    left, right = picture.axes[-2:]
    response = next(line for line in left.lines if line.get_label() == "altered in B alone")
    np.testing.assert_allclose(response.get_ydata(), [0.1, 0.3, 0.6])
    control = next(line for line in left.lines if line.get_label() == "the same in all modalities")
    np.testing.assert_allclose(control.get_ydata(), [0.4])
    assert [label.get_text() for label in right.get_yticklabels()] == list(bars)
