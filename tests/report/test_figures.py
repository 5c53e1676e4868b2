"""The picture: what is said, the chosen slice, nothing cut, no text over text."""

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
            support,
            made["attribution"],
        ]
    shown = np.repeat(present[:, None], SHAPE[0], axis=1)
    made["records"] = explanation.records(error, label, spacing, modalities, classes, shown, *evidence)
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
    assert ("nothing found" in inside) == ("nothing was found" in words) == bool(options.get("empty"))
    assert ("Conflict between the scans" in words) == options.get("full", True)
    numbers = {str(n + 1) for n in range(min(len(made["records"]), figures.SHOWN_REGIONS))}
    assert numbers <= set(inside)


def test_the_slice_with_most_expected_errors_is_shown():
    body = np.ones((5, 8, 8), bool)
    label, error = np.zeros((5, 8, 8), np.uint8), np.full((5, 8, 8), 0.05)
    assert figures.informative_slice({"label": label, "error_probability": error}, body)[0] == 2
    label[1, :6, :6] = 1
    assert figures.informative_slice({"label": label, "error_probability": error * 0}, body)[0] == 1
    assert figures.informative_slice({"label": label, "error_probability": error}, body)[0] == 1
    error[4, :4, :4] = 0.5
    assert figures.informative_slice({"label": label, "error_probability": error}, body)[0] == 4


def test_a_review_region_is_marked_where_the_shown_slice_meets_it():
    error = np.zeros((4, 8, 8), np.float32)
    error[1:3, 2:5, 2:5] = 0.5
    error[3, 6:8, 6:8] = 0.4
    records = [{"place": {"slice": 1, "row": 3, "column": 3}}, {"place": {"slice": 3, "row": 6, "column": 6}}]
    assert figures.marks({"error_probability": error}, records, 2) == [(2, 3, 3), (3, 6, 6)]


def test_a_region_inside_the_band_around_it_is_marked_apart():
    error = np.zeros((1, 12, 12), np.float32)
    error[0, 1:11, 1:11] = 0.5
    cause = np.where(error > 0, 4, 0).astype(np.uint8)
    cause[0, 2:5, 2:5] = 2
    records = [{"place": {"slice": 0, "row": 3, "column": 3}}, {"place": {"slice": 0, "row": 9, "column": 9}}]
    inner, band = figures.marks({"error_probability": error, "cause": cause}, records, 0)
    assert inner == (0, 3, 3) and cause[band] == 4
