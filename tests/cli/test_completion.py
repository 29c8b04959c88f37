"""The completion scripts, as a shell would run them."""

import shutil
import subprocess

import pytest

from halfplate.cli import VERBS, build_parser
from halfplate.cli.completion import SHELLS, script


def completed(*words):
    """What bash offers for the last of `words`."""
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("bash is not installed")
    line = " ".join(f"'{word}'" for word in ("halfplate", *words))
    code = f"{script('bash', build_parser())}\nCOMP_WORDS=({line}); COMP_CWORD={len(words)}; _halfplate\n"
    run = subprocess.run(
        [bash, "--norc", "-c", code + 'printf "%s\\n" "${COMPREPLY[@]}"'], capture_output=True, text=True, check=True
    )
    assert not run.stderr
    return set(run.stdout.split())


def test_verbs_and_their_beginnings():
    assert completed("") == {*VERBS, "--help", "--version"}
    assert completed("comp") == {"compress", "completion"}


def test_options_are_those_of_the_verb():
    assert {"--against", "--activations", "--help"} <= completed("eval", "model", "--")
    assert completed("eval", "model", "--ag") == {"--against"}
    assert completed("inspect", "out", "--ag") == set()


def test_values_where_they_are_few_and_files_elsewhere():
    assert completed("eval", "model", "--activations", "") == {"auto", "float", "int8"}
    assert completed("bench", "model", "--head-dtype", "b") == {"bf16"}
    assert completed("completion", "") == set(SHELLS)
    assert completed("recipe", "v") == {"validate"}
    # Nothing of ours, so that the shell offers files.
    assert completed("compress", "") == set()
    assert completed("compress", "model", "-o", "--") == set()


@pytest.mark.parametrize("shell", SHELLS)
def test_every_option_of_every_verb_is_in_the_script(halfplate, shell):
    from argparse import SUPPRESS

    text = halfplate("completion", shell).out
    (verbs,) = (action.choices for action in build_parser()._actions if action.dest == "verb")
    for verb in verbs.values():
        for action in verb._actions:
            for option in action.option_strings:
                wanted = f"-l {option[2:]} " if shell == "fish" and option.startswith("--") else option
                assert action.help == SUPPRESS or wanted in text or wanted.strip() + "\n" in text


@pytest.mark.parametrize("shell", SHELLS)
def test_the_shell_itself_reads_the_script(shell):
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"{shell} is not installed")
    subprocess.run([program, "-n"], input=script(shell, build_parser()), text=True, check=True)


def test_an_unknown_shell_is_one_line(halfplate):
    halfplate("completion", "tcsh").refused("invalid choice: 'tcsh'", "bash")
