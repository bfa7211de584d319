"""Past one machine: harvest, index, evaluation and conversion cut into tasks that datatrove runs."""

from hubsae.scale.jobs import Convert, Evaluate, Harvest, Index, Job
from hubsae.scale.launch import EXECUTORS, TaskError, run

__all__ = ["EXECUTORS", "Convert", "Evaluate", "Harvest", "Index", "Job", "TaskError", "run"]
