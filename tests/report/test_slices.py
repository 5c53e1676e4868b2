"""One axial slice: orientation, proportions, what is enlarged, where outlines run."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from entrust_jax.report import slices


def test_right_of_the_patient_is_left_of_the_picture_and_anterior_up():
    body = np.ones((1, 6, 8), bool)
    view = slices.make_view(body, (1.0, 1.0, 1.0))
    plane = np.zeros((6, 8))
    plane[5, 7] = 1  # the rightmost and most anterior voxel
    assert np.argwhere(slices.radiological(plane, view)).tolist() == [[0, 0]]
    x, y = slices.position(5, 7, view)
    assert x == pytest.approx(0.5) and y == pytest.approx(7.5)


def test_pixels_keep_the_proportions_of_the_spacing():
    view = slices.make_view(np.ones((2, 10, 10), bool), (5.0, 1.0, 3.0))
    assert view.extent == pytest.approx((0, 10, 0, 30))
    near = slices.zoomed(view, np.pad(np.ones((1, 1), bool), ((5, 4), (5, 4))), (5.0, 1.0, 3.0))
    assert near.extent[3] / near.extent[1] == pytest.approx(3.0)


def test_the_enlarged_window_holds_the_finding():
    view = slices.make_view(np.ones((1, 60, 80), bool), (1.0, 1.0, 1.0))
    interest = np.zeros((60, 80), bool)
    interest[55:60, 2:10] = True  # at the border, where a centred window would stick out
    near = slices.zoomed(view, interest, (1.0, 1.0, 1.0))
    assert near.rows.stop - near.rows.start < 60
    assert (
        0 <= near.rows.start <= 55 and near.rows.stop == 60 and 0 <= near.columns.start <= 2 and near.columns.stop >= 10
    )
    interest[0, 79] = True
    assert slices.zoomed(view, interest, (1.0, 1.0, 1.0)) is view


def test_outline_runs_along_the_voxel_borders():
    figure = Figure()
    axes = figure.add_subplot()
    view = slices.make_view(np.ones((1, 10, 10), bool), (1.0, 2.0, 1.0))
    mask = np.zeros((10, 10), bool)
    mask[9, 3:6] = True  # touches the window's left edge in the picture
    slices.outline(axes, mask, view, "#E69F00", halo=False)
    (drawn,) = axes.collections
    box = drawn.get_paths()[0].get_extents()
    assert (box.x0, box.x1) == pytest.approx((0.0, 2.0), abs=1e-6)
    assert (box.y0, box.y1) == pytest.approx((3.0, 6.0), abs=1e-6)
