"""What the project's files say of one another: version, commands, continuous integration, pins."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import deqlib
import viar

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([a-z][\w-]*):", MAKEFILE, re.M))


def text_of(name: str) -> str:
    return (ROOT / name).read_text()


def made_by(text: str) -> set[str]:
    """Targets of all lines that run make and nothing else, comments, options and variables aside."""
    lines = re.findall(r"^(?:\w+=\S+ )?make(?: --jobs \d| --[\w-]+)* ([\w. -]+?) *(?:#.*)?$", text, re.M)
    return {target for line in lines for target in line.split()}


def test_the_version_stands_in_one_place() -> None:
    assert "version" not in PROJECT["project"]
    assert "version" in PROJECT["project"]["dynamic"]
    place = ROOT / PROJECT["tool"]["hatch"]["version"]["path"]
    assert place == Path(deqlib.__file__)
    assert f'__version__ = "{deqlib.__version__}"\n' in place.read_text()


def test_the_changelog_has_the_version_below_what_is_not_released() -> None:
    headings = re.findall(r"^## (.*)$", text_of("CHANGELOG.md"), re.M)
    assert headings[0] == "[Unreleased]"
    assert re.fullmatch(rf"\[{re.escape(deqlib.__version__)}\] - \d{{4}}-\d\d-\d\d", headings[1])


def test_continuous_integration_runs_the_readmes_test_commands() -> None:
    told = {target for target in made_by(text_of("README.md")) if target.startswith("test")}
    run = made_by(text_of(".ci/run"))
    assert told == {"test", "test-all"}
    assert run == {"lint", "types", "docs", "test-all"}
    quick, slow, faults, every = (
        re.search(rf"^{target}: \$\(VENV\)/.dev\n\t\$\(VENV\)/\$\(PYTEST\)(.*)$", MAKEFILE, re.M)[1]
        for target in ("test", "test-slow", "test-faults", "test-all")
    )
    assert quick == ' -m "not slow and not faults"'
    assert slow == ' -m "slow and not faults"'
    assert (faults, every) == (" -m faults", "")


def test_commits_are_checked_by_what_continuous_integration_runs() -> None:
    repositories = yaml.safe_load(text_of(".pre-commit-config.yaml"))["repos"]
    assert [repository["repo"] for repository in repositories] == ["local"]  # nothing is fetched
    entries = [hook["entry"] for hook in repositories[0]["hooks"]]
    assert {entry.removeprefix("make ") for entry in entries} == {"lint", "types"}


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", ".ci/run"])
def test_every_make_command_that_is_told_exists(page: str) -> None:
    told = made_by(text_of(page)) | set(re.findall(r"`make ([\w-]+)`", text_of(page)))
    assert told
    assert told <= TARGETS


def test_the_reference_lists_every_name_that_users_are_promised() -> None:
    pages = {page.stem: page.read_text() for page in (ROOT / "docs/api").glob("*.md")}
    listed = re.findall(r"<!-- names: (\w+) -->", text_of("docs/api.md"))
    assert sorted(listed) == sorted(pages)
    told = set(re.findall(r"^(?::::| +heading:) (\S+)$", "\n".join(pages.values()), re.M))
    promised = {f"{package.__name__}.{name}" for package in (deqlib, viar) for name in package.__all__}
    assert promised - told == set()


PAGES = ["README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "docs/architecture.md"]


@pytest.mark.parametrize("page", [*PAGES, "benchmarks/README.md", "models/viar/README.md"])
def test_every_file_that_is_told_exists(page: str) -> None:
    folder, text = (ROOT / page).parent, text_of(page)
    links = {folder / link for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)}
    paths = set(re.findall(r"(?<![\w/.])((?:tests|docs|deqlib|models|benchmarks)/[\w./-]*\w)", text))
    found = links | {ROOT / path for path in paths if not re.search("NAME|SUITE", path)}
    assert [str(path) for path in sorted(found) if not path.exists()] == []
    names = re.findall(r"`(\w+\.py)`", text)
    assert [name for name in names if not any(ROOT.glob(f"[!.]*/**/{name}"))] == []


def test_the_help_of_make_names_every_command() -> None:
    done = subprocess.run(["make", "--silent", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(re.findall(r"make ([\w-]+)", done.stdout)) == TARGETS - {"help"}


def test_every_command_is_phony() -> None:
    (phony,) = re.findall(r"^\.PHONY: (.*)$", MAKEFILE, re.M)
    assert set(phony.split()) == TARGETS


def test_every_dependency_is_pinned_within_its_range() -> None:
    lines = text_of("constraints.txt").splitlines()
    pins = dict(line.replace("_", "-").split("==") for line in lines if "==" in line)
    extras = PROJECT["project"]["optional-dependencies"]
    for requirement in itertools.chain(PROJECT["project"]["dependencies"], *extras.values()):
        name, lowest = re.fullmatch(r"([\w-]+)(?:\[\w+\])?(?:[>=]=([\d.]+))?(?:;.*)?", requirement).groups()
        if name != "deqlib":
            assert numbers(pins[name.replace("_", "-")]) >= numbers(lowest), name


# The first versions without a fault that this code would reach, by what pyproject.toml says of them.
WITHOUT_FAULTS = {"torch": "2.10", "filelock": "3.20.3", "datasets": "4", "pillow": "12.3"}


@pytest.mark.promise("No dependency with a known fault")
def test_no_dependency_may_be_of_a_version_with_a_known_fault() -> None:
    extras = PROJECT["project"]["optional-dependencies"].values()
    lowest = dict(
        requirement.split(">=")
        for requirement in itertools.chain(PROJECT["project"]["dependencies"], *extras)
        if ">=" in requirement and ";" not in requirement
    )
    assert {name for name in WITHOUT_FAULTS if numbers(lowest[name]) < numbers(WITHOUT_FAULTS[name])} == set()
    assert all(f"{name} {version}" in text_of("pyproject.toml") for name, version in WITHOUT_FAULTS.items())


def numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]


def test_the_oldest_pytorch_that_is_tested_is_the_one_that_is_promised() -> None:
    (promised,) = PROJECT["project"]["dependencies"]
    tested = dict(re.findall(r"^TORCH_(\w+) \?= ([\d.]+)$", MAKEFILE, re.M))
    assert promised == "torch>=" + tested["OLDEST"].removesuffix(".0")
    (pinned,) = re.findall(r"^torch==(.*)$", text_of("constraints.txt"), re.M)
    assert numbers(tested["OLDEST"]) < numbers(pinned) < numbers(tested["NEWEST"])


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """What may be released but for the building: a clean tree on main, with a version in its changelog."""
    for name in (".ci/release", "deqlib/__init__.py", "CHANGELOG.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\necho would build >&2\nexit 3\n")
    python.chmod(0o755)
    (tmp_path / ".gitignore").write_text("/.venv\n/dist\n")
    git(tmp_path, "init", "--quiet", "--initial-branch", "main")
    commit(tmp_path)
    return tmp_path


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@b.example", "-c", "commit.gpgsign=false"]
    return subprocess.run(
        ["git", *who, *arguments], cwd=folder, check=True, capture_output=True, text=True
    ).stdout


def commit(folder: Path) -> None:
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--allow-empty", "--message", "it")


def other_changelog(folder: Path) -> None:
    page = folder / "CHANGELOG.md"
    page.write_text(page.read_text().replace(f"## [{deqlib.__version__}] - ", "## [9.9.9] - "))
    commit(folder)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda folder: None, "would build"),
        (lambda folder: (folder / "new.py").write_text(""), "the tree has changes"),
        (lambda folder: git(folder, "switch", "--quiet", "-c", "other"), "releases are made on main"),
        (lambda folder: git(folder, "tag", f"v{deqlib.__version__}"), f"tag v{deqlib.__version__} exists"),
        (other_changelog, "CHANGELOG.md has no"),
    ],
    ids=["nothing", "changes", "branch", "tag", "changelog"],
)
def test_a_release_refuses_what_cannot_be_undone_before_it_builds(
    repository: Path, spoil: Callable[[Path], object], reason: str
) -> None:
    spoil(repository)
    tags = git(repository, "tag")
    done = subprocess.run([".ci/release", "tag"], cwd=repository, capture_output=True, text=True)
    assert done.returncode
    assert reason in done.stderr
    assert ("would build" in done.stderr) == (reason == "would build")
    assert git(repository, "tag") == tags


def test_drawings_say_what_their_texts_say() -> None:
    folder, page = ROOT / "docs/assets/architecture", text_of("docs/architecture.md")
    drawings = sorted(folder.glob("*.mmd"))
    assert len(drawings) == 5
    grammar = {
        "flowchart",
        "sequenceDiagram",
        "autonumber",
        "participant",
        "subgraph",
        "direction",
        "loop",
        "end",
    }
    for text in drawings:
        assert f"assets/architecture/{text.stem}.svg" in page
        drawn = re.sub(
            r"<style.*?</style>|<[^>]*>", " ", text.with_suffix(".svg").read_text(), flags=re.DOTALL
        )
        words = set(re.findall(r"[A-Za-z_]{4,}", text.read_text())) - grammar
        assert len(words) > 3
        assert not {word for word in words if word not in drawn}, text.name
