"""Proposes configurations. Proposals are pure functions of the known results, so a restart proposes the same ones."""

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from pais_ray.config.overlays import ConfigError
from pais_ray.search.space import Choice, Domain, Params, Space
from pais_ray.search.trials import RankedConfiguration, mean_scores

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

DRAWS_PER_POINT = 50  # draws per requested configuration before a small space counts as exhausted


def grid_points(space: Space) -> Iterator[Params]:
    """Every combination; the last setting changes fastest. Raises ConfigError if a setting has no list of values."""
    for path, domain in space.items():
        if not isinstance(domain, Choice):
            raise ConfigError(
                f"--sampler grid: {path}={domain} has no grid; list its values, or use --sampler random or optuna"
            )
    for values in itertools.product(*(domain.corners() for domain in space.values())):
        yield dict(zip(space, values, strict=True))


def random_points(space: Space, seed: int, count: int) -> Iterator[Params]:
    """The first ``count`` different draws; fewer if the space has fewer configurations."""
    drawn: list[Params] = []
    for index in range(DRAWS_PER_POINT * count):
        random = np.random.default_rng([seed, index])
        params = {path: domain.draw(random) for path, domain in space.items()}
        if params not in drawn:
            drawn.append(params)
            yield params
        if len(drawn) == count:
            return


def tpe_point(space: Space, seed: int, known: Sequence[RankedConfiguration]) -> Params:
    """The proposal of Optuna's TPE sampler after the ``known`` results; the first ten proposals are random.

    Configurations that were stopped early count as pruned. Running ones keep new proposals away from them.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed + len(known), constant_liar=True)
    )
    distributions = {path: _distribution(domain) for path, domain in space.items()}
    for configuration in known:
        if all(configuration.params[path] in domain for path, domain in space.items()):
            study.add_trial(_optuna_trial(configuration, space, distributions))
    drawn = study.ask(distributions).params
    return {
        path: domain.values[drawn[path]] if isinstance(domain, Choice) else domain.rounded(drawn[path])
        for path, domain in space.items()
    }


def _distribution(domain: Domain) -> "BaseDistribution":
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(domain, Choice):  # by position: a value may be a list, which Optuna does not accept
        return CategoricalDistribution(tuple(range(len(domain.values))))
    if domain.kind == "randint":
        return IntDistribution(int(domain.low), int(domain.high))
    return FloatDistribution(domain.low, domain.high, log=domain.kind == "loguniform")


def _optuna_trial(
    configuration: RankedConfiguration, space: Space, distributions: "dict[str, BaseDistribution]"
) -> "FrozenTrial":
    from optuna.trial import TrialState, create_trial

    states = {"finished": TrialState.COMPLETE, "stopped": TrialState.PRUNED, "failed": TrialState.FAIL}
    state = states.get(configuration.state, TrialState.RUNNING)
    values = configuration.params
    params = {
        path: domain.values.index(values[path]) if isinstance(domain, Choice) else values[path]
        for path, domain in space.items()
    }
    return create_trial(
        state=state,
        params=params,
        distributions=distributions,
        value=configuration.ap if state == TrialState.COMPLETE else None,
        intermediate_values=mean_scores(configuration.trials),
    )
