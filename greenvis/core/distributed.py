"""What processes that train one model together must agree on. Without several processes nothing
here does anything."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from greenvis.errors import BadInput, GreenvisError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.hooks import RemovableHandle

T = TypeVar("T")
_SHARDING = ("FSDP", "DeepSpeed", "Megatron_LM")  # as accelerate's environment variables spell them
_SHARDING_ADVICE = (
    "cuts a model's parameters up, and techniques (their terms, deltas, merge and undo) need them "
    "whole: use plain data parallelism (DDP: torchrun, accelerate launch --multi_gpu), or train "
    "without gv.wrap and meter with gv.track alone"
)


def launched_world_size() -> int:
    """Return how many processes a launcher (torchrun, accelerate launch) started, this one among
    them; 1 without one."""
    number = os.environ.get("WORLD_SIZE", "")
    return int(number) if number.isdigit() else 1


def require_single_process(what: str) -> None:
    """Raise BadInput where this is one of several processes, and `what` is for one."""
    if launched_world_size() > 1:
        raise BadInput(
            f"{what} runs as one process, and this is one of {launched_world_size()}: start it "
            "without the launcher"
        )


def init_process_group() -> None:
    """Meet the other processes, where a launcher started some. Raises BadInput where it is to shard
    the model."""
    if launched_world_size() > 1:
        refuse_sharding()
        from accelerate import PartialState

        # else it takes no notice of a launcher where there is no GPU
        PartialState(cpu=not torch.accelerator.is_available())


def destroy_process_group() -> None:
    """Part from the other processes, when the work is done."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def refuse_sharding(model: nn.Module | None = None) -> None:
    """Raise BadInput for FSDP, DeepSpeed and the like: asked for by `accelerate launch`, or at work
    on `model` already."""
    requests = {name: os.environ.get(f"ACCELERATE_USE_{name.upper()}", "") for name in _SHARDING}
    shardings = [name for name, value in requests.items() if value.lower() in ("1", "true", "yes")]
    tensors = sys.modules.get("torch.distributed.tensor")  # whoever shards by it has imported it
    sharded = sys.modules.get("torch.distributed.fsdp")
    kinds = () if sharded is None else (sharded.FullyShardedDataParallel, sharded.FSDPModule)
    for module in model.modules() if model is not None else ():
        # how the first FSDP marks what lies in it
        if isinstance(module, kinds) or "_is_fsdp_managed_module" in vars(module):
            shardings.append("FSDP")
        elif type(module).__name__ == "DeepSpeedEngine":
            shardings.append("DeepSpeed")
    for parameter in model.parameters() if model is not None else ():
        if tensors is not None and isinstance(parameter, tensors.DTensor):
            shardings.append("a sharding into DTensors (FSDP2, tensor parallelism)")
        elif hasattr(parameter, "ds_id"):
            shardings.append("DeepSpeed ZeRO")
    if shardings:
        raise BadInput(f"{shardings[0]} {_SHARDING_ADVICE}")


