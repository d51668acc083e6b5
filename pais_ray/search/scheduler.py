"""Decides which trial of a running search starts next and which one stops; reports the progress."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

from pais_ray.config.tree import Config, dump
from pais_ray.files.json_lines import metric_rows
from pais_ray.search import report
from pais_ray.search.asha import is_promoted
from pais_ray.search.plan import SearchPlan
from pais_ray.search.space import Params, compose_with
from pais_ray.search.trials import Trial, TrialStore
from pais_ray.tracking.record import Status

METRIC = "teacher/segm_AP"
TABLE_LINES = 8


class TrialScheduler:
    """Decides for Ray Tune and records every decision in the trial store.

    ``settings`` are those of every trial besides the searched ones; ``close`` ends the tracking of a trial with a
    status; ``echo`` prints. Tune's thread calls all methods but ``progress``, which another thread calls.
    """

    def __init__(
        self,
        plan: SearchPlan,
        store: TrialStore,
        settings: Params,
        close: Callable[[Trial, Status], None],
        echo: Callable[[str], None],
        minutes: float | None = None,
    ) -> None:
        self.plan, self.store, self.settings, self.close, self.echo = plan, store, settings, close, echo
        self.stop_reason: str | None = None  # why the search ends before all configurations were tried
        self.input_error: str | None = None
        self.started = time.monotonic()
        self.deadline = self.started + 60 * minutes if minutes else None
        self.queue = [t for t in store.trials if t.state not in ("finished", "stopped")]
        for trial in self.queue:
            trial.state = "waiting"
        self.is_idle = False  # no trial may start until one reports
        self.steps_before = sum(last_step(plan, t) for t in store.own_trials())  # of earlier starts
        self.storage_failed = False  # the folder of the search cannot be written; results are in memory
        self.lock = threading.Lock()

    def next_trial(self) -> Trial | None:
        """The next trial to start, with its config written; trials of an earlier start come first.

        None if no trial may start now; ``has_waiting_trials`` says whether one may start later.
        """
        with self.lock:
            if not self.queue and not self.is_idle:
                proposed = self.plan.propose(self.store)
                self.queue = [self.store.add(*proposed)] if proposed else []
                self.is_idle = proposed is None
            if not self.queue:
                return None
            trial = self.queue[0]
            root = self.plan.trial_root(trial.id)
            try:
                root.mkdir(parents=True, exist_ok=True)
                (root / "config.yaml").write_text(dump(self.trial_config(trial)))
            except OSError as error:
                self.report_storage_error(error)
                return None
            self.queue.pop(0)
            trial.state, trial.why = "running", ""
            self.save()
            step = last_step(self.plan, trial)
            action = f"resumes after step {step}" if step else "starts"
            self.echo(f"{trial.id} {action}: {report.describe(trial.params)}")
            return trial

    def has_waiting_trials(self) -> bool:
        """Whether there may be trials that cannot start yet."""
        with self.lock:
            is_blocked = self.storage_failed and bool(self.queue)
            return self.stop_reason is None and (is_blocked or self.plan.has_waiting_seeds(self.store))

    def save(self) -> None:
        """Saves the trial store; after a failure, the next report tries again."""
        try:
            self.store.save()
        except OSError as error:
            self.report_storage_error(error)
        else:
            self.storage_failed = False

    def report_storage_error(self, error: OSError) -> None:
        """Prints a storage error, once until storage works again."""
        if not self.storage_failed:
            self.echo(f"{self.plan.root} cannot be written ({error}); the search continues. Free or restore storage")
        self.storage_failed = True

    def trial_config(self, trial: Trial) -> Config:
        """The config of a trial."""
        own = {"run.name": trial.id, "train.seed": trial.seed, **trial.params}
        return compose_with(self.plan.words, {**self.settings, **own})

    def on_score(self, name: str, step: int, ap: float) -> bool:
        """Records the AP of a trial and returns whether the trial must stop.

        A recorded AP is final: a resumed trial reports its early steps again.
        """
        with self.lock:
            self.is_idle = False
            trial = self.store.trial(name)
            if step not in trial.scores:
                self.record_score(trial, step, ap)
            self.save()
            return trial.state in ("stopped", "failed")

    def on_end(self, name: str, *, is_finished: bool) -> None:
        """Records that a trial has ended: at its last step, or after a stop."""
        with self.lock:
            self.is_idle = False
            trial = self.store.trial(name)
            if trial.state == "stopped":
                self.close(trial, "KILLED")  # the trial no longer writes to its run directory
            elif is_finished:
                trial.state = "finished"
                self.echo(f"{name} finished")
            else:  # stopped from outside, such as by the shutdown of its machine
                trial.state = "waiting"
            self.save()

    def on_failure(self, name: str, reason: str) -> None:
        """Records that a trial failed; a later start of the search retries it."""
        with self.lock:
            self.is_idle = False
            trial = self.store.trial(name)
            if trial.state == "stopped":  # its process died while it saved its last checkpoint
                self.close(trial, "KILLED")
            elif trial.state != "finished":
                trial.state, trial.why = "failed", reason
                self.echo(f"{name} failed: {reason}")
                self.close(trial, "FAILED")
            self.save()

    def on_input_error(self, name: str, reason: str) -> None:
        """Ends the search: the input is wrong, and every trial would fail."""
        with self.lock:
            self.is_idle = False
            self.stop_reason, self.input_error = "wrong input", f"trial {name}: {reason}"
            self.save()

    def record_score(self, trial: Trial, step: int, ap: float) -> None:
        """Records an AP. At a rung, the first trial of a configuration is compared with those of the others; further
        seeds start only after it has finished, and run to the end."""
        trial.scores[step] = ap
        decision = ""
        if step in self.plan.rungs and trial in self.store.first_trials():
            at_rung = self.store.rung(step)
            continues = is_promoted(ap, at_rung.values())
            decision = f"; {'continues' if continues else 'stopped'} at this rung ({len(at_rung)} trials so far)"
            if not continues:
                trial.state, trial.why = "stopped", f"AP {ap:.4f} at rung {step} ({len(at_rung)} trials so far)"
        self.echo(f"{trial.id} at {step}/{self.plan.steps}: AP {ap:.3f}{decision}")

    def should_stop(self) -> bool:
        """Whether all trials must stop now: after Ctrl-C or wrong input, or at the end of the time budget."""
        if self.stop_reason is None and self.deadline is not None and time.monotonic() > self.deadline:
            self.stop_reason = "time budget"
            self.echo("the time budget is used up; stopping all trials. The same command resumes them")
        return self.stop_reason is not None

    def release_running(self) -> list[Trial]:
        """The trials that were running when the search ended; the next start resumes them."""
        running = [t for t in self.store.trials if t.state == "running"]
        for trial in running:
            trial.state = "waiting"
        self.save()
        return running

    def progress(self) -> str:
        """Counts of trials, estimated remaining time and the table of configurations."""
        with self.lock:
            own = self.store.own_trials()
            states = [t.state for t in own]
            counts = [f"{states.count(s)} {s}" for s in ("finished", "stopped", "failed") if s in states]
            steps = {t.id: last_step(self.plan, t) for t in own}
            running = [t for t in own if t.state == "running"]
            names = ", ".join(f"{t.id} {steps[t.id]}/{self.plan.steps}" for t in running)
            stopped = [t for t in self.store.first_trials() if t.folder is None and t.state == "stopped"]
            num_dropped = sum(len(self.plan.missing_seeds(self.store, t.params)) for t in stopped)
            num_ahead = self.plan.samples * len(self.plan.seeds) - len(states) - num_dropped + len(running)
            steps_ahead = num_ahead * self.plan.steps - sum(steps[t.id] for t in running)
            steps_done = sum(steps.values()) - self.steps_before
            line = ", ".join([*counts, f"running {names or 'none'}"])
            if steps_done > 0:
                remaining = max(steps_ahead, 0) / steps_done * (time.monotonic() - self.started)
                minutes, seconds = divmod(int(remaining), 60)
                line += f" | ETA {minutes // 60}:{minutes % 60:02d}:{seconds:02d} if no trial is stopped early"
            return f"{line}\n{report.table(self.store.ranking(), len(self.plan.seeds), most=TABLE_LINES)}"


def last_step(plan: SearchPlan, trial: Trial) -> int:
    """The last step that the trial logged."""
    root = Path(trial.folder) if trial.folder else plan.trial_root(trial.id)
    return max((int(row["step"]) for row in metric_rows(root)), default=0)
