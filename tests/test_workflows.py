"""The habits of the repository agree with it: workflows, templates, pre-commit and citation."""

import re
import shlex

import pytest
import yaml

from tests.support import TOP, pages_of_docs

GITHUB = TOP / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
SETUP = (TOP / "setup.py").read_text("utf-8")
# Commands of the runner's shell, and those that a step just before installs.
OF_THE_RUNNER = {"apt-get", "grep", "python"}
OF_AN_EXTRA = {"mkdocs": "docs", "ruff": "test", "lint-imports": "test", "basedpyright": "test"}


def jobs():
    for path in WORKFLOWS:
        for name, job in yaml.safe_load(path.read_text())["jobs"].items():
            yield pytest.param(job, id=f"{path.stem}-{name}")


def check_command(words, installed):
    """Fails on a command that does not exist; adds the extras that it installs to `installed`."""
    command, *arguments = words
    if command in ("bash", "source"):
        script = TOP / arguments[0]
        assert script.is_file(), f"{arguments[0]} does not exist"
        if command == "bash":  # its own extras, and its flags are pytest's
            installed.update(re.findall(r'^install_project "\[(\w+)\]"', script.read_text(), re.M))
            assert all(word.startswith("--durations") or word in ("-m", "slow", "browser")
                       for word in arguments[1:])  # fmt: skip
    elif command == "install_project":
        extras = arguments[0].strip("[]").split(",")
        assert all(f'"{extra}": [' in SETUP for extra in extras)
        installed.update(extras)
    elif command.startswith(".venv/bin/"):
        assert OF_AN_EXTRA[command.removeprefix(".venv/bin/")] in installed
    else:
        assert command in OF_THE_RUNNER, f"{command}: no command that a test knows"


@pytest.mark.parametrize("job", list(jobs()))
def test_workflows_call_what_exists(job):
    installed = set()
    for step in job["steps"]:
        assert ("uses" in step) != ("run" in step)
        if "uses" in step:
            assert re.fullmatch(r"[\w-]+/[\w-]+@[\w./-]+", step["uses"])
            continue
        for line in step["run"].splitlines():
            check_command(shlex.split(line), installed)


def test_the_check_itself_finds_what_is_missing():
    for words in (["bash", "launch/none.sh"], ["install_project", "[none]"], ["rufff", "check"]):
        with pytest.raises(AssertionError):
            check_command(words, set())


def test_tests_run_on_every_python_that_is_declared():
    checks = yaml.safe_load((GITHUB / "workflows" / "checks.yml").read_text())
    pythons = checks["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert f'python_requires=">={pythons[0]}"' in SETUP and len(pythons) == 3


def test_the_release_publishes_without_a_token():
    release = yaml.safe_load((GITHUB / "workflows" / "release.yml").read_text())
    publish = release["jobs"]["publish"]
    assert publish["permissions"] == {"id-token": "write"}
    assert "secrets." not in str(release)
    check = next(step for step in release["jobs"]["build"]["steps"] if "name" in step)["run"]
    version = re.search(r'version="(.+)"', SETUP).group(1)
    pattern = shlex.split(check)[2].replace("${GITHUB_REF_NAME#v}", version)
    assert pattern in SETUP


def test_pre_commit_has_the_ruff_of_the_constraints():
    config = yaml.safe_load((TOP / ".pre-commit-config.yaml").read_text())
    (ruff,) = config["repos"]
    assert f"ruff=={ruff['rev'].removeprefix('v')}\n" in (TOP / "constraints.txt").read_text()


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((TOP / "CITATION.cff").read_text())
    assert f'version="{citation["version"]}"' in SETUP
    assert citation["license"] in SETUP
    (paper,) = citation["references"]
    assert "2308.04380" in str(paper["identifiers"]) and len(paper["authors"]) == 5


def test_issue_templates_ask_for_something():
    for path in (GITHUB / "ISSUE_TEMPLATE").glob("*.yml"):
        template = yaml.safe_load(path.read_text())
        if path.stem != "config":
            assert template["name"] and template["description"]
            assert len({part["id"] for part in template["body"]}) == len(template["body"])


def test_contributing_is_one_screen_and_its_scripts_are_there():
    page = TOP / "CONTRIBUTING.md"
    text = page.read_text("utf-8")
    assert len(text.splitlines()) <= 50
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert (TOP / target).exists(), target
    for block in pages_of_docs.blocks(page):
        for words in block.commands:
            check_command([words[0].removeprefix(".venv/bin/"), *words[1:2]], {"test"})
