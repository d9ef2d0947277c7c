"""A run folder becomes pictures and one page; a damaged one becomes one line."""

import base64
import json
import re

import pytest

from kvtrain.cli import main
from kvtrain.evaluation.plots import Bucket
from kvtrain.evaluation.report import (
    facts,
    figures,
    learns_from_a_teacher,
    load_positions,
    load_tables,
    report_run,
)
from kvtrain.metrics import METRICS
from kvtrain.models.gating import HEAD_COMPRESSION

LOGGED = """step,loss,learning_rate,tokens_per_second,compression,compression_target,val_loss,val_perplexity
0,4.0,0.001,900,1.0,1.0,,
1,3.0,0.001,1000,1.5,2.0,2.5,12.182
2,2.0,0.0005,1100,1.9,2.0,,
"""
HEADS = """step,layer,head,merged_fraction
1,0,0,0.5
1,0,1,0.25
"""
EVALUATION = [
    {"task": "other", "model": "m"},
    {"task": "perplexity", "model": "m", "by_position": [{"position": 64, "loss": 2.0, "targets": 9, "kept": 32.5}]},
]
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "dmc-tiny"
    folder.mkdir()
    (folder / "metrics.csv").write_text(LOGGED)
    return folder


def test_a_report_is_a_few_pictures_and_a_page(run):
    written = report_run(run)
    assert [str(path.relative_to(run)) for path in written] == [
        "report/loss.png",
        "report/compression.png",
        "report/learning_rate.png",
        "report/speed.png",
        "report/report.html",
    ]
    assert all(path.read_bytes().startswith(PNG) for path in written[:4])


def test_a_control_stands_beside_the_held_out_loss(run, tmp_path):
    control = tmp_path / "control"
    control.mkdir()
    (control / "metrics.csv").write_text(LOGGED.replace("2.5,12.182", "2.25,9.488"))
    drawn = figures(load_tables(run), control=load_tables(control)[METRICS])
    (axes,) = drawn["loss"].axes
    lines = {line.get_label(): line.get_ydata().tolist() for line in axes.get_lines()}
    assert lines["held-out, control"] == [2.25] and [2.5] in lines.values()
    found = facts(load_tables(run)[METRICS], load_tables(control)[METRICS])
    assert found["Held-out perplexity of the control"] == "9.49"
    assert main(["report", str(run), "--control", str(control), "--output", str(tmp_path / "out")]) == 0
    assert "9.49" in (tmp_path / "out" / "report.html").read_text()


def test_pictures_go_to_the_run_s_loggers(run, capsys):
    assert main(["report", str(run), "--log"]) == 2
    assert "has logged to neither wandb nor TensorBoard" in capsys.readouterr().err
    assert not (run / "report").exists()
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (run / "tensorboard").mkdir()
    assert main(["report", str(run), "--log"]) == 0
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert events.Tags()["images"] == ["report/loss", "report/compression", "report/learning_rate", "report/speed"]
    (image,) = events.Images("report/loss")
    assert image.step == 2 and image.encoded_image_string.startswith(PNG) and image.width > 500


def test_a_comparison_has_no_control(capsys):
    assert main(["report", "--compare", "a.json", "--control", "runs/x"]) == 2
    assert "--control and --log are of a run" in capsys.readouterr().err


def test_heads_and_positions_are_drawn_where_there_are_files_of_them(run):
    (run / "head_compression.csv").write_text(HEADS)
    (run / "eval.json").write_text(json.dumps(EVALUATION))
    assert [path.stem for path in report_run(run)] == [
        "loss",
        "compression",
        "layer_compression",
        "head_compression",
        "perplexity_by_position",
        "slots_by_position",
        "learning_rate",
        "speed",
        "report",
    ]
    text = (run / "report" / "report.html").read_text(encoding="utf-8")
    assert len(re.findall(r'<img alt="[a-z ]+" src="data:image/png;base64,', text)) == 8


def test_what_the_files_beside_the_metrics_say(run):
    assert (load_tables(run)[HEAD_COMPRESSION], load_positions(run)) == ([], [])
    (run / "head_compression.csv").write_text(HEADS)
    (run / "eval.json").write_text(json.dumps(EVALUATION))
    assert load_tables(run)[HEAD_COMPRESSION][1] == {"step": 1, "layer": 0, "head": 1, "merged_fraction": 0.25}
    assert load_positions(run) == [Bucket(64, 2.0, 32.5)]
    (run / "eval.json").write_text(json.dumps(EVALUATION[:1]))
    assert load_positions(run) == []


