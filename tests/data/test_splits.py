"""Splits: by patient, the same whatever the listing, drawn once."""

import collections
import json
import types
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from entrust_jax.data import splits
from entrust_jax.data.layouts import Case
from entrust_jax.errors import UserError

PAIRS = [(f"P{i:02d}-{t}", f"P{i:02d}") for i in range(40) for t in range(1 + i % 3)]
PLAIN = {"seed": 0, "folds": 5, "fold": 0, "test_pattern": ""}


def cases(pairs=PAIRS, bare=()):
    label = Path("label.nii.gz")
    return [Case(name, patient, i, {}, None if name in bare else label) for i, (name, patient) in enumerate(pairs)]


def config(**values):
    return types.SimpleNamespace(**{**PLAIN, **values})


@settings(max_examples=30, deadline=None)
@given(
    st.integers(8, 60),
    st.integers(0, 9),
    st.integers(2, 5),
    st.integers(0, 4),
    st.randoms(use_true_random=False),
)
def test_every_case_once_and_patients_whole_in_any_order(count, seed, folds, fold, random):
    pairs = [(f"P{i}-{t}", f"P{i}") for i in range(count) for t in range(1 + i % 2)]
    values = {"seed": seed, "folds": folds, "fold": fold % folds, "test_pattern": ""}
    parts = splits.draw(pairs, **values)
    assert sorted(name for names in parts.values() for name in names) == sorted(name for name, _ in pairs)
    patient = dict(pairs)
    where = collections.defaultdict(set)
    for part, names in parts.items():
        assert names
        for name in names:
            where[patient[name]].add(part)
    assert all(len(found) == 1 for found in where.values())
    random.shuffle(pairs)
    assert splits.draw(pairs, **values) == parts


def test_folds_partition_the_patients_and_sizes_are_as_promised():
    pairs = [(f"P{i}", f"P{i}") for i in range(60)]
    tests, vals = [], set()
    for fold in range(5):
        parts = splits.draw(pairs, **{**PLAIN, "fold": fold})
        assert [len(parts[part]) for part in splits.PARTS] == [30, 6, 12, 12]
        tests += parts["test"]
        vals.add(tuple(parts["val"]))
    assert sorted(tests) == sorted(name for name, _ in pairs)
    assert len(vals) == 5


def test_seed_changes_the_draw():
    assert splits.draw(PAIRS, **PLAIN) != splits.draw(PAIRS, **{**PLAIN, "seed": 1})


def test_pattern_takes_whole_patients():
    pairs = [(f"{'CS' if i < 10 else 'DU'}_{i}", f"P{i}") for i in range(30)] + [("DU_later", "P0")]
    parts = splits.draw(pairs, **{**PLAIN, "test_pattern": "^CS_"})
    assert set(parts["test"]) == {f"CS_{i}" for i in range(10)} | {"DU_later"}


@pytest.mark.parametrize(
    "values, message",
    [
        ({"test_pattern": "XX"}, "matches no case name"),
        ({"test_pattern": "("}, "mend the pattern"),
        ({"test_pattern": "."}, "leaves no patient for train"),
        ({"fold": 5}, "fold 5 of 5"),
        ({"folds": 0}, "of 0 folds"),
        ({"folds": 1, "fold": 1}, "fold 1 of 1"),
    ],
)
def test_impossible_values(values, message):
    with pytest.raises(UserError, match=message):
        splits.draw(PAIRS, **{**PLAIN, **values})


def test_one_fold_is_no_split_and_says_so():
    found = splits.plan(cases([("b", "b"), ("a", "a")]), config(folds=1))
    assert all(found.parts[part] == ["a", "b"] for part in splits.PARTS)
    assert "no score says anything" in found.lines[0]


def test_too_few_patients():
    with pytest.raises(UserError, match="leaves no patient for train"):
        splits.draw([("a", "a"), ("b", "b"), ("c", "c")], **{**PLAIN, "folds": 2})


def test_written_once_and_read_back(tmp_path):
    path = tmp_path / "w" / "splits.json"
    parts = splits.load_or_draw(path, cases(), config()).parts
    before = path.read_bytes()
    assert splits.load_or_draw(path, cases()[::-1], config()).parts == parts == splits.load(path)
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == ["splits.json"]


def test_a_kept_split_wins_over_what_would_be_drawn(tmp_path):
    path = tmp_path / "splits.json"
    splits.load_or_draw(path, cases(), config())
    content = json.loads(path.read_text())
    content["train"], content["test"] = content["test"], content["train"]
    path.write_text(json.dumps(content))
    assert splits.load_or_draw(path, cases(), config()).parts["test"] == content["test"]


