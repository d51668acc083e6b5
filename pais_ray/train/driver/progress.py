"""The lines that a run prints while it trains."""

from pais_ray.files.console import echo
from pais_ray.train.messages import EvaluationScores, Event, Notice, StepProgress


def print_event(event: Event) -> None:
    """Prints an event as one line."""
    echo(event_line(event))


def event_line(event: Event) -> str:
    """An event as one line of text."""
    match event:
        case Notice():
            return event.text
        case EvaluationScores():
            return scores_line(event)
        case StepProgress():
            return progress_line(event)


def scores_line(event: EvaluationScores) -> str:
    """Segmentation and box AP of one role."""
    ap = ", ".join(
        f"{kind} AP {event.scores.get(f'{event.role}/{kind}_AP', float('nan')):.3f}" for kind in ("segm", "bbox")
    )
    return f"  evaluation at step {event.step}: {event.role} {ap}"


def progress_line(event: StepProgress) -> str:
    """Step, losses, pseudo-labels, learning rate, speed and remaining time."""
    metrics = event.metrics
    labeled, unlabeled = (
        sum(v for k, v in metrics.items() if k.startswith(f"{part}/")) for part in ("labeled", "unlabeled")
    )
    kept = metrics.get("pseudo/kept_per_image")
    minutes, seconds = divmod(int(event.eta_s), 60)
    loss = f"loss {metrics['loss']:.3f}" if "loss" in metrics else "no loss, skipped"
    return (
        f"{event.step:>6}/{event.last_step} | {loss} (labeled {labeled:.3f}, unlabeled {unlabeled:.3f})"
        + (f" | {kept:.1f} pseudo-labels/img" if kept is not None else "")
        + f" | lr {metrics['lr']:.2g} | {metrics['time/img_per_s']:.1f} img/s"
        + f" | data wait {100 * metrics['time/data_wait_share']:.0f} %"
        + f" | ETA {minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
    )
