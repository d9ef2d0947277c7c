"""The one door: pages of help at once, mistakes in one line, and what each small command passes on."""

import json
import logging
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import kvtrain
import kvtrain_cli
from kvtrain.cli import COMMANDS
from kvtrain.data.passkey import PasskeyTask
from kvtrain.data.retrieval import RetrievalTask
from kvtrain.errors import UsageError, causes, explain_load_errors, nearest, raised_by_kvtrain, unknown
from kvtrain.export.push import Pushed, PushTarget
from kvtrain.help import FOLDER, generated_pages

ROOT = Path(__file__).resolve().parents[1]
HELP_SECONDS = 1.0


def refused(capsys, *argv: str) -> str:
    """The one line that a command line is refused with."""
    assert kvtrain_cli.main(list(argv)) == 2
    captured = capsys.readouterr()
    assert captured.out.strip() == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("kvtrain: error: ")
    return lines[0].removeprefix("kvtrain: error: ")


@pytest.mark.parametrize("arguments", [["--help"], ["fit", "--help"]], ids=" ".join)
def test_help_is_quick_and_imports_nothing_heavy(arguments):
    program = (
        "import sys, kvtrain_cli\n"
        f"code = kvtrain_cli.main({arguments!r})\n"
        "heavy = {'torch', 'transformers', 'lightning', 'kvtrain'} & set(sys.modules)\n"
        "sys.exit(code or sorted(heavy).__repr__() if heavy else 0)\n"
    )
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
        seconds.append(time.perf_counter() - begin)
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout.startswith("usage: kvtrain")
    print(f"kvtrain {' '.join(arguments)}: {statistics.median(seconds):.3f} s")
    assert statistics.median(seconds) < HELP_SECONDS


def test_help_pages_follow_from_the_code():
    for name, text in generated_pages().items():
        assert (FOLDER / f"{name}.txt").read_text() == text, f"run `python -m kvtrain.help` to write {name}.txt again"


def test_every_command_has_a_page():
    assert {path.stem for path in FOLDER.glob("*.txt")} == {"kvtrain", *COMMANDS}


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_both_doors_print_the_stored_page(capsys, name):
    assert kvtrain_cli.main([name, "--help"]) == 0
    page = capsys.readouterr().out
    assert kvtrain_cli.main([name, "-h"]) == 0
    assert page == capsys.readouterr().out == (FOLDER / f"{name}.txt").read_text()


def test_version_is_the_package_s(capsys):
    assert kvtrain_cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"kvtrain {kvtrain.__version__}\n"


def test_nothing_asked_shows_the_commands_and_fails(capsys):
    assert kvtrain_cli.main([]) == 2
    assert "commands:" in capsys.readouterr().out


def test_the_outer_door_hands_over(capsys):
    assert kvtrain_cli.main(["fti"]) == 2
    assert capsys.readouterr().err == "kvtrain: error: unknown command 'fti'. Did you mean 'fit'?\n"


def test_help_pages_cannot_be_asked_for_by_path():
    assert kvtrain_cli.help_page("../help/fit") is None


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("exprot a b", "unknown command 'exprot'. Did you mean 'export'?"),
        ("zzz", "unknown command 'zzz'. See kvtrain --help"),
        ("recipes x", "unexpected word 'x'. See kvtrain recipes --help"),
        ("export a", "OUT is missing. See kvtrain export --help"),
        ("export a b --private", "--private says something about --push-to, which is missing"),
        ("generate m --promt x", "unknown option '--promt'. Did you mean '--prompt'?"),
        ("generate m", "--prompt is missing. See kvtrain generate --help"),
        ("generate m --prompt", "option '--prompt' needs a value"),
        ("generate m --prompt x --seed abc", "--seed: expected an integer, got 'abc'"),
        ("generate m --prompt x --top-p abc", "--top-p: expected a number, got 'abc'"),
        ("eval m", "--tasks is missing. See kvtrain eval --help"),
        ("prepare --corpus x", "--tokenizer, --output is missing. See kvtrain prepare --help"),
        ("estimate", "--config is missing. See kvtrain estimate --help"),
        ("report", "RUN is missing. See kvtrain report --help"),
    ],
)
def test_a_mistake_is_answered_in_one_line(capsys, line, answer):
    assert refused(capsys, *line.split()) == answer


def planted(monkeypatch, module: str, **functions) -> None:
    """Put a module in the place of one that a command imports."""
    monkeypatch.setitem(sys.modules, module, SimpleNamespace(**functions))


