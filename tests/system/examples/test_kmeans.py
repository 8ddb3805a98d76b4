"""examples/kmeans: a recipe without gradients; one import changes for SpeechBrain."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from tests.support.brains import same_state

from .example import Example

KMEANS = Example("kmeans")


def test_it_gives_the_same_centroids_on_speechbrain(tmp_path: Path) -> None:
    ours, theirs = KMEANS.both_sides(tmp_path)
    assert "speechbrain" in type(theirs).__mro__[1].__module__
    assert same_state(ours.modules, theirs.modules)
    assert ours.distances == theirs.distances
    assert ours.purity == theirs.purity
    assert not list(ours.modules.parameters())
    # Lloyd's algorithm never increases the distance.
    assert all(later <= earlier for earlier, later in pairwise(ours.distances))
    assert ours.distances[-1] < 0.8 * ours.distances[0]
    assert ours.purity > 0.75


def test_it_runs_as_a_script_and_draws(tmp_path: Path) -> None:
    done = KMEANS.script(tmp_path, "--number_of_epochs=2", "--clusters=12")
    assert done.returncode == 0, done.stderr
    assert "epoch  2" in done.stdout
    assert "purity" in done.stdout
    folder = tmp_path / "results" / "kmeans" / "1234"
    assert [path.name for path in folder.iterdir()] == ["centroids.png"]
