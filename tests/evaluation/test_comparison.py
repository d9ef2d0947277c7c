"""What eval writes of several methods becomes one figure and one page; what cannot stand side by side is refused."""

import json
import re

import pytest

import kvtrain_cli
from kvtrain.evaluation.comparison import compare
from kvtrain.evaluation.comparison_plots import quality_figure
from kvtrain.evaluation.comparison_points import label, pooled, read_points

ON = {"corpus": "heldout", "sequence_length": 64, "tokenizer": "a1"}
MEASURED = {"model": "m", "kv_bytes_end": 5e5, "kv_share_mean": 0.5, "measured_on": ON}


def continuation(method, perplexity, mean, peak=None, **changes):
    row = {"task": "continuation", "method": method, "trained": False, "perplexity": perplexity}
    return {**MEASURED, **row, "kv_bytes_mean": mean, "kv_bytes_peak": peak or mean, **changes}


def passkey(method, accuracy, mean, **changes):
    row = {"task": "passkey", "method": method, "trained": False, "accuracy": accuracy}
    return {**MEASURED, **row, "kv_bytes_mean": mean, "kv_bytes_peak": mean, **changes}


H2O = [continuation(f"H2O(budget={budget}, recent=8)", 30 - budget / 8, 2**14 * budget, 2**20) for budget in (32, 16)]
ROWS = {
    "full": [continuation("Full()", 18.0, 2**20), passkey("Full()", 0.9, 2**20)],
    "h2o": [*H2O, passkey("H2O(budget=32, recent=8)", 0.5, 2**19)],
    "dmc": [continuation("DMC(compression=2)", 19.0, 2**19, trained=True)],
}


@pytest.fixture
def files(tmp_path):
    for name, rows in ROWS.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    return [str(tmp_path / f"{name}.json") for name in ROWS]