def test_export_passes_its_arguments_on(monkeypatch, capsys):
    calls = []
    monkeypatch.setattr("kvtrain.export.hf.export_run", lambda *args, **rest: calls.append((*args, *rest.values())))
    monkeypatch.setattr("kvtrain.export.hf.export_plain", lambda *args: calls.append(args))
    monkeypatch.setattr("kvtrain.export.push.require_token", lambda: calls.append("token"))
    monkeypatch.setattr("kvtrain.export.push.push_folder", lambda *args: calls.append(args) or Pushed("abc", True))
    assert kvtrain_cli.main(["export", "runs/x", "out"]) == 0
    options = ["--push-to", "me/model", "--private", "--dtype", "float32", "--remote-code", "--keep-adapter"]
    assert kvtrain_cli.main(["export", "runs/x", "out", *options]) == 0
    assert kvtrain_cli.main(["export", "kvtrain:tiny", "out", "--method", "DMC(compression=2)"]) == 0
    run, out = Path("runs/x"), Path("out")
    target = PushTarget("me/model", "main", private=True)
    assert calls == [
        (run, out, "bfloat16", False, False, None),
        *("token", (run, out, "float32", True, True, "me/model"), (out, target)),
        ("kvtrain:tiny", kvtrain.DMC(compression=2), out, "bfloat16", False),
    ]
    assert capsys.readouterr().out == "out\nout\nme/model@main: pushed in commit abc\nout\n"
    assert kvtrain_cli.main(["export", "kvtrain:tiny", "out", "--method", "DMC()", "--keep-adapter"]) == 2
    assert "--keep-adapter is of a run with lora" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["torchao", "torch.utils._pytree"])
def test_packages_that_come_along_stay_silent(name, capsys):
    logging.getLogger(name).setLevel(logging.NOTSET)
    assert kvtrain_cli.main(["recipes"]) == 0
    assert not logging.getLogger(name).isEnabledFor(logging.WARNING)
    assert logging.getLogger(name).isEnabledFor(logging.ERROR)


def test_generate_prints_the_text_and_the_facts(monkeypatch, capsys):
    calls = []

    def generate_text(model, prompt, **settings):
        calls.append((model, prompt, settings))
        return SimpleNamespace(text="once upon", facts=lambda: "12 tok/s")

    planted(monkeypatch, "kvtrain.inference.generate", generate_text=generate_text)
    words = ["--temperature", "0.5", "--top-p=0.9", "--seed", "7", "--apply-chat-template"]
    assert kvtrain_cli.main(["generate", "m", "--prompt", "once", *words, "--method", "DMC()"]) == 0
    sampling = {"temperature": 0.5, "top_p": 0.9, "seed": 7, "max_new_tokens": 64, "chat_template": True}
    assert calls == [("m", "once", {"method": kvtrain.DMC(), "device": "auto", **sampling})]
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("once upon\n", "12 tok/s\n")


def test_eval_prints_a_table_and_writes_json(monkeypatch, capsys, tmp_path):
    rows = [
        {"task": "perplexity", "value": 12.3456, "rows": 7, "acc_stderr": 0.1, "by_position": [{"position": 4}]},
        {"task": "passkey", "note": "skipped"},
    ]
    calls = []
    planted(monkeypatch, "kvtrain.evaluation.evaluate", run_tasks=lambda *a, **k: calls.append((a, k)) or rows)
    file = tmp_path / "figures.json"
    words = ["--limit", "3", "--passkeys", "4", "--words", "8", "--method", "DMC()", "--json", str(file)]
    words += ["--keys", "9", "--questions", "2", "--kinds", "multikey,multihop"]
    words += ["--seed", "5", "--num-fewshot", "2", "--apply-chat-template"]
    assert kvtrain_cli.main(["eval", "m", "--tasks", "perplexity, passkey", *words]) == 0
    settings = {
        "corpus": "heldout",
        "sequence_length": 1024,
        "stride": None,
        "limit": 3,
        "decode": False,
        "device": "auto",
    }
    settings |= {"prompt": None, "ask": None, "passkeys": PasskeyTask(4, 8), "method": kvtrain.DMC()}
    settings["retrieval"] = RetrievalTask(9, 2, {"multikey": 1.0, "multihop": 1.0})
    settings |= {"seed": 5, "num_fewshot": 2, "chat_template": True}
    assert calls == [(("m", ["perplexity", "passkey"]), settings)]
    assert json.loads(file.read_text()) == rows
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["task", "value", "rows"] in table and ["task", "note"] in table  # lists are for the file alone
    assert ["perplexity", "12.35", "7"] in table
    assert ["passkey", "skipped"] in table


def test_report_prints_what_it_drew(monkeypatch, capsys):
    calls = []
    planted(monkeypatch, "kvtrain.evaluation.report", report_run=lambda *a: calls.append(a) or [Path("a.png")])
    assert kvtrain_cli.main(["report", "runs/x"]) == 0
    assert kvtrain_cli.main(["report", "runs/x", "--output", "d"]) == 0
    assert calls == [(Path("runs/x"), None, None), (Path("runs/x"), Path("d"), None)]
    assert capsys.readouterr().out == "a.png\na.png\n"


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"body": f"line {number} of the corpus"}) + "\n" for number in range(20)))
    return path


