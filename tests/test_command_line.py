"""What the commands share: exit codes, one line an error, plain messages in the log, fast help."""

import errno
import io
import logging
import subprocess
import sys

import pytest

from fne_jax import command_line
from fne_jax.errors import EnvironmentFailure, Interrupted, UserError
from fne_jax.logs import set_up_logging
from tests.support import TOP

COMMANDS = ("train", "evaluate", "prepare", "audit", "study", "plan", "benchmark", "convert")


def raising(error, cause=None):
    def main(arguments):
        del arguments
        raise error from cause

    return main


def end_of(main, monkeypatch, capsys):
    """Returns the exit code and stderr of a command whose main function this is."""
    monkeypatch.setattr(command_line, "set_up_logging", lambda level: None)
    monkeypatch.setattr(sys, "argv", ["command"])
    with pytest.raises(SystemExit) as stop:
        command_line.run(main)
    return stop.value.code, capsys.readouterr().err


NO_SPACE = OSError(errno.ENOSPC, "No space left on device", "/runs/x")


@pytest.mark.parametrize(
    ("error", "cause", "code", "said"),
    [
        (UserError("no such field"), None, 2, "error: no such field\n"),
        (UserError("cannot be read"), PermissionError(errno.EACCES, "denied"), 2, "read\n"),
        (UserError("no such file"), FileNotFoundError(errno.ENOENT, "none"), 2, "file\n"),
        (UserError("cut off"), OSError("image file is truncated"), 2, "cut off\n"),
        (UserError("cannot be written"), NO_SPACE, 74, "error: cannot be written\n"),
        (EnvironmentFailure("no answer"), RuntimeError("timeout"), 74, "error: no answer\n"),
        (NO_SPACE, None, 74, "error: OSError: [Errno 28] No space left on device: '/runs/x'\n"),
        (
            PermissionError(errno.EACCES, "denied", "/x"),
            None,
            2,
            "error: [Errno 13] denied: '/x'\n",
        ),
        (MemoryError(), None, 74, "error: MemoryError\n"),
        (Interrupted(15, "saved"), None, 143, "saved\n"),
        (KeyboardInterrupt(), None, 130, "stopped; there was nothing to save\n"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_each_end_has_its_exit_code_and_one_line(error, cause, code, said, monkeypatch, capsys):
    ended = end_of(raising(error, cause), monkeypatch, capsys)
    assert ended[0] == code
    assert ended[1].endswith(said) and ended[1].count("\n") == 1


@pytest.mark.parametrize("error", [FileNotFoundError(errno.ENOENT, "none"), OSError("odd")])
def test_a_bug_keeps_its_traceback(error, monkeypatch):
    monkeypatch.setattr(command_line, "set_up_logging", lambda level: None)
    with pytest.raises(type(error)):
        command_line.run(raising(error))


def in_a_shell(main, redirected):
    """Returns how a process ends that runs a main function's source in a pipeline of bash."""
    pipeline = f'"$0" -c "$1" {redirected}; exit ${{PIPESTATUS[0]}}'
    script = f"from fne_jax import command_line\ndef main(arguments):\n    {main}\n"
    script += "command_line.run(main)"
    return subprocess.run(
        ["bash", "-c", pipeline, sys.executable, script],
        cwd=TOP,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("flush", [False, True])
def test_a_reader_that_has_had_enough_ends_a_command_without_a_word(flush):
    main = f"[print('x' * 1000, flush={flush}) for _ in range(1000)]"
    done = in_a_shell(main, "| head -c 5")
    assert (done.returncode, done.stdout, done.stderr) == (141, "xxxxx", "")


def test_another_broken_pipe_is_an_error():
    done = in_a_shell("raise BrokenPipeError(32, 'of a worker')", "")
    assert done.returncode == 74 and "of a worker" in done.stderr


def test_what_is_printed_to_a_closed_stream_is_dropped():
    main = "print(1), sys.stdout.write(sys.stdout.encoding), sys.stderr.write('x')"
    done = in_a_shell(f"import sys; {main}", ">&- 2>&-")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.fixture
def levels_put_back():
    loggers = logging.root, logging.getLogger("fne_jax"), logging.getLogger("absl")
    before = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, before, strict=True):
        logger.setLevel(level)


@pytest.mark.usefixtures("levels_put_back")
def test_messages_are_plain_although_a_library_configured_logging_first(monkeypatch):
    # As in a fresh process; pytest has handlers of its own here.
    monkeypatch.setattr(logging.root, "handlers", [])
    logging.basicConfig()
    for _ in range(2):
        set_up_logging(logging.INFO)
    # As a progress bar does, which takes what is written to stderr and puts it above itself.
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    logging.getLogger("fne_jax.training.loop").info("step 3")
    logging.getLogger("absl").warning("Missing metrics")
    logging.getLogger("other").info("unasked")
    logging.getLogger("other").warning("a library's warning")
    assert sys.stderr.getvalue() == "step 3\na library's warning\n"


def test_every_command_helps_without_tensorflow_and_without_a_word_of_its_libraries():
    # One process for all: what they import shows in the end. Without PyTorch, as installed.
    script = (
        "import contextlib, importlib, io, sys\n"
        "sys.modules['torch'] = None\n"
        "for name in sys.argv[1:]:\n"
        "    main, text = importlib.import_module('fne_jax.' + name).main, io.StringIO()\n"
        "    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):\n"
        "        main(['--help'])\n"
        "    print(text.getvalue().splitlines()[0])\n"
        "print(*({'tensorflow', 'tensorflow_datasets', 'clu', 'matplotlib'}\n"
        "        & sys.modules.keys()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *COMMANDS], cwd=TOP, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    *usages, heavy = done.stdout.splitlines()
    assert [usage.split()[3] for usage in usages] == [f"fne_jax.{name}" for name in COMMANDS]
    assert heavy == ""
