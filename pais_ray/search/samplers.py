"""The next configuration to try: a pure function of what is known, so a killed search proposes what it would have."""

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from pais_ray.config.overlays import ConfigError
from pais_ray.search.space import Choice, Domain, Params, Space
from pais_ray.search.trials import Standing, mean_scores

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

REDRAWS = 50  # draws a configuration asked for, before a space of few choices counts as exhausted


def grid(space: Space) -> Iterator[Params]:
    """Every combination, the last setting changing fastest. Raises ConfigError where a setting has no list."""
    for path, domain in space.items():
        if not isinstance(domain, Choice):
            raise ConfigError(f"--sampler grid: {path}={domain} has no grid; list its values, or use random or optuna")
    for values in itertools.product(*(domain.corners() for domain in space.values())):
        yield dict(zip(space, values, strict=True))


def random_points(space: Space, seed: int, count: int) -> Iterator[Params]:
    """The first ``count`` different draws; fewer where lists of choices hold no more."""
    drawn: list[Params] = []
    for index in range(REDRAWS * count):
        random = np.random.default_rng([seed, index])
        params = {path: domain.draw(random) for path, domain in space.items()}
        if params not in drawn:
            drawn.append(params)
            yield params
        if len(drawn) == count:
            return


def tpe_point(space: Space, seed: int, known: Sequence[Standing]) -> Params:
    """What Optuna's TPE proposes after ``known``. Configurations stopped early count as pruned; those under way
    keep the next ones at a distance. The first ten are random."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed + len(known), constant_liar=True)
    )
    distributions = {path: _distribution(domain) for path, domain in space.items()}
    for standing in known:
        if all(standing.params[path] in domain for path, domain in space.items()):
            study.add_trial(_frozen(standing, space, distributions))
    drawn = study.ask(distributions).params
    return {
        path: domain.values[drawn[path]] if isinstance(domain, Choice) else domain.rounded(drawn[path])
        for path, domain in space.items()
    }


def _distribution(domain: Domain) -> "BaseDistribution":
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(domain, Choice):  # by position: Optuna takes no lists
        return CategoricalDistribution(tuple(range(len(domain.values))))
    if domain.kind == "randint":
        return IntDistribution(int(domain.low), int(domain.high))
    return FloatDistribution(domain.low, domain.high, log=domain.kind == "loguniform")


def _frozen(standing: Standing, space: Space, distributions: "dict[str, BaseDistribution]") -> "FrozenTrial":
    from optuna.trial import TrialState, create_trial

    states = {"finished": TrialState.COMPLETE, "stopped": TrialState.PRUNED, "failed": TrialState.FAIL}
    state = states.get(standing.state, TrialState.RUNNING)
    params = {
        path: domain.values.index(standing.params[path]) if isinstance(domain, Choice) else standing.params[path]
        for path, domain in space.items()
    }
    return create_trial(
        state=state,
        params=params,
        distributions=distributions,
        value=standing.ap if state == TrialState.COMPLETE else None,
        intermediate_values=mean_scores(standing.trials),
    )