def test_changed_cases_or_values_are_refused(tmp_path):
    path = tmp_path / "splits.json"
    splits.load_or_draw(path, cases(), config())
    with pytest.raises(UserError, match=r"splits\.json.*P00-0 is gone.*new --workdir"):
        splits.load_or_draw(path, cases(PAIRS[1:]), config())
    with pytest.raises(UserError, match=r"Q is new"):
        splits.load_or_draw(path, cases([*PAIRS, ("Q", "Q")]), config())
    with pytest.raises(UserError, match=r"fold 0 -> 1"):
        splits.load_or_draw(path, cases(), config(fold=1))


def test_a_kept_split_with_a_case_in_two_parts_is_refused(tmp_path):
    path = tmp_path / "splits.json"
    splits.load_or_draw(path, cases(), config())
    content = json.loads(path.read_text())
    content["train"].append(content["test"][0])
    path.write_text(json.dumps(content))
    message = rf"splits\.json: case {content['test'][0]} is in train and in test.*; restore the file or use a new --wor"
    for read in (lambda: splits.load(path), lambda: splits.load_or_draw(path, cases(), config())):
        with pytest.raises(UserError, match=message):
            read()
    everywhere = tmp_path / "one" / "splits.json"
    parts = splits.load_or_draw(everywhere, cases(), config(folds=1)).parts
    assert splits.load_or_draw(everywhere, cases(), config(folds=1)).parts == parts == splits.load(everywhere)


def test_a_patient_whom_a_kept_split_took_for_two_is_named(tmp_path):
    path = tmp_path / "splits.json"
    parts = splits.load_or_draw(path, cases([(name, name) for name, _ in PAIRS]), config()).parts
    with pytest.raises(UserError, match=r"splits\.json: patient P\d\d is in \w+ \(case (\S+)\) and in \w+ \(") as error:
        splits.load_or_draw(path, cases(), config())
    said = str(error.value)
    assert "use a new --workdir, or remove the file" in said
    patient = said.partition("patient ")[2][:3]
    assert len({part for part, names in parts.items() if any(name.startswith(patient) for name in names)}) > 1


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"train": 1}'])
def test_damaged_or_missing_file(tmp_path, text):
    path = tmp_path / "splits.json"
    with pytest.raises(UserError, match="no such file"):
        splits.load(path)
    path.write_text(text)
    with pytest.raises(UserError, match=r"splits\.json: is damaged"):
        splits.load_or_draw(path, cases(), config())
    assert path.read_text() == text


def test_cases_without_a_label_are_in_no_part(tmp_path):
    bare = {"P03-0", "P04-0"}
    draw = splits.load_or_draw(tmp_path / "splits.json", cases(bare=bare), config())
    assert draw.parts == splits.draw([pair for pair in PAIRS if pair[0] not in bare], **PLAIN)
    (line,) = draw.lines
    assert "2 cases (P03-0, P04-0)" in line
    assert splits.load_or_draw(tmp_path / "splits.json", cases(bare=bare), config()) == draw._replace(lines=[])
    with pytest.raises(UserError, match="P04-0 is new"):  # it has a label now
        splits.load_or_draw(tmp_path / "splits.json", cases(bare={"P03-0"}), config())
    with pytest.raises(UserError, match=f"none of the {len(PAIRS)} cases in config.data.dir has a label"):
        splits.plan(cases(bare=dict(PAIRS)), config())


def test_a_split_that_holds_cases_without_a_label_goes_on(tmp_path):
    """As they were drawn before."""
    path = tmp_path / "splits.json"
    before = splits.load_or_draw(path, cases(), config()).parts
    assert splits.load_or_draw(path, cases(bare={"P03-0"}), config()).parts == before
    with pytest.raises(UserError, match="P03-0 is gone"):
        splits.load_or_draw(path, [case for case in cases() if case.name != "P03-0"], config())


def test_a_given_fold_is_drawn_from_as_our_own():
    """The parts of 60 patients are those of the versions that knew no given folds."""
    pairs = [(f"P{i}", f"P{i}") for i in range(60)]
    parts = splits.draw(pairs, **PLAIN)
    train = tuple(name for name, _ in pairs if name not in parts["test"])
    fold = splits.Fold(Path("f"), 0, 5, train, tuple(parts["test"]))
    assert splits.draw_within(pairs, fold, seed=0) == (parts, [])
    assert parts["val"] == ["P1", "P22", "P33", "P41", "P42", "P44"]
