"""The volume suite's head is as large as a brain, whatever the scan around it."""

import numpy as np

from entrust_jax.benchmark import volume


def test_a_head_has_the_size_of_a_brain():
    head = volume.head((155, 240, 240), 1)
    sizes = [np.ptp(np.flatnonzero(head.body.any(axis=tuple({0, 1, 2} - {axis})))) + 1 for axis in range(3)]
    assert sizes == [139, 140, 176]  # an odd grid has its middle in a voxel
    small = volume.head((8, 20, 20), 2)
    assert small.image.shape == (2, 8, 20, 20) and not small.image[:, ~small.body].any()
