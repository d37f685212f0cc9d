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

No algorithm's loss or update is in here. Two small classifiers are learnt: of when a world ends (ends), and of which
policy made a step (diversity). What measures the models, critics or policies of a family takes functions and arrays
(model_report, probes, diversity). It imports `envs`, never the other way round. A name is imported when it is first
used: runner.policies, which reads a policy.npz where it is deployed, needs neither the rest nor JAX.
"""

import importlib

import runner.neighbours  # noqa: F401  (first: it says which folder hides one of our packages)

NAMES = {  # module -> what `runner` has of it
    "checkpoint": "DIGESTED fill flat_arrays read_learnt read_npz",
    "devices": "map_seeds over_devices seed_keys",
    "ends": "learn_end",
    "evaluation": "each_seed evaluation_keys play returns_of steps_of",
    "flags": "Count Data Flags Natural Rate RunFlags Share Size "
    "announce check check_run launch parse refuse task_options",
    "files": "write_whole",
    "folder": "folder_of open_task state_files with_angles",
    "log": "say with_eta",
    "presets": "preset",
    "run": "Run",
    "tables": "show",
}
HOMES = {name: module for module, names in NAMES.items() for name in names.split()}
__all__ = list(HOMES)


def __getattr__(name):
    if name not in HOMES:
        raise AttributeError(f"module 'runner' has no attribute '{name}'")
    globals()[name] = getattr(importlib.import_module(f"runner.{HOMES[name]}"), name)
    return globals()[name]


def __dir__():
    return sorted([*globals(), *HOMES])
