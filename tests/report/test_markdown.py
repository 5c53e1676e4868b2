"""A table has a head, a rule and its rows."""

from entrust_jax.report import markdown


def test_a_table_is_a_head_a_rule_and_rows():
    found = markdown.table(["a", "b"], [["1", "2"], ["3", "4"]])
    assert found == ["| a | b |", "| --- | --- |", "| 1 | 2 |", "| 3 | 4 |"]
    assert markdown.table(["a"], []) == ["| a |", "| --- |"]
