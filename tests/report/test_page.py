"""Words on the page."""

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from entrust_jax.report import page


def test_long_words_are_broken_and_kept():
    renderer = FigureCanvasAgg(Figure(dpi=page.DPI)).get_renderer()
    lines = page.wrap("a " + "x" * 300 + " b", 2.0, 11.0, "normal", renderer)
    assert "".join(lines).replace(" ", "") == "a" + "x" * 300 + "b"
    assert len(lines) > 3
