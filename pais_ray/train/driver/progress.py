"""What a person reads while a run goes on."""

from typing import Any

from pais_ray.files.console import echo


def tell(row: dict[str, Any]) -> None:
    """Prints what a worker said."""
    echo(progress_line(row))


def progress_line(row: dict[str, Any]) -> str:
    """One line a person can follow: where we are, how it learns, how fast, how long still."""
    if "text" in row:
        return str(row["text"])
    if "role" in row:
        role = row["role"]
        ap = ", ".join(f"{kind} AP {row.get(f'{role}/{kind}_AP', float('nan')):.3f}" for kind in ("segm", "bbox"))
        return f"  evaluation at {row['step']}: {role} {ap}"
    labeled, unlabeled = (
        sum(v for k, v in row.items() if k.startswith(f"{part}/")) for part in ("labeled", "unlabeled")
    )
    kept = row.get("pseudo/kept_per_image")
    minutes, seconds = divmod(int(row["eta"]), 60)
    loss = f"loss {row['loss']:.3f}" if "loss" in row else "no loss, skipped"
    return (
        f"{row['step']:>6}/{row['last']} | {loss} (labeled {labeled:.3f}, unlabeled {unlabeled:.3f})"
        + (f" | {kept:.1f} pseudo-labels/img" if kept is not None else "")
        + f" | lr {row['lr']:.2g} | {row['time/img_per_s']:.1f} img/s"
        + f" | data wait {100 * row['time/data_wait_share']:.0f} %"
        + f" | ETA {minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
    )
