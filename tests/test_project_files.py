"""Files around the package agree with it: CITATION.cff, the GitHub workflow, pre-commit."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import fastnce

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_citation_matches_the_package():
    citation = (ROOT / "CITATION.cff").read_text()
    top_level = dict(re.findall(r"^([\w-]+): *(.+)$", citation, re.MULTILINE))
    assert top_level["title"] == PROJECT["name"]
    assert top_level["version"] == fastnce.__version__
    assert top_level["license"] == PROJECT["license"]
    names = re.search(r"^authors:\n((?:  .+\n)+)", citation, re.MULTILINE).group(1)
    assert re.findall(r"name: (.+)", names) == [author["name"] for author in PROJECT["authors"]]


def test_citation_refers_to_the_papers_of_the_project():
    cited = re.findall(r'url: "(.+)"', (ROOT / "CITATION.cff").read_text())
    assert sorted(cited) == sorted(PROJECT["urls"].values())


def test_the_workflow_tests_the_python_versions_of_the_classifiers():
    workflow = (ROOT / ".github" / "workflows" / "test.yml").read_text()
    versions = re.search(r"python: \[(.+)\]", workflow).group(1)
    prefix = "Programming Language :: Python :: "
    listed = [line.removeprefix(prefix) for line in PROJECT["classifiers"] if line.startswith(f"{prefix}3.")]
    assert re.findall(r'"([\d.]+)"', versions) == listed
    assert PROJECT["requires-python"] == f">={listed[0]}"


def test_the_workflow_runs_the_make_target_and_holds_no_secret():
    workflow = (ROOT / ".github" / "workflows" / "test.yml").read_text()
    target = re.search(r"run: make (\w+)", workflow).group(1)
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert "secrets." not in workflow
    assert "permissions:\n  contents: read\n" in workflow


def test_pre_commit_has_the_ruff_of_the_constraints():
    pinned = re.search(r"^ruff==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE).group(1)
    hooks = re.findall(r"ruff==([\d.]+)", (ROOT / ".pre-commit-config.yaml").read_text())
    assert hooks == [pinned] * 2
