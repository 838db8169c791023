"""The command line: light help, exit codes, one sentence for an error, and --json."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from jobs import cli
from jobs.__main__ import main, usage
from jobs.cli import VERBS, arguments_of, main_of, parser_of
from sceneray import __version__
from sceneray.errors import ConfigError, DataError, Interrupted
from tests.support import ROOT

HEAVY = ("torch", "ray", "pandas", "torchvision", "sklearn", "matplotlib")


def command(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    """`python -m jobs ...` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "jobs", *arguments],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        **options,
    )


def environment() -> dict[str, str]:
    """What a child needs to find the code where it is not installed."""
    return {**os.environ, "PYTHONPATH": str(ROOT / "platform")}


def loaded_by(code: str) -> set[str]:
    """The heavy packages that a fresh interpreter has imported after `code`."""
    script = f"{code}\nimport sys\nprint('loaded:', *(m for m in {HEAVY!r} if m in sys.modules), file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment(), capture_output=True, text=True, check=True
    )
    return set(done.stderr.rpartition("loaded:")[2].split())


@pytest.fixture
def verb(monkeypatch):
    """Install a verb whose `run` does what the test says."""

    def install(run):
        module = SimpleNamespace(HELP="a verb of a test", EXAMPLE="sceneray try", add_arguments=lambda _: None, run=run)
        monkeypatch.setenv(cli.DEBUG_VARIABLE, "")  # --debug sets it; what was there before comes back
        monkeypatch.setitem(VERBS, "try", "jobs.of_this_test")
        monkeypatch.setitem(sys.modules, "jobs.of_this_test", module)

    handler = signal.getsignal(signal.SIGTERM)
    yield install
    signal.signal(signal.SIGTERM, handler)


def fail_with(error: BaseException):
    """A `run` that raises."""

    def run(_: argparse.Namespace):
        raise error

    return run


def test_help_lists_the_verbs_in_order_with_an_example():
    """`sceneray --help` shows every verb once, in the order of a user's day, with its line and an example of it."""
    done = command("--help")
    assert done.returncode == 0
    assert done.stdout.rstrip("\n") == usage()
    lines = done.stdout.splitlines()
    at = [next(i for i, line in enumerate(lines) if line.startswith(f"  {verb} ")) for verb in VERBS]
    assert at == sorted(at)
    assert list(VERBS) == [
        *("demo", "prepare", "train", "runs", "checkpoints", "tune"),
        *("evaluate", "export", "promote", "rollback", "models", "predict", "serve", "keys", "submit", "watch"),
    ]
    for index, name in zip(at, VERBS, strict=True):
        assert len(lines[index].split(maxsplit=1)[1]) > 20
        assert f"sceneray {name}" in lines[index + 1]


def test_help_is_light():
    """The list of verbs, and each verb's own help, import neither torch nor ray nor pandas."""
    assert loaded_by("from jobs.__main__ import main; main(['--help'])") == set()
    for verb in VERBS:
        assert loaded_by(f"from jobs.cli import parser_of; parser_of({verb!r}).format_help()") == set(), verb


def test_no_verb_is_a_question():
    """Without a verb the list is printed and the exit code says that nothing was done."""
    done = command()
    assert done.returncode == 2
    assert "usage: sceneray VERB" in done.stdout


def test_an_unknown_verb_names_the_nearest(capsys):
    """A mistyped verb exits with 2 and suggests the right one."""
    assert main(["trian", "x.yaml"]) == 2
    assert "unknown verb 'trian': did you mean 'train'?" in capsys.readouterr().err


def test_version(capsys):
    """`--version` prints the package's version."""
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"sceneray {__version__}\n"


@pytest.mark.parametrize("name", list(VERBS))
def test_every_verb_takes_json_and_debug(name):
    """Each verb's parser has the shared options, a description and its example."""
    parser = parser_of(name)
    options = {option for action in parser._actions for option in action.option_strings}
    assert {"--json", "--debug", "--help"} <= options
    assert "example:" in parser.format_help()


@pytest.mark.parametrize("name", list(VERBS))
def test_every_example_parses(name):
    """The example in a verb's help is a command line that the verb itself accepts."""
    words = usage().splitlines()
    line = next(line for line in words if line.strip().startswith(f"sceneray {name}"))
    arguments = line.split()[2:]
    arguments_of(name, arguments)