def test_prepare_trains_a_tokenizer_and_writes_shards(capsys, tmp_path, corpus):
    arguments = ["prepare", "--corpus", str(corpus), "--text-column", "body"]
    arguments += ["--tokenizer", str(tmp_path / "bpe"), "--train-tokenizer", "270"]
    assert kvtrain_cli.main([*arguments, "--output", str(tmp_path / "shards")]) == 0
    manifest = json.loads((tmp_path / "shards" / "manifest.json").read_text())
    assert (manifest["num_documents"], manifest["vocab_size"]) == (20, 270)
    assert f"20 documents, {manifest['num_tokens']:,} tokens" in capsys.readouterr().out
    answer = refused(capsys, *arguments, "--output", str(tmp_path / "more"))
    assert answer == f"{tmp_path}/bpe exists already; --train-tokenizer writes a new folder"


def test_prepare_says_what_is_wrong_with_a_corpus(capsys, tmp_path, corpus):
    arguments = ("--tokenizer", "kvtrain:tiny", "--output", str(tmp_path / "shards"))
    assert refused(capsys, "prepare", "--corpus", "/nowhere", *arguments).startswith("/nowhere: no such file")
    assert "no column 'text'" in refused(capsys, "prepare", "--corpus", str(corpus), *arguments)
    assert not (tmp_path / "shards").exists()


def plant_report(monkeypatch, error: BaseException) -> None:
    def fail(*_):
        raise error

    planted(monkeypatch, "kvtrain.evaluation.report", report_run=fail)


def test_a_missing_file_is_named(monkeypatch, capsys):
    plant_report(monkeypatch, FileNotFoundError(2, "No such file or directory", "runs/x"))
    assert refused(capsys, "report", "runs/x") == "runs/x: No such file or directory"


def test_a_defect_keeps_its_traceback(monkeypatch):
    plant_report(monkeypatch, ValueError("from a library"))
    with pytest.raises(ValueError, match="from a library"):
        kvtrain_cli.main(["report", "runs/x"])


def test_debug_shows_every_traceback(monkeypatch):
    monkeypatch.setenv("KVTRAIN_DEBUG", "1")
    with pytest.raises(UsageError):
        kvtrain_cli.main(["fti"])


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (KeyboardInterrupt(), 130, "kvtrain: interrupted\n"),
        (KeyboardInterrupt("stopped at 7"), 130, "kvtrain: stopped at 7\n"),
        (SystemExit(143), 143, ""),
        (SystemExit(), 0, ""),
        (SystemExit("words"), 1, ""),
    ],
)
def test_leaving_has_an_exit_code(monkeypatch, capsys, error, code, words):
    plant_report(monkeypatch, error)
    assert kvtrain_cli.main(["report", "x"]) == code
    assert capsys.readouterr().err == words


def test_nearest_names_only_what_is_near():
    assert nearest("max_stepz", ["max_time", "max_steps"]) == "max_steps"
    assert nearest("zzz", ["max_steps"]) is None
    assert unknown("option", "zzz", ["max_steps"]) == "unknown option 'zzz'"


def test_only_a_raise_of_our_own_is_a_mistake():
    from kvtrain.data.corpus import corpus_files
    from kvtrain.data.shards import ShardWriter

    with pytest.raises(ValueError, match="no such file") as own:
        corpus_files("/nowhere")
    assert raised_by_kvtrain(own.value)
    with pytest.raises(ValueError, match=r"could not convert|invalid literal") as pythons:
        ShardWriter(Path(), 10).add(["x"], 1, "s")
    assert not raised_by_kvtrain(pythons.value)
    wrapped = RuntimeError("outer")
    wrapped.__cause__ = own.value
    assert list(causes(wrapped)) == [wrapped, own.value]


def open_badly(logger: logging.Logger) -> None:
    with explain_load_errors("m"):
        logger.warning("a long report")
        raise RuntimeError("header too small")


def test_a_library_s_report_is_told_only_of_a_model_that_opens():
    logger, told = logging.getLogger("transformers"), []
    handler = logging.Handler()
    handler.emit = told.append
    logger.addHandler(handler)
    try:
        with pytest.raises(UsageError, match=r"no model that can be opened at 'm' \(header too small\); give a folder"):
            open_badly(logger)
        assert told == []
        with explain_load_errors("m"):
            logger.warning("some weights are new")
        assert [record.getMessage() for record in told] == ["some weights are new"]
    finally:
        logger.removeHandler(handler)


def test_what_kvtrain_itself_says_of_a_model_stays_as_it_is():
    from kvtrain.models.registry import method_from_dict

    with pytest.raises(ValueError, match="unknown method 'zip'"), explain_load_errors("m"):
        method_from_dict({"name": "zip"})