def world_size() -> int:
    """Return how many processes train together: 1 where none was asked for."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return this process's number, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def barrier() -> None:
    """Wait until all processes have come here."""
    if world_size() > 1:
        dist.barrier()


def seed_per_rank() -> None:
    """Let each process draw random numbers of its own from here on; the first goes on as it would
    alone."""
    if rank():
        torch.manual_seed(int(torch.randint(2**62, ())) + rank())


class _RankBatchSampler:
    """Batches of a sampler, of each the part that falls to this process; parts differ by one sample
    at most."""

    def __init__(self, batches: Any) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.batches:
            yield torch.tensor(batch).tensor_split(world_size())[rank()].tolist()


def split_batches(loader: DataLoader[Any]) -> DataLoader[Any]:
    """Return the loader with this process's part of each of its batches; the parts of all processes
    make the whole batch."""
    if world_size() == 1:
        return loader
    options = {
        name: getattr(loader, name)
        for name in ("collate_fn", "num_workers", "generator", "pin_memory")
    }
    return DataLoader(
        loader.dataset, batch_sampler=_RankBatchSampler(loader.batch_sampler), **options
    )


class SampleMean:
    """Make the gradient of an optimizer step that of the mean over all its samples, of every
    micro-batch and process.

    Trainers weigh micro-batches alike, and processes, whatever each holds: an uneven last batch,
    replayed samples. A loss that is a mean over its batch is to be multiplied by `weight` before
    its backward; `settle` puts right by how much once all samples of the step are known. Where all
    batches are of one size nothing is changed, bit for bit.
    """

    def __init__(self) -> None:
        self._unit: int | Tensor | None = None
        self._samples: int | Tensor = 0

    def weight(self, samples: int | Tensor, unit: int | Tensor | None = None) -> float | Tensor:
        """Return what a micro-batch counts for, in units: where absent, the step's first batch (of
        the process with most)."""
        if unit is not None:
            self._unit = unit
        elif self._unit is None:
            self._unit = samples
            if world_size() > 1:
                self._unit = torch.as_tensor(samples).to(_device(), copy=True)
                dist.all_reduce(self._unit, dist.ReduceOp.MAX)
        self._samples += samples
        return samples / self._unit

    def rescale(self, parameters: Iterable[nn.Parameter], divisor: int) -> None:
        """After a step's last backward, make the gradients the mean; divisor: by what the trainer
        divides their sum."""
        assert self._unit is not None
        total = self._samples
        unit, self._unit, self._samples = self._unit, None, 0
        if world_size() > 1:
            total = torch.as_tensor(total).to(_device(), copy=True)
            dist.all_reduce(total)
        factor = unit * divisor / total
        if isinstance(factor, torch.Tensor) or factor != 1.0:
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)


def part_weights(parts: Iterable[int], like: Tensor) -> list[float | Tensor]:
    """Return what the mean over each part of this process's batch counts for, where the loss is
    weighed by all its samples.

    A loss that adds up means over parts (new and replayed images) is then the one over every
    process's parts, though each holds them in other shares. All ones in a single process.
    """
    counts = torch.tensor([*parts], dtype=torch.float64)
    if world_size() == 1:
        return [1.0] * len(counts)
    total = counts.to(_device(), copy=True)
    dist.all_reduce(total)
    weights = (
        counts.to(total.device) / total.clamp_min(1) * (total.sum() / counts.sum().clamp_min(1))
    )
    return list(weights.to(like))


def any_of(flags: Tensor) -> Tensor:
    """Return which of these flags are set in any process."""
    if world_size() == 1:
        return flags
    number = flags.to(torch.int32, copy=True)
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return number.bool()


def main_first(ask: Callable[[], T]) -> T:
    """Ask in every process, in the first before the others (who find what it made), and return to
    each its own answer.

    What one raises, all raise, so that none waits for it; an error that another process has to tell
    is marked as `reported`.
    """
    if world_size() == 1:
        return ask()
    answer: Any = None
    error: Exception | None = None
    if rank():
        dist.barrier()
    try:
        answer = ask()
    except Exception as raised:  # whatever it is, the others must hear of it
        error = raised
    if not rank():
        dist.barrier()
    heard: list[Any] = [None] * world_size()
    own = None if error is None else (isinstance(error, BadInput), _message(error))
    dist.all_gather_object(heard, own)
    first = next((i for i, one in enumerate(heard) if one is not None), None)
    if first is None:
        return answer
    bad, words = heard[first]
    if error is None or first != rank():
        error = (BadInput if bad else GreenvisError)(words)
        error.reported = True
    raise error


def _message(error: Exception) -> str:
    return str(error) if isinstance(error, GreenvisError) else f"{type(error).__name__}: {error}"


def _device() -> torch.device:
    """Return where tensors must be that the processes exchange."""
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def all_reduce_sum(total: Mapping[str, Tensor], samples: int) -> int:
    """Add every process's tensors, in place and by name, and return the sum of what they have seen.

    Each process must name the same tensors. What is then divided by the sum is a mean over all
    processes' samples.
    """
    if world_size() == 1:
        return samples
    for tensor in total.values():
        dist.all_reduce(tensor)
    number = torch.tensor(
        samples, dtype=torch.int64, device=next(iter(total.values())).device if total else None
    )
    dist.all_reduce(number)
    return int(number)


def all_reduce_mean(tensors: Iterable[Tensor]) -> None:
    """Give every process the mean of all processes' tensors, in place."""
    if (many := world_size()) > 1:
        for tensor in tensors:
            dist.all_reduce(tensor.div_(many))


def sync(values: Iterable[Tensor]) -> None:
    """Give every process the first one's values, in place, where each saw other images."""
    if world_size() > 1:
        for value in values:
            dist.broadcast(value.detach(), 0)


def on_main(ask: Callable[[], T]) -> T:
    """Ask in the first process, and return its answer in all of them; what it raises there, all
    raise."""
    if world_size() == 1:
        return ask()
    outcome: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            outcome = [(ask(), None)]
        except Exception as error:  # whatever it is, the others must not wait for an answer
            outcome = [(None, error)]
    dist.broadcast_object_list(outcome, 0)
    answer, error = outcome[0]
    if error is not None:
        raise report_once(error)
    return answer


def report_once(error: Exception) -> Exception:
    """Return an error that all processes are about to raise, marked as `reported` in all but the
    first."""
    if isinstance(error, GreenvisError):
        error.reported = rank() > 0
    return error


def average_gradients(parameters: Iterable[nn.Parameter]) -> list[RemovableHandle]:
    """Make each gradient the mean over all processes as it comes, for a loss that no
    DistributedDataParallel sees.

    Every process must run the same backward, so that gradients come in one order.
    """
    if world_size() == 1:
        return []

    def shared(gradient: Tensor) -> Tensor:
        averaged = gradient.clone()
        all_reduce_mean([averaged])
        return averaged

    return [parameter.register_hook(shared) for parameter in parameters if parameter.requires_grad]
