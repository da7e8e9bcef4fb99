"""The images without a docker daemon: their pins, their user, and the commands that they run."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
IMAGES = ["Dockerfile", "Dockerfile.cpu"]
# Built together in NVIDIA's image, and never replaced.
OF_THE_IMAGE = {"torch", "numpy"}


def pins(path: str) -> dict[str, str | None]:
    """Requirement -> exact version, None without one."""
    lines = [line.partition("#")[0].strip() for line in (REPOSITORY / path).read_text().splitlines()]
    found = (line.partition("==") for line in lines if line)
    return {name: version or None for name, _, version in found}


def instructions(image: str) -> list[tuple[str, str]]:
    """(word, argument) of a Dockerfile, continued lines joined."""
    text = re.sub(r"^#.*\n", "", (REPOSITORY / image).read_text(), flags=re.M)
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines) if word]


def test_the_image_installs_the_versions_that_the_project_is_tested_with() -> None:
    constraints = pins("constraints.txt")
    for name, version in pins("docker/requirements.txt").items():
        assert version == constraints.get(name), name


def test_the_image_installs_all_that_the_project_depends_on() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    needed = {re.split(r"[<>=\[ ]", line)[0] for line in project["dependencies"]}
    assert needed - OF_THE_IMAGE <= set(pins("docker/requirements.txt"))
    assert not OF_THE_IMAGE & set(pins("docker/requirements.txt"))


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_is_pinned_unprivileged_and_proven_by_its_last_step(image: str) -> None:
    steps = instructions(image)
    word, base = steps[0]
    assert word == "FROM"
    assert re.search(r":\d+\.\d+", base), f"{base} is not pinned"
    assert [rest for word, rest in steps if word == "USER"][-1] not in ("root", "0")
    assert steps[-1][0] == "RUN"
    assert steps[-1][1].startswith("python docker/smoke_test.py")


def test_what_the_image_is_built_around_may_not_be_replaced(tmp_path: Path) -> None:
    """pip is a stand-in here that replaces PyTorch, as a requirement on a newer one would."""
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/bash\n"
        f'if [[ "$3" == list ]]; then printf "numpy==2\\ntorch==$(cat {tmp_path}/torch)\\n"; '
        f'elif [[ -n "$REPLACES" ]]; then echo 2.12 > {tmp_path}/torch; fi\n'
    )
    python.chmod(0o755)
    for replaces, status in (("", 0), ("yes", 1)):
        (tmp_path / "torch").write_text("2.11")
        result = subprocess.run(
            [REPOSITORY / "docker/install.sh"],
            env={"PATH": "/usr/bin:/bin", "PYTHON": str(python), "REPLACES": replaces},
            capture_output=True,
        )
        assert result.returncode == status


@pytest.mark.slow  # imports everything, twice
def test_the_smoke_test_passes_here() -> None:
    result = subprocess.run(
        [sys.executable, REPOSITORY / "docker/smoke_test.py"], capture_output=True, text=True, timeout=200
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "operators: " in result.stdout
    assert "dry run: ok" in result.stdout
