"""The picture: orientation, proportions, the chosen slice, nothing cut, no text over text."""

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from entrust_jax.data.body import coordinates
from entrust_jax.data.layouts import case_number
from entrust_jax.data.preprocess import Volume
from entrust_jax.report import figures
from entrust_jax.trustmap import explanation

SHAPE = (4, 20, 24)  # D, H = x, W = y


def make_case(modalities, classes, *, missing=(), full=True, empty=False, spacing=(3.0, 1.0, 2.0)):
    rng = np.random.default_rng(1)
    body = np.zeros(SHAPE, bool)
    body[:, 2:18, 2:22] = True
    present = np.array([name not in missing for name in modalities])
    image = rng.standard_normal((len(modalities), *SHAPE)).astype(np.float32) * body * present[:, None, None, None]
    volume = Volume("case", "case", case_number("case"), image, present, None, body, coordinates(body), spacing, None)
    label = np.zeros(SHAPE, np.uint8)
    error = np.full(SHAPE, 0.01, np.float32)
    if not empty:
        label[1:3, 4:9, 5:12] = len(classes) - 1
        error[2, 4:9, 5:8], error[0, 12:16, 12:16], error[3, 4:9, 16:20] = 0.45, 0.3, 0.25
    probability = np.full((*SHAPE, len(classes)), 0.1 / len(classes), np.float32)
    made = {
        "label": label,
        "probability": probability,
        "error_probability": error,
        "entropy": error,
        "predicted_dice": 0.8 if full else None,
        "regions": {name: {"volume_ml": 12.0, "interval": [9.0, 14.0] if full else None} for name in classes[1:]},
        "seconds": 1.0,
    }
    evidence = []
    if full:
        pairs = len(modalities) * (len(modalities) - 1) // 2
        support = np.full((len(modalities), *SHAPE, len(classes)), 0.3, np.float32)
        made |= {
            "hypotheses": np.stack([label, np.roll(label, 1, axis=1)]),
            "divergence": error,
            "conflict": error,
            "cause": np.where(error > 0.2, 2, 0).astype(np.uint8),
            "attribution": rng.standard_normal((len(modalities), *SHAPE)).astype(np.float32),
        }
        evidence = [
            made["cause"],
            np.stack([error] * pairs) if pairs else np.zeros((0, *SHAPE), np.float32),
            support,
            made["attribution"],
        ]
    made["records"] = explanation.records(error, label, spacing, modalities, classes, present, *evidence)
    return made, volume


CASES = {
    "two classes": (("T1", "FLAIR"), ("background", "lesion"), {}),
    "one scan": (("CT",), ("background", "lesion"), {}),
    "four classes": (
        ("T1", "T1ce", "T2", "FLAIR"),
        ("background", "necrotic core", "oedema", "enhancing tumour"),
        {},
    ),
    "missing": (("T1", "FLAIR", "T1ce"), ("background", "lesion"), {"missing": ("FLAIR",)}),
    "without trust maps": (("T1", "FLAIR"), ("background", "lesion"), {"full": False}),
    "nothing found": (("T1", "FLAIR"), ("background", "lesion"), {"empty": True}),
}


@pytest.fixture
def pages(monkeypatch) -> list[Figure]:
    """The figures that are saved while the test runs."""
    saved: list[Figure] = []
    original = Figure.savefig

    def savefig(self, *arguments, **named):
        saved.append(self)
        return original(self, *arguments, **named)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return saved


def draw(path, modalities, classes, **options):
    made, volume = make_case(modalities, classes, **options)
    figures.overview(
        path,
        made,
        volume,
        modalities=modalities,
        reference="FLAIR" if "FLAIR" in modalities else "CT",
        classes=classes,
        title="A title with a $ and an _ in it",
        warnings=["A long warning " * 30],
    )
    return made


@pytest.mark.parametrize("name", CASES)
def test_everything_is_said_and_no_text_is_cut_or_covered(tmp_path, pages, name):
    modalities, classes, options = CASES[name]
    made = draw(tmp_path / "o.png", modalities, classes, **options)
    (page,) = pages
    renderer = page.canvas.get_renderer()
    texts = [*page.texts, *(text for axes in page.axes for text in axes.texts)]
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in texts if text.get_text()]
    width, height = page.canvas.get_width_height()
    for words, box in boxes:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height, words
    for i, (words, box) in enumerate(boxes):
        for others, other in boxes[i + 1 :]:
            # a descender may touch the line below; a covered letter may not
            across = min(box.x1, other.x1) - max(box.x0, other.x0)
            along = min(box.y1, other.y1) - max(box.y0, other.y0)
            assert not (across > 1 and along > 4), (words, others)
    assert imread(tmp_path / "o.png").shape[:2] == (height, width)
    words = " ".join(text.get_text() for text in page.texts)
    for record in made["records"][: figures.SHOWN_REGIONS]:
        assert explanation.sentence(record) in words
    assert " ".join(("A long warning " * 30).split()) in words
    assert "not a medical device" in words
    inside = [text.get_text() for axes in page.axes for text in axes.texts]
    for modality in options.get("missing", ()):
        assert f"{modality}\nmissing" in inside
        assert f"Does {modality} support" not in words
    assert ("nothing found" in inside) == bool(options.get("empty"))
    assert ("Conflict between the scans" in words) == options.get("full", True)
    numbers = {str(n + 1) for n in range(min(len(made["records"]), figures.SHOWN_REGIONS))}
    assert numbers <= set(inside)


