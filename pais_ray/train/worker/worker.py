"""A training worker from its start to its end: it builds the parts of the loop, runs it, and reports failures."""

import inspect
import os
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pais_ray.config.tree import rows_per_step
from pais_ray.runs.directory import read_pseudo_label_limit
from pais_ray.tracking.system_metrics import NodeSampler
from pais_ray.train.distributed import WorkerGroup, collective_timeout
from pais_ray.train.errors import StorageLostError, TrainingEnded, find_fatal_error
from pais_ray.train.guards import Guards
from pais_ray.train.job import Job
from pais_ray.train.messages import FatalError
from pais_ray.train.step import StepSettings
from pais_ray.train.worker.checkpointing import Checkpointer
from pais_ray.train.worker.evaluation import RunEvaluator
from pais_ray.train.worker.heartbeat import Heartbeat
from pais_ray.train.worker.logger import Logger, RunLogger, report_last_event
from pais_ray.train.worker.loop import TrainingLoop
from pais_ray.train.worker.recovery import Recovery
from pais_ray.train.worker.resume import check_storage, load_resume_point, restore_state


def run(loop_config: "dict[str, ray.ObjectRef[Job]]") -> None:
    """Run a worker to its end.

    A failure that a restart may cure is raised, and Ray restarts the worker group. Any other one is reported to the
    driver, and all ranks end without an error: this one leaves the process group, so that the others' collectives fail.
    """
    job = ray.get(loop_config["job"])
    torch.set_num_threads(job.threads)
    if job.config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS requires it before its first call
        torch.use_deterministic_algorithms(True)
    worker: Worker | None = None
    try:
        worker = Worker(job)
        try:
            worker.loop.train()
        finally:
            worker.close()
    except Exception as error:
        job.monitor.forget_all_ranks.remote()  # the group ends with this rank
        reason = find_fatal_error(error)
        if reason is not None:
            is_input_error = not isinstance(reason, TrainingEnded | StorageLostError)
            fatal = FatalError(text=str(reason), is_input_error=is_input_error)
            ray.get(job.monitor.publish_fatal_error.remote(fatal))
        elif not ray.get(job.monitor.has_fatal_error.remote()):
            first_line = (str(error).strip().splitlines() or [""])[0][:300]
            text = f"a worker failed ({type(error).__name__}: {first_line}); the workers restart"
            step = worker.loop.state.step if worker is not None else 0
            rank = ray.train.get_context().get_world_rank()
            report_last_event(job, step, text, {"event": "failed", "rank": rank})
            raise
        if dist.is_initialized():
            dist.destroy_process_group()


class Worker:
    """One rank of a run: its training loop, and what must be closed after it."""

    def __init__(self, job: Job) -> None:
        context = ray.train.get_context()
        config = job.config
        group = WorkerGroup(
            rank=context.get_world_rank(), world_size=context.get_world_size(), device=ray.train.torch.get_device()
        )
        self.job, self.group = job, group
        check_storage(job.root, ray.util.get_node_ip_address())
        self.heartbeat = Heartbeat(job.monitor, job.root, group.rank, ray.get_runtime_context().get_node_id())
        resume = load_resume_point(job.root, config, job.schedule, group)
        self.heartbeat.attempt = resume.attempt
        state = restore_state(job, resume, group.device)
        network = wrap_network(state.student, group)
        settings = StepSettings(
            schedule=job.schedule,
            clip_norm=config.optim.clip_norm,
            precision=config.train.precision,
            seed=config.train.seed,
            max_pseudo_labels=read_pseudo_label_limit(job.root, config.train.max_pseudo_labels),
            rows=rows_per_step(job.schedule, config),
            cpu_group=cpu_group(group, job),
        )
        interval_s = config.tracking.system_metrics_interval_s if config.tracking.enabled else None
        first_of_node = context.get_local_rank() == 0
        self.sampler = NodeSampler(job.root, context.get_node_rank(), interval_s if first_of_node else None)
        self.logger = RunLogger(job, state.step) if group.rank == 0 else Logger()
        self.checkpointer = Checkpointer(
            job.root,
            config.train.keep_checkpoints,
            state,
            self.heartbeat,
            group,
            on_event=lambda text, fields: self.logger.event(state.step, text, fields),
        )
        guards = Guards(config.guards)
        evaluator = RunEvaluator(job, state, group, self.heartbeat, self.logger, self.checkpointer, guards)
        self.loop = TrainingLoop(
            job=job,
            resume=resume,
            state=state,
            network=network,
            settings=settings,
            group=group,
            heartbeat=self.heartbeat,
            logger=self.logger,
            checkpointer=self.checkpointer,
            evaluator=evaluator,
            recovery=Recovery(job, state, group, self.logger, self.checkpointer, evaluator, guards),
        )
        self.loop.report_start()

    def close(self) -> None:
        """Stop the threads and write what is left, in an order in which no thread needs what is closed."""
        self.heartbeat.close()
        self.job.monitor.forget_rank.remote(self.group.rank)
        self.checkpointer.close()
        self.sampler.close()
        self.logger.close()  # after the checkpointer, which reports events


def wrap_network(student: nn.Module, group: WorkerGroup) -> nn.Module:
    """The student as the step calls it: wrapped in DDP if there are several ranks."""
    if group.world_size == 1:
        return student
    ids = [group.device.index] if group.device.type == "cuda" else None
    return DistributedDataParallel(student, device_ids=ids, gradient_as_bucket_view=True, **without_buffer_sync())


def without_buffer_sync() -> dict[str, Any]:
    """The argument that keeps DDP from copying rank 0's buffers before each forward pass.

    Norms are frozen or GroupNorm, so buffers need no copy, and one between the two forward passes of a step would
    change tensors that the graph of the first still needs. torch 2.15 renamed the argument.
    """
    names = inspect.signature(DistributedDataParallel.__init__).parameters
    return {"forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers": False}


def cpu_group(group: WorkerGroup, job: Job) -> dist.ProcessGroup | None:
    """The process group of flags on the CPU; None if there is only one rank."""
    if group.world_size == 1:
        return None
    made = dist.new_group(backend="gloo", timeout=collective_timeout(job.config.guards))
    assert isinstance(made, dist.ProcessGroup)  # this rank is a member
    return made
