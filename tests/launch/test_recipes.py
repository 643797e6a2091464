"""Every recipe is parsed, planned and dry-run at its real world size, under the launcher that its first line names."""

from __future__ import annotations

import json
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
from launch import expected as expected_command
from launch.expected import expectations

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "launch/recipes").glob("*.yaml"))
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
    whole = config.train.epochs * math.ceil(pairs / config.batch.pairs_per_step)
    assert plan.num_steps == min(whole, config.train.max_steps or whole)
    assert config.batch.pairs_per_step >= launch.world_size  # else ranks idle in every step
    shipped = [ROOT / str(source) for source in config.data.train if (ROOT / str(source)).is_file()]
    if shipped:
        assert sum(len(path.read_text().splitlines()) for path in shipped) == pairs
    if config.parallel.ds_config is not None:
        read_ds_json(str(ROOT / config.parallel.ds_config))
    for expected in expectations(recipe.read_text()):
        every = config.eval.every_steps if expected.metric.startswith("eval_") else config.log.every_steps
        assert every is not None and every <= expected.step <= plan.num_steps


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


def test_a_run_is_held_against_what_its_recipe_expects(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("# expect: step 20 loss 0.6 +- 0.05\n# expect: step 25 eval_loss 0.5 +- 0.01\n")

    def verdict(*rows: dict[str, float]) -> tuple[int, list[str]]:
        (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        code = expected_command.main([str(recipe), str(tmp_path)])
        return code, [line.split()[0] for line in capsys.readouterr().out.splitlines()]

    first, second = {"step": 20, "loss": 0.64}, {"step": 25, "eval_loss": 0.505}
    assert verdict(first, second) == (0, ["ok", "ok"])
    assert verdict(first) == (0, ["ok", "not"])
    assert verdict({"step": 20, "loss": 0.66}, second) == (1, ["OFF", "ok"])
    recipe.write_text("model: {}\n")
    assert verdict(first) == (2, [])
    recipe.write_text("# expect: loss 0.6\n")
    assert verdict(first) == (2, [])