def test_every_table_that_lies_in_a_run_is_drawn(run):
    """A run without its recipe, too: tables say by themselves what they are."""
    (run / "head_gates.csv").write_text("step,layer,head,gate,full\n1,0,0,0.5,1\n")
    (run / "kv_map.csv").write_text("layer,key_layer,value_layer,sliding\n0,0,0,0\n1,0,0,0\n")
    assert [path.stem for path in report_run(run)] == [
        "loss",
        "compression",
        "head_gates",
        "kv_map",
        "learning_rate",
        "speed",
        "report",
    ]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("head_compression.csv", b"step,layer,head\n1,0,0\n"),
        ("head_compression.csv", b"step,layer,head,merged_fraction\n1,0,0,half\n"),
        ("head_compression.csv", b"step,layer,head,merged_fraction\n1,0,0,\n"),
        ("head_compression.csv", b"step,layer\n0,\xff\xfe\n"),
        ("head_gates.csv", b"step,layer\n1,0\n"),
        ("kv_map.csv", b"layer,key_layer,value_layer\n0,0,0\n"),
        ("kv_map.csv", b"layer,key_layer,value_layer,sliding\n1,0,0,0\n"),
        ("eval.json", b"{"),
        ("eval.json", b"\xff"),
        ("eval.json", b"[1]"),
        ("eval.json", b'[{"by_position": [{"position": 64}]}]'),
        ("eval.json", b'[{"by_position": [{"position": "far", "loss": 1.0, "kept": null}]}]'),
    ],
)
def test_damaged_files_beside_the_metrics_are_one_line(run, name, content):
    (run / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged|not what kvtrain eval") as caught:
        report_run(run)
    assert len(str(caught.value).splitlines()) == 1
    assert str(run / name) in str(caught.value)
    assert not (run / "report").exists()


def test_the_page_stands_alone_and_holds_the_same_pictures(run):
    *pictures, page = report_run(run)
    text = page.read_text(encoding="utf-8")
    embedded = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    assert [base64.b64decode(data) for data in embedded] == [path.read_bytes() for path in pictures]
    assert re.findall(r'(?:src|href)="(?!data:)', text) == []
    assert "<title>dmc-tiny</title>" in text
    assert "<tr><th>Optimizer steps</th><td>3</td></tr>" in text


DISTILLED = "model: {class_path: kvtrain.training.DMCModule, init_args: {distill: %s}}"


@pytest.mark.parametrize(
    ("recipe", "panels"),
    [
        (DISTILLED % "true", 2),
        (DISTILLED % "{weight: 0.5}", 2),
        (DISTILLED % "false", 1),
        (DISTILLED % "null", 1),
        ("model: {class_path: a.B}", 1),
        ("model: {class_path: a.B, init_args: null}", 1),
        ("model: null", 1),
        ("not: [yaml", 1),
        (None, 1),
    ],
)
def test_losses_share_an_axis_where_they_measure_the_same(run, recipe, panels):
    if recipe is not None:
        (run / "config.yaml").write_text(recipe)
    drawn = figures(load_tables(run), distilled=learns_from_a_teacher(run))
    assert len(drawn["loss"].axes) == panels


def test_the_report_of_a_run_that_learns_from_a_teacher_has_both_panels(run):
    """Its picture is as many pixels taller."""
    heights = []
    for distill in ("false", "true"):
        (run / "config.yaml").write_text(DISTILLED % distill)
        heights.append(int.from_bytes(report_run(run)[0].read_bytes()[20:24]))
    assert heights == [630, 882]


def test_the_report_goes_where_it_is_told(run, tmp_path):
    written = report_run(run, tmp_path / "a" / "b")
    assert {path.parent for path in written} == {tmp_path / "a" / "b"}
    assert not (run / "report").exists()


def test_a_second_report_replaces_the_first(run):
    first = [path.read_bytes() for path in report_run(run)]
    assert [path.read_bytes() for path in report_run(run)] == first


def test_facts_of_a_run(run):
    assert facts(load_tables(run)[METRICS]) == {
        "Optimizer steps": "3",
        "Tokens per second, median": "1,000",
        "Training loss at the end, smoothed": "2.0000",
        "Held-out loss at the end": "2.5000",
        "Held-out perplexity at the end": "12.18",
        "Compression reached": "1.90",
        "Compression aimed at": "2.00",
    }


def test_facts_of_methods_stand_below_those_of_all_runs():
    names = ("compression", "val_compression", "mean_gate", "val_serving_gap", "val_loss")
    assert list(facts([{"step": 0, **dict.fromkeys(names, 0.25)}]).items())[1:] == [
        ("Held-out loss at the end", "0.2500"),
        ("Compression reached", "0.25"),
        ("Held-out compression at the end", "0.25"),
        ("Mean gate at the end", "0.250"),
        ("Held-out loss, serving minus training form", "+0.25000"),
    ]


def test_facts_leave_out_what_was_not_logged():
    assert facts([{"step": 1999, "loss": 2.0, "tokens": 16384000}]) == {
        "Optimizer steps": "2,000",
        "Tokens": "16,384,000",
        "Training loss at the end, smoothed": "2.0000",
    }


def test_figures_are_those_that_the_metrics_allow():
    assert list(figures({METRICS: [{"step": 0, "loss": 2.0}]})) == ["loss"]


def test_a_diverged_run_can_be_drawn(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,loss,learning_rate\n0,4.0,0.1\n1,nan,0.1\n2,inf,0.1\n")
    assert len(report_run(tmp_path)) == 3


def test_a_run_name_cannot_write_html(tmp_path):
    folder = tmp_path / "<script>alert(1)&"
    folder.mkdir()
    (folder / "metrics.csv").write_text(LOGGED)
    text = report_run(folder)[-1].read_text(encoding="utf-8")
    assert "<script" not in text
    assert "<h1>&lt;script&gt;alert(1)&amp;</h1>" in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no metrics.csv"),
        (b"", "no losses yet"),
        (b"step,loss\n", "no losses yet"),
        (b"step,learning_rate\n0,0.1\n", "no losses yet"),
        (b"step,loss\n0,four\n", "damaged"),
        (b"step,loss\n0,1.0,7,8\n", "damaged"),
        (b"step,loss\n,1.0\n", "a row without step"),
        (b"loss\n1.0\n", "a row without step"),
        (b"step,loss\n0,\xff\xfe\n", "damaged"),
        (b"step,loss\n0,\x00\n", "damaged"),
    ],
)
def test_damaged_metrics_are_one_line(tmp_path, content, message):
    if content is not None:
        (tmp_path / "metrics.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        report_run(tmp_path)
    assert len(str(caught.value).splitlines()) == 1
    assert str(tmp_path) in str(caught.value)
    assert not (tmp_path / "report").exists()
