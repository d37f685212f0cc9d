"""The room of a run: everything that a script keeps or refuses, whatever it learns.

    with runner.Run("dac", args, task, buffer) as run:          the folder, made or resumed
        train_chunk = run.compile(train_chunk, shapes, data)    refuses a run that does not fit into memory
        state = run.restore(init, keys)                         a fresh state, or exactly where the run was
        for step in run.chunks("update", args.num_updates, state.num_updates):
            state, metrics = train_chunk(state, data)
            run.progress(step, metrics, ("train/q",))           rate, ETA, these metrics; ends a run that diverged
            if run.due(step):
                run.log(step, metrics | evaluate(nets(state), eval_keys))
            run.save(state)                                     each minute, at the end, and before a signal ends it
        run.write_policy("diffusion", params)
        return run.finish()                                     figures and the score

Nothing here knows an algorithm. It imports `envs`, never the other way round.
"""

import runner.neighbours  # noqa: F401  (first: it says which folder hides one of our packages)
from runner.checkpoint import fill, flat_arrays, read_npz
from runner.devices import map_seeds, over_devices, seed_keys
from runner.ends import learn_end
from runner.evaluation import each_seed, evaluation_keys, play, returns_of
from runner.flags import (
    Count,
    Data,
    Flags,
    Natural,
    Rate,
    RunFlags,
    Share,
    Size,
    check,
    check_run,
    launch,
    parse,
    refuse,
    task_options,
)
from runner.folder import folder_of, open_task, state_files
from runner.log import say, with_eta, write_whole
from runner.presets import preset
from runner.run import DIGESTED, Run
from runner.tables import show

__all__ = [
    "DIGESTED", "Count", "Data", "Flags", "Natural", "Rate", "Run", "RunFlags", "Share", "Size", "check", "check_run",
    "each_seed", "evaluation_keys", "fill", "flat_arrays", "folder_of", "launch", "learn_end", "map_seeds", "open_task",
    "over_devices", "parse", "play", "preset", "read_npz", "refuse", "returns_of", "say", "seed_keys", "show",
    "state_files", "task_options", "with_eta", "write_whole",
]  # fmt: skip