def test_right_of_the_patient_is_left_of_the_picture_and_anterior_up():
    body = np.ones((1, 6, 8), bool)
    view = figures.make_view(body, (1.0, 1.0, 1.0))
    plane = np.zeros((6, 8))
    plane[5, 7] = 1  # the rightmost and most anterior voxel
    assert np.argwhere(figures.radiological(plane, view)).tolist() == [[0, 0]]
    x, y = figures.position(5, 7, view)
    assert x == pytest.approx(0.5) and y == pytest.approx(7.5)


def test_pixels_keep_the_proportions_of_the_spacing():
    view = figures.make_view(np.ones((2, 10, 10), bool), (5.0, 1.0, 3.0))
    assert view.extent == pytest.approx((0, 10, 0, 30))
    near = figures.zoomed(view, np.pad(np.ones((1, 1), bool), ((5, 4), (5, 4))), (5.0, 1.0, 3.0))
    assert near.extent[3] / near.extent[1] == pytest.approx(3.0)


def test_the_enlarged_window_holds_the_finding():
    view = figures.make_view(np.ones((1, 60, 80), bool), (1.0, 1.0, 1.0))
    interest = np.zeros((60, 80), bool)
    interest[55:60, 2:10] = True  # at the border, where a centred window would stick out
    near = figures.zoomed(view, interest, (1.0, 1.0, 1.0))
    assert near.rows.stop - near.rows.start < 60
    assert (
        0 <= near.rows.start <= 55 and near.rows.stop == 60 and 0 <= near.columns.start <= 2 and near.columns.stop >= 10
    )
    interest[0, 79] = True
    assert figures.zoomed(view, interest, (1.0, 1.0, 1.0)) is view


def test_outline_runs_along_the_voxel_borders():
    figure = Figure()
    axes = figure.add_subplot()
    view = figures.make_view(np.ones((1, 10, 10), bool), (1.0, 2.0, 1.0))
    mask = np.zeros((10, 10), bool)
    mask[9, 3:6] = True  # touches the window's left edge in the picture
    figures.outline(axes, mask, view, "#E69F00", halo=False)
    (drawn,) = axes.collections
    box = drawn.get_paths()[0].get_extents()
    assert (box.x0, box.x1) == pytest.approx((0.0, 2.0), abs=1e-6)
    assert (box.y0, box.y1) == pytest.approx((3.0, 6.0), abs=1e-6)


def test_the_slice_with_most_expected_errors_is_shown():
    body = np.ones((5, 8, 8), bool)
    label, error = np.zeros((5, 8, 8), np.uint8), np.full((5, 8, 8), 0.05)
    assert figures.informative_slice({"label": label, "error_probability": error}, body, 0.2)[0] == 2
    label[1, :6, :6] = 1
    assert figures.informative_slice({"label": label, "error_probability": error * 0}, body, 0.2)[0] == 1
    assert figures.informative_slice({"label": label, "error_probability": error}, body, 0.2)[0] == 1
    error[4, :4, :4] = 0.5
    assert figures.informative_slice({"label": label, "error_probability": error}, body, 0.2)[0] == 4


def test_a_review_region_is_marked_where_the_shown_slice_meets_it():
    error = np.zeros((4, 8, 8), np.float32)
    error[1:3, 2:5, 2:5] = 0.5
    error[3, 6:8, 6:8] = 0.4
    records = [{"place": {"slice": 1, "row": 3, "column": 3}}, {"place": {"slice": 3, "row": 6, "column": 6}}]
    assert figures.marks(error, records, 2, 0.2) == [(2, 3, 3), (3, 6, 6)]


def test_long_words_are_broken_and_kept():
    renderer = figures.FigureCanvasAgg(Figure(dpi=figures.DPI)).get_renderer()
    lines = figures.wrap("a " + "x" * 300 + " b", 2.0, 11.0, "normal", renderer)
    assert "".join(lines).replace(" ", "") == "a" + "x" * 300 + "b"
    assert len(lines) > 3