def drawn(points, panel):
    """Lines of a panel with several points, or marked, as label, xs and ys."""
    axes = quality_figure(points).axes[panel]
    return [(line.get_marker(), list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()]


def test_lines_are_of_methods_by_their_bytes(files):
    points = [point for file in files for point in read_points(file)]
    lines = drawn(points, 0)
    assert [(xs, ys) for marker, xs, ys in lines if marker == "s" and xs] == [([0.25, 0.5], [28.0, 26.0])]
    assert [(xs, ys) for marker, xs, ys in lines if marker == "o" and xs] == [([0.5], [19.0])]
    assert [(xs, ys) for marker, xs, ys in lines if marker == "*"] == [([1.0], [18.0])]
    assert sorted((xs, ys) for marker, xs, ys in lines if marker == "|") == [([1.0], [26.0]), ([1.0], [28.0])]
    assert [(xs, ys) for marker, xs, ys in drawn(points, 1) if xs] == [([0.5], [0.5]), ([1.0], [0.9])]


def test_what_is_trained_is_filled_and_drawn_through(files):
    figure = quality_figure([point for file in files for point in read_points(file)])
    (legend,) = figure.legends
    texts = [text.get_text().strip() for text in legend.get_texts()]
    assert texts == ["plain model", "DMC", "H2O", "trained", "not trained", "most bytes ever held"]
    _, dmc, h2o, *_ = legend.get_lines()
    assert (dmc.get_linestyle(), h2o.get_linestyle()) == ("-", "--")
    assert dmc.get_markerfacecolor() == dmc.get_color() and h2o.get_markerfacecolor() == "white"


def test_the_page_stands_alone_and_is_the_same_again(files, tmp_path, capsys):
    assert kvtrain_cli.main(["report", "--compare", *files, "--output", str(tmp_path / "out")]) == 0
    names = ("quality.png", "comparison.html")
    assert capsys.readouterr().out.split() == [str(tmp_path / "out" / name) for name in names]
    text = (tmp_path / "out" / "comparison.html").read_text(encoding="utf-8")
    assert re.findall(r'(?:src|href)="(?!data:)', text) == []
    (row,) = re.findall(r"<tr><th>DMC</th>(.*?)</tr>", text)
    expected = ["m", "DMC(compression=2)", "trained", "19", "0.500", "0.477", "0.500", "50.0%"]
    assert re.findall(r"<td>(.*?)</td>", row) == expected
    assert text.count("Measured on: corpus heldout, sequence_length 64, tokenizer a1.") == 2
    again = compare(files, tmp_path / "again")
    assert [path.read_bytes() for path in again] == [(tmp_path / "out" / path.name).read_bytes() for path in again]


def test_kinds_of_retrieval_are_one_panel_and_tables_of_their_own(tmp_path):
    """Of all answers, a quarter of which is of one kind; where kinds differ between methods nothing is drawn."""
    rows = [passkey("Full()", 0.9, 2**20)]
    for kind, answers, found, held in (("single", 10, 0.5, 2**20), ("hops", 30, 0.9, 2**19)):
        row = passkey("Full()", found, held)
        rows.append({**row, "task": "retrieval", "kind": kind, "answers": answers})
    (tmp_path / "a.json").write_text(json.dumps([*rows, continuation("Full()", 18.0, 2**20)]))
    points = read_points(str(tmp_path / "a.json"))
    drawn = pooled(points)
    assert [point.panel.heading for point in drawn] == [
        *("Share of passkeys found", "Share of values found", "Perplexity of continuations")
    ]
    assert (drawn[1].quality, drawn[1].mean, drawn[1].answers) == (pytest.approx(0.8), 0.75 * 2**20, 40)
    titles = [axes.get_title(loc="left") for axes in quality_figure(drawn).axes]
    assert titles == ["Perplexity of continuations", "Share of passkeys found", "Share of values found"]
    *_, page = compare([str(tmp_path / "a.json")], tmp_path / "out")
    text = page.read_text(encoding="utf-8")
    for heading in (*titles, "Share of values found: single", "Share of values found: hops"):
        assert f">{heading}<" in text
    single = {**rows[1], "method": "H2O(budget=64, recent=8)", "trained": False}
    (tmp_path / "b.json").write_text(json.dumps([single]))
    with pytest.raises(ValueError, match=r"were measured on different things \(kinds: hops, single and single\)"):
        compare([str(tmp_path / "a.json"), str(tmp_path / "b.json")], tmp_path / "two")


def test_kinds_of_ruler_are_panels_of_a_length_each(tmp_path):
    row = {key: value for key, value in passkey("Full()", 0.5, 2**20).items() if key != "accuracy"}
    rows = [
        {**row, "task": task, "kind": "vt", "recall": 0.25, "measured_on": {**ON, "sequence_length": length}}
        for task, length in (("ruler:512", 512), ("ruler:1024:vt", 1024))
    ]
    (tmp_path / "a.json").write_text(json.dumps([*rows, {**rows[0], "task": "perplexity"}]))
    points = read_points(str(tmp_path / "a.json"))
    assert [point.panel.heading for point in points] == [
        f"Share of what RULER asks for in {length:,} tokens: vt" for length in (512, 1024)
    ]
    assert [point.quality for point in points] == [0.25, 0.25]


def test_tasks_of_others_are_panels_of_their_own(tmp_path):
    """By the metric that lm-eval names first, and the way in which it improves; a sum over tasks has no bytes."""
    row = {key: value for key, value in passkey("Full()", 0.5, 2**20).items() if key != "accuracy"}
    rows = [
        {**row, "task": "lm-eval:arc_easy", "acc": 0.25, "acc_stderr": 0.1, "metric": "acc", "better": "higher"},
        {**row, "task": "lm-eval:text", "bits_per_byte": 2.0, "metric": "bits_per_byte", "better": "lower"},
        {**row, "task": "lm-eval:both", "acc": 0.3, "metric": "acc", "better": "higher", "kv_bytes_mean": None},
        {**row, "task": "lm-eval:early", "acc": 0.3},
        {**row, "task": "reasoning:chain_sum:64", "score": 0.75, "solved": 0.5},
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    found = [
        (point.panel.heading, point.panel.better, point.quality) for point in read_points(str(tmp_path / "a.json"))
    ]
    assert found == [
        ("lm-eval, arc_easy: acc", "higher", 0.25),
        ("lm-eval, text: bits_per_byte", "lower", 2.0),
        ("reasoning-gym, chain_sum:64: score", "higher", 0.75),
    ]
    *_, page = compare([str(tmp_path / "a.json")], tmp_path / "out")
    assert all(f">{heading}<" in page.read_text(encoding="utf-8") for heading, _, _ in found)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("H2O(budget=256, recent=128)", "H2O"),
        ("SnapKV(budget=64, per_head='adaptive')", "SnapKV, per_head=adaptive"),
        ("Full(kv_bits=4)", "plain, fewer bits"),
        ("H2O(budget=64, recent=8, kv_bits=4)", "H2O, kv_bits=4"),
        ("MiKV(budget=64, recent=8, low_bits=2)", "MiKV, low_bits=2"),
        ("TransNormer()", "TransNormer"),
    ],
)
def test_a_line_is_named_by_its_method_without_sizes(text, expected):
    assert label(text) == expected


