"""YAML is looked over before it is loaded; what recipes may well hold passes."""

import pytest
import yaml

from kvtrain import strict_yaml
from kvtrain.recipes import explain_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: &x [1, 2]\nb: *x\nc: {d: *x}", {"a": [1, 2], "b": [1, 2], "c": {"d": [1, 2]}}),
        ("a: &x {k: 1}\nb: {<<: *x, k: 2}", {"a": {"k": 1}, "b": {"k": 2}}),
        ("a: {k: 1}\nb: {k: 1}", {"a": {"k": 1}, "b": {"k": 1}}),
        ("[k, k]", ["k", "k"]),
        ("a: '.nan'\nb: inf\nc: 1.0e+300", {"a": ".nan", "b": "inf", "c": 1e300}),
        ("0: zero", {0: "zero"}),
        ("", None),
    ],
)
def test_ordinary_yaml_is_loaded(text, value):
    assert strict_yaml.load(text) == value


def test_aliases_count_for_what_they_stand_for():
    tenfold = "a: &a [{}]\nb: &b [{}]\nc: [{}]\n".format(*([", ".join([name] * 60)] for name in ("1", "*a", "*b")))
    with pytest.raises(strict_yaml.StrictYAMLError) as refused:
        strict_yaml.load(tenfold.replace("['", "").replace("']", ""))
    assert explain_yaml(refused.value) == " line 3: stands for more than 100,000 values, aliases written out"
    assert len(strict_yaml.load("a: &a [" + "1, " * 60 + "1]\nb: [" + "*a, " * 60 + "*a]")["b"]) == 61


def test_the_tree_has_the_lines_of_the_text():
    node = strict_yaml.compose("a: 1\nb:\n  c: 2")
    assert isinstance(node, yaml.MappingNode)
    assert [key.start_mark.line for key, _ in node.value] == [0, 1]
    assert strict_yaml.compose("") is None