@pytest.mark.parametrize("words", ["x.yaml --dry-run seed=3", "--dry-run x.yaml seed=3", "x.yaml seed=3 --dry-run"])
def test_options_may_stand_anywhere(words):
    """An option between a settings file and its key=value is understood as one at the end is."""
    arguments = arguments_of("train", words.split())
    assert (arguments.config, arguments.overrides, arguments.dry_run) == ("x.yaml", ["seed=3"], True)


def test_what_is_submitted_keeps_its_order():
    """Options after the submitted verb are that verb's, in the order given."""
    arguments = arguments_of("submit", ["train", "x.yaml", "--dry-run", "seed=3"])
    assert (arguments.verb, arguments.arguments) == ("train", ["x.yaml", "--dry-run", "seed=3"])


def test_a_wrong_argument_exits_with_2(capsys):
    """An unknown option is refused by the verb's parser."""
    with pytest.raises(SystemExit) as caught:
        main(["export", "--no-such-option"])
    assert caught.value.code == 2
    assert "usage: sceneray export" in capsys.readouterr().err


def test_success_is_0_and_json_holds_the_result(verb, tmp_path):
    """A verb that did its work returns 0 and writes its result, parents of the file included."""
    verb(lambda _: {"miou": 0.5, "classes": ["sky"]})
    file = tmp_path / "deep" / "result.json"
    assert main(["try", "--json", str(file)]) == 0
    assert json.loads(file.read_text()) == {"miou": 0.5, "classes": ["sky"]}


def test_a_result_that_cannot_be_written_is_a_failure(verb, tmp_path, capsys):
    """Where --json names a folder, the exit code is not 0 and the message says which path."""
    verb(lambda _: {})
    assert main(["try", "--json", str(tmp_path)]) == 1
    assert f"cannot write the result to {tmp_path}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"),
    [(DataError("rule, came, fix"), 1), (ConfigError("rule, came, fix"), 2), (Interrupted("rule, came, fix"), 75)],
)
def test_an_error_is_one_sentence(verb, capsys, error, code):
    """An error of ours is its message alone on stderr, with the class's exit code and no result file."""
    verb(fail_with(error))
    assert main_of("try", []) == code
    captured = capsys.readouterr()
    assert captured.err == "sceneray: rule, came, fix\n"
    assert captured.out == ""


def test_debug_shows_the_traceback(verb, capsys):
    """With --debug the traceback stands before the sentence."""
    verb(fail_with(DataError("rule, came, fix")))
    assert main_of("try", ["--debug"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("Traceback")
    assert err.endswith("sceneray: rule, came, fix\n")


def test_an_error_from_a_ray_task_is_one_sentence_too(verb, capsys):
    """What a Ray task raised is told by its own message, without the remote traceback that Ray puts around it."""
    from ray.exceptions import RayTaskError

    remote = RayTaskError("prepare_shard", "Traceback (remote) ...", DataError("rule, came, fix"))
    verb(fail_with(remote.as_instanceof_cause()))
    assert main_of("try", []) == 1
    assert capsys.readouterr().err == "sceneray: rule, came, fix\n"


def test_an_unexpected_error_names_its_kind(verb, capsys):
    """An error that nobody foresaw is told with its class and the way to its traceback."""
    verb(fail_with(ZeroDivisionError("division by zero")))
    assert main_of("try", []) == 1
    err = capsys.readouterr().err
    assert err == (
        "sceneray: unexpected ZeroDivisionError: division by zero (run again with --debug for the traceback)\n"
    )


def test_ctrl_c_is_130(verb, capsys):
    """An interrupt ends in one word and the shell's code for it."""
    verb(fail_with(KeyboardInterrupt()))
    assert main_of("try", []) == 130
    assert capsys.readouterr().err == "sceneray: interrupted\n"


def test_sigterm_stops_like_ctrl_c(verb):
    """A polite kill runs the verb's own clean-up, as Ctrl-C does."""
    cleaned = []

    def run(_: argparse.Namespace):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            raise AssertionError("the signal was lost")
        finally:
            cleaned.append(True)

    verb(run)
    assert main_of("try", []) == cli.EXIT_INTERRUPTED
    assert cleaned == [True]


def test_the_console_script_is_this_command_line():
    """`sceneray` in pyproject.toml is the main function that these tests call."""
    import tomllib

    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"sceneray": "jobs.__main__:main"}
