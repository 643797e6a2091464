"""From a config to an exit code: joins the ranks, runs, and turns every end into one line and one number."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import traceback
from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING, NoReturn

from data_utils.schema import DataError
from dpo.beat import VARIABLE
from dpo.config import Config, ConfigError
from dpo.refusals import CheckpointError
from dpo.signals import StopRequest

if TYPE_CHECKING:
    from dpo.run import Run
    from dpo.runlog import RunLog
    from dpo.world import World

    Train = Callable[[Run], bool]
    Work = Callable[[World, StopRequest], bool]

FINISHED, CONFIG, CHECKPOINT, PEER, STOPPED, UNEXPECTED = 0, 2, 3, 4, 75, 1

logger = logging.getLogger("dpo")


def session(config: Config, train: Train) -> int:
    """Run `train` on a freshly built `Run`; returns the exit code of DESIGN's contract."""
    joined = _join(config)
    if joined is None:
        return CONFIG
    world, stop = joined
    from dpo.runlog import RunLog
    from dpo.watchdog import Watchdog

    log = RunLog(config, world)
    code, reason = _outcome(lambda: _attempt(config, world, log, stop, train))
    if code not in (FINISHED, STOPPED):
        if log.is_open:
            log.status("failed", log.step, code, reason)
        if code != PEER or VARIABLE not in os.environ:  # else the launcher says which rank died of what
            _end(reason, world.rank)
    log.close()
    _leave(world, code)
    Watchdog.close_all()  # not before: leaving may wait for other ranks
    return code


def end_process(code: int) -> NoReturn:
    """End this process with `code`, after all that Python has to do at exit.

    Without the destructors of C++ libraries: of 84 jobs of two ranks that refused their data, 3 lost a rank to SIGABRT
    ("terminate called without an active exception") as it ended, and with it the exit code; of 36 that ended so, none.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def tool_session(config: Config, work: Work) -> int:
    """Run `work`, which keeps no run directory; returns the exit code of DESIGN's contract."""
    joined = _join(config)
    if joined is None:
        return CONFIG
    world, stop = joined
    code, reason = _outcome(lambda: FINISHED if work(world, stop) else STOPPED)
    if code not in (FINISHED, STOPPED):
        _end(reason, world.rank)
    _leave(world, code)
    return code


def _join(config: Config) -> tuple[World, StopRequest] | None:
    """Join the ranks and listen for signals; None where that was refused, with its line."""
    quiet()
    from dpo.world import World

    try:
        sharded = config.parallel.engine in ("fsdp2", "deepspeed")
        world = World.start(config.parallel.device, sharded, config.parallel.timeout_s)
    except ConfigError as error:
        _end(str(error), 0)
        return None
    stop = StopRequest(config.train.stop_after_steps)
    stop.listen()  # not before: a rank that waits for others in C++ would not hear its handlers
    return world, stop


def _leave(world: World, code: int) -> None:
    """Leave the group after a good end, or alone; ranks that refuse together are ended by `end_process`."""
    if code in (FINISHED, STOPPED) or (world.size == 1 and code in (CONFIG, CHECKPOINT)):
        world.leave()


def _outcome(action: Callable[[], int]) -> tuple[int, str]:
    """The exit code of an action, and why it failed."""
    from dpo.world import lost_a_peer

    try:
        return action(), ""
    except (ConfigError, DataError) as error:
        return _note(CONFIG, error)
    except CheckpointError as error:
        return _note(CHECKPOINT, error)
    except KeyboardInterrupt:
        return UNEXPECTED, "interrupted; nothing was saved since the last checkpoint"
    except Exception as error:
        if lost_a_peer(error):
            return _note(PEER, error)
        traceback.print_exc()
        return _note(UNEXPECTED, error)


def _attempt(config: Config, world: World, log: RunLog, stop: StopRequest, train: Train) -> int:
    from dpo.run import Run

    if config.log.wandb and find_spec("wandb") is None:
        raise ConfigError("log.wandb=true needs the wandb package: pip install wandb")
    status = log.read_status()
    log.check_same_run()
    if status.get("state") == "finished":
        if world.is_main:
            print(f"{log.directory}: this run is finished (step {status['step']}); see summary.json and final/")
        return FINISHED
    if config.checkpoint.resume == "never" and status:
        raise ConfigError(f"run.dir={log.directory} holds a run and checkpoint.resume=never: give another --run.dir")
    try:
        return FINISHED if train(Run(config, world, log, stop)) else STOPPED
    except (RuntimeError, MemoryError) as error:
        from dpo.advice import explain, ran_out_of_memory

        if not ran_out_of_memory(error):
            raise
        raise explain(config, world) from error


def _note(code: int, error: Exception) -> tuple[int, str]:
    logger.error("exit code %d", code, exc_info=error)
    return code, f"{type(error).__name__}: {error}" if code == UNEXPECTED else str(error)


def _end(reason: str, rank: int) -> None:
    prefix = f"[rank {rank}] " if rank else ""
    print(f"{prefix}error: {' '.join(reason.split())}", file=sys.stderr, flush=True)


def quiet() -> None:
    """Keep libraries' chatter out of the terminal; warnings go to the rank's log."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for name in ("DeepSpeed", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.captureWarnings(True)
    logging.getLogger().addHandler(logging.NullHandler())  # until the log file is open
