"""A search under way: which trial starts next, what a report means, how far we are. Tune asks, the ledger remembers."""

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pais_ray.config.tree import Config, dump
from pais_ray.files.json_lines import metric_rows
from pais_ray.search import report
from pais_ray.search.asha import goes_on
from pais_ray.search.plan import Plan
from pais_ray.search.space import Params, compose_with
from pais_ray.search.trials import Trial, TrialStore
from pais_ray.tracking.record import Status

METRIC = "teacher/segm_AP"
TABLE_LINES = 8


class TrialScheduler:
    """Decides for Tune. ``settings`` are those of every trial beside what is searched over; ``close`` ends a trial's
    tracking (trial, status); ``say`` prints. Tune's thread calls ``next`` and ``heard``, another one ``progress``."""

    def __init__(
        self,
        plan: Plan,
        ledger: TrialStore,
        settings: Params,
        close: Callable[[Trial, Status], None],
        echo: Callable[[str], None],
        minutes: float | None = None,
    ) -> None:
        self.plan, self.ledger, self.settings, self.close, self.echo = plan, ledger, settings, close, echo
        self.halt: str | None = None  # why the search ends before all is tried
        self.wrong_input: str | None = None
        self.started = time.monotonic()
        self.deadline = self.started + 60 * minutes if minutes else None
        self.todo = [t for t in ledger.trials if t.state not in ("finished", "stopped")]
        for trial in self.todo:
            trial.state = "waiting"
        self.idle = False  # nothing may start until a trial reports
        self.made_before = sum(made(plan, t) for t in self.own())
        self.troubled = False  # the search's folder cannot be written now; what is known is in memory
        self.lock = threading.Lock()

    def own(self) -> list[Trial]:
        """The trials that are not of another search."""
        return [t for t in self.ledger.trials if t.folder is None]

    def next(self) -> Trial | None:
        """The next trial to start, its config written down: first those that an earlier start left. None where there
        is none now; ``waits`` says whether one may come."""
        with self.lock:
            if not self.todo and not self.idle:
                proposed = self.plan.propose(self.ledger)
                self.todo = [self.ledger.add(*proposed)] if proposed else []
                self.idle = proposed is None
            if not self.todo:
                return None
            trial = self.todo[0]
            root = self.plan.trial_root(trial.id)
            try:
                root.mkdir(parents=True, exist_ok=True)
                (root / "config.yaml").write_text(dump(self.config(trial)))
            except OSError as error:
                self.complain(error)
                return None
            self.todo.pop(0)
            trial.state, trial.why = "running", ""
            self.save()
            step = made(self.plan, trial)
            self.echo(f"{trial.id} {f'goes on after {step}' if step else 'starts'}: {report.describe(trial.params)}")
            return trial

    def waits(self) -> bool:
        """Whether trials may come that cannot start yet."""
        with self.lock:
            blocked = self.troubled and bool(self.todo)
            return self.halt is None and (blocked or self.plan.has_to_come(self.ledger))

    def save(self) -> None:
        """Writes down what is known, or tries again at the next report: each run stands in its own directory."""
        try:
            self.ledger.save()
        except OSError as error:
            self.complain(error)
        else:
            self.troubled = False

    def complain(self, error: OSError) -> None:
        if not self.troubled:
            self.echo(f"{self.plan.root} cannot be written ({error}); the search goes on. Make room, or restore it")
        self.troubled = True

    def config(self, trial: Trial) -> Config:
        own = {"run.name": trial.id, "train.seed": trial.seed, **trial.params}
        return compose_with(self.plan.words, {**self.settings, **own})

    def on_result(self, name: str, result: Mapping[str, Any]) -> bool:
        """Takes a trial's report; whether it must stop. What was recorded once at a step stands, and is not judged
        again: a resumed trial reports early steps once more."""
        with self.lock:
            self.idle = False
            trial = self.ledger.trial(name)
            if "wrong_input" in result:
                self.halt, self.wrong_input = "wrong input", f"trial {name}: {result['wrong_input']}"
            elif "failed" in result and trial.state == "stopped":  # its process died over its last checkpoint
                self.close(trial, "KILLED")
            elif "failed" in result and trial.state != "finished":
                trial.state, trial.why = "failed", result["failed"]
                self.echo(f"{name} failed: {trial.why}")
                self.close(trial, "FAILED")
            elif "finished" in result:  # its last word
                if trial.state == "stopped":
                    self.close(trial, "KILLED")  # now that nobody else writes there
                elif result["finished"]:
                    trial.state = "finished"
                    self.echo(f"{name} finished")
                else:  # somebody stopped it, a machine that is shut down perhaps
                    trial.state = "waiting"
            elif METRIC in result and result["step"] not in trial.scores:
                self.judge(trial, result["step"], result[METRIC])
            self.save()
            return trial.state in ("stopped", "failed")

    def judge(self, trial: Trial, step: int, ap: float) -> None:
        """Records an AP. At a rung a configuration's first trial is held against those of the others; its further
        seeds only start once it has finished, and run to the end."""
        trial.scores[step] = ap
        verdict = ""
        if step in self.plan.rungs and trial in self.ledger.firsts():
            at_rung = self.ledger.rung(step)
            stays = goes_on(ap, at_rung.values())
            verdict = f"; {'goes on' if stays else 'stopped'} at this rung ({len(at_rung)} trials so far)"
            if not stays:
                trial.state, trial.why = "stopped", f"AP {ap:.4f} at rung {step} ({len(at_rung)} trials so far)"
        self.echo(f"{trial.id} at {step}/{self.plan.steps}: AP {ap:.3f}{verdict}")

    def halts(self) -> bool:
        """Whether all trials are to stop now: Ctrl-C, wrong input, or no time left."""
        if self.halt is None and self.deadline is not None and time.monotonic() > self.deadline:
            self.halt = "time budget"
            self.echo("the time budget is used up; stopping all trials, the same command goes on with them")
        return self.halt is not None

    def rest(self) -> list[Trial]:
        """The trials that were running when the search ended; they wait for the next start."""
        left = [t for t in self.ledger.trials if t.state == "running"]
        for trial in left:
            trial.state = "waiting"
        self.save()
        return left

    def progress(self) -> str:
        """How far we are, and the table."""
        with self.lock:
            own = self.own()
            states = [t.state for t in own]
            counts = [f"{states.count(s)} {s}" for s in ("finished", "stopped", "failed") if s in states]
            steps = {t.id: made(self.plan, t) for t in own}
            running = [f"{t.id} {steps[t.id]}/{self.plan.steps}" for t in own if t.state == "running"]
            stopped = [t for t in self.ledger.firsts() if t.folder is None and t.state == "stopped"]
            never = sum(len(self.plan.missing(self.ledger, t.params)) for t in stopped)
            to_come = self.plan.samples * len(self.plan.seeds) - len(states) - never + states.count("running")
            ahead = to_come * self.plan.steps - sum(steps[t.id] for t in own if t.state == "running")
            just_made = sum(steps.values()) - self.made_before
            line = ", ".join([*counts, f"running {', '.join(running) or 'none'}"])
            if just_made > 0:
                minutes, seconds = divmod(int(max(ahead, 0) / just_made * (time.monotonic() - self.started)), 60)
                line += f" | ETA {minutes // 60}:{minutes % 60:02d}:{seconds:02d} if none is stopped early"
            return f"{line}\n{report.table(self.ledger.standings(), len(self.plan.seeds), most=TABLE_LINES)}"


def made(plan: Plan, trial: Trial) -> int:
    """The last step that the trial logged."""
    root = Path(trial.folder) if trial.folder else plan.trial_root(trial.id)
    return max((int(row["step"]) for row in metric_rows(root)), default=0)
