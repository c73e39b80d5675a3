"""Several processes that train one model: what they average, agree on and wrap. Nothing where there is one process."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from taylor_cuda.errors import InputError, TaylorError

T = TypeVar("T")

__all__ = ["Replicas", "by_value", "gathered", "mean", "together", "total", "world_size"]

# Arguments of DistributedDataParallel that its attributes don't answer for: given anew, or refused by ``Replicas``.
_NOT_ATTRIBUTES = {
    *("self", "module", "init_sync", "bucket_cap_mb", "bucket_cap_mb_list", "check_reduction", "device_mesh"),
    *("delay_all_reduce_named_params", "param_to_hook_all_reduce", "mixed_precision"),
}


def world_size(group: Any) -> int:
    """The ranks in a process group; 1 without a group."""
    return 1 if group is None else dist.get_world_size(group)


def mean(tensor: Tensor, group: Any) -> Tensor:
    """The mean of a tensor over the ranks of a process group, bit-equal on all of them; the tensor without a group.

    Args:
        tensor: floating, of the same shape and dtype on every rank; not changed.
        group: a ``torch.distributed.ProcessGroup``, or ``None``.
    """
    return tensor if world_size(group) == 1 else total(tensor, group) / world_size(group)


def total(tensor: Tensor, group: Any) -> Tensor:
    """The sum of a tensor over the ranks of a process group, bit-equal on all of them; the tensor without a group.

    Args:
        tensor: of the same shape and dtype on every rank; not changed.
        group: a ``torch.distributed.ProcessGroup``, or ``None``.
    """
    if world_size(group) == 1:
        return tensor
    result = tensor.clone()
    dist.all_reduce(result, group=group)
    return result


def gathered(value: T, group: Any) -> list[T]:
    """What every rank of a process group gives, by rank: anything that pickle takes; one value without a group."""
    if world_size(group) == 1:
        return [value]
    values = [value] * world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def by_value(text: str, group: Any) -> dict[str, list[int]]:
    """The texts that the ranks of a process group give, each with the ranks that give it."""
    found: dict[str, list[int]] = {}
    for rank, other in enumerate(gathered(text, group)):
        found.setdefault(other, []).append(rank)
    return found


@contextmanager
def together(what: str, group: Any) -> Iterator[None]:
    """If the body raises on one rank, raise on all of them, instead of leaving the others to wait for it.

    Raises:
        TaylorError: it raised on other ranks only; names them and what they raised.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    messages = gathered("" if error is None else f"{type(error).__name__}: {error}", group)
    if error is not None:
        raise error
    failed = [rank for rank, message in enumerate(messages) if message]
    if failed:
        raise TaylorError(f"{what} failed on {_ranks(failed)}: {messages[failed[0]]}; go on from a checkpoint")


@contextmanager
def unreduced(loss: Tensor, group: Any) -> Iterator[None]:
    """Backward passes in the body, which end at no parameter, leave ``DistributedDataParallel`` to wait for the loss's.

    With ``static_graph=True`` it takes its first backward pass, whatever that is, for the one at whose end it averages
    gradients.
    """
    wrapper = None if group is None else _waiting_for(loss)
    if wrapper is None:
        yield
        return
    wrapper._static_graph_delay_allreduce_enqueued = True
    try:
        yield
    finally:
        wrapper._static_graph_delay_allreduce_enqueued = False


def _waiting_for(loss: Tensor) -> Any:
    """The wrapper through which ``loss`` came, if its graph is static and it waits for its first backward pass."""
    seen, waiting = set[Any](), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        reference = getattr(node, "ddp_weakref", None)
        wrapper = None if reference is None else reference()
        if wrapper is not None and _first_pass_is_to_come(wrapper):
            return wrapper
        waiting += [following for following, _ in node.next_functions]
    return None


def _first_pass_is_to_come(wrapper: DistributedDataParallel) -> bool:
    return wrapper.static_graph and not wrapper._static_graph_delay_allreduce_enqueued


