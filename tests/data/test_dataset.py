"""The data of a config: whose scan is whose."""

import pytest

from entrust_jax.data import dataset, splits
from entrust_jax.data.layouts import Case
from entrust_jax.errors import UserError

NAMES = [f"HOSP_{patient:02d}_{time}" for patient in range(12) for time in (1, 2)]
CASES = [Case(name, name, i, {}, None) for i, name in enumerate(NAMES)]


def test_without_a_pattern_the_layout_says_who_it_is():
    assert dataset.name_patients(CASES, "") == CASES


def test_the_pattern_names_the_patient_and_keeps_the_scans_together():
    found = dataset.name_patients(CASES, r"(.+)_\d$")
    assert [case.patient for case in found[:3]] == ["HOSP_00", "HOSP_00", "HOSP_01"]
    assert [(case.name, case.number) for case in found] == [(case.name, case.number) for case in CASES]
    pairs = [(case.name, case.patient) for case in found]
    parts = splits.draw(pairs, seed=0, folds=4, fold=0, test_pattern="")
    for names in parts.values():
        assert len(names) == 2 * len({name[:7] for name in names})


@pytest.mark.parametrize(
    ("pattern", "said"),
    [("(", "mend the pattern"), (r".+_\d", "no group"), (r"(.+)_1$", "HOSP_00_2"), ("(x*)", "HOSP_00_1")],
)
def test_a_pattern_that_does_not_fit_is_one_clear_error(pattern, said):
    with pytest.raises(UserError, match="patient_pattern") as error:
        dataset.name_patients(CASES, pattern)
    assert said in str(error.value)
