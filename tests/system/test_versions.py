"""The version matrix is the same in the script, in the workflow and in the documents."""

from __future__ import annotations

import re

import yaml

from tests.support.documents import ROOT, table

SCRIPT = (ROOT / "tests" / "system" / "versions.sh").read_text()
ROWS = dict(re.findall(r'(?:ROWS="|^ {6})([\w.-]+) +(3\.\d+) ', SCRIPT, re.M))


def test_the_workflow_runs_each_row_on_its_python() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "versions.yml").read_text())
    matrix = workflow["jobs"]["versions"]["strategy"]["matrix"]["include"]
    assert {each["row"]: each["python"] for each in matrix} == ROWS


def test_the_table_has_each_row() -> None:
    rows = table((ROOT / "CONTRIBUTING.md").read_text(), "Row")
    assert {row[0]: row[1] for row in rows} == ROWS | {".ci/run": "3.11"}