class Replicas:
    """The copies of one model among which ``DistributedDataParallel`` averages gradients.

    Args:
        model: the wrapper, or a module without one: then there is one copy, and nothing here does anything.

    Attributes:
        module: the module inside.
        wrapper: the wrapper, or ``None``.
        group: its process group, or ``None``.

    Raises:
        InputError: a wrapper with an option that can't be taken over into a new one, or one that is or has inside what
            ``torch.compile`` returned.
    """

    def __init__(self, model: nn.Module) -> None:
        _check_not_compiled(model)
        self.wrapper = model if isinstance(model, DistributedDataParallel) else None
        self.module: nn.Module = model if self.wrapper is None else self.wrapper.module
        self.group: Any = None if self.wrapper is None else self.wrapper.process_group
        self.size = world_size(self.group)
        if self.wrapper is not None:
            unsupported = {
                "mixed_precision": self.wrapper.mixed_precision,
                "delay_all_reduce_named_params": self.wrapper._delay_all_reduce_params,
            }
            for option, value in unsupported.items():
                if value:
                    raise InputError(
                        f"model: DistributedDataParallel(…, {option}=…) changes the module in ways that a second "
                        "wrapper can't repeat; wrap it without (torch.autocast instead of mixed_precision)"
                    )

    # -- agreeing --------------------------------------------------------------

    def agree(self, what: str, digest: str) -> None:
        """Raise on every rank unless all of them give the same text.

        Raises:
            TaylorError: names the ranks that differ.
        """
        by_digest = by_value(digest, self.group)
        if len(by_digest) > 1:
            parties = "; ".join(f"{_ranks(ranks)}: {text[:12]}" for text, ranks in by_digest.items())
            raise TaylorError(
                f"{what} differs over ranks ({parties}): nothing was cut. Their parameters or gradients have come "
                "apart, or they were given different arguments (a seed, a budget)"
            )

    def together(self, what: str) -> AbstractContextManager[None]:
        """:func:`together` over these replicas."""
        return together(what, self.group)

    # -- wrapping --------------------------------------------------------------

    def rewrap(self) -> None:
        """Make the wrapper anew, in place, around the parameters as they are now.

        Its hooks sit on gradient accumulators that a cut replaces: without this it would go on without averaging
        anything, silently. The wrapper stays the same object, with its options, communication hooks and module hooks.
        """
        wrapper = self.wrapper
        if wrapper is None:
            return
        options = _options(wrapper)
        communication, training = list(wrapper._comm_hooks), wrapper.training
        kinds = ("_forward", "_backward")
        hooks = {name: value for name, value in vars(wrapper).items() if name.startswith(kinds) and "_hooks" in name}
        flags = {module: module.training for module in self.module.modules()}
        # no first broadcast: the ranks have just agreed, and their buffers may be meant to differ
        DistributedDataParallel.__init__(wrapper, self.module, init_sync=False, **options)
        vars(wrapper).update(hooks)
        wrapper.training = training
        for module, flag in flags.items():
            module.training = flag
        for hook, state in communication:
            wrapper.register_comm_hook(state, hook)
        self.average_first_pass()

    def average_first_pass(self) -> None:
        """Let no first pass of a static graph be in ``no_sync``, which PyTorch can't have.

        Anew after each cut. One average more does no harm: that of averaged gradients is what they are.
        """
        wrapper = self.wrapper
        if wrapper is None or not _first_pass_is_to_come(wrapper):
            return

        def average(_wrapper: nn.Module, _args: Any) -> None:
            if _first_pass_is_to_come(wrapper):
                wrapper.require_backward_grad_sync = True
            else:
                handle.remove()

        handle = wrapper.register_forward_pre_hook(average)

    def watch_wrapper(self) -> RemovableHandle | None:
        """From now on a forward pass of the module through any other wrapper than this one raises.

        After a cut such a wrapper would silently stop averaging gradients. ``None`` where nothing is distributed.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return None
        mine, model = self.wrapper, self.module

        def check(module: nn.Module, _args: Any) -> None:
            active = DistributedDataParallel._active_ddp_module
            if module is not model or active is None or active is mine or not torch.is_grad_enabled():
                return  # a copy of the model has the hook too
            wanted = "give Pruner the wrapper itself" if mine is None else "call the wrapper that Pruner was given"
            raise InputError(
                "model: this forward pass goes through a DistributedDataParallel wrapper that the pruner doesn't know "
                f"and that would stop averaging gradients after a cut; {wanted}"
            )

        return model.register_forward_pre_hook(check)


def _check_not_compiled(model: Any) -> None:
    if isinstance(getattr(model, "_orig_mod", None), DistributedDataParallel):
        raise InputError(
            "model: a DistributedDataParallel that was compiled by torch.compile; give the wrapper itself, "
            "model._orig_mod, and call the compiled one"
        )
    if isinstance(model, DistributedDataParallel) and hasattr(model.module, "_orig_mod"):
        raise InputError(
            "model: DistributedDataParallel around what torch.compile returned; compile the module in place, "
            "module.compile(), and wrap the module itself"
        )


def _options(wrapper: DistributedDataParallel) -> dict[str, Any]:
    """The arguments a wrapper was made with, as far as they differ from the defaults of this torch."""
    parameters = inspect.signature(DistributedDataParallel.__init__).parameters
    names = parameters.keys() - _NOT_ATTRIBUTES
    if "forward_sync_buffers" in names:
        names.discard("broadcast_buffers")  # its old name; giving both is deprecated
    options = {name: getattr(wrapper, name) for name in names if hasattr(wrapper, name)}
    if not wrapper.bucket_bytes_cap_default:
        options["bucket_cap_mb"] = wrapper.bucket_bytes_cap / 2**20
    return options


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