@pytest.mark.parametrize("name", ["mine", "H2O(budget=64)", r"_a $\frac$ b"])
def test_a_file_can_name_its_line(files, name, tmp_path):
    points = read_points(f"{name}={files[1]}")
    assert {point.label for point in points} == {name}
    figure = quality_figure(points)
    assert figure.legends[0].get_texts()[0].get_text().strip().replace(r"\$", "$") == name
    figure.savefig(tmp_path / "a.png")  # where a formula would be read


def test_a_file_whose_name_has_an_equals_sign(tmp_path):
    (tmp_path / "lr=1").mkdir()
    file = tmp_path / "lr=1" / "x=y.json"
    file.write_text(json.dumps(ROWS["full"]))
    assert [point.label for point in read_points(str(file))] == ["plain model"] * 2
    assert [point.label for point in read_points(f"b={file}")] == ["b"] * 2


def test_plain_models_keep_the_names_of_their_files(files):
    points = [*read_points(f"small={files[0]}"), *read_points(files[0])]
    texts = [text.get_text().strip() for text in quality_figure(points).legends[0].get_texts()]
    assert texts[:2] == ["plain model", "small"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"task": "perplexity", "perplexity": 3.0}], "a.json: nothing in it says what a cache holds while it answers"),
        ([passkey("Full()", 1.0, None)], "a.json: nothing in it says"),
        ([*H2O, continuation("Full()", 18.0, 2**20, measured_on={**ON, "prompt": 8})], "(prompt: None and 8)"),
        ([*H2O, continuation("Full()", 18.0, 2**20, measured_on={**ON, "corpus": "stdlib"})], "heldout and stdlib"),
        ([{"task": "continuation", "kv_bytes_mean": 3.0}], "not what this version of kvtrain eval --json writes"),
        ({"task": "continuation"}, "not what this version of kvtrain eval --json writes"),
    ],
)
def test_what_cannot_stand_side_by_side_is_one_line(tmp_path, capsys, rows, message):
    file = tmp_path / "a.json"
    file.write_text(json.dumps(rows))
    assert kvtrain_cli.main(["report", "--compare", str(file), "--output", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line and not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [["report"], ["report", "runs/x", "--compare", "a.json"]])
def test_a_run_or_files(arguments, capsys):
    assert kvtrain_cli.main(arguments) == 2
    assert "See kvtrain report --help" in capsys.readouterr().err


def test_a_missing_file_is_one_line(tmp_path, capsys):
    for file in ("a.json", "=a.json", "x=a.json"):
        assert kvtrain_cli.main(["report", "--compare", str(tmp_path / file)]) == 2
        error = capsys.readouterr().err
        assert f"{file}: there is no such file" in error and "kvtrain eval MODEL --tasks ... --json FILE" in error
