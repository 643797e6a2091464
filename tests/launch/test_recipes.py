"""Every recipe is parsed, planned and dry-run at its real world size, under the launcher that its first line names."""

from __future__ import annotations

import math
import os
import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from dpo.config import parse_config
from dpo.ds_json import read_ds_json
from dpo.plan import make_plan

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted(path for path in (ROOT / "launch/recipes").glob("*.yaml") if path.name != "quickstart.yaml")
SCRIPTS = {"local": "local.sh", "torchrun": "torchrun.sh", "deepspeed": "deepspeed.sh", "slurm": "submit.sh"}


@dataclass(frozen=True)
class Launch:
    """The first line of a recipe."""

    launcher: str
    options: list[str]

    @staticmethod
    def of(recipe: Path) -> Launch:
        first = recipe.read_text().splitlines()[0]
        assert first.startswith("# launch: "), f"{recipe}: the first line is `# launch: LAUNCHER OPTIONS`"
        launcher, *options = shlex.split(first.removeprefix("# launch: "))
        return Launch(launcher, options)

    def option(self, name: str, default: int = 1) -> int:
        return int(self.options[self.options.index(name) + 1]) if name in self.options else default

    @property
    def nodes(self) -> int:
        return self.option("--nodes")

    @property
    def world_size(self) -> int:
        return self.option("-n") if self.launcher == "local" else self.nodes * self.option("--gpus")


def pairs_of(recipe: Path) -> int:
    (number,) = re.findall(r"^# pairs: (\d+)$", recipe.read_text(), flags=re.MULTILINE)
    return int(number)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_planned_at_its_world_size(recipe: Path) -> None:
    config = parse_config(["--config", str(recipe)])
    launch, pairs = Launch.of(recipe), pairs_of(recipe)
    plan = make_plan(config, launch.world_size, pairs)
    assert plan.world_size == launch.world_size
    assert plan.num_steps == config.train.epochs * math.ceil(pairs / config.batch.pairs_per_step)
    assert config.batch.pairs_per_step >= launch.world_size  # else ranks idle in every step
    if config.parallel.ds_config is not None:
        read_ds_json(str(ROOT / config.parallel.ds_config))
    expected = re.findall(r"^# expect: step (\d+) (\S+) ([\d.]+) \+- ([\d.]+)$", recipe.read_text(), flags=re.MULTILINE)
    assert len(expected) == recipe.read_text().count("# expect:")
    for step, metric, _, _ in expected:
        every = config.eval.every_steps if metric.startswith("eval_") else config.log.every_steps
        assert int(step) <= plan.num_steps
        assert every is not None and (int(step) % every == 0 or int(step) % plan.steps_per_epoch == 0)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_launcher_of_its_first_line_prints_a_command_per_node(recipe: Path) -> None:
    launch = Launch.of(recipe)
    config = ["--config", str(recipe.relative_to(ROOT))]
    done = subprocess.run(
        ["bash", f"launch/{SCRIPTS[launch.launcher]}", *launch.options, *config],
        cwd=ROOT, env={"PATH": os.environ["PATH"], "DRY_RUN": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    commands = [shlex.split(line) for line in lines if "train_dpo.py" in line]
    assert all(words[words.index(str(ROOT / "train_dpo.py")) + 1 :] == config for words in commands)
    if launch.launcher == "slurm":
        assert len(commands) == 1
        assert f"--ntasks={launch.world_size}" in commands[0]
        assert sum(line.startswith("# node ") for line in lines) == launch.nodes
    else:
        assert len(commands) == launch.nodes


def test_the_folder_has_the_ladder_from_one_cpu_to_many_nodes() -> None:
    sizes = {Launch.of(recipe).world_size for recipe in RECIPES}
    assert {1, 8, 16, 32, 64} <= sizes
    assert {Launch.of(recipe).launcher for recipe in RECIPES} == set(SCRIPTS)
