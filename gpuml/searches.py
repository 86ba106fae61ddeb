"""Searches among settings: many models at once, of which the better ones go on."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from gpuml.devices import Array
from gpuml.errors import DeviceMemoryError, unknown_name
from gpuml.losses import Loss
from gpuml.models import Model
from gpuml.optimizers import Optimizer
from gpuml.population_runs import (
    Crew,
    PopulationEngine,
    Results,
    Run,
    Task,
    make_run,
    part_size,
)
from gpuml.populations import Plan, Population
from gpuml.schedules import Schedule
from gpuml.training import ProgressBar, positive_integer


def successive_halving(
    model: Model,
    X: Any,
    y: Array | None,
    parameters: Mapping[str, Any] | Iterable[Mapping[str, Any]],
    *,
    n_models: int | None = None,
    n_epochs: int = 16,
    factor: int = 2,
    refill: bool = False,
    by: str | None = None,
    loss: str | Loss | None = None,
    optimizer: str | Optimizer = "gradient_descent",
    batch_size: int | None = 64,
    validation_data: tuple[Array, Array] | None = None,
    schedule: str | Schedule | None = None,
    shuffle: bool | Literal["each"] = True,
    seed: int = 0,
    memory_limit: int | str | None = None,
    engine: PopulationEngine | None = None,
    progress: bool | None = None,
) -> Population:
    """Search settings: train many models for few epochs, the better ones on for more.

    After each stage the best 1 / factor of the models go on, until two or fewer are left, or
    `n_epochs` are reached; each stage ends after `factor` times as many epochs as the one
    before, and the last after `n_epochs`. All that are compared were trained for as many epochs.

    Parameters
    ----------
    model, X, y
        As for :func:`train_population`.
    parameters : mapping of str to list or distribution, or iterable of mappings
        What to try for ``learning_rate``, ``momentum``, ``weight_decay``, ``seed``, as
        scikit-learn's searches take it: lists, and objects with ``rvs`` such as those of
        ``scipy.stats``. Lists alone are a grid: all of it, if `n_models` allow, with other
        seeds for what is left over; else a sample without repetition. Or settings that are
        chosen already, such as a ``ParameterGrid`` or a ``ParameterSampler``.
    n_models : int, optional
        Models in the first stage; all settings of a grid, or of an iterable, unless given.
    n_epochs : int
        Of the models that reach the last stage.
    factor : int
        At least 2.
    refill : bool
        Whether the places of those that were dropped go to new settings, which first catch up
        to the same number of epochs. Otherwise they are freed, and stages take less and less.
    by : str, optional
        The column that decides: ``validation_loss`` unless given, or without validation data
        ``loss``.
    seed : int
        For what is drawn from `parameters`, and for the order of samples.
    loss, optimizer, batch_size, validation_data, schedule, shuffle
        As for :func:`train_population`.
    memory_limit, engine, progress
        As for :func:`train_population`, but all models of a stage must fit at once.

    Returns
    -------
    Population
        All models that were tried; `epochs` says how far each came, and `ranking` puts those
        first that came farthest.

    Raises
    ------
    ValueError
        If a parameter has another name, there are fewer settings than models, or as
        :func:`train_population` raises.
    KeyError
        If there is no column `by`.
    DeviceMemoryError
        If the models do not fit at once.

    References
    ----------
    Jamieson, Talwalkar: Non-stochastic Best Arm Identification and Hyperparameter Optimization.
    AISTATS 2016. Algorithm of Figure 3.
    Karnin, Koren, Somekh: Almost Optimal Exploration in Multi-Armed Bandits. ICML 2013, where
    sequential halving comes from.

    Examples
    --------
    >>> import numpy as np
    >>> from gpuml.models import MLP
    >>> X = np.linspace(-1, 1, 64, dtype=np.float32)[:, None]
    >>> rates = {"learning_rate": [0.001, 0.01, 0.1, 0.3]}
    >>> found = successive_halving(MLP([1, 8, 1], device="cpu"), X, X**2, rates, n_epochs=8)
    >>> sorted(found.epochs.tolist())
    [4, 4, 8, 8]
    """
    n_epochs, factor = positive_integer("n_epochs", n_epochs), positive_integer("factor", factor)
    if factor < 2:
        raise ValueError(f"factor must be at least 2, got {factor}")
    plan = Plan(
        model,
        X,
        y,
        loss=loss,
        optimizer=optimizer,
        n_epochs=n_epochs,
        batch_size=batch_size,
        validation_data=validation_data,
        schedule=schedule,
        shuffle=shuffle,
        seed=seed,
        memory_limit=memory_limit,
        engine=engine,
    )
    if n_models is None:
        n_models = _number_of_settings(parameters)
    n_models = positive_integer("n_models", n_models)
    sizes, ends = _stages(n_models, n_epochs, factor)
    n_tried = n_models + refill * sum(n_models - -(-n_models // factor) for _ in ends[1:])
    plan.set_models(n_tried, **_columns_of(_drawn(parameters, n_tried, seed)))
    with plan.training() as (task, results):
        _halve(plan, task, results, sizes, ends, refill=refill, by=by, progress=progress)
    return plan.finished()


def _stages(n_models: int, n_epochs: int, factor: int) -> tuple[list[int], list[int]]:
    """Return how many models are in each stage, and after how many epochs it ends.

    Examples
    --------
    >>> _stages(16, 24, 2)
    ([16, 8, 4, 2], [3, 6, 12, 24])
    """
    sizes = [n_models]
    while -(-sizes[-1] // factor) > 1 and factor ** len(sizes) <= n_epochs:
        sizes.append(-(-sizes[-1] // factor))
    return sizes, [round(n_epochs / factor**i) for i in reversed(range(len(sizes)))]


def _halve(
    plan: Plan,
    task: Task,
    results: Results,
    sizes: Sequence[int],
    ends: Sequence[int],
    *,
    refill: bool,
    by: str | None,
    progress: bool | None,
) -> None:
    """Train stage by stage, and let go of the worst after each but the last."""
    n_models = sizes[0]
    fits, why = part_size(task, n_models)
    if why:
        raise DeviceMemoryError(f"{why}: a search holds all at once, so lower n_models to {fits}")

    def trained(members: Any, end: int) -> Run:
        run = make_run(task, results, plan.begin(members))
        with ProgressBar(progress, end, task.data.n_steps, 0) as bar:
            run.train(end, bar)
        return run

    run, n_tried = trained(np.arange(n_models), ends[0]), n_models
    for begin, end, next_size in zip(ends[:-1], ends[1:], sizes[1:], strict=True):
        size = sizes[1] if refill else next_size
        best = plan.population().order(by)
        run.keep(best[np.isin(best, run.members)][:size])
        runs = [run]
        if refill:
            places = np.arange(n_tried, n_tried + n_models - size)
            runs.append(trained(places, begin))
            n_tried += len(places)
        results.note(
            f"after epoch {begin} the best {len(run.members)} went on"
            + (f", and {n_models - size} new ones came" if refill else "")
        )
        crews = [r.crew() for r in runs if len(r.members)]
        if not crews:
            break
        crew = Crew.joined(crews, task.model.device.xp)
        run = make_run(task, results, crew, epoch=begin, generator=run.generator)
        with ProgressBar(progress, end, task.data.n_steps, begin) as bar:
            run.train(end, bar)


PARAMETERS = {
    "learning_rate": "learning_rates",
    "momentum": "momenta",
    "weight_decay": "weight_decays",
    "seed": "seeds",
}


def _is_grid(parameters: Any) -> bool:
    is_mapping = isinstance(parameters, Mapping)
    return is_mapping and not any(hasattr(values, "rvs") for values in parameters.values())


def _number_of_settings(parameters: Any) -> int:
    if _is_grid(parameters):
        from sklearn.model_selection import ParameterGrid

        return len(ParameterGrid(parameters))
    if hasattr(parameters, "__len__") and not isinstance(parameters, Mapping):
        return len(parameters)
    raise ValueError("distributions have no end: give n_models")


def _drawn(parameters: Any, n: int, seed: int) -> list[dict[str, Any]]:
    """Return so many settings: of a grid, by chance, or the first of those that are given."""
    from sklearn.model_selection import ParameterGrid, ParameterSampler

    if not isinstance(parameters, Mapping):
        found = [dict(setting) for setting in itertools.islice(parameters, n)]
        if len(found) < n:
            raise ValueError(f"{n} models are to be tried, parameters gives {len(found)} settings")
    elif _is_grid(parameters) and len(ParameterGrid(parameters)) <= n:
        grid = list(ParameterGrid(parameters))
        if "seed" in parameters and len(grid) < n:
            raise ValueError(
                f"{n} models are to be tried, and the grid has {len(grid)} settings with their "
                "seeds: leave seed away, or give more of them"
            )
        found = list(itertools.islice(itertools.cycle(grid), n))
    else:
        found = list(ParameterSampler(parameters, n, random_state=seed))
    for name in {name for setting in found for name in setting}:
        if name not in PARAMETERS:
            raise ValueError(unknown_name("parameter", str(name), PARAMETERS))
    if len({frozenset(setting) for setting in found}) > 1:
        raise ValueError("all settings must name the same parameters")
    return found


def _columns_of(settings: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return settings as the arguments of `Plan.set_models`."""
    return {PARAMETERS[name]: [setting[name] for setting in settings] for name in settings[0]}
