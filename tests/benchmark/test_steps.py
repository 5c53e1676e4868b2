"""With an exact denoiser many steps are exact, and few are not where b is large."""

import numpy as np
import pytest

from entrust_jax.benchmark import steps


def test_many_steps_give_the_law_and_few_with_a_large_scale_do_not():
    scales = list(steps.SCALES.values())
    exact = steps.frequencies(scales[1], 64, "ddim")
    assert exact["presence"] == pytest.approx(steps.PRESENCE, abs=0.025)
    assert exact["smallest"] > 0.3 and exact["largest"] < 0.37
    assert steps.frequencies(scales[0], 4, "ddim")["presence"] > steps.PRESENCE + 0.08


@pytest.mark.parametrize("radius", [1.5, 3.0])
def test_the_rule_of_the_decision_holds(radius):
    found = steps.decision(0.3 / np.sqrt(2), radius)
    assert found["measured"] == pytest.approx(found["rule"], abs=0.5)
